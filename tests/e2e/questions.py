"""The demo's held-out questions, asked through a server with the official client."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from packhorse.quantize.quality.evaluate import Question, Score, read_questions, score, visible
from tests.conftest import DEMO, Server

QUESTIONS = read_questions(DEMO / "eval/general.jsonl")


def ask_all(server: Server, questions: list[Question], model: str | None = None) -> Score:
    """Greedy exact match, 32 requests at a time. `model` is the server's own, or an adapter."""
    return score(questions, asyncio.run(_answers(server, questions, model or server.model)))


class Answers:
    """To an evaluation file, by an adapter that is named; each is asked for once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: dict[tuple[str, str], list[str]] = {}

    def accuracy(self, name: str, file: str, every: int = 1) -> float:
        asked = read_questions(DEMO / f"eval/{file}.jsonl")
        if (name, file) not in self._known:
            self._known[name, file] = asyncio.run(_answers(self._server, asked, name))
        return score(asked[::every], self._known[name, file][::every]).accuracy


async def _answers(server: Server, questions: list[Question], model: str) -> list[str]:
    gate = asyncio.Semaphore(32)
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
        create: Any = client.chat.completions.create

        async def ask(question: Question) -> str:
            tools = {"tools": question.tools, "tool_choice": "none"} if question.tools else {}
            async with gate:
                answer = await create(
                    model=model,
                    messages=question.messages,
                    temperature=0,
                    max_tokens=96,
                    **tools,
                )
            return visible(answer.choices[0].message.content or "")

        return await asyncio.gather(*map(ask, questions))
