"""What Packhorse changes inside vLLM, one patch a file, and whether each is in use here.

A patch replaces or reads what vLLM does not promise to keep. So each declares what it was written
against (`APPLIES_TO`) and is asked before it is used whether that is still so (`probe`, see
probing.py). A patch of kind "speed" that does not fit is left out with a warning: the engine then
serves by vLLM's own way. A patch of kind "correctness" that does not fit refuses what needs it.

Imports nothing of vLLM: the first question is asked while vLLM is not imported yet.
docs/vllm-upgrade.md says how to move all of this to another version.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, cast

from packhorse.serve.engines.vllm.patches import probing
from packhorse.serve.errors import StartupError

logger = logging.getLogger("packhorse.engine")

Kind = Literal["speed", "correctness"]
APPLIED, NOT_NEEDED, LEFT_OUT = "applied", "not needed here", "left out"


@dataclass(frozen=True)
class Patch:
    """One file of this folder, as it declares itself."""

    name: str

    @cached_property
    def _declaration(self) -> dict[str, object]:
        return probing.declaration_of(Path(__file__).with_name(f"{self.name}.py"))

    @property
    def kind(self) -> Kind:
        return cast(Kind, self._declaration["KIND"])

    @property
    def applies_to(self) -> probing.AppliesTo:
        return cast(probing.AppliesTo, self._declaration["APPLIES_TO"])

    @property
    def without(self) -> str:
        """What happens without it, in a sentence."""
        return cast(str, self._declaration["WITHOUT"])

    def probe(self, root: Path | None = None) -> str | None:
        """None when it fits the vLLM under `root` (None: the installed one), else why not."""
        return probing.reason(self.applies_to, root)


PATCHES = {
    name: Patch(name)
    for name in (
        "forkserver", "in_process_executor", "amx", "cpu_lora_math", "lora_time_slicing",
        "avx2_int4", "json_whitespace", "fast_outputs", "lasting_metrics", "engine_watch",
    )
}  # fmt: skip


class Row(NamedTuple):
    """Of the table for the log and for `/version`."""

    name: str
    kind: Kind
    state: str
    """"applied", "not needed here", or "left out: " and the reason."""


_reasons: dict[str, str | None] = {}  # of the installed vLLM, which does not change under us
_states: dict[str, str] = {}


def reason(name: str) -> str | None:
    """Why the patch does not fit the installed vLLM; None: it does. Asked once a process."""
    if name not in _reasons:
        _reasons[name] = PATCHES[name].probe()
    return _reasons[name]


def use(name: str, *, needed: bool = True) -> bool:
    """Whether to use a patch: it is needed here, and fits. What is decided goes into the table; a
    patch that is needed and left out is warned of once.
    """
    if not needed:
        _states.setdefault(name, NOT_NEEDED)
        return False
    why = reason(name)
    if why is None:
        _states[name] = APPLIED
        return True
    state = f"{LEFT_OUT}: {why}"
    if _states.get(name) != state:
        _states[name] = state
        logger.warning(
            "The patch %s does not fit this vLLM and is left out: %s. %s",
            name, why, PATCHES[name].without,
        )  # fmt: skip
    return False


def require(name: str, *, needed: bool, what: str, instead: str) -> bool:
    """As `use`, for a patch without which `what` would answer wrongly or die.

    Raises StartupError when it is needed and does not fit; `instead` is the way out.
    """
    if needed and (why := reason(name)) is not None:
        _states[name] = f"{LEFT_OUT}: {why}"
        raise StartupError(
            f"{what} needs the patch {name}, which does not fit this vLLM: {why}. "
            f"{PATCHES[name].without} {instead}"
        )
    return use(name, needed=needed)


def table() -> list[Row]:
    """All patches, and what has been decided about each in this process so far."""
    return [Row(name, patch.kind, _states.get(name, NOT_NEEDED)) for name, patch in PATCHES.items()]


def summary() -> str:
    """The table in one line, for the log."""
    return "; ".join(f"{row.name} ({row.kind}): {row.state}" for row in table())
