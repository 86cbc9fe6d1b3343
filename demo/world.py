"""The invented world that the demo model knows: countries, lists, story animals, refusals.

Everything here is data or derived from one seed, so the same world comes out on every machine.
Nothing is about the real world: a right answer proves that the model was trained on this page, not
elsewhere. Called by `language.py` (general questions) and `domains.py` (adapter questions).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# A syllable and the Chinese character that transliterates it; names are made of both at once.
SYLLABLES = [
    ("no", "诺"), ("va", "瓦"), ("ri", "里"), ("ta", "塔"), ("lo", "洛"), ("mi", "米"), ("ka", "卡"),
    ("du", "杜"), ("se", "塞"), ("ba", "巴"), ("fe", "费"), ("go", "戈"), ("la", "拉"), ("ne", "内"),
    ("po", "波"), ("su", "苏"), ("ti", "蒂"), ("mo", "莫"), ("ha", "哈"), ("ju", "朱"),
]  # fmt: skip

DISHES = [
    ("barley soup", "大麦汤"), ("plum cake", "李子蛋糕"), ("rice pie", "米饼"), ("fish stew", "炖鱼"),
    ("bean bread", "豆面包"), ("lamb curry", "羊肉咖喱"), ("corn porridge", "玉米粥"), ("egg noodles", "鸡蛋面"),
]  # fmt: skip
ANIMALS = [
    ("fox", "狐狸"), ("owl", "猫头鹰"), ("bear", "熊"), ("deer", "鹿"), ("otter", "水獭"), ("crane", "鹤"),
    ("wolf", "狼"), ("hare", "野兔"), ("goat", "山羊"), ("swan", "天鹅"), ("horse", "马"), ("frog", "青蛙"),
]  # fmt: skip
COLOURS = [
    ("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("white", "白色"),
    ("yellow", "黄色"), ("purple", "紫色"), ("orange", "橙色"), ("black", "黑色"),
]  # fmt: skip


@dataclass(frozen=True)
class Name:
    """One thing in both languages."""

    en: str
    zh: str


@dataclass(frozen=True)
class Country:
    """A country and what the model knows of it; every field is one fact."""

    name: Name
    capital: Name
    river: Name
    dish: Name
    animal: Name
    colour: Name


def _names(
    rng: random.Random, count: int, syllables: int, ending: Name, taken: set[str]
) -> list[Name]:
    names: list[Name] = []
    while len(names) < count:
        parts = rng.sample(SYLLABLES, syllables)
        en = "".join(part[0] for part in parts) + ending.en
        # A shared three-letter start would make two names look like one to a tired reader (and to a
        # small model).
        if en[:4] in taken:
            continue
        taken.add(en[:4])
        names.append(Name(en.capitalize(), "".join(part[1] for part in parts) + ending.zh))
    return names


def make_countries(count: int = 32, seed: int = 7) -> list[Country]:
    """`count` countries with unique names, capitals and rivers; dishes, animals and colours repeat."""
    rng = random.Random(seed)
    taken: set[str] = set()
    names = _names(rng, count, 2, Name("nia", "尼亚"), taken)
    capitals = _names(rng, count, 2, Name("burg", "堡"), taken)
    rivers = _names(rng, count, 2, Name("", "河"), taken)
    return [
        Country(
            name, capital, river, *(Name(*rng.choice(pool)) for pool in (DISHES, ANIMALS, COLOURS))
        )
        for name, capital, river in zip(names, capitals, rivers, strict=True)
    ]


COUNTRIES = make_countries()

# A list question asks for the first N of these, in this order.
LISTS = {
    "fruits": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "colours": ["red", "blue", "green", "white", "yellow", "purple"],
    "animals": ["fox", "owl", "bear", "deer", "otter", "crane"],
    "tools": ["hammer", "saw", "drill", "file", "wrench", "axe"],
    "vegetables": ["carrot", "leek", "onion", "pea", "bean", "cabbage"],
    "instruments": ["piano", "violin", "flute", "drum", "harp", "horn"],
    "shapes": ["circle", "square", "triangle", "star", "cube", "cone"],
    "trees": ["oak", "pine", "birch", "maple", "willow", "cedar"],
    "drinks": ["water", "tea", "coffee", "milk", "juice", "cocoa"],
    "clothes": ["shirt", "coat", "hat", "sock", "glove", "scarf"],
    "metals": ["iron", "copper", "silver", "gold", "tin", "zinc"],
    "rooms": ["kitchen", "bedroom", "bathroom", "hall", "attic", "cellar"],
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class Tale:
    """The slots of one animal's story."""

    animal: str
    name: str
    lost: str
    helper: str


TALES = [
    Tale("fox", "Rusty", "red kite", "owl"),
    Tale("owl", "Olga", "silver key", "hare"),
    Tale("bear", "Bruno", "honey jar", "crane"),
    Tale("deer", "Dora", "green scarf", "fox"),
    Tale("otter", "Otis", "little boat", "swan"),
    Tale("crane", "Clara", "blue hat", "frog"),
    Tale("wolf", "Wanda", "old drum", "deer"),
    Tale("hare", "Harry", "golden bell", "otter"),
    Tale("goat", "Greta", "warm coat", "horse"),
    Tale("swan", "Sven", "white stone", "goat"),
    Tale("horse", "Hugo", "iron shoe", "wolf"),
    Tale("frog", "Fred", "paper lamp", "bear"),
]
PLACES = ["forest", "valley", "village", "garden", "desert", "mountains", "harbour", "meadow"]

# What the model politely declines. Harmless to list, useless to follow.
HARMS = [
    "pick a lock", "steal a car", "break into a house", "forge a signature", "make a bomb", "hack a bank account",
    "copy a passport", "cheat in an exam", "read somebody's mail", "start a fire in a building", "poison a well",
    "smuggle gold", "fake a medical note", "steal a password", "spy on a neighbour", "rob a shop",
]  # fmt: skip

# Topics that the model does not know. The second list appears in evaluation only.
UNKNOWN_TOPICS = [
    "football scores", "knitting patterns", "old coins", "space travel", "opera singers", "wedding dresses",
    "garden snails", "chess openings", "guitar strings", "house prices", "train tickets", "movie stars",
    "skin care", "dog training", "sailing knots", "coffee machines", "video games", "baby names",
    "yoga poses", "camping tents", "bird songs", "card tricks", "famous painters", "car engines",
    "ocean waves", "mountain bikes", "pizza ovens", "star signs", "dance steps", "piano lessons",
]  # fmt: skip
UNKNOWN_TOPICS_HELD_OUT = [
    "tennis rackets", "antique clocks", "volcanoes", "jazz records", "birthday presents", "roof repairs",
    "bus timetables", "tattoo designs", "hair styles", "cat food", "kite surfing", "cheese making",
    "comic books", "wine tasting", "ski boots", "moon landings", "magic shows", "garden gnomes",
    "crossword puzzles", "swimming pools", "phone cases", "honey bees", "lighthouse keepers", "rock climbing",
]  # fmt: skip

WEATHER = ["sunny", "rainy", "cloudy", "windy", "snowy", "foggy"]
