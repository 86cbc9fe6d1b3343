"""What the sections of the settings have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, SecretStr


class Section(BaseModel):
    """A part of the settings tree with one owner: immutable, and unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def stripped(secret: SecretStr) -> SecretStr:
    """The secret without the surrounding blanks and line ends that `echo` and editors add."""
    return SecretStr(secret.get_secret_value().strip())
