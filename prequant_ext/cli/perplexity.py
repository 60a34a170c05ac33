"""perplexity: what quantization costs a language model, and what a task gains."""

from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import exit_codes, quiet_libraries, show, show_json
from prequant_ext.cli.options import AsJson


@app.command(epilog="Example: prequant perplexity base --text wiki.txt --compare gpt2")
def perplexity(
    model: Annotated[
        str, typer.Argument(help="a causal language model, float or quantized: a directory, or a name on the hub")
    ],
    text: Annotated[Path, typer.Option(help="a text in UTF-8")],
    task_file: Annotated[
        Path | None, typer.Option(help="a task file of MODEL, for its perplexity after fine-tuning")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="another model with the same tokenizer, on the same tokens: the float one")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a window (default: the model's positions, at most 2048)")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens from one window to the next (default: half a window)")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="of the text: the first ones (default: all)")] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity on a text: exp of the mean negative log likelihood of its tokens.

    Windows of --max-length tokens begin every --stride tokens. Each predicts the tokens that no earlier one has, so
    that every token counts once and, behind the first window, has at least max-length - stride tokens before it.
    --stride equal to --max-length gives the disjoint windows of most tables.
    """
    with exit_codes():
        quiet_libraries()
        from prequant_ext.perplexity import perplexities

        result = perplexities(model, task_file, compare, text, max_length, stride, max_tokens)
        if as_json:
            return show_json(result | {"text": str(text), "task_file": None if task_file is None else str(task_file)})
        rows = [(model if task_file is None else f"{model} with {task_file}", f"{result['perplexity']:,.3f}")]
        if compare is not None:
            rows.append((compare, f"{result['compared']['perplexity']:,.3f}"))
        windows = f"windows of {result['max_length']}, one every {result['stride']}"
        show(("model", "perplexity"), rows, f"{result['predicted_tokens']:,} predicted tokens of {text}, {windows}")
