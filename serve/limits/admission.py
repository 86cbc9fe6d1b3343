"""Admission control: counters and limits above which a request is refused at once. It has no queue.

There are two steps, because the first must be cheap and the second must know the prompt's length.
`enter` runs before a body is read: it limits the calls in flight, of the server and of each key.
`admit` runs after rendering and before the engine: it limits what the engine holds, and what a key
may use per minute. A request that is answered from the cache takes only the first step.

Requests are refused rather than queued, because a request that waits longer than it runs is worth
little to its caller and holds memory meanwhile. With half as many requests waiting as running, the
wait is about half of a request's own duration, at any load.

Called by `pipeline`, in the event loop only: nothing here is locked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packhorse.serve.errors import Overloaded, QuotaSpent
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.messages import Caller
from packhorse.serve.metrics import ModelMetrics, ServerMetrics
from packhorse.serve.settings.admission import AdmissionSettings

# Limits until an engine has told its capacity (`fit`).
DEFAULT_IN_ENGINE = 256
DEFAULT_QUEUED_TOKENS = 256 * 1024
# This share of what the engine runs at once may wait in addition.
WAITING_SHARE = 0.5
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
# What a key's next answer is expected to have, of token quotas: at first, and how much of each
# answer goes into the mean of those before.
FIRST_ANSWER_TOKENS = 256.0
NEWEST_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request may cost the engine. `answer_tokens` is the most that all its choices
    together may have; a quota is charged with what they are expected to have, and settled at the
    end.
    """

    prompt_tokens: int
    answer_tokens: int
    choices: int = 1


class InFlightPermit:
    """The right of one call to be handled. `leave` gives it back, and may be called twice."""

    __slots__ = ("_account", "_admission", "_uses_engine")

    def __init__(self, admission: Admission, account: _Account, *, uses_engine: bool) -> None:
        self._admission: Admission | None = admission
        self._account = account
        self._uses_engine = uses_engine

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.in_flight -= 1
            self._admission.in_flight_for_engine -= self._uses_engine
            self._admission.calls_rate.fresh += 1
            self._admission = None
            self._account.concurrent -= 1


class EnginePermit:
    """The right of one request to the engine. Call `begun` at its first chunk and `ended` at its
    end; both may be called twice.
    """

    __slots__ = ("_account", "_admission", "_cost", "_reserved", "_waits")

    def __init__(
        self, admission: Admission, account: _Account | None, cost: Cost, reserved: int
    ) -> None:
        """`reserved` are the tokens that its key's quota was charged with."""
        self._admission: Admission | None = admission
        self._account = account
        self._cost = cost
        self._reserved = reserved
        self._waits = True

    def begun(self) -> None:
        """The engine has returned the first chunk: the request does not wait any more."""
        if self._waits and self._admission is not None:
            self._waits = False
            self._admission.waiting -= 1
            self._admission.queued_tokens -= self._cost.prompt_tokens
            self._admission.tokens_rate.fresh += self._cost.prompt_tokens

    def ended(self, used_tokens: int) -> None:
        """The request has ended, in any way. Its key's quota is charged with what was used instead
        of what was reserved, which may leave a debt.
        """
        if self._admission is None:
            return
        self.begun()
        self._admission.running -= self._cost.choices
        self._admission.answers_rate.fresh += self._cost.choices
        self._admission = None
        if self._account is not None:
            self._account.tokens.give_back(self._reserved - used_tokens)
            if used_tokens:
                answered = max(0, used_tokens - self._cost.prompt_tokens)
                self._account.learn(answered / self._cost.choices)


class Admission:
    """The counters of one model, and the accounts of its callers."""

    def __init__(
        self,
        settings: AdmissionSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        metrics: ModelMetrics | None = None,
        server_metrics: ServerMetrics | None = None,
    ) -> None:
        """`clock` gives seconds. `server_metrics` counts the bytes of bodies."""
        self._settings = settings or AdmissionSettings()
        self._clock = clock
        self._metrics = metrics or ModelMetrics()
        self._accounts: dict[str, _Account] = {}
        self.max_in_engine = self._settings.max_in_engine or DEFAULT_IN_ENGINE
        self.max_queued_tokens = self._settings.max_queued_tokens or DEFAULT_QUEUED_TOKENS
        self.bodies = Bodies(
            self._settings.max_bodies_bytes, metrics=server_metrics, model_metrics=self._metrics
        )
        self.in_flight = 0
        self.in_flight_for_engine = 0
        self.entered: Callable[[], None] | None = None
        """Told of each call for the engine that is let in, by the task that runs."""
        self.running = 0
        self.waiting = 0
        self.queued_tokens = 0
        # How fast calls end, answers end and prompt tokens are read: estimates for Retry-After.
        self.calls_rate = _Rate(clock)
        self.answers_rate = _Rate(clock)
        self.tokens_rate = _Rate(clock)
        # Read at each scrape: setting a gauge would take a lock for each request.
        self._metrics.waiting.set_function(lambda: self.waiting)
        self._metrics.queued_tokens.set_function(lambda: self.queued_tokens)

    def fit(self, max_num_seqs: int, kv_cache_tokens: int) -> None:
        """Set the limits that the settings leave open to 1.5 times the engine's capacity. 0: the
        engine does not know it, and the default stays.
        """
        share = 1 + WAITING_SHARE
        if max_num_seqs and self._settings.max_in_engine is None:
            self.max_in_engine = math.ceil(max_num_seqs * share)
        if kv_cache_tokens and self._settings.max_queued_tokens is None:
            self.max_queued_tokens = math.ceil(kv_cache_tokens * share)

    def enter(self, caller: Caller, *, uses_engine: bool = True) -> InFlightPermit:
        """Admit a call to be read. Raises Overloaded. Costs two comparisons."""
        if self.in_flight >= self._settings.max_in_flight:
            raise self._refused(
                "in_flight",
                f"The server handles {self.in_flight} requests, its limit; try again soon.",
                self.calls_rate.seconds_for(1),
            )
        account = self._account(caller)
        if caller.max_concurrent is not None and account.concurrent >= caller.max_concurrent:
            raise self._refused(
                "key_concurrency",
                f"The key {caller.name!r} has {account.concurrent} requests running, its limit; "
                "wait until one has ended.",
                MIN_RETRY_S,
            )
        if not self.in_flight:
            self.calls_rate.restart()
        self.in_flight += 1
        account.concurrent += 1
        if uses_engine:
            self.in_flight_for_engine += 1
            if self.entered is not None:
                self.entered()
        return InFlightPermit(self, account, uses_engine=uses_engine)

    def admit(
        self, caller: Caller, costs: Sequence[Cost], *, counts: bool = True
    ) -> list[EnginePermit]:
        """Admit the requests of one call to the engine, all or none of them. Raises Overloaded, and
        changes nothing then.

        A call without costs, whose answers come from the cache, counts towards its key's requests
        only. A call that was admitted before does not count towards them again: `counts` False.
        A call above a whole limit is admitted when the engine has nothing else; else it could never
        run.
        """
        tokens = choices = 0
        for cost in costs:
            tokens += cost.prompt_tokens
            choices += cost.choices
        requests = 1 if counts else 0
        account = self._quotas_of(caller)
        reserved = [0] * len(costs)
        if account is not None:
            reserved = [cost.prompt_tokens + account.expected(cost) for cost in costs]
            self._check_quotas(caller, account, requests, sum(reserved))
        if not costs:
            if account is not None:
                account.requests.take(requests)
            return []
        if self.running and self.running + choices > self.max_in_engine:
            raise self._full(choices)
        if self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            raise self._queue_full(tokens)
        if account is not None:
            account.requests.take(requests)
            account.tokens.take(sum(reserved))
        if not self.running:
            self.answers_rate.restart()
            self.tokens_rate.restart()
        self.running += choices
        self.waiting += len(costs)
        self.queued_tokens += tokens
        return [
            EnginePermit(self, account, cost, of_cost)
            for cost, of_cost in zip(costs, reserved, strict=True)
        ]

    def check_room(self, caller: Caller) -> None:
        """Whether one more request would be admitted at all: asked before its prompt is rendered,
        so that what a full server refuses costs it little. Raises what `admit` would, and takes
        nothing.
        """
        if self.running and self.running + 1 > self.max_in_engine:
            raise self._full(1)
        if self.queued_tokens and self.queued_tokens + 1 > self.max_queued_tokens:
            raise self._queue_full(1)
        if (account := self._quotas_of(caller)) is not None:
            self._check_quotas(caller, account, 1, 1)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller.name)
        if account is None:
            account = self._accounts[caller.name] = _Account(self._clock())
        return account

    def _quotas_of(self, caller: Caller) -> _Account | None:
        """The account to charge, up to date; None for a key without quotas."""
        if caller.tokens_per_minute is None and caller.requests_per_minute is None:
            return None
        now_s = self._clock()
        account = self._account(caller)
        account.requests.refill(caller.requests_per_minute, now_s)
        account.tokens.refill(caller.tokens_per_minute, now_s)
        return account

    def _check_quotas(self, caller: Caller, account: _Account, requests: int, tokens: int) -> None:
        """Raises QuotaSpent with the time to wait."""
        wait_s = account.requests.seconds_until(1) if requests else 0.0
        if wait_s:
            raise self._refused(
                "key_requests",
                f"The key {caller.name!r} has used its {caller.requests_per_minute} requests per "
                f"minute; wait {wait_s:.1f} s.",
                wait_s,
                clamp=False,
            )
        wait_s = account.tokens.seconds_until(tokens) if tokens else 0.0
        if wait_s:
            raise self._refused(
                "key_tokens",
                f"This call is expected to take {tokens} tokens, prompt and answer, and the key "
                f"{caller.name!r} has {max(0, int(account.tokens.level))} left of its "
                f"{caller.tokens_per_minute} per minute; wait {wait_s:.1f} s, or lower max_tokens.",
                wait_s,
                clamp=False,
            )

    def _full(self, choices: int) -> Overloaded:
        return self._refused(
            "running",
            f"The engine has {self.running} answers to write and this call asks for {choices}, "
            f"above the limit of {self.max_in_engine}; try again soon.",
            self.answers_rate.seconds_for(self.running + choices - self.max_in_engine),
        )

    def _queue_full(self, tokens: int) -> Overloaded:
        return self._refused(
            "queued_tokens",
            f"{self.queued_tokens} prompt tokens wait for the engine and this call has {tokens} or "
            f"more, above the limit of {self.max_queued_tokens}; try again soon.",
            self.tokens_rate.seconds_for(self.queued_tokens + tokens - self.max_queued_tokens),
        )

    def _refused(
        self, reason: str, message: str, retry_after_s: float, *, clamp: bool = True
    ) -> Overloaded:
        """The error of a counted refusal. `clamp`: retry_after_s is an estimate, not a quota's
        known wait.
        """
        self._metrics.admission_refusals.labels(reason).inc()
        if clamp:
            retry_after_s = min(max(retry_after_s, MIN_RETRY_S), MAX_RETRY_S)
        kind = QuotaSpent if reason.startswith("key_") else Overloaded
        return kind(message, retry_after_s=retry_after_s)


class _Account:
    """One key's concurrent calls, the quotas that it has left, and how long its answers are."""

    __slots__ = ("_answer_tokens", "concurrent", "requests", "tokens")

    def __init__(self, now_s: float) -> None:
        self.concurrent = 0
        self.requests = _Bucket(now_s)
        self.tokens = _Bucket(now_s)
        self._answer_tokens = FIRST_ANSWER_TOKENS

    def expected(self, cost: Cost) -> int:
        """Tokens that all choices together are likely to have: most requests allow many more."""
        return min(cost.answer_tokens, math.ceil(self._answer_tokens * cost.choices))

    def learn(self, answer_tokens: float) -> None:
        """A choice has had so many."""
        self._answer_tokens += (answer_tokens - self._answer_tokens) * NEWEST_SHARE


class _Bucket:
    """A token bucket: it refills at its rate, holds one minute's worth at most, and starts full.

    An amount above one minute's worth may be taken when the bucket is full, and leaves a debt.
    """

    __slots__ = ("_per_minute", "_refilled_s", "level")

    def __init__(self, now_s: float) -> None:
        self._per_minute = math.inf
        self._refilled_s = now_s
        self.level = math.inf

    def refill(self, per_minute: int | None, now_s: float) -> None:
        """Add what has accrued since the last call. The rate may have changed since."""
        if per_minute is None:
            self._per_minute = self.level = math.inf
        elif self._per_minute == math.inf:
            self._per_minute = self.level = per_minute
        else:
            self._per_minute = per_minute
            self.give_back((now_s - self._refilled_s) * per_minute / 60)
        self._refilled_s = now_s

    def seconds_until(self, amount: int) -> float:
        """How long until the amount may be taken; 0: now."""
        missing = min(amount, self._per_minute) - self.level
        # A caller that has waited the time it was told must not fail by a rounding error.
        return 0.0 if missing < 1e-6 else missing * 60 / self._per_minute

    def take(self, amount: int) -> None:
        self.level -= amount

    def give_back(self, amount: float) -> None:
        self.level = min(self.level + amount, self._per_minute)


class _Rate:
    """An exponentially weighted rate over about the last ten busy seconds.

    Amounts come with every request and the rate is read only at a refusal. So amounts are added to
    `fresh`, and a read takes them as spread evenly over the time since the last read.
    """

    __slots__ = ("_amount", "_any", "_clock", "_looked_s", "_since_s", "fresh")

    WINDOW_S = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget the past; called when work begins after an idle time."""
        self._since_s = self._looked_s = self._clock()
        self._amount = 0.0
        self._any = False
        self.fresh = 0

    def seconds_for(self, amount: int) -> float:
        """How long the amount takes at this rate; infinite when the rate has fallen to 0, and 0
        while there was no amount yet, because then nothing is known.
        """
        now_s = self._clock()
        passed = (now_s - self._looked_s) / self.WINDOW_S
        if passed > 0:
            # Past amounts fade by e in each window; fresh ones have faded in part already.
            faded = -math.expm1(-passed)
            self._amount = self._amount * (1 - faded) + self.fresh * faded / passed
            self._any = self._any or self.fresh > 0
            self._looked_s = now_s
            self.fresh = 0
        if not self._amount:
            return math.inf if self._any else 0.0
        # Shortly after a restart there is less than a window: the same fading, over that time.
        seen_s = self.WINDOW_S * -math.expm1((self._since_s - now_s) / self.WINDOW_S)
        return amount * seen_s / self._amount
