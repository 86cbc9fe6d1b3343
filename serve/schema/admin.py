"""Bodies of operators' requests."""

from __future__ import annotations

from serve.schema.fields import StrictBody


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
