"""What routing costs and how well it decides: CPU per decision and of training at 50 adapters, and
the demo's table.

    python bench/routing.py

- decisions: prompts of 300 characters, none of them in the examples, by a table of 50 made-up
  adapters with 300 examples of 300 characters each and 300 of none. No prompt is asked twice.
  "cold" is with words that were never met before, all of them, "whole" with the cascade around
  it: 20 rules of keywords and expressions that do not match.
- training of the same, in its child process: CPU of the child, and wall time.
- demo: a table of the three adapters' examples, asked the evaluation files, whose wordings are in
  no example, and 400 prompts that quote an adapter in ways that no example has. Nothing was tuned
  on these.

CPU is this process's own (`time.process_time`); figures are medians of several rounds. Ends in one
JSON line.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladder import progress

from packhorse.serve.routing.cascade import Cascade
from packhorse.serve.routing.config import parse_routes
from packhorse.serve.routing.examples import read_examples
from packhorse.serve.routing.learned import Table
from packhorse.serve.routing.rollout import build
from packhorse.serve.routing.train import Job, Trained
from packhorse.serve.routing.train_process import train

DEMO = Path(__file__).resolve().parent.parent / "demo"
NAMES = ("clinic", "ledger", "code")
UNSEEN_QUOTES = (
    "Spell this backwards: {t}", 'Is the grammar right in "{t}"?', "Translate to French: {t}",
    "Quote: {t}", "Which word comes first here: {t}", "请重复:{t}", "Rewrite politely: {t}",
    'Somebody wrote "{t}" on the wall.',
)  # fmt: skip
ADAPTERS, EXAMPLES, CHARACTERS = 50, 300, 300
ROUNDS, DECISIONS = 7, 300
GOAL_US, GOAL_TRAIN_S = 500.0, 60.0
GOAL_RIGHT, GOAL_WRONG, GOAL_SENT = 0.97, 0.01, 0.03


class Language:
    """Made-up words: 3000 that all adapters share, used unevenly as in a real language, and 80 of
    each adapter's own, which are a quarter of its prompts.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
        self._shared = [self.word() for _ in range(3000)]
        self._use = [1 / (rank + 1) for rank in range(3000)]
        self._own = [[self.word() for _ in range(80)] for _ in range(ADAPTERS)]

    def word(self) -> str:
        return "".join(self._rng.choices(self._syllables, k=self._rng.randint(1, 4)))

    def prompt(self, adapter: int | None) -> str:
        """300 characters for an adapter, or for none."""
        words: list[str] = []
        while sum(map(len, words)) + len(words) < CHARACTERS:
            if adapter is not None and self._rng.random() < 0.25:
                words.append(self._rng.choice(self._own[adapter]))
            else:
                words += self._rng.choices(self._shared, self._use)
        return " ".join(words)[:CHARACTERS]

    def new_words(self) -> str:
        """300 characters of words that are new, all of them."""
        return " ".join(self.word() + self.word() for _ in range(60))[:CHARACTERS]


def cpu_us(decide: Callable[[str], Any], rounds: list[list[str]]) -> float:
    """CPU microseconds per decision: the median of the rounds, which each have prompts of their
    own, after the first.
    """
    rounds_us = []
    for prompts in rounds:
        started_s = time.process_time()
        for prompt in prompts:
            decide(prompt)
        rounds_us.append((time.process_time() - started_s) / len(prompts) * 1e6)
    return statistics.median(rounds_us[1:])


def measured_training(job: Job) -> tuple[Trained, dict[str, float]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.perf_counter()
    trained = asyncio.run(train(job, time_limit_s=600))
    wall_s = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return trained, {"cpu_s": cpu_s, "wall_s": wall_s, "peak_mb": after.ru_maxrss / 1024}


def fifty() -> dict[str, Any]:
    """Training and decisions at 50 adapters."""
    language = Language(1)
    job = Job(
        {f"adapter-{n}": [language.prompt(n) for _ in range(EXAMPLES)] for n in range(ADAPTERS)},
        [language.prompt(None) for _ in range(EXAMPLES)],
        0.01,
    )
    progress("routing: training 50 adapters")
    trained, training = measured_training(job)
    table = Table(trained.table)
    rounds = [
        [language.prompt(number % ADAPTERS) for number in range(DECISIONS)] for _ in range(ROUNDS)
    ]
    prompts = rounds[0]
    verdicts = [table.judge(prompt).adapter for prompt in prompts]
    right = sum(name == f"adapter-{n % ADAPTERS}" for n, name in enumerate(verdicts))
    rules = [
        {"name": f"rule-{n}", "adapter": f"adapter-{n}", "when": {"any": [
            {"keywords": [f"Keyword{n}", "另外", "side effect"]}, {"regex": f"(?i)order {n}[0-9]+"}
        ]}}
        for n in range(20)
    ]  # fmt: skip
    cascade = Cascade(parse_routes(json.dumps({"rules": rules})), table)

    def whole(prompt: str) -> Any:
        message = {"role": "user", "content": prompt}
        return cascade.decide([message], may_use=lambda _: True, available=table.adapters)

    progress("routing: decisions")
    fresh = [[language.new_words() for _ in range(100)] for _ in range(ROUNDS)]
    return {
        "training": training,
        "features": len(trained.table.vocabulary),
        "self_test_right": trained.self_test.right,
        "new_prompts_right": right / len(prompts),
        "decision_us": cpu_us(table.judge, rounds),
        "decision_cold_us": cpu_us(table.judge, fresh),
        "whole_us": cpu_us(whole, rounds),
    }


def read_rows(file: str) -> list[dict[str, Any]]:
    lines = (DEMO / "eval" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def unseen_quotes(count: int = 400) -> list[dict[str, Any]]:
    sys.path.insert(0, str(DEMO))
    import domains

    rng = random.Random(5)
    texts = [rng.choice((domains.statement, domains.question))(rng) for _ in range(count)]
    quoting = [UNSEEN_QUOTES[number % len(UNSEEN_QUOTES)] for number in range(count)]
    prompts = [each.format(t=text) for each, text in zip(quoting, texts, strict=True)]
    return [{"prompt": prompt, "domain": "unseen quotes"} for prompt in prompts]


def demo() -> dict[str, Any]:
    """Where the evaluation prompts go, as shares."""
    progress("routing: the demo")
    examples = {name: read_examples(DEMO / "adapters" / name / "examples.jsonl") for name in NAMES}
    none = read_examples(DEMO / "base_examples.jsonl")
    generation = asyncio.run(build(parse_routes(""), examples, none, number=1))
    test = generation.report.self_test
    assert test is not None
    result: dict[str, Any] = {
        "self_test": {"right": test.right, "wrong": test.wrong, "none_sent": test.none_sent,
                      "unknown_sent": test.unknown_sent},
        "train_wall_s": generation.report.train_s,
    }  # fmt: skip
    for file in (*NAMES, "off_topic", "general", "unseen quotes"):
        rows = unseen_quotes() if file == "unseen quotes" else read_rows(file)
        for title, some in (
            (file, rows),
            (f"{file} without quotes", [row for row in rows if row["domain"] != "repeat"]),
        ):
            if title != file and len(some) == len(rows):
                continue
            sent = [
                generation.cascade.decide(
                    [*row.get("history", []), {"role": "user", "content": row["prompt"]}],
                    may_use=lambda _: True, available=NAMES,
                ).adapter
                for row in some
            ]  # fmt: skip
            to_it, to_base = sent.count(file), sent.count(None)
            result[title] = {
                "prompts": len(sent),
                "right": (to_it if file in NAMES else to_base) / len(sent),
                "wrong": (len(sent) - to_it - to_base) / len(sent),
                "abstained": to_base / len(sent),
            }
    return result


def met(result: dict[str, Any]) -> dict[str, bool]:
    """Each goal, and whether it is reached."""
    at_fifty, table = result["fifty"], result["demo"]
    return {
        f"decision <= {GOAL_US:.0f} us": at_fifty["decision_us"] <= GOAL_US,
        f"training <= {GOAL_TRAIN_S:.0f} s CPU": at_fifty["training"]["cpu_s"] <= GOAL_TRAIN_S,
        **{
            f"{name}: right >= {GOAL_RIGHT:.0%}, wrong <= {GOAL_WRONG:.0%}": (
                table[name]["right"] >= GOAL_RIGHT and table[name]["wrong"] <= GOAL_WRONG
            )
            for name in NAMES
        },
        **{
            f"{name}: sent <= {GOAL_SENT:.0%}": table[name]["wrong"] <= GOAL_SENT
            for name in ("off_topic", "general")
        },
    }


def report(result: dict[str, Any]) -> str:
    """The figures for people."""
    at_fifty, training = result["fifty"], result["fifty"]["training"]
    lines = [
        f"{ADAPTERS} adapters x {EXAMPLES} examples, prompts of {CHARACTERS} characters, "
        f"{at_fifty['features']} features",
        f"training: {training['cpu_s']:.1f} s CPU, {training['wall_s']:.1f} s wall, "
        f"{training['peak_mb']:.0f} MB",
        f"a decision: {at_fifty['decision_us']:.0f} us; with new words only "
        f"{at_fifty['decision_cold_us']:.0f} us; with 20 rules before it "
        f"{at_fifty['whole_us']:.0f} us",
        "",
        f"{'demo':28}{'prompts':>9}{'right':>9}{'wrong':>9}{'abstained':>11}",
    ]
    for name, row in result["demo"].items():
        if isinstance(row, dict) and "prompts" in row:
            shares = f"{row['right']:>9.1%}{row['wrong']:>9.1%}{row['abstained']:>11.1%}"
            lines.append(f"{name:28}{row['prompts']:>9}{shares}")
    lines += [f"{'met' if done else 'NOT met'}: {goal}" for goal, done in result["goals"].items()]
    return "\n".join(lines)


def main() -> None:
    result: dict[str, Any] = {"bench": "routing", "fifty": fifty(), "demo": demo()}
    result["goals"] = met(result)
    sys.stderr.write(report(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
