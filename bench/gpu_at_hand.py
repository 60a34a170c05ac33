"""Why the GPU targets of the Makefile cannot run here, and what to do; silent and successful where they can.

python bench/gpu_at_hand.py && echo a GPU, and kernels for it
"""

import sys

import torch

from prequant_ext import doctor


def gap() -> str | None:
    """What is missing, with the remedy; None where there is a GPU and this build has kernels for it."""
    if not torch.cuda.is_available():
        return (
            f"no NVIDIA GPU that torch {torch.__version__} can use. Remedy: on a machine with a GPU and its driver, "
            "`make clean`, then this target again: "
            "it installs a CUDA build of torch. Without one, `make gate` and `make gpu-model` check and model the "
            "same kernels"
        )
    info, capability = doctor.build_info(), torch.cuda.get_device_capability()
    if info["cuda"] is None:
        return (
            "this build has no CUDA kernels. Remedy: put nvcc (CUDA 12 or newer) on PATH, then `make clean` and "
            "this target again"
        )
    if not doctor.runs_on(capability, info["architectures"]):
        wanted = f"{capability[0]}.{capability[1]}"
        return (
            f"this build has kernels for {' '.join(info['architectures'])}, not for {wanted}. Remedy: "
            f"TORCH_CUDA_ARCH_LIST={wanted} and `make clean` first"
        )
    return None


if __name__ == "__main__":
    sys.exit(gap())
