"""Our part, in the project's environment: `quantize model` through its Python function.

Called by `quantize_peers.py` as `python packhorse.py JOB`. The calibration rows are read and cut by
our own reader; that they are the rows the others got is checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from job import Job, read_job, timed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from packhorse.quantize.calibration import text
from packhorse.quantize.run import run as quantize
from packhorse.quantize.settings import Settings


def run(job: Job) -> None:
    rows = load_file(job.rows)["rows"]
    options = dict(job.options)
    # Where a run looks by itself; methods that do without it refuse to be given one.
    place = Path(options.pop("calibration"))
    settings = Settings(
        job.model,
        Path(job.out),
        calibration_tokens=rows.numel(),
        sequence_length=rows.shape[1],
        seed=0,
        force=True,
        quality=False,
        verify=False,
        overwrite=True,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ours = text.read(
        place, tokenizer, max_tokens=rows.numel(), sequence_length=rows.shape[1], seed=0, force=True
    )
    if not torch.equal(ours.rows, rows):
        raise RuntimeError("The calibration rows are not those that the other tools got.")
    # The others load a model before the clock starts, and so have imported its architecture.
    AutoModelForCausalLM.from_pretrained(job.model)
    with timed(job, "packhorse", "torch", "transformers"):
        quantize(settings, lambda label, steps: lambda done: None)


if __name__ == "__main__":
    run(read_job())
