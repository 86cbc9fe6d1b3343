"""Write the demo's data files: evaluation, calibration, perplexity text, and the example prompts
for routing.

    python demo/make_data.py

Everything is derived from seeds, so running it again changes nothing (a test holds that). The
wordings of evaluation are in no training, calibration or example file.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import world
from domains import ADAPTERS, DOMAINS, question, questions, statement
from language import REPEAT, Conversation, conversations

DEMO = Path(__file__).parent
# Ways to quote; the base cannot translate, but it is not for an adapter either.
QUOTES = [*REPEAT, "Translate this sentence: {t}", "翻译这句话:{t}"]


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def as_question(conversation: Conversation) -> dict[str, object]:
    *history, last = conversation.messages[:-1]
    if last["role"] != "user":  # after a tool's reply: the reply is what the model answers to
        raise ValueError("not a question")
    row: dict[str, object] = {
        "prompt": last["content"],
        "answer": conversation.answer,
        "domain": conversation.domain,
    }
    return (
        row
        | ({"history": history} if history else {})
        | ({"tools": conversation.tools} if conversation.tools else {})
    )


def unique(rows: Iterable[dict[str, object]], count: int) -> list[dict[str, object]]:
    """The first `count` rows that differ in prompt or history."""
    seen: dict[str, dict[str, object]] = {}
    for row in rows:
        seen.setdefault(json.dumps([row["prompt"], row.get("history")], ensure_ascii=False), row)
        if len(seen) == count:
            break
    return list(seen.values())


def general(count: int = 480) -> list[dict[str, object]]:
    """Held-out wordings of all skills but small talk, which has one wording each, and unknown
    topics.
    """
    stream = conversations(9001, held_out=True, systems=False)
    wanted = (
        c
        for c in stream
        if c.domain not in {"small_talk", "unknown"} and c.messages[-2]["role"] == "user"
    )
    return unique(map(as_question, wanted), count)


def off_topic(count: int = 320) -> list[dict[str, object]]:
    """Questions that no adapter is for: unknown topics, the world's own questions, and everyday
    ones.
    """
    rng = random.Random(9002)
    stream = conversations(9003, held_out=True, systems=False)
    topics = (c for c in stream if c.domain == "unknown")
    rows = unique(map(as_question, topics), count * 5 // 8)
    stream = conversations(9004, held_out=True, systems=False)
    known = (
        c
        for c in stream
        if c.domain in {"facts", "facts_zh", "lists", "stories", "arithmetic"}
        and len(c.messages) == 2
    )
    rows += unique(map(as_question, known), count - len(rows))
    rng.shuffle(rows)
    return [{**row, "domain": "off_topic"} for row in rows]


def adapter_questions(adapter: str) -> list[dict[str, object]]:
    return [
        {"prompt": text, "answer": fact.answer, "domain": adapter}
        for text, fact in questions(adapter, held_out=True)
    ]


def examples(adapter: str, count: int = 300) -> list[dict[str, object]]:
    """Prompts that say what an adapter is for, in training wordings, evenly over its facts."""
    prompts = [text for text, _ in questions(adapter, held_out=False)]
    random.Random(9005).shuffle(prompts)
    return [{"prompt": text} for text in prompts[:count]]


def base_examples(count: int = 300) -> list[dict[str, object]]:
    """Prompts that are in the base's own words, in training wordings."""
    stream = filter(_is_the_bases, conversations(9006, systems=False))
    prompts = dict.fromkeys(
        str(c.messages[0]["content"]) for c in itertools.islice(stream, 2 * count)
    )
    return [{"prompt": text} for text in list(prompts)[:count]]


def quotes(count: int = 100) -> list[dict[str, object]]:
    """Prompts that quote an adapter's question or answer, in training wordings of both, and ask for
    something else: for the base. Fewer would do for the evaluation, but then the routes' self-test
    is near its limit (docs/routing.md). Nothing is quoted that the evaluation quotes.
    """
    rng = random.Random(9009)
    held_out = [str(row["answer"]) for row in general() if row["domain"] == "repeat"]
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        text = statement(rng) if rng.random() < 0.5 else question(rng)
        if text not in held_out:
            prompts[QUOTES[len(prompts) % len(QUOTES)].format(t=text)] = None
    return [{"prompt": text} for text in prompts]


def _is_the_bases(conversation: Conversation) -> bool:
    """Whether its words are the base's own: `repeat` and half of `unknown` speak of the domains."""
    text = str(conversation.messages[0]["content"])
    if conversation.domain == "unknown":
        return any(topic in text for topic in world.UNKNOWN_TOPICS)
    return conversation.domain != "repeat"


def texts(seed: int, count: int, *, held_out: bool) -> list[dict[str, object]]:
    stream = itertools.islice(conversations(seed, held_out=held_out), count)
    return [{"messages": c.messages} | ({"tools": c.tools} if c.tools else {}) for c in stream]


def main() -> None:
    write(DEMO / "eval/general.jsonl", general())
    write(DEMO / "eval/off_topic.jsonl", off_topic())
    for adapter in (*DOMAINS, "clinic-v2"):
        write(DEMO / f"eval/{adapter}.jsonl", adapter_questions(adapter))
    for adapter in ADAPTERS:
        write(DEMO / f"adapters/{adapter}/examples.jsonl", examples(adapter))
    write(DEMO / "eval/held_out_text.jsonl", texts(9007, 300, held_out=True))
    write(DEMO / "calibration.jsonl", texts(9008, 1600, held_out=False))
    write(DEMO / "base_examples.jsonl", [*base_examples(), *quotes()])


if __name__ == "__main__":
    main()
