"""Loads one checkpoint after another in vLLM, in this process, and says what log-probabilities each
gives the same prompts, and which KV cache it chose. Run by test_loads.py:

    python -m tests.e2e.loads_child PROMPTS.json RESULT.json FOLDER...
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answer(folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probabilities of each prompt's tokens but the first; dtypes of attention's caches."""
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
    (dtypes,) = llm.apply_model(cache_dtypes)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"logprobs": found, "kv_cache_dtypes": dtypes}


def cache_dtypes(model: torch.nn.Module) -> list[str]:
    attentions = [part for part in model.modules() if hasattr(part, "_k_scale_float")]
    return sorted({str(getattr(part, "kv_cache_dtype", "auto")) for part in attentions})


if __name__ == "__main__":
    torch.cpu._init_amx()  # see serve/engines/vllm/patches/cpu_worker.py
    prompts = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    # What was imported stays. vLLM looks at all of it nine times a load, half a second each.
    gc.unfreeze = lambda: None
    for folder in sys.argv[3:]:
        gc.freeze()
        try:
            results[folder] = answer(folder, prompts)
        except Exception as error:  # noqa: BLE001  # what vLLM says is what the test wants to show
            results[folder] = f"{type(error).__name__}: {error}"
        Path(sys.argv[2]).write_text(json.dumps(results))
