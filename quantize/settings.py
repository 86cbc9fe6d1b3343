"""The settings of one run of `quantize model`, and how a caller follows its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHANNEL = -1
"""As a group size: one scale for each output."""

Progress = Callable[[str, int], Callable[[int], None]]
"""Called with the name of a task and its number of steps; returns a function to call with the
number of steps that were just finished."""


@dataclass(frozen=True)
class Settings:
    """The options of a run. The command line fills them in; tests and benchmarks create them."""

    model: str
    """A model folder, or a name on the Hugging Face hub."""
    out: Path
    """The folder to make."""
    method: str
    """A key of methods.METHODS."""
    bits: float | None = None
    """Bits per weight. None: 4, or 8 for int8 and fp8. A number between 4 and 16 that is not whole
    is a budget, scales included, for mixed precision."""
    keep: tuple[str, ...] = ()
    """Layers that are not quantized: shell patterns of their names, or `re:` and a regular
    expression."""
    group_size: int | None = None
    """The number of inputs that share one scale, for methods with groups: 32, 64, 128 or CHANNEL.
    None: the largest of 128, 64 and 32 that divides the inputs of all layers."""
    symmetric: bool | None = None
    """Whether quantization is symmetric around zero. None: yes, but for awq."""
    kv: str | None = None
    """`fp8`: calibrate scales of an 8-bit KV cache, and write them into the checkpoint."""
    format: str | None = None
    """A name of formats.FORMATS. None: compressed-tensors."""
    targets: tuple[str, ...] = ("cpu", "cuda")
    """The platforms on which vLLM must be able to run the result."""
    calibration: Path | str | None = None
    """Calibration text: a file, a folder, or the name of a hub dataset. None:
    `../calibration.jsonl` seen from the model folder, if it exists."""
    calibration_tokens: int = 128 * 512
    """The number of calibration tokens that are used."""
    sequence_length: int | None = None
    """Tokens per calibration row. None: 512, or the model's context length if it is shorter."""
    seed: int = 0
    """Seed of the order of calibration texts."""
    force: bool = False
    """Accept fewer calibration tokens than give stable statistics."""
    eval_file: Path | None = None
    """Questions for the score. None: `../eval/general.jsonl` seen from the model folder, if it
    exists."""
    text_file: Path | None = None
    """Text for perplexity and divergence. None: `../eval/held_out_text.jsonl` seen from the model
    folder, if it exists."""
    quality: bool = True
    """Measure quality before and after."""
    verify: bool = True
    """Load check: load the finished checkpoint in vLLM, and compare it with the original."""
    overwrite: bool = False
    """Replace `out` if it exists."""
    resume: bool = False
    """Continue after the finished steps of an earlier run for `out` with the same settings; start
    from the beginning when there are none."""
    restart: bool = False
    """Delete the steps of an earlier, unfinished run for `out`."""
    device: str = "auto"
    """The device that blocks run on: cpu, cuda, or auto, which is cuda where there is a GPU."""
    offload_limit_bytes: int | None = None
    """Bytes of stored activations that stay in memory; the others go to the disk of `out`. None:
    half of the free memory."""
