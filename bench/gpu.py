"""The layer's operators against cuBLAS on the GPU at hand, into bench/results/<gpu>.json and a table beside it.

    python bench/gpu.py                                      every shape
    python bench/gpu.py --shapes 4096x4096 --tokens 1 16     these (N x K) and token counts alone

How it measures: each contender is captured into a CUDA graph, so that Python's time is not counted; a round runs every
contender once, each after a write to twice the L2 cache, in an order that turns by one; the figure is the median over
the rounds of the time between two CUDA events, less that of an empty pair. cuBLAS is one of the contenders. Clocks,
temperature and power are read before and after each shape.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import prequant_ext
from gpu_at_hand import gap
from prequant_ext import doctor, ops

RESULTS = Path(__file__).parent / "results"
SHAPES = [(768, 768), (1024, 1024), (3072, 768), (768, 3072), (4096, 1024), (4096, 4096), (11008, 4096)]  # N, K
TOKENS = [1, 4, 16, 64, 128, 512, 1024, 4096]
BASELINE = "cublas"
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"


@dataclass
class Contender:
    """One way to the same product."""

    name: str
    run: Callable[[], Tensor]
    bytes: int  # that it must move at least
    exact: Tensor | None = None  # what it approximates, float32: its own weights, so the error is the arithmetic's


@dataclass
class Line:
    """One figure."""

    name: str
    N: int
    K: int
    M: int
    microseconds: float
    gigabytes_per_second: float
    speedup: float  # of the baseline's time in the same rounds
    error: float | None  # relative, in the 2-norm
    is_graph: bool
    clocks: list[str] = field(default_factory=list)


# ---- contenders ------------------------------------------------------------------------------------------------------


def contenders(M: int, N: int, K: int, dtype: torch.dtype, device: str, r: int = 5) -> list[Contender]:
    """cuBLAS first, then ours; r outlier columns and a bias, as the layer has them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator).to(device) * 0.02
    x = torch.randn(M, K, generator=generator).to(device, dtype)
    grad_y = torch.randn(M, N, generator=generator).to(device, dtype)
    scale = (6 * weight.std() / 16).reshape(1, 1)
    zero_point = torch.full((1, 1), 8, dtype=torch.uint8, device=device)
    dims = torch.randperm(K, generator=generator)[:r].sort().values.to(device)
    values, bias = weight[:, dims].contiguous(), torch.zeros(N, device=device)
    canonical = ops.quantize_pack(weight, scale, zero_point, 4, dims, 1)
    quantized = ops.dequantize(canonical, scale, zero_point, K, 4, torch.float32).index_copy(1, dims, values)
    packed, out_features = (ops.prepack(canonical, K, 4), N) if ops.reads_prepacked(canonical) else (canonical, None)
    half, half_bias = weight.to(dtype), bias.to(dtype)
    layer, item = (packed, scale, zero_point, dims, values), x.element_size()
    moved = canonical.numel() + values.numel() * 4 + (M * K + M * N) * item

    def w4a8() -> Tensor:
        activations = ops.quantize_activations(x, True, 0)
        return ops.linear_w4a8(x, *activations, *layer, bias, 4, 1, False, out_features)

    product, gradient = x.float() @ quantized.T, grad_y.float() @ quantized
    return [
        Contender(
            BASELINE,
            lambda: functional.linear(x, half, half_bias),
            half.numel() * item + (M * K + M * N) * item,
            x.float() @ half.float().T,
        ),
        Contender("linear_w4a16", lambda: ops.linear_w4a16(x, *layer, bias, 4, 1, out_features), moved, product),
        Contender("linear_w4a8", w4a8, moved, product),
        Contender("linear_dx", lambda: ops.linear_dx(grad_y, *layer, K, 4, 1), moved, gradient),
    ]


def peers(M: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Other libraries' 4-bit layers, as far as they are installed and take this shape; the others with the reason."""
    found, missing = [], {}
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 0.02
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    moved = N * K // 2 + (M * K + M * N) * x.element_size()
    for name, make in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao), ("marlin", _marlin)):
        try:
            run = make(weight, x)
            run()
            found.append(Contender(name, run, moved))
        # a peer that is absent or refuses the shape must not end the run; the table says why it is missing
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def _bitsandbytes(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def _torchao(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    N, K = weight.shape
    # its int4 kernel takes bfloat16 alone
    linear = torch.nn.Linear(K, N, bias=False, device=weight.device, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    rounded = x.bfloat16()
    return lambda: linear(rounded)


def _marlin(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    import marlin

    N, K = weight.shape
    layer = marlin.Layer(K, N, groupsize=-1).to(weight.device)  # any codes and scales cost the same time
    return lambda: layer(x.half())


# ---- measuring -------------------------------------------------------------------------------------------------------


def _captured(run: Callable[[], Tensor]) -> tuple[Callable[[], object], bool]:
    """The call as a CUDA graph; as it is where it cannot be captured, and the line says so."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(), run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False


def times(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median microseconds of each, every one timed once a round."""
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    runs = [lambda: None, *runs]
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs)):
            which = (i + turn) % len(runs)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            begin.record()
            runs[which]()
            end.record()
            pairs[which].append((begin, end))
        torch.cuda.synchronize()
    empty, *medians = [statistics.median(begin.elapsed_time(end) for begin, end in pair) * 1e3 for pair in pairs]
    return [max(median - empty, 0.0) for median in medians]


def clocks() -> str:
    """MHz of the multiprocessors and of the memory, degrees, watts, reasons to throttle: nvidia-smi's words."""
    query = [
        "nvidia-smi",
        f"--query-gpu={CLOCKS}",
        "--format=csv,noheader",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def measure(M: int, N: int, K: int, dtype: torch.dtype, rounds: int) -> tuple[list[Line], dict[str, str]]:
    others, missing = peers(M, N, K, dtype, "cuda")
    all_ = contenders(M, N, K, dtype, "cuda") + others
    errors = [relative_error(contender) for contender in all_]
    captured = [_captured(contender.run) for contender in all_]
    before = clocks()
    medians = times([run for run, _ in captured], rounds)
    around = [before, clocks()]
    lines = []
    for contender, error, (_, is_graph), median in zip(all_, errors, captured, medians, strict=True):
        rate = contender.bytes / median / 1e3 if median else 0.0
        lines.append(
            Line(contender.name, N, K, M, median, rate, medians[0] / median if median else 0.0, error, is_graph, around)
        )
    return lines, missing


def relative_error(contender: Contender) -> float | None:
    if contender.exact is None:
        return None
    return ((contender.run().float() - contender.exact).norm() / contender.exact.norm()).item()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def table(lines: list[Line], heading: str) -> str:
    """One row a shape and token count: microseconds and GB/s of each contender,
    and how many times as fast as cuBLAS.
    """
    names = list(dict.fromkeys(line.name for line in lines))
    rows = [heading, "", f"| N x K | M | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for N, K, M in dict.fromkeys((line.N, line.K, line.M) for line in lines):
        cells = []
        for name in names:
            line = next((line for line in lines if (line.name, line.N, line.K, line.M) == (name, N, K, M)), None)
            figures = (
                f"{line.microseconds:.1f} µs, {line.gigabytes_per_second:.0f} GB/s{'' if line.is_graph else ', eager'}"
                if line
                else "–"
            )
            cells.append(figures if line is None or name == BASELINE else f"**{line.speedup:.2f}×** {figures}")
        rows.append(f"| {N} x {K} | {M} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", metavar="NxK", help="default: " + " ".join(f"{N}x{K}" for N, K in SHAPES)
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=TOKENS, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}"
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    reason = gap()
    if reason:
        sys.exit(f"bench-gpu: {reason}")
    shapes = (
        [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes] if arguments.shapes else SHAPES
    )
    gpu, commit = torch.cuda.get_device_name(0), _commit()
    about = (
        f"{gpu}, torch {torch.__version__}, prequant_ext {prequant_ext.__version__} ({commit}), "
        f"{arguments.dtype}, medians of {arguments.rounds} rounds"
    )
    print(about)
    lines: list[Line] = []
    missing: dict[str, str] = {}
    for N, K in shapes:
        for M in arguments.tokens:
            measured, absent = measure(M, N, K, getattr(torch, arguments.dtype), arguments.rounds)
            lines += measured
            missing.update(absent)
            print(
                f"{N} x {K}, M = {M}: "
                + ", ".join(f"{line.name} {line.microseconds:.1f} µs ({line.speedup:.2f}×)" for line in measured),
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    base = RESULTS / re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    text = table(lines, f"{about}. × is the speed of cuBLAS on the same shape in the same rounds.")
    text += "".join(f"\n{name} was not measured: {why}" for name, why in missing.items())
    about_all = {
        "gpu": gpu,
        "torch": torch.__version__,
        "commit": commit,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "build": doctor.build_info(),
    }
    record = {**about_all, "clocks": CLOCKS, "not_measured": missing, "lines": [asdict(line) for line in lines]}
    base.with_suffix(".json").write_text(json.dumps(record, indent=1))
    base.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{base.with_suffix('.json')}")


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return done.stdout.strip() or "no commit"


if __name__ == "__main__":
    main()
