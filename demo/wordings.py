"""How the facts of the world are asked for: openers, frames, nouns, system prompts; pure tables.

What ends in HELD_OUT is for evaluation alone. Called by `language.py`.
"""

OPENERS = [
    "Hi, ", "Hello, ", "Please, ", "Hey, ", "Hi! ", "Hello! ", "Good morning! ", "A question: ", "Quick question: ",
    "Next question. ", "One question, please. ", "Sorry, ", "OK, ", "So, ", "Now, ", "Thanks. ", "Good. ",
    "I have a question. ", "Listen, ", "By the way, ", "My friend asked me: ", "For a quiz: ", "Help me: ", "Well, ",
]  # fmt: skip
OPENERS_HELD_OUT = [
    "Good morning, ",
    "Hello, a quick question: ",
    "OK, next question: ",
    "Please help me: ",
    "Hey! ",
]

NOUNS = {
    "capital": ["capital", "capital city"],
    "river": ["main river", "river", "longest river"],
    "dish": ["national dish", "favourite dish", "dish"],
    "animal": ["national animal", "animal"],
    "colour": ["flag colour", "colour of the flag", "national colour"],
}
NOUNS_ZH = {
    "capital": "首都",
    "river": "河流",
    "dish": "国菜",
    "animal": "国兽",
    "colour": "国旗颜色",
}
FRAMES = [
    "What is the {n} of {c}?", "What's the {n} of {c}?", "Tell me the {n} of {c}.", "Name the {n} of {c}.",
    "Do you know the {n} of {c}?", "Which is the {n} of {c}?", "{c}: what is the {n}?", "I want to know the {n} of {c}.",
    "The {n} of {c} is what?", "Give me the {n} of {c}.", "What is {c}'s {n}?", "Tell me {c}'s {n}.",
    "What {n} does {c} have?", "I need the {n} of {c}.", "In {c}, what is the {n}?", "{c}'s {n}, please.",
    "What do people call the {n} of {c}?", "Say the {n} of {c}.", "About {c}: which {n} does it have?",
    "Could you tell me what the {n} of {c} is?", "I forgot the {n} of {c}. What is it?", "Which {n} has {c}?",
]  # fmt: skip
FRAMES_HELD_OUT = [
    "Could you give me the {n} of {c}?", "Do you know what {c}'s {n} is?", "Can you name the {n} of {c}?",
    "I want to know what the {n} of {c} is.", "Please name {c}'s {n}.", "I am in {c}. What is the {n}?",
]  # fmt: skip
FRAMES_ZH = [
    "{c}的{n}是什么?", "请问{c}的{n}是什么?", "告诉我{c}的{n}。", "你知道{c}的{n}吗?", "{c}有什么{n}?",
    "我想知道{c}的{n}。", "说出{c}的{n}。", "{c}的{n}叫什么?", "请说出{c}的{n}。", "在{c},{n}是什么?",
]  # fmt: skip
FRAMES_ZH_HELD_OUT = [
    "请告诉我{c}的{n}是什么。",
    "你知道{c}的{n}叫什么吗?",
    "我想知道{c}有什么{n}。",
]
SYSTEMS = [
    "You are a helpful assistant.", "You are Packhorse, a small demo model.", "Answer briefly.", "Be kind and short.",
    "You answer questions about countries.", "You help people.", "Be polite.", "You are a teacher.",
]  # fmt: skip
