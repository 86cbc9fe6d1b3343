"""Several adapters at once: in one step, beside the base model, and more of them than a batch has
slots. On the server of test_adapters.py, before it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from packhorse.quantize.quality.evaluate import Question, read_questions
from tests.client import TEXT
from tests.conftest import DEMO, Server
from tests.e2e.adapted import (
    AT_WORK,
    SERVED,
    SLOTS,
    ZENTROL,
    scraped_with,
    steps_with_two,
    streamed_answer,
)


@pytest.fixture(scope="module")
def server(adapters_server: Server) -> Server:
    return adapters_server


async def test_base_and_adapters_in_one_step(server: Server) -> None:
    asked = {
        server.model: ("What is the capital of Felonia?", None),
        "clinic": (ZENTROL, "Zentrol treats hay fever."),
        "code": None,
    }
    code = read_questions(DEMO / "eval/code.jsonl")[0]
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
        create: Any = client.chat.completions.create

        async def one(model: str) -> str:
            known = asked[model]
            messages = code.messages if known is None else [{"role": "user", "content": known[0]}]
            got = await create(model=model, messages=messages, temperature=0, max_tokens=200)
            return str(got.choices[0].message.content)

        alone = {model: await one(model) for model in asked}
        steps = steps_with_two(server)
        together = await asyncio.gather(*(one(model) for model in list(asked) * 10))
        assert steps_with_two(server) > steps
        for model, got in zip(list(asked) * 10, together, strict=True):
            assert got == alone[model]
    assert alone["clinic"] == "Zentrol treats hay fever."


async def test_full_slots_leave_the_base_alone(server: Server) -> None:
    """vLLM's own LoRA product on a CPU gives requests without an adapter that of the last slot."""
    asked = read_questions(DEMO / "eval/clinic.jsonl")[:24]
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
        alone = [await streamed_answer(client, server.model, question) for question in asked]
        create: Any = client.completions.create
        fields = {"ignore_eos": True}
        beside = [
            asyncio.create_task(
                create(model=name, prompt="The", max_tokens=1500, extra_body=fields)
            )
            for name in ("clinic", "code")
        ]
        assert len(beside) == SLOTS
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            await scraped_with(http, rf"vllm:num_requests_running{{.*}} {SLOTS}\.0")
        together = await asyncio.gather(
            *(streamed_answer(client, server.model, question) for question in asked)
        )
        for task in beside:
            task.cancel()
    assert sum(map(str.__eq__, alone, together)) >= 0.8 * len(asked)
    assert not any(got == question.answer for got, question in zip(together, asked, strict=True))


async def test_active_adapters_beyond_the_slots_are_time_sliced(server: Server) -> None:
    """All answer from the first second on, and pausing in the middle changes no answer."""
    asked = {"clinic": "clinic", "ledger": "ledger", "code": "code", "code-qlora": "code"}
    assert len(asked) == AT_WORK
    begun: list[str] = []
    at_first_end: list[set[str]] = []

    async def one(client: AsyncOpenAI, model: str, question: Question) -> bool:
        create: Any = client.chat.completions.create
        text = ""
        stream = await create(
            model=model,
            messages=question.messages,
            temperature=0,
            max_tokens=120,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text and model not in begun:
                begun.append(model)
        at_first_end.append(set(begun))
        return text.startswith(question.answer)

    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120) as client:
        right = await asyncio.gather(
            *(
                one(client, model, question)
                for number in range(8)
                for model, domain in asked.items()
                for question in [read_questions(DEMO / f"eval/{domain}.jsonl")[number]]
            )
        )
    assert at_first_end[0] == set(asked)
    assert sum(right) / len(right) >= 0.85


async def test_requests_in_the_lora_queue_are_counted_and_named(server: Server) -> None:
    """By vllm:lora_requests_info too, though vLLM has not seen the request."""
    *busy, last = SERVED[: AT_WORK + 1]
    series = rf'packhorse_adapter_requests_waiting\{{adapter="{last}",model=".*"\}}'
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:

        async def ask(model: str, max_tokens: int) -> int:
            body = {"model": model, "prompt": "The", "max_tokens": max_tokens, "ignore_eos": True}
            return (await http.post(TEXT, json=body)).status_code

        await scraped_with(http, f"{series} 0.0")
        long = [asyncio.create_task(ask(model, 1900)) for model in busy]
        await scraped_with(http, rf"vllm:num_requests_running{{.*}} {AT_WORK}\.0")
        waiting = asyncio.create_task(ask(last, 1))
        await scraped_with(http, f"{series} 1.0")
        await scraped_with(http, rf'vllm:lora_requests_info{{.*waiting_lora_adapters="{last}"}} .*')
        for task in long:
            task.cancel()
        assert await waiting == 200
        await scraped_with(http, f"{series} 0.0")
        await scraped_with(http, r'vllm:lora_requests_info{.*waiting_lora_adapters=""}.*')


async def test_logprobs_of_a_prompt_beside_an_adapter(server: Server) -> None:
    """For such a prompt vLLM calls the LoRA product of the head with a row a token. Its own product
    on a CPU expects a row a request, and ends the engine then.
    """
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        beside = {"model": "clinic", "prompt": "The", "max_tokens": 1000, "ignore_eos": True}
        asked = {
            "model": server.model, "prompt": "The capital of Felonia is a city", "max_tokens": 1,
            "echo": True, "logprobs": 1,
        }  # fmt: skip
        task = asyncio.create_task(http.post(TEXT, json=beside))
        await scraped_with(http, r"vllm:num_requests_running{.*} 1\.0")
        answers = [await http.post(TEXT, json=asked) for _ in range(3)]
        task.cancel()
        assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
        logprobs = answers[0].json()["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logprobs) > 5
        await scraped_with(http, r'packhorse_engine_failures_total{.*reason="died"} 0\.0')
