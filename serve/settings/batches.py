"""Settings of files and batches (batches/), see docs/batches.md."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from packhorse.serve.settings.section import Section

MIB, GIB, DAY_S = 2**20, 2**30, 24 * 3600


class BatchSettings(Section):
    """Without `folder`, the server keeps no files and runs no batches."""

    folder: Path | None = None
    """Holds uploaded files, batches and their answers over restarts. One server at a time uses it.
    """
    max_file_bytes: int = Field(200 * MIB, ge=1024)
    """Larger uploads are refused with 413 before they are read whole."""
    max_bytes_per_tenant: int = Field(4 * GIB, ge=1024)
    """All files of a tenant together, answers among them. A batch whose answers go beyond it fails,
    and keeps the answers that it has.
    """
    max_files_per_tenant: int = Field(1000, ge=4)
    max_unfinished_per_tenant: int = Field(20, ge=1)
    """Batches of a tenant that have not ended; they run one after the other."""
    max_lines: int = Field(50_000, ge=1)
    """Lines of one batch."""
    concurrency: int | None = Field(None, ge=1)
    """Lines in the engine at once, while there are no other calls. Unset: the engine's
    max_num_seqs.
    """
    max_step_s: float = Field(0.1, gt=0)
    """Lines at once become fewer while a token of theirs takes longer: a live call that arrives
    waits for the engine's step in progress. Where one line alone takes half of it, twice that time.
    """
    share_beside_live: float = Field(0.03, gt=0, le=1)
    """The share of the time in which one line may run beside live calls, so that a batch goes on
    under steady traffic. 1: always one line.
    """
    quiet_s: float = Field(2.0, ge=0)
    """How long there must have been no live call before lines run freely."""
    ttl_s: int = Field(30 * DAY_S, ge=3600)
    """Files, and batches that have ended, are deleted when they are older."""
    max_completion_window_s: int = Field(7 * DAY_S, ge=60)
    """The longest completion_window that a batch may ask for."""
