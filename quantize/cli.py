"""`quantize model`, `report` and `inspect`: options become settings, errors become exit codes, and
progress becomes bars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

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

from packhorse.quantize.errors import BadInput, QuantizeError
from packhorse.quantize.settings import Settings

Value = TypeVar("Value", int, float)
MAX_OFFLOAD_LIMIT_GB = 1e6

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
            "float8. rtn: round to nearest, for any model."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to make. It appears when the run is complete."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per weight: 4, or 8 with --target cuda. In between, such as 4.5: mixed "
            "precision with this average, scales included. [default: 4; int8, fp8: 8]"
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers that are not quantized, such as 'model.layers.0.*' or 're:.*down_proj$'; "
            "can be given several times.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale: 32, 64, 128, or -1 for one scale per output. "
            "[default: 128, or the largest that divides all layers]"
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Whether 4-bit quantization has no zero points. [default: yes, but for awq]",
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="fp8: calibrate scales of an 8-bit KV cache, and write them."),
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
        str,
        typer.Option(help="The platforms on which vLLM must be able to run it: cpu, cuda or both."),
    ] = "cpu,cuda",
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what the run would make, and its size, memory and time; do nothing.",
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help='Text like what the model will see: JSON lines {"messages"} or {"text"}, .txt, a '
            "folder of them, or a dataset of the hub, NAME[@CONFIG][:SPLIT]. "
            "[default: calibration.jsonl beside the model folder, if there]"
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="The number of calibration tokens.")] = (
        128 * 512
    ),
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per calibration row. [default: 512, or the context]"),
    ] = None,
    row_tokens: Annotated[int | None, typer.Option(hidden=True)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of calibration texts.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Accept too little calibration text.")
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
        bool, typer.Option(help="Load the result in vLLM, and compare it with the original.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace --out if it exists.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue an interrupted run with the same options, if there is one."
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the steps of an interrupted run.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(help="The device that blocks run on, one at a time: cpu, cuda or auto."),
    ] = "auto",
    offload_limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=MAX_OFFLOAD_LIMIT_GB,
            help="GB of stored activations that stay in memory; the others go to --out's disk. "
            "[default: half of what is free]",
        ),
    ] = None,
    spill_above: Annotated[
        float | None, typer.Option(min=0.0, max=MAX_OFFLOAD_LIMIT_GB, hidden=True)
    ] = None,
) -> None:
    """Quantize MODEL into a new folder that stock vLLM loads.

    \b
    quantize model demo/model --method int8 --out out/demo-int8
    packhorse serve out/demo-int8

    The folder has the weights, every side file of the original (tokenizer, chat template, ...),
    and quantize_report.json: sizes, errors by layer, quality before and after, and the weights'
    sha256. It appears when the run is complete. An interrupted run keeps its finished blocks in a
    hidden folder beside --out: the same command with --resume continues there, and makes the same
    bytes. Exit code 2: the run cannot be done; the message says why, and what to change.
    """
    console = Console()
    sequence_length = _renamed("row-tokens", row_tokens, "sequence-length", sequence_length)
    offload_limit = _renamed("spill-above", spill_above, "offload-limit", offload_limit)
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
        sequence_length=sequence_length,
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
        offload_limit_bytes=None if offload_limit is None else round(offload_limit * 1e9),
    )
    with _errors():
        # Imported here, as importing torch takes seconds, and --help and mistakes should not.
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
    folders: Annotated[list[Path], typer.Argument(help="Folders that quantize model made.")],
    html: Annotated[
        Path | None, typer.Option(help="Write one HTML page with plots, which needs no network.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the quality report of a checkpoint, or compare those of several.

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
    """Print what is in a checkpoint: architecture, quantization, sizes, files, measured quality."""
    with _errors():
        from packhorse.quantize.report import inspect as inspection

        facts = inspection.inspect(folder)
    console = Console()
    if as_json:
        console.print_json(json.dumps(facts))
    else:
        console.print(inspection.as_table(folder, facts))


def _renamed(old: str, old_value: Value | None, new: str, new_value: Value | None) -> Value | None:
    """The value of an option that may be given by its old name, with a warning. The new name wins.
    Old names go with the next release.
    """
    if old_value is None:
        return new_value
    Console(stderr=True).print(
        f"warning: --{old} is now called --{new}; the old name will be removed in the next release",
        style="yellow", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return old_value if new_value is None else new_value


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
