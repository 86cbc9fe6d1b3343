"""The official Python client's embeddings, of a server with an embedding model."""

from __future__ import annotations

import math
from typing import Any

import openai
from common import (
    BASE_URL,
    CAPITAL,
    KEY,
    LONG,
    MODEL,
    UNKNOWN_MODEL,
    WEATHER,
    WRONG_KEY,
    call,
    main,
    refused,
)

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=60)


def embed(given: Any, by: Any = client, model: str = MODEL, **more: Any) -> Any:
    return by.embeddings.create(model=model, input=given, **more)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


@call
def embeddings() -> Any:
    """The client asks for base64 by itself, and reads it with numpy where that is."""
    answer = embed([CAPITAL, WEATHER])
    if [entry.index for entry in answer.data] != [0, 1] or not answer.usage.prompt_tokens:
        raise AssertionError(f"{[entry.index for entry in answer.data]}, {answer.usage}")
    (one,) = embed(CAPITAL).data
    vectors = [entry.embedding for entry in answer.data]
    if cosine(one.embedding, vectors[0]) < 0.999 or cosine(*vectors) > 0.999:
        raise AssertionError("a text alone has another vector, or two texts have the same")
    return {"dimensions": len(one.embedding), "tokens": answer.usage.total_tokens}


@call
def floats() -> Any:
    plain = embed(CAPITAL, encoding_format="float").data[0].embedding
    if cosine(plain, embed(CAPITAL).data[0].embedding) < 0.9999:
        raise AssertionError("floats and base64 are different vectors")
    return {"dimensions": len(plain)}


@call
def token_ids() -> Any:
    answer = embed([[5, 6, 7], [8, 9]])
    if len(answer.data) != 2 or answer.usage.prompt_tokens != 5:
        raise AssertionError(f"{len(answer.data)} vectors, {answer.usage}")
    return {"tokens": answer.usage.prompt_tokens}


@call
def models() -> Any:
    names = [model.id for model in client.models.list()]
    if MODEL not in names:
        raise AssertionError(f"{MODEL} is not among {names}")
    return {"models": names}


@call
def wrong_key() -> Any:
    other = client.with_options(api_key=WRONG_KEY)
    return refused(lambda: embed(CAPITAL, other), openai.AuthenticationError, status=401)


@call
def unknown_model() -> Any:
    return refused(lambda: embed(CAPITAL, model=UNKNOWN_MODEL), openai.NotFoundError, status=404)


@call
def too_long() -> Any:
    return refused(lambda: embed(LONG), openai.BadRequestError, status=400)


if __name__ == "__main__":
    main()
