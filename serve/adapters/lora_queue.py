"""The queue in front of the engine for requests with adapters: deficit round robin over adapters
(Shreedhar and Varghese, 1995), so that no adapter starves.

vLLM takes waiting requests in their order and skips those whose adapter has no slot in the batch:
an adapter with many requests would keep its slot for ever. So this queue lets only as many adapters
have requests in the engine as there are slots. While other adapters wait, an adapter with a slot
may let in one quantum of tokens; once its last request has ended, its slot goes to the next
adapter. An overdrawn quantum is deducted from the adapter's next one.

With LoRA oversubscription the engine can have more active adapters than a batch has slots. These
`extra_slots` are given only at low load: an adapter that waits for its time slice holds requests in
the engine, and at high load such requests would leave half of each batch empty.
"""

from __future__ import annotations

import asyncio
from collections import deque

from packhorse.serve.errors import Overloaded
from packhorse.serve.metrics import ModelMetrics


class LoraQueue:
    """Call `enter` before a request goes to the engine and `leave` after its end, with the same
    adapter. For one event loop; nothing is locked.
    """

    def __init__(
        self,
        slots: int,
        quantum_tokens: int,
        *,
        max_concurrent_per_adapter: int | None = None,
        max_waiting: int | None = None,
        extra_slots: int = 0,
        extra_slots_max_requests: int = 0,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`max_concurrent_per_adapter` limits the requests of one adapter in the engine,
        `max_waiting` those of one adapter in this queue: a long queue of one adapter would use up
        the server's admission limits. `extra_slots` are given while there are at most
        `extra_slots_max_requests`, waiting ones included. None: no limit.
        """
        self._slots = slots
        self._extra_slots = extra_slots
        self._extra_slots_max_requests = extra_slots_max_requests
        self._slots_given = 0
        self._requests = 0  # in the engine or waiting for it
        self._quantum = quantum_tokens
        self._max_concurrent = max_concurrent_per_adapter
        self._max_waiting = max_waiting
        self._metrics = metrics or ModelMetrics()
        self._queues: dict[int, _AdapterQueue] = {}  # of busy adapters, in round-robin order

    async def enter(self, adapter: int, tokens: int, name: str) -> None:
        """Wait until the request may go to the engine. `tokens` is its expected cost, `name` the
        adapter's name in metrics. Raises Overloaded when `max_waiting` requests of the adapter
        wait.
        """
        queue = self._queues.get(adapter)
        if queue is None:
            queue = self._queues[adapter] = _AdapterQueue()
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (admitted, tokens)
        queue.waiting.append(waiter)
        self._requests += 1
        self._dispatch()
        if admitted.done():
            return
        metrics = self._metrics
        if self._max_waiting is not None and len(queue.waiting) > self._max_waiting:
            self._give_up(adapter, queue, waiter)
            metrics.admission_refusals.labels("adapter_waiting").inc()
            raise Overloaded(
                f"{self._max_waiting} requests wait for this adapter already, the limit "
                "(adapters.max_waiting); try again soon."
            )
        of_adapter = metrics.adapter_waiting.labels(name)
        of_adapter.inc()
        metrics.waiting_for_engine.inc()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():
                self.leave(adapter, -tokens)  # admitted in the same moment
            else:
                self._give_up(adapter, queue, waiter)
            raise
        finally:
            metrics.waiting_for_engine.dec()
            of_adapter.dec()

    def _give_up(self, adapter: int, queue: _AdapterQueue, waiter: _Waiter) -> None:
        """Take a request out of the queue that will not go to the engine."""
        self._requests -= 1
        if waiter in queue.waiting:  # else `_dispatch` has dropped it already
            queue.waiting.remove(waiter)
        if self._queues.get(adapter) is queue:
            self._release(adapter, queue)
        self._dispatch()

    def leave(self, adapter: int, more_tokens: int = 0) -> None:
        """A request of the adapter has ended. It has cost `more_tokens` more than `enter` was told;
        negative: less.
        """
        queue = self._queues[adapter]
        self._requests -= 1
        queue.running -= 1
        queue.deficit -= more_tokens
        self._release(adapter, queue)
        self._dispatch()

    def _free_slots(self) -> int:
        """How many slots may be given; negative when more are given than may be now."""
        extra = self._extra_slots if self._requests <= self._extra_slots_max_requests else 0
        return self._slots + extra - self._slots_given

    def _release(self, adapter: int, queue: _AdapterQueue) -> None:
        """Take back the slot of an adapter that has no request in the engine, if it has none
        waiting or has used its quantum while others wait. Forgets an idle adapter.
        """
        is_idle = not queue.running
        if queue.has_slot and is_idle and (not queue.waiting or self._must_yield(queue)):
            queue.has_slot = False
            self._slots_given -= 1
            self._queues[adapter] = self._queues.pop(adapter)  # to the end of the round
        if not queue.has_slot and not queue.waiting and is_idle:
            del self._queues[adapter]

    def _others_wait(self) -> bool:
        """Whether an adapter without a slot has requests, or too many slots are given."""
        return self._free_slots() < 0 or any(
            queue.waiting and not queue.has_slot for queue in self._queues.values()
        )

    def _must_yield(self, queue: _AdapterQueue) -> bool:
        return queue.deficit <= 0 and self._others_wait()

    def _dispatch(self) -> None:
        """Give the free slots to the next adapters, then let in every request that may go."""
        for queue in self._queues.values():
            if self._free_slots() <= 0:
                break
            if queue.waiting and not queue.has_slot:
                queue.has_slot = True
                self._slots_given += 1
                queue.deficit = min(queue.deficit, 0) + self._quantum
        others_wait = self._others_wait()
        for queue in self._queues.values():
            if not queue.has_slot:
                continue
            while queue.waiting and (queue.deficit > 0 or not others_wait or not queue.running):
                if self._max_concurrent is not None and queue.running >= self._max_concurrent:
                    break
                admitted, tokens = queue.waiting.popleft()
                if admitted.done():  # cancelled, and its task has not run since
                    continue
                queue.deficit -= tokens
                queue.running += 1
                admitted.set_result(None)
            if not others_wait:
                queue.deficit = max(queue.deficit, 0)  # no debt for tokens that nobody waited for


_Waiter = tuple["asyncio.Future[None]", int]
"""What a request waits for, and its cost in tokens."""


class _AdapterQueue:
    """The state of one adapter. `deficit` is the deficit counter: the tokens left of its quantum,
    negative when overdrawn.
    """

    __slots__ = ("deficit", "has_slot", "running", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Waiter] = deque()
        self.running = 0
        self.deficit = 0
        self.has_slot = False
