"""Inference of a BERT-base with random weights: PreQuant beside torch float32, bfloat16 and dynamic int8, in the same
rounds.

    python bench/model.py                                            batch 1 and 16, sequences of 128
    python bench/model.py --layers 2 --batch 1 4 --seq 64 --rounds 5

All are the same model in eval mode under no_grad. The error is that of the last hidden state against the float model in
float64. A share of the roofline counts the encoder's matrix products; embeddings, GELU, LayerNorm and softmax are time
but no work in it.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import reporting
import timing
from prequant_ext import PreQuantConfig, quantize_model
from prequant_ext.measure import MB
from reporting import say
from timing import Contender, Row

FP32 = "torch fp32"


def dynamic_int8(engine: str) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to drop it; until then it is what its users have
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    return convert


def prequant(activation_bits: int | None) -> Callable[[nn.Module], nn.Module]:
    def convert(model: nn.Module) -> nn.Module:
        quantize_model(model, PreQuantConfig(activation_bits=activation_bits))
        return model

    return convert


# how it is made of a copy of the float model; precision of float32 products
MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    FP32: (lambda model: model, "highest"),
    "torch bf16": (lambda model: model.bfloat16(), "highest"),
    "torch dynamic int8 (fbgemm)": (dynamic_int8("fbgemm"), "highest"),
    "torch dynamic int8 (onednn)": (dynamic_int8("onednn"), "highest"),
    "prequant w4a8": (prequant(8), "highest"),
    "prequant w4a16, high": (prequant(None), "high"),
    "prequant w4a16, highest": (prequant(None), "highest"),
}


def models_of(base: nn.Module, names: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every model by its name, and the reasons of those that cannot be made here."""
    found: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name in names:
        say(f"making {name}")
        try:
            found[name] = MODELS[name][0](copy.deepcopy(base))
        except (AttributeError, ImportError, RuntimeError) as error:  # torch's own int8 is not in every build of it
            if name == FP32 or name.startswith("prequant"):
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def megabytes(model: nn.Module) -> float | None:
    """Of the parameters and buffers; None for torch's quantized layers, which keep their weights in neither."""
    if any(type(module).__module__.startswith("torch.ao") for module in model.modules()):
        return None
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / MB


def rows_of(
    models: dict[str, nn.Module],
    ids: Tensor,
    exact: Tensor,
    threads: int,
    peaks: timing.Peaks,
    rounds: int,
    budget: float,
) -> list[Row]:
    batch, seq = ids.shape
    config = models[FP32].config
    flops = timing.encoder_flops(config.num_hidden_layers, config.hidden_size, batch, seq)  # type: ignore[union-attr,arg-type]
    contenders = []
    for name, model in models.items():
        precision = MODELS[name][1]
        torch.set_float32_matmul_precision(precision)
        error = timing.relative_error(model(input_ids=ids).last_hidden_state, exact)
        call = lambda model=model: model(input_ids=ids)  # noqa: E731
        contenders.append(Contender(name, call, FP32, flops, error_with_float_weights=error, precision=precision))
    rows = timing.measure(contenders, rounds, budget, threads, peaks)
    say(
        f"{threads} thread(s), {batch} x {seq}: "
        + ", ".join(f"{row['name']} {row['milliseconds']:.0f} ms" for row in rows)
    )
    return [{**row, "batch": batch, "seq": seq, "weights_mb": megabytes(models[row["name"]])} for row in rows]


def results_table(rows: Sequence[Row]) -> str:
    titles = ["batch", "threads", "model", "ms", "×", "%", "sequences/s", "error", "MB of weights"]
    return reporting.table(
        titles,
        (
            [
                f"{row['batch']} x {row['seq']}",
                str(row["threads"]),
                row["name"],
                f"{row['milliseconds']:.1f}",
                f"{row['speedup']:.2f}{reporting.mark([row])}",
                f"{100 * row['roofline_share']:.0f}",
                f"{1e3 * row['batch'] / row['milliseconds']:.1f}",
                f"{row['error_with_float_weights']:.1e}",
                "–" if row["weights_mb"] is None else f"{row['weights_mb']:.0f}",
            ]
            for row in rows
        ),
    )


@torch.no_grad()
def main() -> None:
    parser = reporting.options(__doc__, rounds=9)
    parser.add_argument("--layers", type=int, default=12, help="default: 12")
    parser.add_argument("--hidden", type=int, default=768, help="default: 768")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="default: 1 16")
    parser.add_argument("--seq", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help=f"models with one of these words in their names, of: {'; '.join(MODELS)}",
    )
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for the rounds of one batch; default: 30")
    arguments = parser.parse_args()
    from transformers import BertConfig, BertModel

    about = reporting.header(arguments.threads, ["transformers"])
    by_threads = {threads: timing.peaks(threads) for threads in arguments.threads}
    torch.manual_seed(0)
    heads = max(1, arguments.hidden // 64)
    shape = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * arguments.hidden,
    }
    base = BertModel(BertConfig(max_position_embeddings=max(512, arguments.seq), **shape)).eval()
    models, missing = models_of(
        base,
        [name for name in MODELS if not arguments.only or name == FP32 or any(word in name for word in arguments.only)],
    )

    rows: list[Row] = []
    for batch in arguments.batch:
        ids = torch.randint(1000, 30000, (batch, arguments.seq), generator=torch.Generator().manual_seed(batch))
        exact = base.double()(input_ids=ids).last_hidden_state
        base.float()
        for threads, peak in by_threads.items():
            torch.set_num_threads(threads)
            rows += rows_of(models, ids, exact, threads, peak, arguments.rounds, arguments.budget)
    model = {"layers": arguments.layers, "hidden": arguments.hidden}
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, model=model, missing=missing))
    print(reporting.headline(about))
    print(
        f"BERT of {arguments.layers} layers of {arguments.hidden}. ×: speed of {FP32} in the same rounds. "
        f"{reporting.peaks_line(by_threads)}. *: noisy"
    )
    print(results_table(rows))
    print(reporting.missing_lines(missing))


if __name__ == "__main__":
    main()
