"""One line of a batch's input: a JSON object with custom_id, method, url and body. What is wrong
with it, and the lines that answer it.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from packhorse.serve.batches.records import ENDPOINTS, LineFault, Progress, Reply, TokenUsage

MAX_CUSTOM_ID = 512
MAX_FAULTS = 100
"""Faults that are told of one input file; the rest of the file is not read after them."""
# The reading thread rests between lines, or it would hold Python's lock against live requests.
LINES_AT_ONCE, REST_S = 32, 0.0005
BLANK = b" \t\r\n\xef\xbb\xbf"  # a byte order mark too, which some editors write

# Calls that a batch cannot keep the answer of: field -> what to do instead.
REFUSED_FIELDS = {
    "stream": "a batch has whole answers; leave stream out",
    "background": "a batch is in the background already; leave background out",
}


class Line(NamedTuple):
    """A line that may be run."""

    custom_id: str
    url: str
    body: dict[str, Any]


def parse(raw: bytes, number: int, endpoint: str | None) -> Line | LineFault:
    """The line with this number, from 1. `endpoint` is the one that all lines must call; None: any
    of ENDPOINTS.
    """
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return LineFault("invalid_json_line", "This line is not valid JSON.", number)
    if not isinstance(document, dict):
        return LineFault("invalid_json_line", "This line is not a JSON object.", number)
    custom_id, url = document.get("custom_id"), document.get("url")
    if custom_id is None:
        return _missing("custom_id", number)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters."
        return LineFault("invalid_custom_id", message, number, "custom_id")
    if str(document.get("method") or "POST").upper() != "POST":
        message = "method must be POST, the only one that a batch makes calls with."
        return LineFault("invalid_method", message, number, "method")
    if url is None:
        return _missing("url", number)
    if endpoint is not None and url != endpoint:
        message = f"url must be the batch's endpoint, {endpoint}."
        return LineFault("mismatched_url", message, number, "url")
    if url not in ENDPOINTS:
        message = f"url must be one of {', '.join(ENDPOINTS)}."
        return LineFault("invalid_url", message, number, "url")
    body = document.get("body")
    if body is None:
        return _missing("body", number)
    if not isinstance(body, dict):
        return LineFault("invalid_body", "body must be a JSON object.", number, "body")
    return Line(custom_id, url, body)


def _missing(name: str, number: int) -> LineFault:
    return LineFault("missing_required_parameter", f"{name} is missing.", number, name)


class Index:
    """Where the lines of an input file are: made by one reading of the whole file, which is checked
    on the way. Holds 8 bytes a line, and about 150 more until `forget_keys`.
    """

    def __init__(self, path: Path, endpoint: str | None, *, max_lines: int, max_bytes: int) -> None:
        """Blocks. A line may have max_bytes. Raises OSError."""
        self.offsets: array[int] = array("Q")
        """The place of each line that is not blank, in bytes."""
        self.faults: list[LineFault] = []
        self._keys: dict[bytes, int] = {}
        with path.open("rb") as file:
            for number, offset, raw in _lines(file, max_bytes):
                if number % LINES_AT_ONCE == 0:
                    time.sleep(REST_S)
                if len(self.faults) >= MAX_FAULTS or len(self.offsets) > max_lines:
                    break
                if raw is None:
                    message = f"This line is above the limit of {max_bytes} bytes."
                    self.faults.append(LineFault("line_too_long", message, number))
                elif raw.strip(BLANK):
                    self._add(parse(raw, number, endpoint), number, offset)
        if len(self.offsets) > max_lines:
            message = f"The file has more than {max_lines} lines; split it."
            self.faults = [LineFault("too_many_lines", message)]
        elif not self.offsets and not self.faults:
            self.faults = [LineFault("empty_file", "The file has no line.")]

    def _add(self, line: Line | LineFault, number: int, offset: int) -> None:
        if isinstance(line, LineFault):
            self.faults.append(line)
            return
        key = key_of(line.custom_id)
        if key in self._keys:
            message = (
                "The custom_id of this line is that of an earlier one; each line needs its own."
            )
            self.faults.append(LineFault("duplicate_custom_id", message, number, "custom_id"))
            return
        self._keys[key] = len(self.offsets)
        self.offsets.append(offset)

    def position(self, custom_id: str) -> int | None:
        """The position of the line with this id among all lines; None: there is none."""
        return self._keys.get(key_of(custom_id))

    def forget_keys(self) -> None:
        """Free what `position` needs."""
        self._keys = {}


def key_of(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(number, offset, bytes) of each line; no bytes for one that is too long."""
    number = offset = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        if len(raw) <= max_bytes or raw.endswith(b"\n"):
            yield number, start, raw
            continue
        while (raw := file.readline(2**20)) and not raw.endswith(b"\n"):
            offset += len(raw)
        offset += len(raw)
        yield number, start, None


def refusal(line: Line) -> str | None:
    """Why a batch cannot make this call, in a sentence; None: it can."""
    for name, instead in REFUSED_FIELDS.items():
        value = line.body.get(name)
        if value is not None and value is not False:
            return f"{name}: not in a batch; {instead}."
    return None


def answered(custom_id: str, request_id: str, reply: Reply) -> tuple[bytes, bool]:
    """The line of the output or error file for a reply, and whether it is an error."""
    body = _one_line_json(reply)
    status = reply.status
    if body is None:
        status, body = 500, _error("The endpoint's answer is not JSON.", "server_error")
    head = (
        f'{{"id": {json.dumps("batch_req_" + request_id)}, "custom_id": {json.dumps(custom_id)}, '
        f'"response": {{"status_code": {status}, "request_id": {json.dumps(request_id)}, "body": '
    )
    return head.encode() + body + b'}, "error": null}\n', not 200 <= status < 300


def refused(custom_id: str, request_id: str, message: str) -> bytes:
    """The line of the error file for a call that is not made."""
    reply = Reply(400, JSON, _error(message, "invalid_request_error"))
    return answered(custom_id, request_id, reply)[0]


def not_run(custom_id: str, request_id: str, code: str, message: str) -> bytes:
    """The line of the error file for a line whose batch ended before it ran."""
    document = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return json.dumps(document).encode() + b"\n"


JSON = {"content-type": "application/json"}


def _error(message: str, kind: str) -> bytes:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return json.dumps({"error": error}).encode()


def _one_line_json(reply: Reply) -> bytes | None:
    """The body on one line; None when it is no JSON."""
    if not reply.headers.get("content-type", "").startswith("application/json"):
        return None
    body = reply.body.strip()
    if b"\n" not in body and b"\r" not in body:
        return body or None
    try:
        return json.dumps(json.loads(body)).encode()
    except ValueError:
        return None


def count(document: dict[str, Any], progress: Progress, usage: TokenUsage) -> None:
    """Count a line of an output or error file."""
    response = document.get("response")
    if isinstance(response, dict) and 200 <= response["status_code"] < 300:
        progress.completed += 1
        usage.add(response["body"].get("usage"))
    else:
        progress.failed += 1
