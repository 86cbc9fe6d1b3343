"""Adapters in vLLM: each version is a LoRA of its own, with its own name, number and path."""

from __future__ import annotations

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from packhorse.serve.engines.vllm.health import has_died
from packhorse.serve.errors import EngineDied, Invalid, Unavailable
from packhorse.serve.messages import AdapterVersion


class Loras:
    """The adapters of one engine. vLLM would load an adapter that it does not have in the middle of
    a step, and die of one that it cannot load; so no request names one that was not loaded before.
    """

    def __init__(self, llm: AsyncLLM, loaded: dict[int, LoRARequest]) -> None:
        """`loaded` are the loaded adapters by number, none so far; kept up to date here."""
        self._llm = llm
        self._loaded = loaded

    async def load(self, adapter: AdapterVersion) -> None:
        """Raises Invalid with vLLM's reason, EngineDied."""
        request = LoRARequest(adapter.engine_name, adapter.int_id, str(adapter.folder))
        try:
            await self._llm.add_lora(request)
        except EngineDeadError as error:
            raise EngineDied("The engine has stopped.", retry_after_s=30) from error
        except Exception as error:  # what the core raised, as text
            if await has_died(self._llm):
                raise EngineDied("The engine has stopped.", retry_after_s=30) from error
            raise Invalid(
                f"The engine does not take the adapter {adapter.name!r}: {error}"
            ) from error
        self._loaded[adapter.int_id] = request

    async def unload(self, adapter: AdapterVersion) -> None:
        """Raises EngineDied."""
        self._loaded.pop(adapter.int_id, None)
        try:
            await self._llm.remove_lora(adapter.int_id)
        except EngineDeadError as error:
            raise EngineDied("The engine has stopped.", retry_after_s=30) from error

    def of(self, adapter: AdapterVersion | None) -> LoRARequest | None:
        """What to give with a request. Raises Unavailable when it is not loaded."""
        if adapter is None:
            return None
        request = self._loaded.get(adapter.int_id)
        if request is None:
            raise Unavailable(
                f"The engine has lost the adapter {adapter.name!r}; the server's log says why."
            )
        return request
