"""Settings of admission control (limits/): what is refused at once with 429."""

from __future__ import annotations

from pydantic import Field

from packhorse.serve.settings.section import Section


class AdmissionSettings(Section):
    """Limits above which a call is refused at once with 429."""

    max_in_flight: int = Field(1024, ge=1)
    """Concurrent HTTP and gRPC calls, counted before their bodies are read."""
    max_bodies_bytes: int = Field(256 * 2**20, ge=2**20)
    """Bytes of request bodies and messages held by all calls in progress; one key may hold half."""
    max_in_engine: int | None = Field(None, ge=1)
    """Answers (prompts x n) in the engine, waiting or running. Unset: 1.5 times the engine's
    max_num_seqs.
    """
    max_queued_tokens: int | None = Field(None, ge=1)
    """Prompt tokens that the engine has not read. Unset: 1.5 times the tokens of the KV cache.
    One request is always admitted, however long its prompt is.
    """
