"""Settings of the Responses API (api/responses/): what is kept, what runs in the background."""

from __future__ import annotations

from pydantic import Field

from packhorse.serve.settings.section import Section


class ResponsesSettings(Section):
    max_kept: int = Field(10_000, ge=0)
    """Responses that this process keeps in memory. 0: none are kept; `store` has no effect then,
    and previous_response_id finds nothing.
    """
    max_kept_bytes: int = Field(128 * 2**20, ge=0)
    """Memory for them. When it is full, the tenant that holds most loses its oldest one."""
    max_entry_bytes: int = Field(4 * 2**20, ge=1024)
    """A response with its conversation that is larger is not kept."""
    ttl_s: float = Field(24 * 3600.0, gt=0, le=30 * 24 * 3600)
    """How long a response can be fetched and continued."""
    max_background: int = Field(64, ge=0)
    """Responses with `background` that wait or run at a time; one tenant may have half of them."""
