"""Settings of a request's life: its time limits, and the drain at the end."""

from __future__ import annotations

from pydantic import Field, model_validator

from packhorse.serve.settings.section import Section


class ServiceSettings(Section):
    served_model_name: str | None = None
    """The name that clients send as `model`. Unset: the model folder's name."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """After SIGTERM, how long requests in flight may take to end; then they are cancelled."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Time limit of a request that sets no timeout itself, waiting included."""
    max_request_timeout_s: float = Field(3600.0, gt=0)
    """The highest timeout that a request may set."""
    max_inputs: int = Field(2048, ge=1)
    """Inputs of one call on a pooling model: texts of embeddings, documents of rerank."""

    @model_validator(mode="after")
    def _default_is_allowed(self) -> ServiceSettings:
        if self.request_timeout_s > self.max_request_timeout_s:
            raise ValueError(
                f"request_timeout_s={self.request_timeout_s:g} is above max_request_timeout_s="
                f"{self.max_request_timeout_s:g}; raise the latter too"
            )
        return self
