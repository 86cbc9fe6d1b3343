"""Log-probabilities as answers report them: how many alternatives, under which names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from packhorse.serve.messages import TokenLogprob


class ReportedLogprob(NamedTuple):
    """The log-probability of one token, and those of its most likely alternatives."""

    name: str
    """The token's text, or `token_id:N` where the request asks for ids."""
    text: str
    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    rank: int | None
    """The token's place by probability, from 1."""
    top: tuple[ReportedLogprob, ...] = ()
    """The most likely tokens in this place, best first; theirs are empty."""


class LogprobOptions(NamedTuple):
    """What a request says about log-probabilities."""

    num_top: int
    """Alternatives per token; -1: all that the engine reported."""
    as_ids: bool = False

    def reported(self, entries: Iterable[TokenLogprob]) -> list[ReportedLogprob]:
        return [
            ReportedLogprob(*self._own(entry), tuple(map(self._alternative, self._best(entry))))
            for entry in entries
        ]

    def _best(self, entry: TokenLogprob) -> Sequence[TokenLogprob]:
        return entry.top if self.num_top < 0 else entry.top[: self.num_top]

    def _alternative(self, entry: TokenLogprob) -> ReportedLogprob:
        return ReportedLogprob(*self._own(entry))

    def _own(self, entry: TokenLogprob) -> tuple[str, str, int, float | None, int | None]:
        name = f"token_id:{entry.token_id}" if self.as_ids else entry.token
        return name, entry.token, entry.token_id, entry.logprob, entry.rank


ALL = LogprobOptions(-1)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens, for a request that asks for them."""

    entries: Sequence[ReportedLogprob] | None
    """None when the engine reported none."""


def prompt_logprobs(
    requested: int | None, entries: Sequence[TokenLogprob] | None
) -> PromptLogprobs | None:
    """None when the request does not ask for them. The engine has cut `entries` to the number
    requested; they are named by their text in every case.
    """
    if requested is None:
        return None
    return PromptLogprobs(None if entries is None else ALL.reported(entries))


class OffsetLogprobs(NamedTuple):
    """Log-probabilities of a piece of a completion, with each token's place in the whole text."""

    entries: Sequence[ReportedLogprob]
    text_offsets: Sequence[int]
    """Characters (Unicode code points) before each token, over all pieces of its choice."""
