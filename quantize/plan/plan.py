"""What a run will do: the planner's decision, for `run`, for the report and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packhorse.quantize.numerics.grid import Scheme
from packhorse.quantize.settings import CHANNEL
from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """One run, decided. Sizes are in bytes; `peak_memory_bytes` and `seconds` are estimates, of
    quantizing alone: measuring quality and loading the result in the engine come on top.
    """

    method: str
    scheme: Scheme
    format: str
    group_size: int
    """Really used; CHANNEL for one scale an output."""
    kv: bool
    """Whether scales of an 8-bit KV cache are calibrated and written."""
    calibrated: bool
    """Whether calibration text is run through the model where there is any; the estimates assume
    that there is."""
    needs_text: bool
    """Whether a run without calibration text must be refused."""
    row_tokens: int
    """Of that text, seen together."""
    convert_to: str | None
    """The dtype that tensors outside the quantized layers get; None: they stay as they are."""
    linears: tuple[str, ...]
    """Prefixes of the layers that are quantized."""
    ignored: tuple[str, ...]
    """Prefixes of linear layers that stay as they are."""
    budget: float | None
    """Bits a weight of `linears` that may be spent on average; None: all have the same scheme."""
    choices: tuple[Scheme, ...]
    """What layers may get instead of `scheme` within the budget, besides staying as they are."""
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    seconds: float
    flops_per_s: float
    """What `seconds` assumes."""
    tensor_parallel: tuple[int, ...]
    """Sizes that work, of 1, 2, 4 and 8."""
    kernels: dict[str, str]
    """What vLLM runs the layers with, by target."""
    unprovable: str | None
    """Why this host's vLLM cannot load the result; None: it can."""
    notes: list[str]
    """Departures from what was asked, and what to know before serving."""
    others: Mapping[str, Scheme] = field(default_factory=dict)
    """Schemes of the layers that got another one, once that is known."""

    def scheme_of(self, prefix: str) -> Scheme:
        return self.others.get(prefix, self.scheme)

    def as_json(self) -> dict[str, Any]:
        grid = self.scheme.grid
        return {
            "method": self.method,
            "scheme": str(self.scheme),
            "format": self.format,
            "bits": grid.bits,
            "budget": self.budget,
            "others": {prefix: str(scheme) for prefix, scheme in self.others.items()},
            "group_size": self.group_size,
            "symmetric": grid.symmetric,
            "kv_scales": self.kv,
            "calibrated": self.calibrated,
            "converted_to": self.convert_to,
            "quantized_layers": len(self.linears),
            "ignored": list(self.ignored),
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "estimates": {
                "peak_memory_bytes": self.peak_memory_bytes,
                "seconds": round(self.seconds, 1),
                "at_flops_per_s": round(self.flops_per_s),
            },
            "tensor_parallel": list(self.tensor_parallel),
            "kernels": self.kernels,
            "notes": self.notes,
        }

    def as_table(self) -> Table:
        """For people; notes below the figures."""
        grid = self.scheme.grid
        group = "one scale an output" if self.group_size == CHANNEL else f"groups {self.group_size}"
        table = Table(title="Plan", title_justify="left", show_header=False)
        table.add_column("")
        table.add_column("")
        table.add_row("method", self.method)
        sign = "symmetric" if grid.symmetric else "asymmetric"
        table.add_row("scheme", f"{self.scheme}, {group}, {sign}")
        table.add_row("format", self.format)
        table.add_row("KV cache", "fp8, calibrated scales" if self.kv else "as served")
        if self.budget:
            choices = ", ".join(map(str, self.choices))
            table.add_row(
                "mixed", f"{self.budget} bits on average: {choices} or unchanged where it pays most"
            )
        table.add_row("layers", f"{len(self.linears)} quantized, {len(self.ignored)} left alone")
        ratio = self.bytes_after / self.bytes_before
        sizes = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        table.add_row("size", f"{sizes} ({ratio:.0%})")
        table.add_row("memory (estimate)", f"{self.peak_memory_bytes / 1e9:.1f} GB")
        speed = f"at {self.flops_per_s / 1e9:.0f} GFLOP/s, measured here"
        table.add_row(
            "time (estimate)", f"{self.seconds:.0f} s {speed}; quality and proof excluded"
        )
        table.add_row("tensor parallel", ", ".join(map(str, self.tensor_parallel)))
        for target, name in self.kernels.items():
            table.add_row(f"kernel on {target}", name)
        if self.unprovable:
            table.add_row("load proof", f"none: {self.unprovable}")
        for note in self.notes:
            table.add_row("note", note)
        return table
