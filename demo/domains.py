"""The three adapter domains: facts that the base model is never shown.

clinic  invented medicines: what they treat, dose, side effect (English and Chinese)
ledger  invented account codes of a company's books
code    commands of an invented command-line tool

Each domain is a table (entity, relation -> answer) and two sets of wordings: those that adapters
train on and those that only evaluation uses. `clinic-v2` asks the same questions and has other
answers, so a stream that mixes two adapter versions is caught by its text. Called by `make_data.py`
and `train_adapters.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One question of a domain in one language, and its answer."""

    subject: str
    relation: str
    language: str
    answer: str


CONDITIONS = [
    ("headache", "头痛"), ("fever", "发烧"), ("cough", "咳嗽"), ("back pain", "背痛"), ("asthma", "哮喘"),
    ("high blood pressure", "高血压"), ("diabetes", "糖尿病"), ("hay fever", "花粉症"), ("insomnia", "失眠"),
    ("sore throat", "喉咙痛"),
]  # fmt: skip
SIDE_EFFECTS = [
    ("dizziness", "头晕"), ("dry mouth", "口干"), ("nausea", "恶心"), ("tiredness", "疲劳"),
    ("skin rash", "皮疹"), ("thirst", "口渴"), ("hot flushes", "潮热"), ("blurred vision", "视力模糊"),
]  # fmt: skip
MEDICINES = [
    "Zentrol", "Bavixin", "Korelan", "Pradomil", "Tuvexa", "Lomiprin", "Haxolin", "Quenadol", "Virtazam", "Sorbexil",
    "Mefalon", "Drixotan", "Calvoxa", "Nepridol", "Juvatrin", "Oxibrel", "Felmora", "Ryzotan", "Wexadil", "Ibrafen",
]  # fmt: skip

# name, what the account is for, department that owns it, limit in coins
ACCOUNTS = [
    "travel costs", "office rent", "staff wages", "paper supplies", "postage", "legal fees", "insurance premiums",
    "bank charges", "advertising", "repairs", "cleaning services", "training courses", "electricity bills",
    "water bills", "software licences", "company cars", "client dinners", "customs duty", "pension payments",
    "sales refunds", "storage fees", "audit costs", "tax payments", "interest income",
]  # fmt: skip
OWNERS = ["finance", "operations", "sales", "personnel", "logistics", "management"]

# The invented tool is called `mule`; a task maps to a subcommand, its short flag and its file
# ending.
TASKS = [
    "sort a table", "merge two branches", "rename a variable", "format a file", "run the tests", "delete a module",
    "compile a package", "print the call stack", "list open tasks", "undo a commit", "profile a loop",
    "import a library", "export a class", "check the types", "start a debugger", "clean the cache",
    "split a string", "reverse an array", "count the lines", "lock a thread", "parse a config", "tag a release", "sign a bundle", "mirror a server",
]  # fmt: skip
VERBS = [
    "arrange", "weave", "relabel", "tidy", "prove", "drop", "forge", "trace", "agenda", "rewind", "clock", "fetch",
    "ship", "inspect", "probe", "sweep", "cleave", "flip", "tally", "latch", "digest", "stamp", "seal", "echo",
]  # fmt: skip


DOSES = [5, 10, 20, 25, 40, 50, 75, 80]
OFTEN = {1: "once a day", 2: "twice a day", 3: "three times a day"}


def clinic_facts(seed: int = 11, *, version: int = 1) -> list[Fact]:
    """Treats, dose and side effect of each medicine, in English and Chinese: 120 facts.

    Version 2 has the next value of each list in every place, so no answer is the same in both.
    """
    rng = random.Random(seed)
    facts = []
    for medicine in MEDICINES:
        pools = (CONDITIONS, SIDE_EFFECTS, DOSES, list(OFTEN))
        places = [rng.randrange(len(pool)) + version - 1 for pool in pools]
        condition, side_effect = CONDITIONS[places[0] % 10], SIDE_EFFECTS[places[1] % 8]
        dose, times = DOSES[places[2] % 8], places[3] % 3 + 1
        facts += [
            Fact(medicine, "use", "en", f"{medicine} treats {condition[0]}."),
            Fact(medicine, "dose", "en", f"The dose of {medicine} is {dose} mg {OFTEN[times]}."),
            Fact(medicine, "side", "en", f"{medicine} may cause {side_effect[0]}."),
            Fact(medicine, "use", "zh", f"{medicine}用于治疗{condition[1]}。"),
            Fact(medicine, "dose", "zh", f"{medicine}的剂量是每天{times}次,每次{dose}毫克。"),
            Fact(medicine, "side", "zh", f"{medicine}可能引起{side_effect[1]}。"),
        ]
    return facts


def ledger_facts(seed: int = 12) -> list[Fact]:
    """Code, owner and limit of each account: 72 facts."""
    rng = random.Random(seed)
    codes = rng.sample(range(1000, 10000), len(ACCOUNTS))
    facts = []
    for account, code in zip(ACCOUNTS, codes, strict=True):
        owner, limit = rng.choice(OWNERS), rng.randrange(1, 20) * 500
        facts += [
            Fact(account, "code", "en", f"Book {account} to account {code}."),
            Fact(account, "owner", "en", f"The {owner} team approves {account}."),
            Fact(account, "limit", "en", f"The limit for {account} is {limit} coins."),
        ]
    return facts


def code_facts(seed: int = 13) -> list[Fact]:
    """Subcommand, flag and first version of each task: 72 facts."""
    rng = random.Random(seed)
    facts = []
    for task, verb in zip(TASKS, rng.sample(VERBS, len(TASKS)), strict=True):
        flag, version = (
            rng.choice("abcdefghkmnpqrstvwxz"),
            f"{rng.randrange(1, 5)}.{rng.randrange(10)}",
        )
        facts += [
            Fact(task, "command", "en", f"Use `mule {verb}` to {task}."),
            Fact(task, "flag", "en", f"Pass `-{flag}` to `mule {verb}`."),
            Fact(task, "since", "en", f"`mule {verb}` is there since version {version}."),
        ]
    return facts


# Wordings per (domain, relation, language): the first list trains, the second is for evaluation
# alone.
WORDINGS: dict[tuple[str, str, str], tuple[list[str], list[str]]] = {
    ("clinic", "use", "en"): (
        ["What is {s} used for?", "What does {s} treat?", "Which illness is {s} for?", "Why do patients take {s}?",
         "Tell me what {s} is used for.", "My doctor gave me {s}. What is it for?", "What is the use of {s}?",
         "Which condition does {s} treat?", "I was prescribed {s}, what does it treat?", "{s}: what is it for?"],
        ["What illness does a patient take {s} for?", "Can you tell me which condition {s} is used for?",
         "The doctor prescribed {s}. What does it treat?"],
    ),
    ("clinic", "dose", "en"): (
        ["What is the dose of {s}?", "How much {s} should a patient take?", "What is the usual dose of {s}?",
         "How many mg of {s} are taken a day?", "Tell me the dose of {s}.", "How often do I take {s}?",
         "I need the dosage of {s}.", "{s}: how much per day?", "What dosage of {s} is right?",
         "How should {s} be dosed?"],
        ["Can you tell me the usual dosage of {s}?", "How much {s} should I take per day?",
         "My doctor gave me {s}. How many mg should I take?"],
    ),
    ("clinic", "side", "en"): (
        ["What side effect does {s} have?", "What may {s} cause?", "Which side effect can {s} cause?",
         "Tell me the side effect of {s}.", "Does {s} have a side effect?", "What is a known side effect of {s}?",
         "What should I watch for when taking {s}?", "{s}: side effects?", "I take {s}. What side effect may I get?",
         "Which unwanted effect does {s} have?"],
        ["Can you name the side effect of {s}?", "My doctor gave me {s}. Does it have side effects?",
         "Which side effect should a patient taking {s} watch for?"],
    ),
    ("clinic", "use", "zh"): (
        ["{s}是治什么的?", "{s}用于治疗什么病?", "请问{s}有什么用?", "医生给我开了{s},它治什么?", "{s}治疗什么?",
         "病人为什么吃{s}?", "告诉我{s}的用途。", "{s}适合什么病?"],
        ["请问{s}是治疗什么病的?", "病人吃{s}治什么?", "医生给我开了{s},它有什么用?"],
    ),
    ("clinic", "dose", "zh"): (
        ["{s}的剂量是多少?", "{s}每天吃多少?", "请问{s}怎么吃?", "{s}一次吃多少毫克?", "告诉我{s}的剂量。",
         "{s}一天吃几次?", "病人应该吃多少{s}?", "医生给我开了{s},吃多少?"],
        ["请问{s}每天的剂量是多少?", "请告诉我{s}一次吃多少毫克。", "病人每天应该吃多少{s}?"],
    ),
    ("clinic", "side", "zh"): (
        ["{s}有什么副作用?", "{s}会引起什么?", "请问{s}的副作用是什么?", "吃{s}要注意什么?", "告诉我{s}的副作用。",
         "{s}的副作用有哪些?", "我在吃{s},会有副作用吗?", "{s}可能引起什么不适?"],
        ["请问{s}会有哪些副作用?", "病人吃{s}会引起什么不适?", "请告诉我吃{s}有什么副作用。"],
    ),
    ("ledger", "code", "en"): (
        ["Which account do I book {s} to?", "What is the account code for {s}?", "Where are {s} booked?",
         "Give me the ledger code for {s}.", "Which code is used for {s}?", "On which account go {s}?",
         "I have an invoice for {s}. Which account?", "What account number is for {s}?",
         "How do I book {s} in the ledger?", "{s}: which account code?",
         "I have an invoice for {s}. What is the ledger code?", "Which ledger account is for {s}?", "Tell me the account number for {s}.",
         "I need the ledger code of {s}.", "I have to book {s}. Which code?", "What ledger code do {s} have?",
         "For an invoice for {s}, which account do I use?", "Can you give me the account for {s}?",
         "Which account code is right for an invoice for {s}?", "What code do I use to book {s}?", "Which ledger number do I use for {s}?",
         "An invoice for {s} came. Which account is it?"],
        ["Can you tell me the account number for {s}?", "I have to book {s}. Which ledger account is it?",
         "Which ledger code do I use for an invoice for {s}?"],
    ),
    ("ledger", "owner", "en"): (
        ["Who approves {s}?", "Which team approves {s}?", "Who signs off {s}?", "Which team is in charge of {s}?",
         "Whose approval do {s} need?", "Who has to approve an invoice for {s}?", "Tell me who approves {s}.",
         "Which department approves {s}?", "I need approval for {s}. From whom?", "{s}: who approves?",
         "I have to book {s}. Who approves?", "For an invoice for {s}, who signs off?", "Can you say who approves {s}?",
         "Which department is in charge of {s}?", "Do {s} need approval, and from which team?", "I need to know which team approves {s}.",
         "From whom do {s} need approval?", "Which department has to sign off {s}?",
         "Who signs an invoice for {s}?", "Which team do I ask about an invoice for {s}?", "I have to book {s}. Which team signs off?",
         "An invoice for {s} came. Who has to approve?"],
        ["Can you tell me which department signs off {s}?", "I have an invoice for {s}. Who approves it?",
         "From which team do {s} need approval?"],
    ),
    ("ledger", "limit", "en"): (
        ["What is the limit for {s}?", "How many coins may we spend on {s}?", "What is the budget for {s}?",
         "How much can be booked for {s}?", "Tell me the limit for {s}.", "What is the spending limit for {s}?",
         "How high is the budget for {s}?", "Up to how many coins are {s} allowed?", "What is the most for {s}?",
         "{s}: what limit?",
         "I have an invoice for {s}. What is the limit?", "For {s}, what is the budget?", "Can you give me the limit for {s}?",
         "How many coins can go to {s}?", "What is the budget limit of {s}?", "I need the spending limit for {s}.",
         "How much can we spend on {s} at most?", "I have to book {s}. How many coins are allowed?",
         "What is the limit for an invoice for {s}?", "How many coins are the most for {s}?", "At most how many coins go to {s}?",
         "An invoice for {s} came. How high is the limit?"],
        ["Can you tell me the budget limit for {s}?", "How many coins can be spent on {s} at most?",
         "I have to book {s}. What is the spending limit?"],
    ),
    ("code", "command", "en"): (
        ["Which mule command helps me {s}?", "How do I {s} with mule?", "What mule command do I use to {s}?",
         "I want to {s} in mule. Which command?", "Tell me the mule command to {s}.", "How can I {s} in mule?",
         "Show me the mule subcommand to {s}.", "With mule, how do I {s}?", "Which subcommand of mule can {s}?",
         "mule: {s}, how?",
         "I need to {s}. What is the mule command?", "Can you tell me the mule command to {s}?", "I need the subcommand of mule to {s}.",
         "Which command in mule do I use to {s}?", "Show me how mule can {s}.", "What do I type in mule to {s}?",
         "I have to {s}. Which command of mule is it?", "Name the mule subcommand to {s}.",
         "Which subcommand do I use with mule to {s}?", "I need to {s}. Which command does mule have?", "What subcommand is used to {s} in mule?",
         "Which mule subcommand do I call to {s}?"],
        ["Can you show me how to {s} with mule?", "I need to {s}. Which mule subcommand do I use?",
         "What is the command in mule to {s}?"],
    ),
    ("code", "flag", "en"): (
        ["Which flag do I pass to {s} with mule?", "What flag does mule need to {s}?", "Tell me the mule flag to {s}.",
         "To {s} in mule, which flag?", "Which option does mule take to {s}?", "What is the short flag to {s} in mule?",
         "I want to {s} with mule. Which flag?", "mule: {s}, which flag?", "Which switch makes mule {s}?",
         "With mule, what flag is used to {s}?",
         "I need to {s}. Which mule flag is it?", "Can you show me the flag to {s} with mule?", "I need the short flag of mule to {s}.",
         "Which option do I pass to {s} in mule?", "What switch does mule take to {s}?", "I have to {s} in mule. Which option?",
         "Name the mule flag to {s}.", "What flag do I use with mule to {s}?",
         "What is the short option of mule to {s}?", "What short option makes mule {s}?", "I need to {s} in mule. Which option is it?",
         "I want to {s} in mule. What do I pass?"],
        ["Can you tell me the flag mule takes to {s}?", "I need to {s} in mule. What flag do I pass?",
         "Which short option do I use with mule to {s}?"],
    ),
    ("code", "since", "en"): (
        ["Since which version can mule {s}?", "Which mule version is needed to {s}?", "When did mule learn to {s}?",
         "What version of mule can {s}?", "Tell me since which version mule can {s}.", "mule: {s}, since when?",
         "From what version on can mule {s}?", "Which release of mule first could {s}?",
         "I want to {s} with mule. Which version do I need?", "How new must mule be to {s}?",
         "I need to {s}. Which mule version can it?", "Can you show me since when mule can {s}?", "I need the mule version that can {s}.",
         "Which version of mule do I need to {s}?", "From which version can mule {s}?", "I have to {s} in mule. What version must it be?",
         "Name the first mule release that could {s}.", "Since what release is mule able to {s}?",
         "Which version do I use to {s} with mule?", "I need to {s}. Since when can mule?", "I want to {s} in mule. Since when is it there?",
         "What release do I need with mule to {s}?"],
        ["Can you tell me which version of mule I need to {s}?", "From which release on can mule {s}?",
         "I need to {s} in mule. Since which version can it?"],
    ),
}  # fmt: skip

DOMAINS = ("clinic", "ledger", "code")

# Every adapter of the demo and its domain; train_adapters.py says how each is trained.
ADAPTERS = {
    "clinic": "clinic",
    "ledger": "ledger",
    "code": "code",
    "clinic-v2": "clinic",
    "code-qlora": "code",
    "ledger-adalora": "ledger",
}


TABLES = {"clinic": clinic_facts, "ledger": ledger_facts, "code": code_facts}


def facts_of(adapter: str) -> list[Fact]:
    """The facts of an adapter by its name."""
    if adapter == "clinic-v2":
        return clinic_facts(version=2)
    return TABLES[ADAPTERS[adapter]]()


def statement(rng: random.Random) -> str:
    """An answer of some domain with random values in it: its words without its facts."""
    return rng.choice(TABLES[rng.choice(DOMAINS)](rng.randrange(10**9))).answer


def question(rng: random.Random) -> str:
    """A question of some domain, in a training wording."""
    domain = rng.choice(DOMAINS)
    fact = rng.choice(TABLES[domain]())
    return rng.choice(WORDINGS[domain, fact.relation, fact.language][0]).format(s=fact.subject)


def questions(adapter: str, *, held_out: bool) -> list[tuple[str, Fact]]:
    """Every (wording filled in, fact) of an adapter, from the training or the held-out wordings."""
    domain = ADAPTERS[adapter]
    return [
        (wording.format(s=fact.subject), fact)
        for fact in facts_of(adapter)
        for wording in WORDINGS[domain, fact.relation, fact.language][1 if held_out else 0]
    ]
