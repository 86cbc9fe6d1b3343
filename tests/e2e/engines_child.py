"""Several real engines in one process, and one without any speed patch. Run by test_patches.py:

    python -m tests.e2e.engines_child RESULT.json MODEL OTHER_MODEL

What it finds is in RESULT.json. The two models are folders; MODEL has a tokenizer and a chat
template, which both use.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from packhorse.quantize.quality.evaluate import read_questions
from packhorse.serve.engines.vllm import patches
from packhorse.serve.engines.vllm.engine import VllmEngine
from packhorse.serve.errors import StartupError
from packhorse.serve.messages import GenerateRequest, Route, Sampling
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.engine import EngineSettings
from tests.conftest import DEMO

QUESTIONS = read_questions(DEMO / "eval/general.jsonl")[:6]
REASON = "left out for a test"
COUNTED = ("vllm:generation_tokens_total", "vllm:gpu_cache_usage_perc", "vllm:num_requests_running")


def settings(model: Path, **fields: Any) -> EngineSettings:
    size = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 1024**2}
    return EngineSettings.model_validate({"tokenizer": str(model), **size, **fields})


async def build(folder: Path, name: str, chosen: EngineSettings) -> VllmEngine:
    metrics = ModelMetrics(name)
    return await asyncio.to_thread(VllmEngine, folder, name, chosen, metrics=metrics)


def requests(name: str) -> list[GenerateRequest]:
    """Streamed, whole, and with what has no fast way in any case."""
    greedy = Sampling(temperature=0.0, max_tokens=24)
    asked = [
        GenerateRequest(
            f"{name}-{number}",
            name,
            replace(greedy, logprobs=1) if number == 2 else greedy,
            messages=tuple(question.messages),
            stream=number % 2 == 0,
        )
        for number, question in enumerate(QUESTIONS)
    ]
    several = Sampling(temperature=1.0, seed=7, n=2, max_tokens=8)
    return [*asked, GenerateRequest(f"{name}-n", name, several, prompt="The")]


async def answer(engine: VllmEngine, request: GenerateRequest) -> list[Any]:
    """The texts of the choices, and how each ended."""
    route = Route(request.model)
    prompt = await engine.render(request, route)
    texts = [""] * request.sampling.n
    ends: list[Any] = [None] * request.sampling.n
    async for chunk in engine.generate(prompt, request, route):
        texts[chunk.index] += chunk.text
        ends[chunk.index] = chunk.finish_reason or ends[chunk.index]
    return [texts, ends]


async def answers(engine: VllmEngine, name: str) -> list[Any]:
    return list(await asyncio.gather(*(answer(engine, one) for one in requests(name))))


async def leave(engine: VllmEngine, name: str, **fields: Any) -> bool:
    """Whether a request whose reader leaves is gone from the engine."""
    sampling = Sampling(max_tokens=200, ignore_eos=True, **fields)
    request = GenerateRequest(f"{name}-leaves", name, sampling, prompt="The", stream=True)
    route = Route(name)
    chunks = engine.generate(await engine.render(request, route), request, route)
    await anext(chunks)
    await chunks.aclose()
    async with asyncio.timeout(60):
        while engine._llm.get_num_unfinished_requests():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return True


def series() -> dict[str, dict[str, float]]:
    """Values by metric and model."""
    found: dict[str, dict[str, float]] = {name: {} for name in COUNTED}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name in found:
                assert sample.labels["model_name"] not in found[sample.name], "a series twice"
                found[sample.name][sample.labels["model_name"]] = sample.value
    return found


async def settled_series() -> dict[str, dict[str, float]]:
    """The same, when the last step is counted: vLLM hands over its outputs before."""
    found, before = series(), None
    while found != before:
        await asyncio.sleep(0.3)
        found, before = series(), found
    return found


async def check_two(model: Path, other: Path) -> dict[str, Any]:
    """Two engines at a time; one of them is rebuilt."""
    found: dict[str, Any] = {}
    one, two = await asyncio.gather(
        build(model, "one", settings(model)), build(other, "two", settings(model))
    )
    found["one"], found["two"] = await asyncio.gather(answers(one, "one"), answers(two, "two"))
    found["left"] = [await leave(one, "one"), await leave(one, "one", logprobs=1)]
    found["series"] = [await settled_series()]
    await two.close()
    found["one again"] = await answers(one, "one")
    await one.check()
    two = await build(other, "two", settings(model))
    found["two again"] = await answers(two, "two")
    found["series"].append(await settled_series())
    found["table"] = patches.table()
    for engine in (one, two):
        await engine.check()
        await engine.close()
    return found


async def check_unpatched(model: Path) -> dict[str, Any]:
    """One engine without any speed patch."""
    for name, patch in patches.PATCHES.items():
        if patch.kind == "speed":
            patches._reasons[name] = REASON
    engine = await build(model, "plain", settings(model))
    found = {
        "plain": await answers(engine, "plain"),
        "plain left": [await leave(engine, "plain"), await leave(engine, "plain", logprobs=1)],
        "plain table": patches.table(),
        "steps": engine._heartbeat.steps,
    }
    await engine.check()
    running = asyncio.create_task(answer(engine, replace(requests("plain")[0], sampling=LONG)))
    while not engine._llm.get_num_unfinished_requests():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await engine.close()
    (ended,) = await asyncio.gather(running, return_exceptions=True)
    found["plain closed"] = type(ended).__name__
    return found


LONG = Sampling(max_tokens=200, ignore_eos=True)


async def check_refused(model: Path) -> dict[str, Any]:
    patches._reasons["cpu_lora_math"] = REASON
    try:
        await build(model, "refused", settings(model, enable_lora=True))
    except StartupError as error:
        return {"refused": str(error)}
    return {"refused": None}


async def main(model: Path, other: Path) -> dict[str, Any]:
    found = await check_two(model, other)
    found |= await check_unpatched(model)
    return found | await check_refused(model)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    found = asyncio.run(main(Path(sys.argv[2]), Path(sys.argv[3])))
    Path(sys.argv[1]).write_text(json.dumps(found))
