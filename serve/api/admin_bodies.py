"""Bodies of operators' requests."""

from __future__ import annotations

from packhorse.serve.api.fields import StrictBody
from packhorse.serve.api.unknown_fields import LenientBody


class AdapterBody(StrictBody):
    """POST /admin/adapters. `path` is a folder on the server, as PEFT saves it."""

    name: str
    path: str
    replace: bool = False
    """Whether an adapter of this name may be there already."""
    pinned: bool | None = None


class PinBody(StrictBody):
    """PATCH /admin/adapters/NAME."""

    pinned: bool


class LoadAdapterBody(LenientBody):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(LenientBody):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
