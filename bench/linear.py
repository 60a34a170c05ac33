"""The layer's operators on the CPU against torch's float32 product of the same shape.

    python bench/linear.py                                                    every shape and token count, one scale a
    tensor, r = 5
    python bench/linear.py --shapes 768x768 4096x4096 --tokens 1 128          these (N x K) and token counts alone
    python bench/linear.py --operators w4a8 --granularity tensor row group32 group128 --r 0 5 --axis input output
    --dtype float32 bfloat16 --threads 2 1

w4a8 and w4a16 are PreQuantLinear in eval mode under no_grad, the quantization of activations included, beside F.linear;
dx is linear_dx beside ``grad_y @ W``; outlier_grad, from 8-bit activations as w4a8 saves them, beside the product of
gathered columns or rows. The other side is always torch float32. A product of float32 activations by w4a16 and dx obeys
torch.set_float32_matmul_precision: "highest" accumulates float32, "high" permits int16 blocks.

Two errors stand beside a speed, both against a float64 product: that of the layer's own 4-bit weights (the arithmetic's
error), and that of the float weights.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import reporting
import timing
from prequant_ext import PreQuantConfig, PreQuantLinear, ops
from reporting import say
from timing import ERROR_ROWS, SHAPES, TOKENS, Contender, Row, float64_product, relative_error

OPERATORS = ("w4a8", "w4a16", "dx", "outlier_grad")
GRANULARITIES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "outlier_aware"},
    "row": {"strategy": "row_wise"},
    "group32": {"strategy": "group_wise_sigma", "group_size": 32},
    "group128": {"strategy": "group_wise_sigma", "group_size": 128},
}
AXES = {"input": 1, "output": 0}
# M x N x K: off every tile, and the neighbour that is a multiple of all
ODD = ["7x1000x7392:8x1024x7424", "127x1000x7392:128x1024x7424"]


@dataclass(frozen=True)
class Variant:
    """One row of the table. precision is empty where the operator does not ask for it."""

    operator: str
    granularity: str
    r: int
    axis: str
    dtype: str
    precision: str

    @property
    def name(self) -> str:
        kind = "" if self.operator == "outlier_grad" else f" per {self.granularity}"
        return f"{self.operator}{kind} r={self.r} {self.axis} {self.dtype} {self.precision}".rstrip()

    @property
    def key(self) -> tuple[str, int, str]:
        """Of its layers."""
        return self.granularity, self.r, self.axis

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def baseline(self) -> str:
        return {"dx": "torch dx", "outlier_grad": f"torch outlier_grad r={self.r} {self.axis}"}.get(
            self.operator, "torch linear"
        )


def variants(arguments: Any) -> list[Variant]:
    """The product of the options, less what would be measured twice."""
    found = []
    lists = (
        arguments.operators,
        arguments.dtype,
        arguments.granularity,
        arguments.r,
        arguments.axis,
        arguments.precision,
    )
    for operator, dtype, granularity, r, axis, precision in itertools.product(*lists):
        obeys_precision = operator in ("w4a16", "dx") and dtype == "float32"
        if operator == "outlier_grad":
            if r == 0:
                continue
            granularity = arguments.granularity[0]  # it reads no weight
        found.append(Variant(operator, granularity, r, axis, dtype, precision if obeys_precision else ""))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Problem:
    """A weight, as torch has it and as the layers have it by (granularity, r, axis), with activations for the largest
    number of tokens.
    """

    linear: nn.Linear
    layers: dict[tuple[str, int, str], tuple[PreQuantLinear, PreQuantLinear]]  # of 8-bit and of float activations
    x: Tensor
    grad_y: Tensor
    exact: dict[tuple[Any, ...], Tensor]  # float64 products of the first rows: they are the same for every M


def problem(N: int, K: int, tokens: int, chosen: Sequence[Variant]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(K, N, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(N, K, generator=generator) * 0.02)
    layers = {}
    for key in dict.fromkeys(variant.key for variant in chosen):
        granularity, r, axis = key
        config = PreQuantConfig(r=r, **GRANULARITIES[granularity])
        layer = PreQuantLinear.from_linear(linear, config, axis).eval()
        twin = PreQuantLinear(K, N, bias=False, axis=axis, config=replace(config, activation_bits=None)).eval()
        twin.load_state_dict(layer.state_dict())
        layers[key] = (layer, twin)
    return Problem(
        linear, layers, torch.randn(tokens, K, generator=generator), torch.randn(tokens, N, generator=generator), {}
    )


class Work(NamedTuple):
    """One way to a product: what it should be (or its first rows), by the weights that it has and by the float ones,
    and what it takes at least.
    """

    call: Callable[[], Tensor]
    exact: Tensor
    exact_of_float_weights: Tensor
    flops: float
    bytes: float


def contenders(given: Problem, M: int, chosen: Sequence[Variant]) -> list[Contender]:
    """Torch's products and the layer's."""
    works = {"w4a8": linear_work, "w4a16": linear_work, "dx": dx_work, "outlier_grad": outlier_grad_work}
    found: dict[str, Contender] = {}
    for variant in chosen:
        of_torch, ours = works[variant.operator](given, M, variant)
        for name, work, precision in ((variant.baseline, of_torch, ""), (variant.name, ours, variant.precision)):
            if name not in found:
                found[name] = _contender(name, variant.baseline, work, precision or "highest")
    return list(found.values())


def _contender(name: str, baseline: str, work: Work, precision: str) -> Contender:
    torch.set_float32_matmul_precision(precision)
    result = work.call()[: len(work.exact)]
    errors = relative_error(result, work.exact), relative_error(result, work.exact_of_float_weights)
    return Contender(name, work.call, baseline, work.flops, work.bytes, *errors, precision)


def linear_work(given: Problem, M: int, variant: Variant) -> tuple[Work, Work]:
    x, weight, layers = given.x[:M], given.linear.weight, given.layers[variant.key]
    layer, x_ = layers[variant.operator == "w4a16"], x.to(variant.torch_dtype)
    flops, y_elements = 2.0 * M * weight.numel(), M * len(weight)
    exact, exact_, own = (
        _exact(given, rows, tensor, key)
        for rows, tensor, key in ((given.x, x, None), (given.x, x_, None), (given.x, x_, variant.key))
    )
    return (
        Work(lambda: functional.linear(x, weight), exact, exact, flops, weight.nbytes + x.nbytes + 4 * y_elements),
        Work(lambda: layer(x_), own, exact_, flops, _bytes(layer) + x_.nbytes + x_.element_size() * y_elements),
    )


def dx_work(given: Problem, M: int, variant: Variant) -> tuple[Work, Work]:
    grad_y, weight, layer = given.grad_y[:M], given.linear.weight, given.layers[variant.key][0]
    grad_y_, K = grad_y.to(variant.torch_dtype), weight.shape[1]
    flops = 2.0 * M * weight.numel()
    exact, exact_, own = (
        _exact(given, given.grad_y, tensor, key, True)
        for tensor, key in ((grad_y, None), (grad_y_, None), (grad_y_, variant.key))
    )
    tensors = (
        layer.weight_packed,
        layer.weight_scale,
        layer.weight_zero_point,
        layer.outlier_dims,
        layer.outlier_weight,
    )
    return (
        Work(lambda: grad_y @ weight, exact, exact, flops, weight.nbytes + grad_y.nbytes + 4 * M * K),
        Work(
            lambda: ops.linear_dx(grad_y_, *tensors, K, layer.bits, AXES[variant.axis]),
            own,
            exact_,
            flops,
            _bytes(layer) + grad_y_.nbytes + grad_y_.element_size() * M * K,
        ),
    )


def outlier_grad_work(given: Problem, M: int, variant: Variant) -> tuple[Work, Work]:
    """dO from saved 8-bit codes, as the layer's backward takes it: r columns of them for axis "input", all for
    "output".
    """
    x, grad_y, dims = given.x[:M], given.grad_y[:M], given.layers[variant.key][0].outlier_dims
    codes, scale, zero_point, _ = ops.quantize_activations(x, True, 0)
    left, right, axis = grad_y.to(variant.torch_dtype), x, AXES[variant.axis]
    if variant.axis == "input":
        codes, right, columns = codes[:, dims], x[:, dims], left
    else:
        columns = left[:, dims]
    exact = columns.double().T @ right.double()
    own = columns.double().T @ ((codes.double() - zero_point.double()) * scale.double())
    flops, result = 2.0 * M * exact.numel(), 4 * exact.numel()

    def torch_call() -> Tensor:
        return grad_y.T @ x.index_select(1, dims) if axis else grad_y.index_select(1, dims).T @ x

    exact_of_torch = (grad_y if axis else grad_y[:, dims]).double().T @ right.double()
    return (
        Work(torch_call, exact_of_torch, exact_of_torch, flops, 4 * columns.numel() + right.nbytes + result),
        Work(
            lambda: ops.outlier_grad(left, codes, scale, zero_point, dims, axis),
            own,
            exact,
            flops,
            columns.nbytes + codes.nbytes + result,
        ),
    )


def _bytes(layer: PreQuantLinear) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def _exact(
    given: Problem, rows: Tensor, like: Tensor, key: tuple[str, int, str] | None, is_transposed: bool = False
) -> Tensor:
    """The float64 product of the first rows, rounded as ``like``, with the float weights, or with what those of the
    layers of ``key`` are worth.
    """
    place = (is_transposed, like.dtype, key)
    if place not in given.exact:
        weight = given.linear.weight if key is None else given.layers[key][0].dequantize()
        given.exact[place] = float64_product(rows[:ERROR_ROWS].to(like.dtype), weight.T if is_transposed else weight)
    return given.exact[place][: len(like)]


def rows_of(
    given: Problem, M: int, chosen: Sequence[Variant], arguments: Any, by_threads: dict[int, timing.Peaks]
) -> list[Row]:
    N, K = given.linear.weight.shape
    found = []
    for threads, peak in by_threads.items():
        torch.set_num_threads(threads)
        measured = timing.measure(contenders(given, M, chosen), arguments.rounds, arguments.budget, threads, peak)
        found += [{**row, "N": N, "K": K, "M": M} for row in measured]
        ours = [row for row in measured if row["name"] != row["baseline"]]
        say(
            f"{threads} thread(s), {N} x {K}, M = {M}: "
            + ", ".join(f"{row['name']} {row['speedup']:.2f}×" for row in ours)
        )
    return found


# ---- what is printed -------------------------------------------------------------------------------------------------


def details_table(rows: Sequence[Row]) -> str:
    titles = ["shape", "M", "threads", "operator", "ms", "×", "%", "error", "with float weights"]
    return reporting.table(
        titles,
        (
            [
                f"{row['N']} x {row['K']}",
                str(row["M"]),
                str(row["threads"]),
                row["name"],
                f"{row['milliseconds']:.4g}",
                f"{row['speedup']:.2f}{reporting.mark([row])}",
                f"{100 * row['roofline_share']:.0f}",
                f"{row['error']:.1e}",
                f"{row['error_with_float_weights']:.1e}",
            ]
            for row in rows
        ),
    )


def odd_rows(pair: str, chosen: Sequence[Variant], arguments: Any, by_threads: dict[int, timing.Peaks]) -> list[Row]:
    """Rows of an odd shape with ``of_neighbour``: its FLOP/s over those of the aligned shape,
    both in the same rounds.
    """
    (M, N, K), (aligned_M, aligned_N, aligned_K) = (reporting.shape(side) for side in pair.split(":"))
    fitting = [variant for variant in chosen if K % GRANULARITIES[variant.granularity].get("group_size", 1) == 0]
    work, found = (M * N * K) / (aligned_M * aligned_N * aligned_K), []
    odd, aligned = problem(N, K, M, fitting), problem(aligned_N, aligned_K, aligned_M, fitting)
    for threads, peak in by_threads.items():
        torch.set_num_threads(threads)
        neighbours = [
            replace(one, name=f"neighbour's {one.name}", baseline=f"neighbour's {one.name}")
            for one in contenders(aligned, aligned_M, fitting)
        ]
        own = [replace(one, baseline=f"neighbour's {one.name}") for one in contenders(odd, M, fitting)]
        rows = timing.measure([*neighbours, *own], arguments.rounds, arguments.budget, threads, peak)[len(neighbours) :]
        found += [
            {
                **row,
                "N": N,
                "K": K,
                "M": M,
                "neighbour": [aligned_M, aligned_N, aligned_K],
                "of_neighbour": row["speedup"] * work,
            }
            for row in rows
        ]
        say(
            f"{threads} thread(s), {pair}: "
            + ", ".join(f"{row['name']} {100 * row['of_neighbour']:.0f} %" for row in found[-len(rows) :])
        )
    return found


def odd_table(rows: Sequence[Row]) -> str:
    titles = ["odd shape M x N x K", "neighbour", "threads", "operator", "ms", "FLOP/s of the neighbour's", "error"]
    return reporting.table(
        titles,
        (
            [
                "{M} x {N} x {K}".format(**row),
                " x ".join(map(str, row["neighbour"])),
                str(row["threads"]),
                row["name"],
                f"{row['milliseconds']:.4g}",
                f"{100 * row['of_neighbour']:.0f} %{reporting.mark([row])}",
                f"{row['error']:.1e}",
            ]
            for row in rows
        ),
    )


@torch.no_grad()
def main() -> None:
    parser = reporting.options(__doc__, rounds=15)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=reporting.shape,
        default=SHAPES,
        metavar="NxK",
        help="default: " + " ".join(f"{N}x{K}" for N, K in SHAPES),
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=TOKENS, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}"
    )
    parser.add_argument(
        "--granularity", nargs="+", choices=GRANULARITIES, default=["tensor"], help="weights per scale; default: tensor"
    )
    parser.add_argument("--r", nargs="+", type=int, default=[5], help="outlier dimensions; default: 5")
    parser.add_argument(
        "--axis", nargs="+", choices=AXES, default=["input"], help="of the outlier dimensions; default: input"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32"],
        help="of x and grad_y; default: float32",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["highest", "high"],
        default=["highest", "high"],
        help="of float32 products; default: both",
    )
    parser.add_argument(
        "--odd",
        nargs="*",
        default=ODD,
        metavar="MxNxK:MxNxK",
        help=f"odd shapes and their aligned neighbours; default: {' '.join(ODD)}",
    )
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds for the rounds of one shape and token count; default: 1"
    )
    parser.add_argument("--details", action="store_true", help="a line for every shape, too")
    arguments = parser.parse_args()
    chosen = variants(arguments)
    about = reporting.header(arguments.threads)
    by_threads = {threads: timing.peaks(threads) for threads in arguments.threads}
    rows: list[Row] = []
    odd: list[Row] = []
    for N, K in arguments.shapes:
        say(f"{N} x {K}: quantizing")
        given = problem(N, K, max(arguments.tokens), chosen)
        for M in arguments.tokens:
            rows += rows_of(given, M, chosen, arguments, by_threads)
        reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, odd=odd))
    for pair in arguments.odd:
        odd += odd_rows(pair, chosen, arguments, by_threads)
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, odd=odd))

    print(reporting.headline(about))
    print(
        f"×: speed of torch float32 in the same rounds, geometric mean over {len(arguments.shapes)} shapes. "
        f"{reporting.peaks_line(by_threads)}. *: noisy"
    )
    for threads in arguments.threads:
        print(reporting.means_table(rows, threads))
    if odd:
        print(odd_table(odd))
    if arguments.details:
        print(details_table(rows))


if __name__ == "__main__":
    main()
