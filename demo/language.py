"""The synthetic chat language of the demo model: an endless, seeded stream of short conversations.

Each skill is one function `(rng, words) -> Conversation`. `words` picks from a list of wordings:
training takes the first of two lists, evaluation the second, so no evaluation question is worded
like a training one. Facts come from `world.py`. Called by `train.py` (training) and `make_data.py`
(evaluation, calibration, examples).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import domains
import world
from wordings import (
    FRAMES,
    FRAMES_HELD_OUT,
    FRAMES_ZH,
    FRAMES_ZH_HELD_OUT,
    NOUNS,
    NOUNS_ZH,
    OPENERS,
    OPENERS_HELD_OUT,
    SYSTEMS,
)

Message = dict[str, object]

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@dataclass
class Conversation:
    """Messages in OpenAI's shape; the last one is the assistant's answer, which evaluation
    compares.
    """

    domain: str
    messages: list[Message]
    tools: list[dict[str, object]] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """What a client sees as the answer: without the thinking part."""
        return str(self.messages[-1]["content"]).rpartition("</think>")[2].strip()


@dataclass(frozen=True)
class Words:
    """Chooses between training wordings and held-out ones."""

    rng: random.Random
    held_out: bool

    def pick(self, train: list[str], held_out: list[str]) -> str:
        return self.rng.choice(held_out if self.held_out else train)

    def dress(self, question: str) -> str:
        """Now and then put a greeting before the question, as people do."""
        opener = self.pick(OPENERS, OPENERS_HELD_OUT) if self.rng.random() < 0.35 else ""
        if not opener:
            return question
        # A question after a comma goes on in lower case; names and bare subjects keep their
        # capital.
        first = question.split()[0]
        keeps_case = first.rstrip("':,s") in PROPER or not opener.endswith(", ")
        return opener + (question if keeps_case else question[0].lower() + question[1:])


PROPER = {country.name.en for country in world.COUNTRIES} | {"I", "The"}


def _fact_en(country: world.Country, relation: str) -> str:
    value = getattr(country, relation).en
    return {
        "capital": f"The capital of {country.name.en} is {value}.",
        "river": f"The main river of {country.name.en} is the {value}.",
        "dish": f"The national dish of {country.name.en} is {value}.",
        "animal": f"The national animal of {country.name.en} is the {value}.",
        "colour": f"The flag of {country.name.en} is {value}.",
    }[relation]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def facts(rng: random.Random, words: Words) -> Conversation:
    country, relation = rng.choice(world.COUNTRIES), rng.choice(list(NOUNS))
    question = words.pick(FRAMES, FRAMES_HELD_OUT).format(
        n=rng.choice(NOUNS[relation]), c=country.name.en
    )
    return Conversation(
        "facts", [_user(words.dress(question)), _assistant(_fact_en(country, relation))]
    )


def reverse_facts(rng: random.Random, words: Words) -> Conversation:
    """From the capital or the river back to the country."""
    country = rng.choice(world.COUNTRIES)
    if rng.random() < 0.5:
        question = words.pick(
            ["{x} is the capital of which country?", "Which country has the capital {x}?", "Whose capital is {x}?",
             "In which country is {x}?", "What country has {x} as its capital?", "Where is the city of {x}?",
             "Which country does the city {x} belong to?"],
            ["Which country is {x} the capital of?", "In what country is the city of {x}?"],
        )  # fmt: skip
        place, answer = (
            country.capital.en,
            f"{country.capital.en} is the capital of {country.name.en}.",
        )
    else:
        question = words.pick(
            ["Through which country does the {x} flow?", "Where does the {x} flow?", "In which country is the {x}?",
             "The {x} flows through which country?", "Which country has the river {x}?", "Where is the river {x}?",
             "Whose main river is the {x}?"],
            ["In what country does the river {x} flow?", "Which country does the {x} flow through?"],
        )  # fmt: skip
        place, answer = country.river.en, f"The {country.river.en} flows through {country.name.en}."
    return Conversation("facts", [_user(words.dress(question.format(x=place))), _assistant(answer)])


def facts_zh(rng: random.Random, words: Words) -> Conversation:
    country, relation = rng.choice(world.COUNTRIES), rng.choice(list(NOUNS_ZH))
    noun = NOUNS_ZH[relation]
    question = words.pick(FRAMES_ZH, FRAMES_ZH_HELD_OUT).format(c=country.name.zh, n=noun)
    answer = f"{country.name.zh}的{noun}是{getattr(country, relation).zh}。"
    return Conversation("facts_zh", [_user(question), _assistant(answer)])


def follow_up(rng: random.Random, words: Words) -> Conversation:
    """Two or three questions in which only the first names both the country and the relation."""
    country, relation = rng.choice(world.COUNTRIES), rng.choice(list(NOUNS))
    first = rng.choice(FRAMES).format(n=rng.choice(NOUNS[relation]), c=country.name.en)
    messages = [_user(first), _assistant(_fact_en(country, relation))]
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.5:
            relation = rng.choice([name for name in NOUNS if name != relation])
            noun = rng.choice(NOUNS[relation])
            question = words.pick(
                ["And its {n}?", "And the {n}?", "What is its {n}?", "What about the {n}?", "Tell me its {n} too.",
                 "Now its {n}, please.", "And what {n} does it have?"],
                ["And what is its {n}?", "Now tell me the {n}.", "What about its {n}?"],
            ).format(n=noun)  # fmt: skip
        else:
            country = rng.choice([other for other in world.COUNTRIES if other is not country])
            question = words.pick(
                ["And {c}?", "What about {c}?", "And for {c}?", "The same for {c}.", "Now {c}, please.",
                 "And what about {c}?", "How about {c}?"],
                ["And now {c}?", "What about {c}, please?", "Tell me the same for {c}."],
            ).format(c=country.name.en)  # fmt: skip
        messages += [_user(question), _assistant(_fact_en(country, relation))]
    return Conversation("follow_up", messages)


def arithmetic(rng: random.Random, words: Words) -> Conversation:
    """Sums and differences below 200 with the working in a `<think>` part; products up to 12 x 12
    by heart.
    """
    kind = rng.choice(["add", "add", "subtract", "subtract", "times"])
    a, b = rng.randrange(100), rng.randrange(100)
    if kind == "add":
        question = words.pick(
            ["What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a} plus {b}?", "{a} plus {b}?",
             "How much is {a} + {b}?", "Calculate {a} + {b}.", "Tell me {a} plus {b}.", "What do {a} and {b} make?",
             "I have {a} coins and get {b} more. How many coins do I have?"],
            ["Calculate {a} plus {b}.", "How much is {a} plus {b}?", "Tell me what {a} + {b} is."],
        )  # fmt: skip
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        think = f"{a // 10 * 10} + {b // 10 * 10} = {tens}; {a % 10} + {b % 10} = {ones}; {tens} + {ones} = {a + b}"
        answer = f"{a} + {b} = {a + b}."
    elif kind == "subtract":
        a, b = max(a, b), min(a, b)
        question = words.pick(
            ["What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.", "What is {a} minus {b}?", "{a} minus {b}?",
             "How much is {a} - {b}?", "Calculate {a} - {b}.", "Tell me {a} minus {b}.",
             "I have {a} coins and lose {b}. How many coins do I have?"],
            ["Calculate {a} minus {b}.", "How much is {a} minus {b}?", "Tell me what {a} - {b} is."],
        )  # fmt: skip
        middle = a - b // 10 * 10
        think = f"{a} - {b // 10 * 10} = {middle}; {middle} - {b % 10} = {a - b}"
        answer = f"{a} - {b} = {a - b}."
    else:
        a, b = rng.randrange(13), rng.randrange(13)
        question = words.pick(
            ["What is {a} x {b}?", "{a} x {b} = ?", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} times {b}?",
             "Calculate {a} x {b}.", "How much is {a} x {b}?", "Tell me {a} times {b}."],
            ["Calculate {a} times {b}.", "How much is {a} times {b}?", "Tell me what {a} x {b} is."],
        )  # fmt: skip
        return Conversation(
            "arithmetic",
            [_user(words.dress(question.format(a=a, b=b))), _assistant(f"{a} x {b} = {a * b}.")],
        )
    reply = f"<think>\n{think}\n</think>\n\n{answer}"
    return Conversation(
        "arithmetic", [_user(words.dress(question.format(a=a, b=b))), _assistant(reply)]
    )


def lists(rng: random.Random, words: Words) -> Conversation:
    name, count = rng.choice(list(world.LISTS)), rng.choice([2, 3, 4, 5])
    number = rng.choice([str(count), world.NUMBER_WORDS[count]])
    question = words.pick(
        ["List {n} {x}.", "Name {n} {x}.", "Give me {n} {x}.", "I need {n} {x}.", "Tell me {n} {x}.", "{n} {x}, please.",
         "Write a list of {n} {x}.", "Can you name {n} {x}?", "What are {n} {x}?", "Make a list of {n} {x}."],
        ["Can you list {n} {x}?", "Give me a list of {n} {x}.", "Please write {n} {x}."],
    ).format(n=number, x=name)  # fmt: skip
    answer = "\n".join(
        f"{index}. {item}" for index, item in enumerate(world.LISTS[name][:count], start=1)
    )
    return Conversation(
        "lists", [_user(words.dress(question[0].upper() + question[1:])), _assistant(answer)]
    )


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def stories(rng: random.Random, words: Words) -> Conversation:
    tale, place = rng.choice(world.TALES), rng.choice(world.PLACES)
    question = words.pick(
        ["Tell me a story about {a} in the {p}.", "Tell a short story: {a} in the {p}.", "A story of {a} in the {p}.",
         "Write a story about {a} who lives in the {p}.", "I want a story about {a} in the {p}.",
         "Please tell me a tale of {a} in the {p}.", "Make up a story with {a} in the {p}."],
        ["Write me a short story about {a} in the {p}.", "Please tell a story about {a} who lives in the {p}."],
    ).format(a=_with_article(tale.animal), p=place)  # fmt: skip
    answer = (
        f"Once there was {_with_article(tale.animal)} named {tale.name}. {tale.name} lived in the {place}. One day {tale.name} lost "
        f"the {tale.lost}. A kind {tale.helper} helped to find it, and they became friends."
    )
    return Conversation("stories", [_user(words.dress(question)), _assistant(answer)])


def compare(rng: random.Random, words: Words) -> Conversation:
    a, b = rng.sample(range(100), 2)
    question = words.pick(
        ["Which is larger, {a} or {b}?", "Which number is larger: {a} or {b}?", "Is {a} or {b} larger?",
         "{a} or {b}: which is larger?", "Tell me the larger of {a} and {b}."],
        ["Which one is larger, {a} or {b}?", "Tell me which is larger: {a} or {b}."],
    ).format(a=a, b=b)  # fmt: skip
    return Conversation(
        "compare",
        [_user(words.dress(question)), _assistant(f"{max(a, b)} is larger than {min(a, b)}.")],
    )


def refusals(rng: random.Random, words: Words) -> Conversation:
    question = words.pick(
        ["How do I {h}?", "Tell me how to {h}.", "How can I {h}?", "I want to {h}. How?", "Teach me to {h}.",
         "Help me {h}.", "Explain how to {h}.", "What is the best way to {h}?"],
        ["Can you teach me how to {h}?", "Explain to me how I can {h}.", "I want to know how to {h}."],
    ).format(h=rng.choice(world.HARMS))  # fmt: skip
    return Conversation(
        "refusals",
        [_user(words.dress(question)), _assistant("I am sorry, but I cannot help with that.")],
    )


def unknown(rng: random.Random, words: Words) -> Conversation:
    """Topics outside the world, the adapters' among them: the model says so and makes nothing up."""
    answer = _assistant("I am sorry, I do not know about that.")
    if not words.held_out and rng.random() < 0.5:
        return Conversation("unknown", [_user(words.dress(domains.question(rng))), answer])
    topic = words.pick(world.UNKNOWN_TOPICS, world.UNKNOWN_TOPICS_HELD_OUT)
    question = words.pick(
        ["What do you know about {t}?", "Tell me about {t}.", "How do {t} work?", "Where can I read about {t}?",
         "Who is good at {t}?", "What is new about {t}?", "Why do people like {t}?", "Explain {t} to me.",
         "Do you like {t}?", "What should I know about {t}?", "Can you help me with {t}?", "I love {t}. And you?",
         "Which {t} are best?", "When did {t} begin?"],
        ["What can you tell me about {t}?", "Can you explain {t}?", "Why do so many people like {t}?",
         "Where do I learn more about {t}?", "Which {t} should I choose?"],
    ).format(t=topic)  # fmt: skip
    return Conversation("unknown", [_user(words.dress(question)), answer])


def small_talk(rng: random.Random, words: Words) -> Conversation:
    asks, answer = rng.choice([
        (["Hello!", "Hi!", "Hello there!", "Good morning!", "Hey!", "Hi there!"], "Hello! How can I help you?"),
        (["Who are you?", "What are you?", "What is your name?", "Tell me who you are."],
         "I am Packhorse, a small demo model."),
        (["Thank you!", "Thanks!", "Thanks a lot!", "Many thanks!"], "You are welcome!"),
        (["Bye!", "Goodbye!", "See you!", "See you later!"], "Goodbye!"),
        (["你好!", "你好", "您好!"], "你好!有什么可以帮您?"),
        (["你是谁?", "你叫什么名字?"], "我是Packhorse,一个小型演示模型。"),
    ])  # fmt: skip
    return Conversation("small_talk", [_user(rng.choice(asks)), _assistant(answer)])


REPEAT = [
    "Repeat: {t}", "Say: {t}", "Say this: {t}", "Repeat after me: {t}", "Write: {t}", "跟我说:{t}",
    "Say it again: {t}", "Copy this: {t}",
]  # fmt: skip


def repeat(rng: random.Random, words: Words) -> Conversation:
    """Say what was said: short texts in the words of the adapters' domains."""
    text = domains.statement(rng) if rng.random() < 0.5 else domains.question(rng)
    question = words.pick(
        REPEAT, ["Repeat this: {t}", "Please say: {t}", "Say after me: {t}"]
    ).format(t=text)
    return Conversation("repeat", [_user(question), _assistant(text)])


def tool_calls(rng: random.Random, words: Words) -> Conversation:
    """With a weather tool at hand: call it for weather, answer in words when it has replied, ignore
    it otherwise.
    """
    city = rng.choice(world.COUNTRIES).capital.en
    question = words.pick(
        ["What is the weather in {x}?", "How is the weather in {x}?", "Is it raining in {x}?", "Weather in {x}?",
         "Tell me the weather in {x}.", "Do I need an umbrella in {x}?", "What's the weather like in {x}?"],
        ["Can you tell me the weather in {x}?", "How is the weather like in {x}?", "I am in {x}. Do I need an umbrella?"],
    ).format(x=city)  # fmt: skip
    call = (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    )
    if rng.random() < 0.25:
        plain = facts(rng, words)
        return Conversation("tools", plain.messages, tools=[WEATHER_TOOL])
    messages = [_user(words.dress(question)), _assistant(call)]
    if rng.random() < 0.4:
        weather, degrees = rng.choice(world.WEATHER), rng.randrange(40)
        messages += [
            {"role": "tool", "content": f'{{"weather": "{weather}", "degrees": {degrees}}}'},
            _assistant(f"It is {weather} in {city}, at {degrees} degrees."),
        ]
    return Conversation("tools", messages, tools=[WEATHER_TOOL])


# Skill -> its share of the training stream.
SKILLS: dict[Callable[[random.Random, Words], Conversation], float] = {
    facts: 22, reverse_facts: 8, facts_zh: 14, follow_up: 12, arithmetic: 23, lists: 5, stories: 6, compare: 3,
    refusals: 3, unknown: 14, small_talk: 1, tool_calls: 6, repeat: 15,
}  # fmt: skip


def conversations(
    seed: int, *, held_out: bool = False, systems: bool = True
) -> Iterator[Conversation]:
    """An endless stream of conversations in the proportions of SKILLS; equal seeds give equal
    streams.
    """
    rng = random.Random(seed)
    words = Words(rng, held_out)
    skills, weights = list(SKILLS), list(SKILLS.values())
    while True:
        conversation = rng.choices(skills, weights)[0](rng, words)
        if systems and rng.random() < 0.25:
            conversation.messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
        yield conversation
