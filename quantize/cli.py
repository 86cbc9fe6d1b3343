"""`quantize model`, `report` and `inspect`: options become settings, errors become exit codes,
progress becomes bars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from packhorse.quantize.errors import BadInput, QuantizeError
from packhorse.quantize.settings import Settings
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
        str,
        typer.Option(
            help="gptq: 4 bits, the most exact. awq: 4 bits, asymmetric. int8: W8A8. fp8: W8A8 in "
            "float8. rtn: rounded to nearest, for any model."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to make; it appears when everything is done, not before."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Of a weight: 4, or 8 with --target cuda. In between, such as 4.5: so many on "
            "average, scales included, with more where it pays most. [default: 4; int8, fp8: 8]"
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers that stay as they are, such as 'model.layers.0.*' or 're:.*down_proj$'; "
            "can be given several times.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale: 32, 64, 128, or -1 for one scale an output. "
            "[default: 128, or the largest that divides all layers]"
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether 4-bit grids are centred on zero. [default: yes, but for awq]",
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="fp8: calibrate and write scales for an 8-bit KV cache."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors, or for other readers gptq or awq. "
            "[default: compressed-tensors]",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="Where vLLM must be able to run it: cpu, cuda or both.")
    ] = "cpu,cuda",
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be made and what it takes; do nothing.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help='Text like what the model will see: JSON lines {"messages"} or {"text"}, .txt, a '
            "folder of them, or a dataset of the hub, NAME[@CONFIG][:SPLIT]. "
            "[default: calibration.jsonl beside the model folder, if there]"
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it to use.")] = 128 * 512,
    row_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of it that are seen together. [default: 512, or the context]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which texts are taken.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with too little calibration text.")
    ] = False,
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
    verify: Annotated[
        bool, typer.Option(help="Load the result in vLLM and compare it with the original.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace --out when it exists.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where a run with the same options was cut short, if one was."
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what a run that was cut short left.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(help="Where blocks run: cpu, cuda (one block at a time), or auto."),
    ] = "auto",
    spill_above: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1e6,
            help="GB of activations that wait in memory; the rest waits on --out's disk. "
            "[default: half of what is free]",
        ),
    ] = None,
) -> None:
    """Quantize MODEL into a new folder that stock vLLM loads.

    \b
    quantize model demo/model --method int8 --out out/demo-int8
    packhorse serve out/demo-int8

    The folder holds the weights, every side file of the original (tokenizer, chat template, ...),
    and quantize_report.json: sizes, errors by layer, quality before and after, and the weights'
    sha256. It appears when all is done. A run that is cut short keeps its finished blocks in a
    hidden folder beside --out: the same command with --resume goes on there, and ends with the same
    bytes. Exit code 2: it cannot be done as asked; the message says why.
    """
    console = Console()
    settings = Settings(
        model=model,
        out=out or Path(),
        method=method,
        bits=bits,
        keep=tuple(keep or ()),
        group_size=group_size,
        symmetric=symmetric,
        kv=kv,
        format=layout,
        targets=tuple(name.strip() for name in target.split(",")),
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        row_tokens=row_tokens,
        seed=seed,
        force=force,
        eval_file=eval_file,
        text_file=text_file,
        quality=quality,
        verify=verify,
        overwrite=overwrite,
        resume=resume,
        restart=restart,
        device=device,
        spill_above=None if spill_above is None else round(spill_above * 1e9),
    )
    with _errors():
        # Imported late: torch takes seconds, --help and mistakes should not.
        if plan:
            from packhorse.quantize.run import decide

            console.print(decide(settings)[2].as_table())
            return
        if out is None:
            raise BadInput("--out is missing: name the folder to make.")
        from packhorse.quantize.run import run

        with _bars() as progress:
            report = run(settings, progress)
    console.print(report.as_table())
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    done = f"Wrote {out}. Serve it with: packhorse serve {out}"
    console.print(done, highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints that quantize model made.")],
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots, which needs no network.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the quality reports of checkpoints, or look at one.

    \b
    quantize report out/demo-int8 out/demo-gptq --html report.html
    """
    console = Console()
    with _errors():
        from packhorse.quantize.report import page

        reports, names = [page.load(folder) for folder in folders], page.names(folders)
        if html is not None:
            try:
                html.write_text(page.render(reports, names), encoding="utf-8")
            except OSError as error:
                raise BadInput(f"--html {html} cannot be written: {error.strerror}.") from error
    if as_json:
        console.print_json(json.dumps(page.rows(reports, names)))
    else:
        console.print(page.table(reports, names))
        for warning in page.warnings(reports):
            console.print(f"note: {warning}", style="yellow", markup=False)
        if html is not None:
            console.print(f"Wrote {html}.", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds: architecture, quantization, sizes, files, measured quality."""
    with _errors():
        from packhorse.quantize.report import inspect as inspection

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
    except (QuantizeError, KeyboardInterrupt) as error:
        said = " ".join([str(error) or "Interrupted.", *getattr(error, "__notes__", [])])
        Console(stderr=True).print(f"[bold red]error:[/] {escape(said)}", highlight=False)
        raise typer.Exit(2 if isinstance(error, QuantizeError) else 130) from error


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
