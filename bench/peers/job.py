"""What every script here is told, and how each is timed: the same for all, whatever tool runs.

A script gets the path of a job file as its one argument, loads its model, and quantizes inside
`timed`. Seconds run from the loaded model to the finished folder, so imports and loading are not in
them, but writing is. Ours streams the weights and so cannot leave its own reading out.

Knows no tool and no package of this project: it is imported in the tools' own environments.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One tool's work."""

    model: str
    """Folder of the original."""
    rows: str
    """safetensors file: `rows`, int64 (rows, tokens of a row)."""
    out: str
    """Folder to make."""
    figures: str
    """JSON file to make."""
    threads: int
    options: dict[str, Any]
    """The tool's own."""


def read_job() -> Job:
    """The job of the command line, its thread count set."""
    import torch

    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    return job


def _usage() -> tuple[float, float, int]:
    """(seconds by the clock, seconds of all threads, bytes at the peak so far)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # A compiler that a tool starts is part of its work.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime
    # Linux counts ru_maxrss in KiB.
    return time.monotonic(), cpu_s, used.ru_maxrss * 1024


@contextmanager
def timed(job: Job, *packages: str) -> Iterator[None]:
    """Write job.figures at the end of the block; versions of `packages` go with them."""
    start_s, start_cpu_s, start_bytes = _usage()
    yield
    end_s, end_cpu_s, peak_bytes = _usage()
    figures = {
        "seconds": round(end_s - start_s, 2),
        "cpu_seconds": round(end_cpu_s - start_cpu_s, 2),
        "peak_mb": round(peak_bytes / 1e6),
        "loaded_mb": round(start_bytes / 1e6),
        "threads": job.threads,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    Path(job.figures).write_text(json.dumps(figures))
