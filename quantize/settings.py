"""What one run of `quantize model` needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHANNEL = -1
"""As a group size: one scale for a whole output row."""


@dataclass(frozen=True)
class Settings:
    """Options of a run; the command line fills it in, tests build it directly."""

    model: str
    """Model folder or hub name."""
    out: Path
    """Folder to make."""
    method: str
    """A name of methods.METHODS."""
    bits: float | None = None
    """Bits of a weight; unset: what the method is best at (4, or 8 for int8 and fp8). Between 4 and
    16 a size that may be spent, scales included: layers get more bits where it pays most."""
    keep: tuple[str, ...] = ()
    """Layers that stay as they are: shell patterns of their names, or `re:` and a regular
    expression."""
    group_size: int | None = None
    """Inputs that share one scale, for methods with groups: 32, 64, 128 or CHANNEL. Unset: 128, and
    smaller where the model's sizes ask for it."""
    symmetric: bool | None = None
    """Whether the grid is centred on zero; unset: yes, but for awq."""
    kv: str | None = None
    """`fp8`: calibrate scales for an 8-bit KV cache and write them into the checkpoint."""
    format: str | None = None
    """compressed-tensors, gptq or awq; unset: compressed-tensors."""
    targets: tuple[str, ...] = ("cpu", "cuda")
    """Where vLLM must be able to run the result."""
    calibration: Path | str | None = None
    """File or folder of text for methods that look at activations, or the name of a dataset; unset:
    `../calibration.jsonl` seen from the model folder, if there."""
    calibration_tokens: int = 128 * 512
    """How much of it is used."""
    row_tokens: int | None = None
    """Tokens that are seen together; unset: 512, or the model's context where that is shorter."""
    seed: int = 0
    """Of the order in which calibration texts are taken."""
    force: bool = False
    """Go on with too little calibration text."""
    eval_file: Path | None = None
    """Questions for the score; unset: `../eval/general.jsonl` seen from the model folder, if there.
    """
    text_file: Path | None = None
    """Text for perplexity; unset: `../eval/held_out_text.jsonl` seen from the model folder, if
    there.
    """
    quality: bool = True
    """Measure before and after."""
    verify: bool = True
    """Load the finished checkpoint in the real engine, and compare it with the original."""
    overwrite: bool = False
    """Replace `out` when it exists."""
    resume: bool = False
    """Go on from the finished steps of an earlier run for `out` with the same settings; where there
    are none, begin."""
    restart: bool = False
    """Forget an earlier, unfinished run for `out`."""
    device: str = "auto"
    """Where blocks run: cpu, cuda, or auto: cuda where there is one."""
    spill_above: int | None = None
    """Bytes of activations that wait in memory; what is above them waits on the disk of `out`.
    Unset: half of the memory that is free."""
