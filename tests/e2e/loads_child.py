"""Loads one checkpoint after another in vLLM, in this process, and says what log-probabilities each
gives the same prompts. Run by test_loads.py:

    python -m tests.e2e.loads_child PROMPTS.json RESULT.json FOLDER...
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def log_probabilities(folder: str, prompts: list[list[int]]) -> list[list[float]]:
    """Of each prompt's tokens but the first."""
    llm = LLM(
        model=folder,
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 1024**2,
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        seed=0,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    found = [
        [
            entry[token].logprob
            for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for ids, output in zip(prompts, outputs, strict=True)
    ]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    torch.cpu._init_amx()  # see serve/engines/vllm/worker.py
    prompts = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for folder in sys.argv[3:]:
        try:
            results[folder] = log_probabilities(folder, prompts)
        except Exception as error:  # noqa: BLE001  # what vLLM says is what the test wants to show
            results[folder] = f"{type(error).__name__}: {error}"
        Path(sys.argv[2]).write_text(json.dumps(results))
