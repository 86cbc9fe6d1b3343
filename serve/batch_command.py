"""`packhorse batch FILE`: an App without listeners answers the lines of a file, and ends. Called by
the command line; what is kept of a run that was cut short is in `<output>.part`.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from packhorse.serve.app import App, create, first_of, max_line_bytes
from packhorse.serve.batches.run import BatchRun, InputFaulty, Paths, open_run, run_all
from packhorse.serve.engines.processes import end_children
from packhorse.serve.errors import StartupError
from packhorse.serve.messages import ANONYMOUS
from packhorse.serve.settings import Settings, prepare_environment
from packhorse.serve.settings.batches import BatchSettings
from packhorse.serve.signals import Signals
from packhorse.serve.telemetry import logs

MAX_LINES = 100_000_000
"""A file of one's own is bounded by memory alone: some bytes a line."""
SHOWN_FAULTS = 10
INTERRUPTED = 130


class Files(NamedTuple):
    """What a run reads and writes."""

    input: Path
    output: Path
    errors: Path

    @property
    def part(self) -> Path:
        """The folder of a run that has not ended."""
        return self.output.with_name(self.output.name + ".part")

    @property
    def journals(self) -> Paths:
        return Paths(self.input, self.part / "output.jsonl", self.part / "errors.jsonl")


def run_file(settings: Settings, files: Files, at_once: int | None) -> int:
    """Run the file, or what is left of it; the exit code. `at_once` None: as many lines as the
    engine has room for. Raises StartupError.
    """
    prepare_environment()
    logs.set_up("error", settings.log_format, prompts=settings.log_prompts)
    # The folder of a server's batches is not this command's.
    settings = settings.model_copy(update={"batches": BatchSettings()})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, files, at_once))


async def _run(settings: Settings, files: Files, at_once: int | None) -> int:
    signals = Signals()
    console = Console(stderr=True)
    lock = _claim(files)
    run = _open(files, settings)
    try:
        app = create(settings)
        try:
            is_whole = await _answer(app, run, signals, console, at_once)
        finally:
            await app.stop()
            end_children()
    finally:
        await run.close()
    done, failed = run.progress.completed, run.progress.failed
    if not is_whole:
        console.print(
            f"Stopped with {done + failed} of {run.progress.total} lines; run the same command "
            "again to go on.",
            highlight=False,
        )
        return INTERRUPTED
    _publish(files)
    lock.close()
    console.print(f"{done} answers in {files.output}", highlight=False, soft_wrap=True)
    if failed:
        console.print(f"{failed} errors in {files.errors}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


async def _answer(
    app: App, run: BatchRun, signals: Signals, console: Console, at_once: int | None
) -> bool:
    """Run what is left. False: a signal came first. Raises StartupError."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as shown:
        progress = run.progress
        bar = shown.add_task(f"Loading {app.name}", total=progress.total)

        def moved() -> None:
            shown.update(bar, completed=progress.completed + progress.failed)

        starting = asyncio.ensure_future(app.start())
        if await first_of(starting, signals.stop.wait()) is not starting:
            return False
        starting.result()
        shown.update(bar, description="Answering")
        moved()
        if at_once is None:
            at_once = max(1, app.model.engine.capacity.max_num_seqs)
        working = asyncio.ensure_future(
            run_all(run, ANONYMOUS, app.in_process, at_once=at_once, moved=moved)
        )
        first = await first_of(working, app.gave_up.wait(), signals.stop.wait())
        if first is working:
            try:
                working.result()
            except ExceptionGroup as group:
                raise StartupError(f"The file cannot be run: {group.exceptions[0]}") from group
            return True
        with suppress(asyncio.CancelledError, ExceptionGroup):
            await working
        if app.gave_up.is_set():
            raise StartupError("The engine cannot be built any more; the log says why.")
        return False


def _claim(files: Files) -> IO[str]:
    """Make the folder of the run, or find that of an earlier one over the same input. Returns its
    lock, to be kept open. Raises StartupError.
    """
    for path in (files.output, files.errors):
        if path.exists():
            raise StartupError(f"{path} exists; move it away, or give another --output.")
    try:
        with files.input.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.part.mkdir(exist_ok=True)
        lock = (files.part / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = files.part / "input.sha256"
        if not mark.exists():
            mark.write_text(digest + "\n")
        elif mark.read_text().strip() != digest:
            raise StartupError(
                f"{files.part} holds answers to another content of {files.input}; delete it to "
                "begin again, or give another --output."
            )
    except BlockingIOError as error:
        raise StartupError(
            f"Another `packhorse batch` is writing {files.output}; wait for it, or give another "
            "--output."
        ) from error
    except OSError as error:
        raise StartupError(f"{error.filename}: {error.strerror}.") from error
    return lock


def _open(files: Files, settings: Settings) -> BatchRun:
    """Raises StartupError."""
    try:
        return open_run(
            files.journals, None, max_lines=MAX_LINES, max_line_bytes=max_line_bytes(settings)
        )
    except InputFaulty as error:
        told = [
            f"  line {fault.line}: {fault.message}" if fault.line else f"  {fault.message}"
            for fault in error.faults[:SHOWN_FAULTS]
        ]
        more = len(error.faults) - SHOWN_FAULTS
        if more > 0:
            told.append(f"  and {more} more")
        raise StartupError(f"{files.input} cannot be run:\n" + "\n".join(told)) from error
    except OSError as error:
        raise StartupError(f"{error.filename or files.input}: {error.strerror}.") from error


def _publish(files: Files) -> None:
    journals = files.journals
    if journals.errors.stat().st_size:
        journals.errors.rename(files.errors)
    else:
        journals.errors.unlink()
    journals.output.rename(files.output)
    (files.part / "input.sha256").unlink()
    (files.part / "lock").unlink()
    files.part.rmdir()
