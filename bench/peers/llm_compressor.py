"""llm-compressor's part, in its own environment: rounding, GPTQ, or SmoothQuant with GPTQ.

Called by `quantize_peers.py` as `python llm_compressor.py JOB`. Its defaults hold, but for what the
job's options say: `recipe`, `actorder` for GPTQ, and `dtype`.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from job import Job, read_job, timed
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(options: dict[str, Any]) -> list[Any]:
    what = {"targets": "Linear", "ignore": ["lm_head"]}
    # W4A16 is its name for symmetric 4 bits in groups of 128; W8A8 for channels and tokens.
    match options["recipe"]:
        case "rtn":
            return [QuantizationModifier(scheme="W4A16", **what)]
        case "gptq":
            order = {"actorder": options["actorder"]} if "actorder" in options else {}
            return [GPTQModifier(scheme="W4A16", **order, **what)]
        case "w8a8":
            smooth = SmoothQuantModifier(smoothing_strength=0.8)
            return [smooth, GPTQModifier(scheme="W8A8", **what)]
    raise ValueError(options["recipe"])


def run(job: Job) -> None:
    rows = load_file(job.rows)["rows"]
    dataset = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": rows.new_ones(rows.shape).tolist()}
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.options.get("dtype", "auto"))
    steps = recipe(job.options)
    with timed(job, "llmcompressor", "compressed-tensors", "torch", "transformers"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            recipe=steps,
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)


if __name__ == "__main__":
    run(read_job())
