"""vLLM's worker with faults on demand, for test_faults.py: a prompt of token ids says which.

Named in the engine section of its configuration (`worker_cls`); vLLM imports it in its child.
"""

from __future__ import annotations

import os
import time
from typing import Any

from packhorse.serve.engines.vllm.patches.cpu_worker import PatchedCPUWorker

POISON = [301, 302, 303, 304]
SLOW = [305, 306, 307, 308]
SLOW_S = 8


class FaultyWorker(PatchedCPUWorker):
    def execute_model(self, scheduler_output: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            if new.prompt_token_ids[:4] == POISON:
                os._exit(66)
            if new.prompt_token_ids[:4] == SLOW:
                ends_s = time.monotonic() + SLOW_S
                while time.monotonic() < ends_s:
                    sum(range(1000))
        return super().execute_model(scheduler_output)
