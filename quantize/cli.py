"""`quantize model` and `quantize inspect`: options become settings, errors become exit codes,
progress becomes bars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantize.errors import QuantizeError
from quantize.settings import Settings

app = typer.Typer(
    help="Quantize Hugging Face checkpoints for vLLM, with a report that shows what was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it swallows [default: ...] and joins example lines
)


@app.command()
def model(
    model: Annotated[
        str, typer.Argument(help="Model folder with config.json and *.safetensors, or a hub name.")
    ],
    method: Annotated[
        str, typer.Option(help="int8: W8A8, the safe choice. rtn: 4 bits, rounded to nearest.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to make; it appears when everything is done, not before.")
    ],
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale, for rtn: 32, 64 or 128. [default: 128]"),
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help='Questions for the score, JSON lines {"prompt", "answer"}. '
            "[default: eval/general.jsonl beside the model folder, if there]",
        ),
    ] = None,
    text_file: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help='Text for perplexity, JSON lines {"messages"} or {"text"}. '
            "[default: eval/held_out_text.jsonl beside the model folder, if there]",
        ),
    ] = None,
    quality: Annotated[
        bool, typer.Option(help="Measure score and perplexity before and after.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace --out when it exists.")] = False,
) -> None:
    """Quantize MODEL into a new folder that stock vLLM loads.

    \b
    quantize model demo/model --method int8 --out out/demo-int8
    packhorse serve out/demo-int8

    The folder holds the weights, every side file of the original (tokenizer, chat template, ...),
    and quantize_report.json: sizes, errors by layer, quality before and after, and the weights'
    sha256. A run that is killed leaves no such folder. Exit code 2: it cannot be done as asked; the
    message says why.
    """
    settings = Settings(model, out, method, group_size, eval_file, text_file, quality, overwrite)
    with _errors(), _bars() as progress:
        # Imported late: torch takes seconds, --help and mistakes should not.
        from quantize.run import run

        report = run(settings, progress)
    console = Console()
    console.print(report.as_table())
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    done = f"Wrote {out}. Serve it with: packhorse serve {out}"
    console.print(done, highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds: architecture, quantization, sizes, files, measured quality."""
    with _errors():
        from quantize import inspect as inspection

        facts = inspection.inspect(folder)
    console = Console()
    if as_json:
        console.print_json(json.dumps(facts))
    else:
        console.print(inspection.as_table(folder, facts))


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except QuantizeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def progress(label: str, steps: int) -> Callable[[int], None]:
            task = bars.add_task(label, total=steps)
            return lambda done: bars.advance(task, done)

        yield progress
