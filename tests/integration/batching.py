"""A whole server over the echo engine that keeps files and runs batches, and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types import Batch, FileObject

from packhorse.serve.app import App, create
from packhorse.serve.engines import echo
from packhorse.serve.rest.server import Listeners
from packhorse.serve.settings import Settings
from packhorse.serve.settings.admission import AdmissionSettings
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.batches import BatchSettings
from packhorse.serve.settings.cache import CacheSettings
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.settings.service import ServiceSettings
from tests.integration.serving import until_there

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


class Batching:
    """A server, and clients of it by the names of their keys."""

    def __init__(self, app: App, url: str) -> None:
        self.app = app
        self.url = url
        self._clients: dict[str, AsyncOpenAI] = {}

    def client(self, name: str = "none") -> AsyncOpenAI:
        """The official client with the key `key-NAME`; it tries nothing twice."""
        if name not in self._clients:
            self._clients[name] = AsyncOpenAI(
                base_url=f"{self.url}/v1",
                api_key=f"key-{name}",
                max_retries=0,
                http_client=DefaultAsyncHttpxClient(timeout=30),
            )
        return self._clients[name]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


@asynccontextmanager
async def batching(
    folder: Path | None,
    *,
    delay_s: float = 0,
    keys: AuthSettings | None = None,
    admission: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
    **batches: Any,
) -> AsyncIterator[Batching]:
    """`batches` are settings of that section; quiet times are short unless they say otherwise."""
    settings = Settings(
        engine=EngineSettings(kind="echo", echo_delay_s=delay_s),
        service=ServiceSettings(served_model_name="echo"),
        cache=CacheSettings(enabled=False),
        auth=keys or AuthSettings(),
        admission=AdmissionSettings(**(admission or {})),
        http=HttpSettings(**{"port": 0, **(http or {})}),
        batches=BatchSettings(**{"folder": folder, "quiet_s": 0.01, **batches}),
    )
    app = create(settings)
    listeners = Listeners(settings.http, app.asgi, app.admin_asgi, metrics=app.metrics)
    listeners.start()
    await app.start()
    server = Batching(app, listeners.url)
    try:
        yield server
    finally:
        await server.close()
        await app.stop()
        await listeners.stop()


def chat_line(number: int, text: str | None = None, **fields: Any) -> dict[str, Any]:
    """A line that asks the echo engine to say `text`, or its own number."""
    said = f"say {number}" if text is None else text
    return {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": CHAT,
        "body": {"model": "echo", "messages": [{"role": "user", "content": said}], **fields},
    }


def jsonl(lines: Iterable[Any]) -> bytes:
    """Lines as a file; strings and bytes are written as they are."""
    written = []
    for line in lines:
        text = line if isinstance(line, bytes | str) else json.dumps(line)
        written.append(text if isinstance(text, bytes) else text.encode())
    return b"\n".join(written) + b"\n"


async def upload(client: AsyncOpenAI, content: bytes, name: str = "in.jsonl") -> FileObject:
    return await client.files.create(file=(name, content), purpose="batch")


async def submit(client: AsyncOpenAI, lines: Sequence[Any], **fields: Any) -> Batch:
    """A batch of these lines, for chat completions."""
    file = await upload(client, jsonl(lines))
    made = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": file.id, **fields}
    return await client.batches.create(**made)


async def ended(client: AsyncOpenAI, batch: Batch, timeout_s: float = 60) -> Batch:
    """The batch, when it has ended."""
    found = batch

    async def look() -> bool:
        nonlocal found
        found = await client.batches.retrieve(batch.id)
        return found.status in ENDED

    await until_there(look, timeout_s)
    return found


async def answers(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """custom_id -> line of an output or error file. Fails when one is there twice."""
    if file_id is None:
        return {}
    content = (await client.files.content(file_id)).content
    assert content.endswith(b"\n")
    lines = [json.loads(line) for line in content.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def said(line: dict[str, Any]) -> str:
    """The text of a chat answer."""
    text = line["response"]["body"]["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def running(app: App) -> int:
    """Requests in the echo engine."""
    engine = app.model.engine
    inner = getattr(engine, "_engine", engine)
    assert isinstance(inner, echo.EchoEngine)
    return inner.running
