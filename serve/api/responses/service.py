"""The Responses API over one pipeline: requests prepared, responses kept, fetched, deleted and
generated in the background.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.generate import (
    CallContext,
    CollectedChoice,
    collect,
    model_names,
    total_usage,
)
from packhorse.serve.api.generate import requests_of as chat_requests_of
from packhorse.serve.api.responses.answer import Answer
from packhorse.serve.api.responses.background import Background, Job
from packhorse.serve.api.responses.body import NAMES, ResponseBody, renamed
from packhorse.serve.api.responses.items import OWN_ID, InputItem, kept_ids
from packhorse.serve.api.responses.store import Kept, ResponseStore
from packhorse.serve.api.responses.tools import ToolPlan
from packhorse.serve.api.responses.truncation import fitting
from packhorse.serve.api.validation import invalid_from
from packhorse.serve.errors import Conflict, Invalid, NotFound, TooLarge
from packhorse.serve.messages import Caller, GenerateRequest
from packhorse.serve.pipeline import Pipeline, Stream

ID = re.compile(r"resp_[0-9a-f]{32}")
MAX_REFERENCES = 64
"""Responses whose items one request may refer to."""
MAX_REFERRED_BYTES = 8 * 2**20
"""Of all items that one request refers to; one may be referred to many times."""
ANSWER_BYTES = 2**16
"""Room for the answer that a background response must have beside its conversation."""
MAX_LISTED = 100
OVERDUE_S = 60.0
"""A response in the background that has not ended so long after its limit has lost its server."""


@dataclass(slots=True)
class Call:
    """One call of POST /v1/responses, ready to be generated."""

    context: CallContext
    body: ResponseBody
    chat: ChatBody
    answer: Answer
    items: list[dict[str, Any]]
    """The conversation, as it is kept."""
    requests: list[GenerateRequest]
    dropped_items: int = 0
    """Items that truncation has left out."""


@dataclass(frozen=True, slots=True)
class ItemPage:
    """A part of a list of items."""

    items: list[dict[str, Any]]
    has_more: bool


class Responses:
    """See above."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: ResponseStore | None = None,
        *,
        max_background: int = 64,
    ) -> None:
        """`store` None: nothing is kept."""
        self._pipeline = pipeline
        self._store = store
        self._background = Background(pipeline, max_jobs=max_background)

    @property
    def in_background(self) -> int:
        """Responses that wait or are generated there."""
        return self._background.count

    # Generating

    async def prepare(self, body: ResponseBody, context: CallContext) -> Call:
        """All that is needed before the pipeline. Raises ServeError."""
        response_hex = uuid.uuid4().hex
        plan = body.plan()
        earlier, own = await self._conversation(body, context.caller)
        documents = [*earlier, *kept_ids(own, response_hex)]
        items = [*_items(earlier), *own]
        keeps = self._keeps(body)
        if body.runs_in_background and not keeps:
            raise Invalid(
                "background needs a server that keeps responses, and responses.max_kept is 0 here; "
                "send stream instead.",
                param="background",
            )
        more_ignored = () if keeps or not body.store else ("store",)
        chat, dropped = await self._chat(body, items, plan, context, more_ignored)
        return Call(
            context,
            body,
            chat,
            Answer(body, plan, response_hex),
            documents if keeps else [],
            chat_requests_of(self._pipeline, chat, context),
            dropped,
        )

    async def _chat(
        self,
        body: ResponseBody,
        items: list[InputItem],
        plan: ToolPlan,
        context: CallContext,
        more_ignored: Sequence[str],
    ) -> tuple[ChatBody, int]:
        """The chat request, and how many items were left out so that it fits."""

        def chat_of(kept: Sequence[InputItem]) -> ChatBody:
            return body.to_chat(kept, plan, more_ignored)

        if body.truncation != "auto":
            return chat_of(items), 0
        caller = context.caller

        async def tokens_of(kept: Sequence[InputItem]) -> int:
            return await self._count(chat_of(kept), context)

        name = body.model or self._pipeline.models.default(caller)
        max_model_len = self._pipeline.models.of(name, caller).engine.max_model_len
        kept = await fitting(items, tokens_of, max_model_len, body.max_output_tokens)
        return chat_of(kept), len(items) - len(kept)

    def _keeps(self, body: ResponseBody) -> bool:
        return self._store is not None and self._store.fits(0) and body.store is not False

    async def start(self, call: Call) -> list[Stream]:
        """Raises ServeError, with this API's names of fields."""
        try:
            return await self._pipeline.start_all(call.requests)
        except Invalid as error:
            raise renamed(error) from error

    def begun(self, call: Call, streams: Sequence[Stream]) -> None:
        """The streams of a call are there."""
        sampling = streams[0].context.prompt.effective_sampling
        call.answer.begin(model_names(streams), sampling)

    def ended(
        self, call: Call, streams: Sequence[Stream], choices: Sequence[CollectedChoice] = ()
    ) -> None:
        """The answer is complete; `choices` of one that was not streamed."""
        for choice in choices:
            call.answer.add_whole(choice)
        call.answer.usage = total_usage(streams)
        self.keep(call)

    def keep(self, call: Call, *, ends_by_s: float | None = None) -> None:
        """Keep the response as it is now, if it is to be kept."""
        if self._store is None or not self._keeps(call.body):
            return
        kept = Kept(call.answer.document(), call.items, ends_by_s)
        self._store.put(call.context.caller.tenant, call.answer.id, kept.encoded())

    async def whole(self, call: Call) -> list[Stream]:
        """Generate the whole answer. Raises ServeError."""
        streams = await self.start(call)
        self.begun(call, streams)
        choices = await collect(streams)
        self.ended(call, streams, choices)
        return streams

    async def count_tokens(self, body: ResponseBody, context: CallContext) -> int:
        """Tokens of the prompt that the body would have. Raises ServeError."""
        earlier, own = await self._conversation(body, context.caller)
        chat, _ = await self._chat(body, [*_items(earlier), *own], body.plan(), context, ())
        return await self._count(chat, context)

    async def _count(self, chat: ChatBody, context: CallContext) -> int:
        (request,) = chat_requests_of(self._pipeline, chat, context)
        models = self._pipeline.models
        engine = models.of(request.model, context.caller).engine
        try:
            return len(await engine.tokenize(request))
        except Invalid as error:
            raise renamed(error) from error

    # In the background

    def submit(self, call: Call) -> dict[str, Any]:
        """Generate the answer after this call has been answered. Raises Overloaded, Invalid for a
        time that is too long, and Unavailable while the engine loads.
        """
        self._pipeline.models.check_loaded()
        answer = call.answer
        answer.status = "queued"
        if not answer.document()["model"]:
            answer.begin(call.requests[0].model, None)
        assert self._store is not None
        size = len(Kept(answer.document(), call.items, 0.0).encoded())
        if not self._store.fits(size + ANSWER_BYTES):
            raise TooLarge(
                "background: the conversation is larger than what this server keeps "
                "(responses.max_entry_bytes); send less of it, or leave background out.",
                param="background",
            )
        # Those that share its connection's state have ended before it begins.
        call.requests = [replace(request, trace=None) for request in call.requests]
        each_s = self._pipeline.timeout_s(call.requests[0])
        job = Job(
            answer.id,
            call.context.caller,
            call.context.timeout_s or self._pipeline.max_request_timeout_s,
        )
        requests = call.requests

        async def work() -> None:
            left_s = max(job.ends_by_s - time.time(), 0.001)  # what it has waited is gone
            call.requests = [
                replace(request, timeout_s=min(each_s, left_s)) for request in requests
            ]
            await self.whole(call)

        def changed() -> None:
            over = answer.status not in ("queued", "in_progress")
            self.keep(call, ends_by_s=None if over else job.ends_by_s)

        self._background.submit(job, answer, work, changed)
        return answer.document()

    # Kept responses

    async def get(self, caller: Caller, response_id: str) -> Kept:
        """Raises NotFound, Unavailable."""
        kept = await self._find(caller, response_id)
        if kept is None:
            raise NotFound(
                f"There is no response {_shown(response_id)} here: it was not stored, is too old "
                "or was deleted, or is another tenant's."
            )
        return kept

    async def delete(self, caller: Caller, response_id: str) -> None:
        """Raises NotFound, Conflict, Unavailable. One that runs is ended."""
        has_run_here = await self._background.cancel(caller, response_id)
        found = await self.get(caller, response_id)
        if not has_run_here and found.response["status"] in ("queued", "in_progress"):
            raise Conflict(
                "This response is generated by another replica; send the call to that one."
            )
        assert self._store is not None
        await self._store.delete(caller.tenant, response_id)

    async def cancel(self, caller: Caller, response_id: str) -> dict[str, Any]:
        """The response after it was ended; one that has ended is left as it is. Raises NotFound,
        Invalid, Conflict, Unavailable.
        """
        found = await self.get(caller, response_id)
        if not found.response.get("background"):
            raise Invalid("Only a response with background=true can be cancelled.")
        if found.response["status"] in ("queued", "in_progress"):
            if not await self._background.cancel(caller, response_id):
                raise Conflict(
                    "This response is generated by another replica; send the call to that one."
                )
            found = await self.get(caller, response_id)
        return found.response

    async def input_items(
        self, caller: Caller, response_id: str, *, limit: int, after: str | None, ascending: bool
    ) -> ItemPage:
        """Raises NotFound, Invalid, Unavailable."""
        if not 1 <= limit <= MAX_LISTED:
            raise Invalid(
                f"limit={limit} is not between 1 and {MAX_LISTED}; ask for another page with "
                "after.",
                param="limit",
            )
        items = (await self.get(caller, response_id)).items
        if not ascending:
            items = items[::-1]
        start = 0
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise Invalid("after: this response has no such item.", param="after")
            start = places[0] + 1
        return ItemPage(items[start : start + limit], start + limit < len(items))

    async def close(self) -> None:
        """End what runs in the background, and keep what has become of it. The store stays open:
        more may be kept when streams are cut off.
        """
        await self._background.close()

    async def _find(self, caller: Caller, response_id: str) -> Kept | None:
        if self._store is None or not ID.fullmatch(response_id):
            return None
        content = await self._store.get(caller.tenant, response_id)
        if content is None:
            return None
        kept = Kept.decoded(content)
        is_lost = kept.ends_by_s is not None and time.time() > kept.ends_by_s + OVERDUE_S
        if is_lost and not self._background.has(response_id):
            error = {"code": "server_error", "message": "The server that generated it is gone."}
            return replace(kept, response={**kept.response, "status": "failed", "error": error})
        return kept

    async def _conversation(
        self, body: ResponseBody, caller: Caller
    ) -> tuple[list[dict[str, Any]], list[InputItem]]:
        """What came before, as documents, and the request's own items. Raises ServeError."""
        earlier: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            found = await self._find(caller, body.previous_response_id)
            if found is None:
                raise NotFound(
                    f"previous_response_id: there is no response "
                    f"{_shown(body.previous_response_id)} here; send the whole conversation as "
                    "input.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            if found.response["status"] in ("queued", "in_progress"):
                raise Invalid(
                    "previous_response_id: that response is not complete; wait for it.",
                    param="previous_response_id",
                )
            earlier = [*found.items, *found.response["output"]]
        if isinstance(body.input, str):
            return earlier, [InputItem(role="user", content=body.input)]
        return earlier, await self._resolved(list(body.input or ()), caller)

    async def _resolved(self, items: list[InputItem], caller: Caller) -> list[InputItem]:
        """The items, with those that others refer to in their places. Raises ServeError."""
        if not any(item.type == "item_reference" for item in items):
            return items
        known: dict[str, dict[str, dict[str, Any]]] = {}
        resolved = []
        left = MAX_REFERRED_BYTES
        for item in items:
            if item.type != "item_reference":
                resolved.append(item)
                continue
            owner = OWN_ID.fullmatch(item.id or "")
            if owner is not None and owner[1] not in known:
                if len(known) == MAX_REFERENCES:
                    raise Invalid(
                        f"input: items of more than {MAX_REFERENCES} responses are referred to; "
                        "send the items themselves.",
                        param="input",
                    )
                found = await self._find(caller, f"resp_{owner[1]}")
                await asyncio.sleep(0)  # others have the loop between two
                documents = [*found.items, *found.response["output"]] if found else []
                known[owner[1]] = {document["id"]: document for document in documents}
            document = known[owner[1]].get(item.id or "") if owner else None
            if document is None:
                raise NotFound(
                    f"input: there is no item {_shown(item.id or '')} here; send the item itself.",
                    param="input",
                )
            left -= len(json.dumps(document))
            if left < 0:
                raise TooLarge(
                    f"input: the items that are referred to have more than {MAX_REFERRED_BYTES} "
                    "bytes; refer to fewer.",
                    param="input",
                )
            resolved += _items([document])
        return resolved


def _items(documents: Sequence[dict[str, Any]]) -> list[InputItem]:
    """Raises Invalid: what a model has written need not be an item, as a call without a name."""
    try:
        return [InputItem.model_validate(document) for document in documents]
    except ValidationError as error:
        raise invalid_from(error) from None


def _shown(said: str) -> str:
    return repr(said[:80])


def metadata_of(call: Call, metadata: dict[str, str]) -> dict[str, str]:
    """What an answer says about itself, with this API's names of fields."""
    ignored = metadata.get("x-packhorse-ignored")
    if ignored:
        names = (NAMES.get(name, name) for name in ignored.split(", "))
        metadata["x-packhorse-ignored"] = ", ".join(dict.fromkeys(names))
    if call.dropped_items:
        metadata["x-packhorse-dropped-items"] = str(call.dropped_items)
    return metadata
