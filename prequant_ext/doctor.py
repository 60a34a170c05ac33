"""What this installation is made of, and whether it works: ``python -m prequant_ext``, or ``prequant doctor``.

``examine()`` gives the findings as a dict, ``render()`` as text; ``main()`` prints them and returns 1 if something is
broken.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prequant_ext import _native, neighbours, reference

PACKAGES = ("prequant_ext", "torch", "transformers", "numpy", "safetensors", "datasets", "accelerate", "peft", "typer")
DOORS = {"transformers": "the transformers plug-in", "peft": "the PEFT tuner"}  # whose neighbours have wanted versions


def build_info() -> dict[str, Any]:
    """What the library was built with and uses: isa, cuda (a version or None), architectures,
    operators of each device.
    """
    fields = dict(field.split("=", 1) for field in torch.ops.prequant.build_info().split(";"))
    return {
        "isa": fields["isa"],
        "cuda": None if fields["cuda"] == "none" else fields["cuda"],
        "architectures": fields["arch"].split(),
        "operators": {
            device: [name for name in fields[f"{device}_ops"].split(",") if name] for device in ("cpu", "cuda")
        },
    }


def operator_names() -> list[str]:
    """The operators of ``torch.ops.prequant``, in alphabetical order."""
    names = (
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("prequant::")
    )
    return sorted(set(names) - {"build_info"})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Kernels compiled for ``architectures`` ("8.0 9.0+PTX") run on a GPU of this compute capability: same major and no
    newer minor, or PTX no newer.
    """
    for architecture in architectures:
        major, minor = (int(part) for part in re.findall(r"\d+", architecture)[:2])
        is_family = (
            major == capability[0]
            and minor <= capability[1]
            and not re.search(r"[a-z]", architecture.removesuffix("+PTX"))
        )
        is_exact = (major, minor) == capability
        if is_exact or is_family or (architecture.endswith("+PTX") and (major, minor) <= capability):
            return True
    return False


# ---- the smoke test: each device against the reference, on a matrix small enough to take no time ---------------------


def _operands() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator) * 0.05
    mean, std, _, _ = reference.weight_stats(weight, weight.numel())
    scale = (6 * std / 16).float()
    zero_point = (8 - mean / scale.double()).round().to(torch.uint8)
    counts, energy, _, _ = reference.outlier_counts(weight, mean, std, 3.0)
    dims = reference.select_outlier_dims(counts, energy, 3)
    return {
        "weight": weight,
        "scale": scale,
        "zero_point": zero_point,
        "dims": dims,
        "outliers": weight[:, dims].contiguous(),
        "packed": reference.quantize_pack(weight, scale, zero_point, 4, dims, 1),
        "x": torch.randn(5, 64, generator=generator),
    }


def _linear(ops: Any, o: dict[str, Tensor]) -> Tensor:
    weight = (o["packed"], o["scale"], o["zero_point"], o["dims"], o["outliers"], None, 4, 1)
    activations = ops.quantize_activations(o["x"], True, 0)
    return torch.stack([ops.linear_w4a16(o["x"], *weight), ops.linear_w4a8(o["x"], *activations, *weight, False)])


# what is tried: the operators it needs, and how
SMOKE: dict[str, tuple[tuple[str, ...], Callable[[Any, dict[str, Tensor]], Tensor]]] = {
    "quantize and pack": (
        ("quantize_pack",),
        lambda ops, o: ops.quantize_pack(o["weight"], o["scale"], o["zero_point"], 4, o["dims"], 1).float(),
    ),
    "unpack": (("unpack",), lambda ops, o: ops.unpack(o["packed"], 64, 4).float()),
    "dequantize": (
        ("dequantize",),
        lambda ops, o: ops.dequantize(o["packed"], o["scale"], o["zero_point"], 64, 4, torch.float32),
    ),
    "linear forward": (("quantize_activations", "linear_w4a16", "linear_w4a8"), _linear),
}


def smoke_test(device: str, operators: Sequence[str]) -> dict[str, str]:
    """Each entry of SMOKE on ``device`` -> "ok", "not in this build", or what went wrong."""
    on_cpu = _operands()
    on_device = {name: tensor.to(device) for name, tensor in on_cpu.items()}
    results = {}
    for name, (needed, run) in SMOKE.items():
        if not set(needed) <= set(operators):
            results[name] = "not in this build"
            continue
        try:
            wanted, got = run(reference, on_cpu), run(torch.ops.prequant, on_device).cpu()
            error = float((got - wanted).abs().max())
            results[name] = (
                "ok" if error <= 1e-4 * float(wanted.abs().max()) else f"differs from the reference by {error:.3g}"
            )
        except RuntimeError as failure:
            results[name] = str(failure).splitlines()[0]
    return results


# ---- findings --------------------------------------------------------------------------------------------------------


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]


def examine() -> dict[str, Any]:
    """All findings, JSON-ready. ``problems`` lists what is broken with its ``remedy``; ``notes`` what is merely good to
    know.
    """
    info = build_info()
    gpus = _gpus()
    operators = operator_names()
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "cpu": {"isa": info["isa"], "threads": torch.get_num_threads()},
        "cuda": {
            "built_with": info["cuda"],
            "architectures": info["architectures"],
            "torch_built_with": torch.version.cuda,
            "gpus": gpus,
        },
        "operators": {
            name: {device: name in info["operators"][device] for device in ("cpu", "cuda")} for name in operators
        },
        "smoke_test": {"cpu": smoke_test("cpu", info["operators"]["cpu"])},
    }
    if gpus and info["cuda"]:
        report["smoke_test"]["cuda"] = smoke_test("cuda", info["operators"]["cuda"])
    report["problems"], report["notes"] = _judge(report)
    return report


def _judge(report: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    problems: list[dict[str, str]] = []
    notes: list[str] = []
    cuda = report["cuda"]

    missing = [name for name, devices in report["operators"].items() if not devices["cpu"]]
    if missing or not report["operators"]:
        problems.append(
            {"problem": f"operators without a CPU kernel: {', '.join(missing) or 'all'}", "remedy": _native.REBUILD}
        )
    for device, results in report["smoke_test"].items():
        for name, result in results.items():
            if result not in ("ok", "not in this build"):
                problems.append({"problem": f"{name} on {device}: {result}", "remedy": _native.REBUILD})
    for gpu in cuda["gpus"]:
        capability = tuple(int(part) for part in gpu["capability"].split("."))
        if cuda["built_with"] and not runs_on((capability[0], capability[1]), cuda["architectures"]):
            compiled = " ".join(cuda["architectures"])
            problems.append(
                {
                    "problem": f"{gpu['name']} has compute capability {gpu['capability']}, but the kernels are "
                    f"compiled for {compiled}",
                    "remedy": f"TORCH_CUDA_ARCH_LIST={gpu['capability']} {_native.REBUILD}",
                }
            )
    for module in neighbours.NEIGHBOURS:
        version = report["versions"].get(module)
        wrong = version and (neighbours.misfit(module, version) or neighbours.failure(module))
        if wrong:
            problem, _, remedy = neighbours.need(module, DOORS.get(module, module), wrong).rpartition(": ")
            problems.append({"problem": problem, "remedy": remedy})

    if report["versions"]["transformers"] is None:
        notes.append(
            "transformers is not installed; from_pretrained and the command line need it: pip install "
            "'prequant_ext[all]'"
        )
    if cuda["gpus"] and not cuda["built_with"]:
        notes.append(
            "torch sees a GPU, but this build has no CUDA kernels. With nvcc on PATH: PREQUANT_CUDA=1 "
            f"{_native.REBUILD}"
        )
    return problems, notes


# ---- text ------------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The findings as plain text."""
    cuda = report["cuda"]
    gpus = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in cuda["gpus"]) or "none"
    built = f"{cuda['built_with']} for {' '.join(cuda['architectures'])}" if cuda["built_with"] else "no"
    lines = [f"{package:13} {version or 'not installed'}" for package, version in report["versions"].items()]
    lines += [
        "",
        f"CPU           level {report['cpu']['isa']}, {report['cpu']['threads']} threads",
        f"CUDA          built in: {built}; torch's: {cuda['torch_built_with'] or 'no'}; GPUs: {gpus}",
        "",
        f"{'operator':22} cpu  cuda",
    ]
    lines += [
        f"{name:22} {'yes' if on['cpu'] else 'no':4} {'yes' if on['cuda'] else 'no'}"
        for name, on in report["operators"].items()
    ]
    for device, results in report["smoke_test"].items():
        lines += ["", f"smoke test on {device}, against the reference"]
        lines += [f"  {name:20} {result}" for name, result in results.items()]
    lines += [""] + [f"note: {note}" for note in report["notes"]]
    lines += [f"PROBLEM: {found['problem']}\n  remedy: {found['remedy']}" for found in report["problems"]]
    return "\n".join(lines + (["everything works"] if not report["problems"] else []))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; 1 if something is broken, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m prequant_ext", description="Tell what this installation is made of, and whether it works."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    report = examine()
    sys.stdout.write((json.dumps(report, indent=2) if options.json else render(report)) + "\n")
    return 1 if report["problems"] else 0
