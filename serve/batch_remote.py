"""`packhorse batch FILE --url SERVER`: the file goes to a running server as a batch, and its
answers come back. Called by the command line; run again, it waits for the batch that it has made.
"""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from shutil import copyfileobj
from typing import Any, NamedTuple
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from packhorse.serve.errors import StartupError

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
POLL_S = 1.0
TIMEOUT_S = 60.0
MAX_FAILURES = 60
"""Polls in a row that may find no server: it may be starting again."""
BOUNDARY = "packhorse-batch-7f1c9a"
INTERRUPTED = 130


class Server(NamedTuple):
    """Who is asked, and with which key."""

    url: str
    key: str | None

    def request(self, path: str, data: Any = None, **headers: str) -> Any:
        """An open answer. Raises OSError, HTTPException, or StartupError for a refusal."""
        sent = {"authorization": f"Bearer {self.key}"} if self.key else {}
        for name, value in headers.items():
            sent[name.replace("_", "-")] = value
        asked = urllib.request.Request(self.url.rstrip("/") + path, data, sent)
        try:
            return urllib.request.urlopen(asked, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            if error.code in (429, 502, 503, 504):
                raise OSError(error.code, said) from error
            raise StartupError(f"{self.url} answered {error.code}: {said}") from error

    def json(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises as `request`."""
        data = None if document is None else json.dumps(document).encode()
        with self.request(path, data, content_type="application/json") as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def run_file(server: Server, file: Path, output: Path, errors: Path) -> int:
    """Send the file, or find the batch that was made of it; wait, and fetch what it comes to. The
    exit code. Raises StartupError.
    """
    for path in (output, errors):
        if path.exists():
            raise StartupError(f"{path} exists; move it away, or give another --output.")
    mark = output.with_name(output.name + ".batch")
    console = Console(stderr=True)
    try:
        batch = _begun(server, file, mark)
        try:
            batch = _waited(server, batch, console)
        except KeyboardInterrupt:
            console.print(f"{batch['id']} goes on; run the same command again for its answers.")
            return INTERRUPTED
        return _fetched(server, batch, mark, output, errors, console)
    except (OSError, HTTPException, ValueError) as error:
        raise StartupError(f"{server.url} cannot be asked, or a file used: {error}") from error


def _begun(server: Server, file: Path, mark: Path) -> dict[str, Any]:
    """The batch of the file: the one that was made before, or a new one."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if mark.exists():
        made = json.loads(mark.read_text())
        if (made["input"], made["url"]) != (digest, server.url):
            raise StartupError(
                f"{mark} is of another content of {file}, or of another server; delete it to begin "
                "again, or give another --output."
            )
        return server.json(f"/v1/batches/{quote(made['batch'], safe='')}")
    endpoint = _endpoint(file)
    head, tail = _form(file.name)
    length = len(head) + file.stat().st_size + len(tail)
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    with server.request(
        "/v1/files", _parts(head, file, tail), content_type=kind, content_length=str(length)
    ) as answer:
        uploaded = json.load(answer)
    batch = server.json(
        "/v1/batches",
        {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": "24h"},
    )
    mark.write_text(json.dumps({"input": digest, "url": server.url, "batch": batch["id"]}) + "\n")
    return batch


def _endpoint(file: Path) -> str:
    """The endpoint of the first line, which must be that of all."""
    with file.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        url = json.loads(first)["url"]
    except (ValueError, TypeError, KeyError) as error:
        raise StartupError(f"{file}: its first line is no JSON object with a url.") from error
    return str(url)


def _form(name: str) -> tuple[bytes, bytes]:
    """What goes before and after the file."""
    shown = "".join(sign if sign.isalnum() or sign in "._- " else "_" for sign in name)
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{shown}"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    return head.encode(), f"\r\n--{BOUNDARY}--\r\n".encode()


def _parts(head: bytes, file: Path, tail: bytes) -> Iterator[bytes]:
    yield head
    with file.open("rb") as content:
        while piece := content.read(2**18):
            yield piece
    yield tail


def _waited(server: Server, batch: dict[str, Any], console: Console) -> dict[str, Any]:
    """The batch, when it has ended."""
    path = f"/v1/batches/{quote(batch['id'], safe='')}"
    failures = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as shown:
        bar = shown.add_task(batch["status"], total=None)
        while True:
            counts = batch["request_counts"]
            done = counts["completed"] + counts["failed"]
            shown.update(bar, description=batch["status"], total=counts["total"], completed=done)
            if batch["status"] in ENDED:
                return batch
            time.sleep(POLL_S)
            try:
                batch = server.json(path)
                failures = 0
            except (OSError, HTTPException):
                failures += 1
                if failures > MAX_FAILURES:
                    raise


def _fetched(
    server: Server,
    batch: dict[str, Any],
    mark: Path,
    output: Path,
    errors: Path,
    console: Console,
) -> int:
    counts = batch["request_counts"]
    for file_id, path, count, word in (
        (batch["output_file_id"], output, counts["completed"], "answers"),
        (batch["error_file_id"], errors, counts["failed"], "errors"),
    ):
        if file_id is not None:
            _download(server, file_id, path)
            console.print(f"{count} {word} in {path}", highlight=False, soft_wrap=True)
    mark.unlink()
    if batch["status"] == "completed":
        return 1 if counts["failed"] else 0
    told = [f"{batch['id']} is {batch['status']}."]
    for fault in (batch.get("errors") or {}).get("data", ())[:10]:
        place = f"line {fault['line']}: " if fault.get("line") else ""
        told.append(f"  {place}{fault['message']}")
    raise StartupError("\n".join(told))


def _download(server: Server, file_id: str, path: Path) -> None:
    """Write a file of the server's in one step."""
    part = path.with_name(path.name + ".part")
    with (
        server.request(f"/v1/files/{quote(file_id, safe='')}/content") as answer,
        part.open("wb") as file,
    ):
        copyfileobj(answer, file)
        if answer.length:  # http.client takes an early end for the end
            raise OSError("the connection ended before the file did")
    part.rename(path)
