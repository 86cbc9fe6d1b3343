"""What is refused at once because there is too much of it: counters, and no queue of our own.

Two steps, because the first must cost nothing and the second must know the prompt's length.
`enter` comes before a body is read: how many calls the server handles at once, and how many of one
key. `admit` comes after rendering and before the engine: how much the engine has, and what a key
may still use in this minute. An answer that needs no engine takes the first step only.

Why to refuse and not to wait: a request that waits for longer than it runs is worth little to its
caller, and holds memory for nothing. With half as many requests waiting as running, the wait is
about half of a request's own time, however many more are sent.

Called by `service`, in the event loop only: nothing here is locked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packhorse.serve import metrics
from packhorse.serve.errors import Overloaded
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.messages import Caller
from packhorse.serve.settings.sections import AdmissionSettings

# Until an engine says how much it holds at once.
DEFAULT_RUNNING = 256
DEFAULT_QUEUED_TOKENS = 256 * 1024
# Of what the engine holds at once: as much again may wait.
WAITING_SHARE = 0.5
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of the engine. `answer_tokens` is the most it may write, all choices
    together.
    """

    prompt_tokens: int
    answer_tokens: int
    choices: int = 1


class Place:
    """One call that is being handled. `leave` it once it has ended; twice does no harm."""

    __slots__ = ("_account", "_admission")

    def __init__(self, admission: Admission, account: _Account) -> None:
        self._admission: Admission | None = admission
        self._account = account

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.in_flight -= 1
            self._admission.calls_left.fresh += 1
            self._admission = None
            self._account.concurrent -= 1


class Ticket:
    """One request that the engine may have. Say when its answer has begun, and when it has ended;
    either twice does no harm.
    """

    __slots__ = ("_account", "_admission", "_demand", "_waits")

    def __init__(self, admission: Admission, account: _Account | None, demand: Demand) -> None:
        self._admission: Admission | None = admission
        self._account = account
        self._demand = demand
        self._waits = True

    def begun(self) -> None:
        """The engine has answered something."""
        if self._waits and self._admission is not None:
            self._waits = False
            self._admission.waiting -= 1
            self._admission.queued_tokens -= self._demand.prompt_tokens
            self._admission.tokens_left.fresh += self._demand.prompt_tokens

    def ended(self, used_tokens: int) -> None:
        """It is over, however; what it has used less than was reserved goes back to its key."""
        if self._admission is None:
            return
        self.begun()
        self._admission.running -= self._demand.choices
        self._admission.answers_left.fresh += self._demand.choices
        self._admission = None
        if self._account is not None:
            reserved = self._demand.prompt_tokens + self._demand.answer_tokens
            self._account.tokens.give_back(reserved - used_tokens)


class Admission:
    """The counters of one server."""

    def __init__(
        self,
        settings: AdmissionSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds."""
        self._settings = settings or AdmissionSettings()
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self.max_running = self._settings.max_running or DEFAULT_RUNNING
        self.max_queued_tokens = self._settings.max_queued_tokens or DEFAULT_QUEUED_TOKENS
        self.bodies = Bodies(self._settings.max_bodies_bytes)
        self.in_flight = 0
        self.running = 0
        self.waiting = 0
        self.queued_tokens = 0
        # How fast each limit's holders leave, for Retry-After.
        self.calls_left = _Rate(clock)
        self.answers_left = _Rate(clock)
        self.tokens_left = _Rate(clock)
        # Read when scraped: a gauge that is set costs a lock a request.
        metrics.WAITING.set_function(lambda: self.waiting)
        metrics.QUEUED_TOKENS.set_function(lambda: self.queued_tokens)

    def fit(self, max_num_seqs: int, kv_cache_tokens: int) -> None:
        """Set the limits that the settings leave open to what the engine holds at once, and half
        as much again that may wait. 0 is for what the engine does not know.
        """
        share = 1 + WAITING_SHARE
        if max_num_seqs and self._settings.max_running is None:
            self.max_running = math.ceil(max_num_seqs * share)
        if kv_cache_tokens and self._settings.max_queued_tokens is None:
            self.max_queued_tokens = math.ceil(kv_cache_tokens * share)

    def enter(self, caller: Caller) -> Place:
        """Count a call. Raises Overloaded; costs two comparisons."""
        if self.in_flight >= self._settings.max_in_flight:
            raise _refused(
                "in_flight",
                f"The server handles {self.in_flight} requests, its limit; try again soon.",
                self.calls_left.seconds_for(1),
            )
        account = self._account(caller)
        if caller.max_concurrent is not None and account.concurrent >= caller.max_concurrent:
            raise _refused(
                "key_concurrency",
                f"The key {caller.name!r} has {account.concurrent} requests running, its limit; "
                "wait until one has ended.",
                MIN_RETRY_S,
            )
        if not self.in_flight:
            self.calls_left.restart()
        self.in_flight += 1
        account.concurrent += 1
        return Place(self, account)

    def admit(
        self, caller: Caller, demands: Sequence[Demand], *, counts: bool = True
    ) -> list[Ticket]:
        """Let the requests of one call go to the engine, all or none. Raises Overloaded, which has
        then changed nothing.

        A call with no demand, because its answers are there already, counts as a request only; one
        that was admitted before, with another demand, `counts` as none.
        What asks for more than a whole limit is taken when there is nothing else, or it could never
        run.
        """
        tokens = answer_tokens = choices = 0
        for demand in demands:
            tokens += demand.prompt_tokens
            answer_tokens += demand.answer_tokens
            choices += demand.choices
        requests = 1 if counts else 0
        account = self._check_quotas(caller, requests, tokens + answer_tokens)
        if not demands:
            if account is not None:
                account.requests.take(requests)
            return []
        if self.running and self.running + choices > self.max_running:
            raise _refused(
                "running",
                f"The engine has {self.running} answers to write and this call asks for {choices}, "
                f"above the limit of {self.max_running}; try again soon.",
                self.answers_left.seconds_for(self.running + choices - self.max_running),
            )
        if self.queued_tokens and self.queued_tokens + tokens > self.max_queued_tokens:
            raise _refused(
                "queued_tokens",
                f"{self.queued_tokens} prompt tokens wait for the engine and this call has "
                f"{tokens}, above the limit of {self.max_queued_tokens}; try again soon.",
                self.tokens_left.seconds_for(self.queued_tokens + tokens - self.max_queued_tokens),
            )
        if account is not None:
            account.requests.take(requests)
            account.tokens.take(tokens + answer_tokens)
        if not self.running:
            self.answers_left.restart()
            self.tokens_left.restart()
        self.running += choices
        self.waiting += len(demands)
        self.queued_tokens += tokens
        return [Ticket(self, account, demand) for demand in demands]

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.get(caller.name)
        if account is None:
            account = self._accounts[caller.name] = _Account(self._clock())
        return account

    def _check_quotas(self, caller: Caller, requests: int, tokens: int) -> _Account | None:
        """The account to charge; None without quotas. Raises Overloaded with the time to wait."""
        if caller.tokens_per_minute is None and caller.requests_per_minute is None:
            return None
        now_s = self._clock()
        account = self._account(caller)
        account.requests.refill(caller.requests_per_minute, now_s)
        account.tokens.refill(caller.tokens_per_minute, now_s)
        wait_s = account.requests.seconds_until(1) if requests else 0.0
        if wait_s:
            raise _refused(
                "key_requests",
                f"The key {caller.name!r} has used its {caller.requests_per_minute} requests per "
                f"minute; wait {wait_s:.1f} s.",
                wait_s,
                clamp=False,
            )
        wait_s = account.tokens.seconds_until(tokens) if tokens else 0.0
        if wait_s:
            raise _refused(
                "key_tokens",
                f"This call may take {tokens} tokens, prompt and answer, and the key "
                f"{caller.name!r} has {max(0, int(account.tokens.level))} left of its "
                f"{caller.tokens_per_minute} per minute; wait {wait_s:.1f} s, or lower max_tokens.",
                wait_s,
                clamp=False,
            )
        return account


def _refused(reason: str, message: str, retry_after_s: float, *, clamp: bool = True) -> Overloaded:
    """An estimate is clamped; a quota's wait is known."""
    metrics.ADMISSION_REFUSALS.labels(reason).inc()
    if clamp:
        retry_after_s = min(max(retry_after_s, MIN_RETRY_S), MAX_RETRY_S)
    return Overloaded(message, retry_after_s=retry_after_s)


class _Account:
    """What one key has running, and has left."""

    __slots__ = ("concurrent", "requests", "tokens")

    def __init__(self, now_s: float) -> None:
        self.concurrent = 0
        self.requests = _Bucket(now_s)
        self.tokens = _Bucket(now_s)


class _Bucket:
    """A quota: fills at its rate up to one minute's worth, and starts full.

    Something larger than a whole minute's worth is let through when it is full, and leaves a debt.
    """

    __slots__ = ("_per_minute", "_refilled_s", "level")

    def __init__(self, now_s: float) -> None:
        self._per_minute = math.inf
        self._refilled_s = now_s
        self.level = math.inf

    def refill(self, per_minute: int | None, now_s: float) -> None:
        """Add what has come since the last call. The rate may be another one than before."""
        if per_minute is None:
            self._per_minute = self.level = math.inf
        elif self._per_minute == math.inf:
            self._per_minute = self.level = per_minute
        else:
            self._per_minute = per_minute
            self.give_back((now_s - self._refilled_s) * per_minute / 60)
        self._refilled_s = now_s

    def seconds_until(self, amount: int) -> float:
        """0 when it may be taken now."""
        missing = min(amount, self._per_minute) - self.level
        # Who has waited as told must not fail on the last bit of a float.
        return 0.0 if missing < 1e-6 else missing * 60 / self._per_minute

    def take(self, amount: int) -> None:
        self.level -= amount

    def give_back(self, amount: float) -> None:
        self.level = min(self.level + amount, self._per_minute)


class _Rate:
    """How fast something leaves, over about the last ten seconds of being busy.

    Something leaves with every request, and the rate is asked for with a refusal only: so `fresh`
    is just counted up, and taken as spread evenly over the time since it was last looked at.
    """

    __slots__ = ("_amount", "_any", "_clock", "_looked_s", "_since_s", "fresh")

    WINDOW_S = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget what was, because there was nothing to do for a while."""
        self._since_s = self._looked_s = self._clock()
        self._amount = 0.0
        self._any = False
        self.fresh = 0

    def seconds_for(self, amount: int) -> float:
        """How long until so much more has left; infinite when nothing leaves any more, and 0 while
        nothing ever has, because then nothing is known.
        """
        now_s = self._clock()
        passed = (now_s - self._looked_s) / self.WINDOW_S
        if passed > 0:
            # What is seen fades by e in each window; what is fresh has faded in part already.
            faded = -math.expm1(-passed)
            self._amount = self._amount * (1 - faded) + self.fresh * faded / passed
            self._any = self._any or self.fresh > 0
            self._looked_s = now_s
            self.fresh = 0
        if not self._amount:
            return math.inf if self._any else 0.0
        # Young, it has seen less than a window: the same fading, summed over its age.
        seen_s = self.WINDOW_S * -math.expm1((self._since_s - now_s) / self.WINDOW_S)
        return amount * seen_s / self._amount
