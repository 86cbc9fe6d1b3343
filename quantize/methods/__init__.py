"""Methods by name. One method is one file that reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantize.errors import BadInput
from quantize.grid import Codes, Grid


@dataclass(frozen=True)
class Method:
    """How one linear weight becomes codes, and what that needs.

    `format` is the layout it is written in; `activation_bits` is 8 where the kernel also rounds its
    inputs (W8A8), which then needs bf16 around it: vLLM's CPU kernel aborts the process on float16.
    """

    name: str
    summary: str
    grid: Grid
    format: str
    quantize: Callable[[Tensor], Codes]
    activation_bits: int = 16


def _int8(group_size: int) -> Method:
    from quantize.methods import int8

    return int8.method()


def _rtn(group_size: int) -> Method:
    from quantize.methods import rtn

    return rtn.method(group_size)


METHODS: dict[str, Callable[[int], Method]] = {"int8": _int8, "rtn": _rtn}


def make(name: str, *, group_size: int) -> Method:
    """Raises BadInput with the known methods."""
    if name not in METHODS:
        raise BadInput(f"--method {name} is not known; choose one of {', '.join(sorted(METHODS))}.")
    return METHODS[name](group_size)
