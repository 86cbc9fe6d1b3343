"""Embeddings: the body, in OpenAI's form. The data of the answer is the vectors (pooling.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from packhorse.serve.api.fields import INT32_MAX
from packhorse.serve.api.pooling import InputBody
from packhorse.serve.messages import Pooling


class EmbeddingBody(InputBody):
    """POST /v1/embeddings."""

    dimensions: int | None = Field(None, ge=1, le=INT32_MAX)
    """Of models that were trained for it (Matryoshka); others refuse it."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: the bytes of float32 values, little-endian."""
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "little"

    def pooling(self) -> Pooling:
        return Pooling("embed", dimensions=self.dimensions, use_activation=self.use_activation)
