"""instructor on the official client, in its two ways of asking: a tool, and a JSON schema."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from common import (
    BASE_URL,
    CAPITAL,
    JSON_TOKENS,
    KEY,
    LONG,
    MODEL,
    UNKNOWN_MODEL,
    WEATHER,
    WRONG_KEY,
    call,
    main,
    refused,
    said,
)
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


class get_weather(BaseModel):  # the tool's name
    """Get the weather in a city"""

    city: str


ASKED: Any = [{"role": "user", "content": CAPITAL}]


def ask(
    kind: Any,
    mode: instructor.Mode = instructor.Mode.TOOLS,
    *,
    key: str = KEY,
    model: str = MODEL,
    messages: Any = ASKED,
    **more: Any,
) -> Any:
    plain = openai.OpenAI(base_url=BASE_URL, api_key=key, max_retries=0, timeout=60)
    client = instructor.from_openai(plain, mode=mode)
    options: Any = {"temperature": 0, "max_tokens": JSON_TOKENS, "max_retries": 1, **more}
    return client.chat.completions.create(
        model=model, messages=messages, response_model=kind, **options
    )


@call
def chat() -> Any:
    return said(ask(None).choices[0].message.content)


@call
def stream() -> Any:
    """Unfinished objects while the answer comes; usage is not among what it gives."""
    seen = list(ask(instructor.Partial[City], instructor.Mode.JSON_SCHEMA, stream=True))
    return {"parts": len(seen), **City.model_validate(seen[-1].model_dump()).model_dump()}


@call
def tools() -> Any:
    return ask(get_weather, messages=[{"role": "user", "content": WEATHER}]).model_dump()


@call
def structured() -> Any:
    return ask(City, instructor.Mode.JSON_SCHEMA).model_dump()


@call
def wrong_key() -> Any:
    kinds = (InstructorRetryException, openai.AuthenticationError)
    return refused(lambda: ask(City, key=WRONG_KEY), *kinds, status=401)


@call
def unknown_model() -> Any:
    kinds = (InstructorRetryException, openai.NotFoundError)
    return refused(lambda: ask(City, model=UNKNOWN_MODEL), *kinds, status=404)


@call
def too_long() -> Any:
    kinds = (InstructorRetryException, openai.BadRequestError)
    history = [{"role": "user", "content": LONG}]
    return refused(lambda: ask(City, messages=history), *kinds, status=400)


if __name__ == "__main__":
    main()
