"""auto-round's part, in its own environment: signed gradient descent on roundings and ranges.

Called by `quantize_peers.py` as `python auto_round_tool.py JOB`. Its defaults hold (W4A16,
symmetric, groups of 128); the job's options give `iters`.
"""

from __future__ import annotations

from pathlib import Path

from auto_round import AutoRound
from job import Job, read_job, timed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_ROWS = 8  # its own default


def run(job: Job) -> None:
    rows = load_file(job.rows)["rows"]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    with timed(job, "auto-round", "torch", "transformers"):
        AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            iters=job.options["iters"],
            dataset=list(rows.split(BATCH_ROWS)),
            nsamples=len(rows),
            seqlen=rows.shape[1],
            batch_size=BATCH_ROWS,
            device_map="cpu",
        ).quantize_and_save(job.out, format=job.options["format"])
    # It makes a folder named after model and scheme inside the one it is given.
    (made,) = Path(job.out).iterdir()
    made.rename(f"{job.out}.made")
    Path(job.out).rmdir()
    Path(f"{job.out}.made").rename(job.out)


if __name__ == "__main__":
    run(read_job())
