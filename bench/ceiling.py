"""The ceiling: vllm.LLM on the same prompts, without HTTP and without streaming.

Run as a child by bench/compare.py: the job is JSON on stdin, the result the last line of stdout. A
process of its own, because vLLM's engine stays in the process that made it.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from dataclasses import replace

from load import Load, token_prompts
from load_client import PROBE_EVERY_S, fixed_work_s


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(job["folder"], **job["engine"], disable_log_stats=True)
    load = Load(**job["load"])
    sampling = SamplingParams(temperature=0, max_tokens=load.output_tokens, ignore_eos=True)

    def tokens_per_s(some: Load) -> float:
        prompts = [{"prompt_token_ids": ids} for ids in token_prompts(some)]
        started_s = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        wall_s = time.perf_counter() - started_s
        counts = {len(answer.outputs[0].token_ids) for answer in answers}
        assert counts == {load.output_tokens}, counts
        return some.tokens / wall_s

    tokens_per_s(replace(load, requests=load.concurrency, seed="warm-up"))
    probes_s: list[float] = []
    ended = threading.Event()

    def probe() -> None:
        while not ended.wait(PROBE_EVERY_S):
            probes_s.append(fixed_work_s())

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        found = tokens_per_s(load)
    finally:
        ended.set()
        prober.join()
    print(json.dumps({"tokens_per_s": found, "probe_us": statistics.fmean(probes_s) * 1e6}))


if __name__ == "__main__":
    main()
