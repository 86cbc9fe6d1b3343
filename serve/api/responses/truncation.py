"""`truncation: auto`: the oldest items of a conversation are left out until it fits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from packhorse.serve.api.responses.items import CALLS, OUTPUTS, InputItem
from packhorse.serve.errors import Invalid

# What is left for an answer without max_output_tokens, as a share of the context; and the most.
ANSWER_SHARE, MAX_ANSWER_SHARE = 1 / 8, 1 / 2
TOO_LONG = "context_length_exceeded"


async def fitting(
    items: list[InputItem],
    tokens_of: Callable[[Sequence[InputItem]], Awaitable[int]],
    max_model_len: int,
    max_output_tokens: int | None,
) -> list[InputItem]:
    """The items without the oldest ones, as few of them as possible. System messages stay, and the
    rest begins with a user's message where one is left, never with the output of a call that is
    not there. The shortest form is returned when even that does not fit. `tokens_of` counts the
    tokens of a conversation, and is called a logarithm of their number often.
    """
    most = int(max_model_len * MAX_ANSWER_SHARE)
    answer = int(max_model_len * ANSWER_SHARE)
    if max_output_tokens is not None and max_output_tokens > 0:
        answer = min(max_output_tokens, most)
    room = max_model_len - answer

    async def fits(kept: Sequence[InputItem]) -> bool:
        try:
            return await tokens_of(kept) <= room
        except Invalid as error:
            if error.openai_code == TOO_LONG:
                return False
            raise

    if await fits(items):
        return items
    starts = _starts(items)
    low, high = 0, len(starts)  # the first start that fits is in [low, high)
    while low < high:
        middle = (low + high) // 2
        if await fits(_from(items, starts[middle])):
            high = middle
        else:
            low = middle + 1
    return _from(items, starts[min(low, len(starts) - 1)]) if starts else items


def _starts(items: Sequence[InputItem]) -> list[int]:
    """Where a shorter conversation may begin, the longest first."""
    users = [
        place for place, item in enumerate(items) if item.type == "message" and item.role == "user"
    ]
    starts = users[1:]
    last_user = users[-1] if users else -1
    # Within the last turn, when it alone is too long: a call stays with its output.
    opened: set[str | None] = set()
    for place, item in enumerate(items):
        if place <= last_user:
            continue
        if item.type in OUTPUTS:
            opened.discard(item.call_id)
        elif not opened and place > max(last_user, 0) and not _is_system(item):
            starts.append(place)
        if item.type in CALLS:
            opened.add(item.call_id)
    return starts


def _from(items: Sequence[InputItem], start: int) -> list[InputItem]:
    """The items from `start` on, and the system messages before."""
    return [*(item for item in items[:start] if _is_system(item)), *items[start:]]


def _is_system(item: InputItem) -> bool:
    return item.type == "message" and item.role in ("system", "developer")
