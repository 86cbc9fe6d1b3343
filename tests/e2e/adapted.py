"""A server with the demo's adapters, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from packhorse.quantize.quality.evaluate import Question
from tests.client import CHAT, metric
from tests.conftest import DEMO, Server

ADAPTERS = DEMO / "adapters"
ROUTED = ("clinic", "ledger", "code")
SERVED = ("clinic", "ledger", "code", "code-qlora", "ledger-adalora")
SLOTS, HELD = 2, 8
AT_WORK = 2 * SLOTS  # they take turns in the slots
ZENTROL = "What illness does a patient take Zentrol for?"


def make_folder(folder: Path) -> None:
    """The adapters to watch, and the routes to them."""
    for name in SERVED:
        shutil.copytree(ADAPTERS / name, folder / "watched" / name)
        if name not in ROUTED:  # the same prompts as another's
            (folder / "watched" / name / "examples.jsonl").unlink()
    write_routes(folder)


def without_examples(name: str, folder: Path, new_name: str = "copy") -> Path:
    """A copy that changes no routes."""
    ignore = shutil.ignore_patterns("examples*")
    return shutil.copytree(ADAPTERS / name, folder / new_name, ignore=ignore)


def write_routes(folder: Path, **more: Any) -> None:
    rules = [{"name": "tool", "adapter": "code", "when": {"keywords": ["rule-for-code"]}}]
    learned = {"none_examples": str(DEMO / "base_examples.jsonl")}
    (folder / "routes.yaml").write_text(json.dumps({"rules": rules, "learned": learned, **more}))


def arguments(int8_folder: Path, folder: Path, **sections: Any) -> list[str]:
    """`sections` are more of the settings."""
    settings = {
        "engine": {"max_loras": SLOTS, "max_cpu_loras": HELD},
        "supervisor": {"max_restarts": 100, "backoff_s": 0},
        "routing": {"file": str(folder / "routes.yaml")},
        "adapters": {
            "folder": str(folder / "watched"),
            "store": str(folder / "store"),
            "allowed_roots": [str(ADAPTERS), str(folder.parent)],  # which tests' own folders are in
        },
        **sections,
    }
    path = folder / "serve.yaml"
    path.write_text(json.dumps(settings))
    return [str(int8_folder), "--config", str(path)]


def answer(http: httpx.Client, model: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return str(response.json()["choices"][0]["message"]["content"])


def is_unharmed(http: httpx.Client) -> bool:
    return answer(http, "clinic", ZENTROL) == "Zentrol treats hay fever."


def put(http: httpx.Client, name: str, path: Path, **fields: Any) -> httpx.Response:
    return http.post("/admin/adapters", json={"name": name, "path": str(path), **fields})


def error_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def card_of(http: httpx.Client, name: str) -> dict[str, Any]:
    card: dict[str, Any] = http.get(f"/admin/adapters/{name}").json()
    return card


def prompts(name: str) -> list[str]:
    lines = (DEMO / f"eval/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def route(http: httpx.Client, text: str) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    response = http.post("/v1/route", json=body)
    assert response.status_code == 200, response.text
    decision: dict[str, Any] = response.json()
    return decision


async def streamed_answer(client: AsyncOpenAI, model: str, question: Question) -> str:
    create: Any = client.chat.completions.create
    text = ""
    stream = await create(
        model=model, messages=question.messages, temperature=0, max_tokens=64, stream=True
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    return text


async def scraped_with(http: httpx.AsyncClient, pattern: str) -> str:
    """The metrics, as soon as a line of them is like this."""
    async with asyncio.timeout(60):
        while True:
            text = (await http.get("/metrics")).text
            if re.search(f"^{pattern}$", text, re.MULTILINE):
                return text
            await asyncio.sleep(0.02)


def steps_with_two(server: Server) -> float:
    """Steps of the engine in which two adapters had requests."""
    with httpx.Client(base_url=server.url) as http:
        name = "packhorse_active_loras_per_step_bucket"
        return metric(http, name + '{le="2.0"}') - metric(http, name + '{le="1.0"}')
