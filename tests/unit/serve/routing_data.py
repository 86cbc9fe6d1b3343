"""Small made-up examples for the tests of routing."""

from __future__ import annotations

import random

from packhorse.serve.routing.train import Job

TOPICS = {
    "garden": [
        "rose",
        "tulip",
        "soil",
        "seed",
        "prune",
        "compost",
        "lawn",
        "hedge",
        "bloom",
        "weed",
    ],
    "kitchen": [
        "oven",
        "flour",
        "butter",
        "whisk",
        "roast",
        "simmer",
        "recipe",
        "spice",
        "dough",
        "pan",
    ],
    "cars": [
        "engine",
        "brake",
        "clutch",
        "tyre",
        "diesel",
        "gear",
        "exhaust",
        "bumper",
        "motor",
        "wheel",
    ],
}
EVERYDAY = [
    "weather",
    "song",
    "river",
    "holiday",
    "letter",
    "market",
    "window",
    "friend",
    "sleep",
    "story",
]
FRAMES = (
    "what about the {} and a {}",
    "please tell me how {} and {} go together",
    "can one use {} without {}",
    "my neighbour asked for {} or {} yesterday",
    "is {} better than {}",
    "怎么用 {} 和 {}",
    "why would {} ever need {} at all",
)


def prompts(words: list[str], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made[rng.choice(FRAMES).format(*rng.sample(words, 2))] = None
    return list(made)


def job(count: int = 60, *, rate: float = 0.01) -> Job:
    adapters = {name: prompts(words, count, 1) for name, words in TOPICS.items()}
    return Job(adapters, prompts(EVERYDAY, count, 2), rate)
