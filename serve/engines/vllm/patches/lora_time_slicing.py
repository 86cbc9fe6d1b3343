"""More adapters in the engine than a batch has slots for adapters: they get the slots for a few
steps each, in turn.

vLLM lets an adapter into a batch when a slot is free and keeps it there until its last request has
ended, so a newcomer waits for a whole answer, and behind a busy adapter for ever. Here the adapter
that has had a slot longest is paused for a while: its requests keep their place and their KV cache
and are only left out of some steps. vLLM's workers know such requests from pipeline parallelism,
where a request is not in every step either. Runs in the engine core's process; see arguments.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from packhorse.serve.engines.vllm.patches import probing

NAME = "lora_time_slicing"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.core.sched.scheduler": {
        "Scheduler.schedule": "sha256:23816e5a736d5648",
        "Scheduler.__init__": "names: lora_config running waiting",
    },
    "vllm.v1.core.sched.async_scheduler": {
        "AsyncScheduler._update_after_schedule": "sha256:b65c465c2fa0283f",
    },
    "vllm.v1.core.sched.request_queue": {
        "RequestQueue.remove_requests": "call(requests)",
        "RequestQueue.prepend_requests": "call(requests)",
    },
    "vllm.v1.request": {
        "Request.__init__": "names: lora_request next_decode_eligible_step",
    },
    "vllm.config.scheduler": {
        "SchedulerConfig.get_scheduler_cls": "names: scheduler_cls",
    },
}
WITHOUT = "No more adapters have requests in the engine than a batch has slots; others wait longer."

# Changing the adapter in a slot is a copy of its weights: seldom enough not to be felt, often
# enough that a reader of a stream does not feel the pauses.
STEPS = 8


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


class TimeSlices:
    """Which adapters have the slots. The adapter that waits longest gets the slot of the adapter
    that has had one longest.
    """

    def __init__(self, slots: int, steps: int = STEPS) -> None:
        """No adapter loses a slot before having had it for `steps` steps."""
        self._slots = slots
        self._steps = steps
        self._step = 0
        self._since: dict[int, int] = {}  # adapter with a slot: its first step there; oldest first
        self._waiting: deque[int] = deque()

    def of_step(self, working: Iterable[int]) -> set[int]:
        """The adapters of the next step, at most as many as there are slots. `working` are those
        with requests, in the order they came.
        """
        self._step += 1
        at_work = dict.fromkeys(working)
        self._since = {one: step for one, step in self._since.items() if one in at_work}
        self._waiting = deque(one for one in self._waiting if one in at_work)
        known = self._since.keys() | set(self._waiting)
        self._waiting.extend(one for one in at_work if one not in known)
        for _ in range(len(self._waiting)):  # an adapter that yields waits at least a step
            if len(self._since) == self._slots:
                longest = next(iter(self._since))
                if self._step - self._since[longest] < self._steps:
                    break
                del self._since[longest]
                self._waiting.append(longest)
            self._since[self._waiting.popleft()] = self._step
        return set(self._since)


class TimeSlicedScheduler(Scheduler):
    """vLLM's scheduler, with requests of paused adapters left out of a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slices = TimeSlices(self.lora_config.max_loras if self.lora_config else 0)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        requests = [*self.running, *self.waiting]
        working = dict.fromkeys(filter(None, map(_adapter, requests)))
        if not working:
            return super().schedule(*args, **kwargs)
        inside = self._slices.of_step(working)
        if len(inside) == len(working):
            return super().schedule(*args, **kwargs)
        outside = working.keys() - inside
        next_step = self.current_step + 1
        for request in self.running:
            if _adapter(request) in outside:
                request.next_decode_eligible_step = max(
                    request.next_decode_eligible_step, next_step + 1
                )
        held = [request for request in self.waiting if _adapter(request) in outside]
        self.waiting.remove_requests(held)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.waiting.prepend_requests(reversed(held))  # it puts the last one first


class TimeSlicedAsyncScheduler(TimeSlicedScheduler, AsyncScheduler):
    """The same for scheduling a step ahead."""


def scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What `scheduler_cls` names: vLLM calls it as it would a class."""
    is_async = vllm_config.scheduler_config.async_scheduling
    chosen = TimeSlicedAsyncScheduler if is_async else TimeSlicedScheduler
    return chosen(vllm_config=vllm_config, **kwargs)


def _adapter(request: Request) -> int | None:
    return request.lora_request.lora_int_id if request.lora_request else None
