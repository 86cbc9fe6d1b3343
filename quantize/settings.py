"""What one run of `quantize model` needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Options of a run; the command line fills it in, tests build it directly."""

    model: str
    """Model folder or hub name."""
    out: Path
    """Folder to make."""
    method: str
    """A name of methods.METHODS."""
    group_size: int | None = None
    """Inputs that share one scale, for methods with groups: 32, 64 or 128 (the default), and made
    smaller where the model's sizes ask for it."""
    eval_file: Path | None = None
    """Questions for the score; unset: `../eval/general.jsonl` seen from the model folder, if there.
    """
    text_file: Path | None = None
    """Text for perplexity; unset: `../eval/held_out_text.jsonl` seen from the model folder, if
    there.
    """
    quality: bool = True
    """Measure before and after."""
    overwrite: bool = False
    """Replace `out` when it exists."""
