"""The plan of a run: the planner's decisions, as data, as JSON for the report, and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from packhorse.quantize.numerics.grid import Scheme
from packhorse.quantize.settings import CHANNEL


@dataclass(frozen=True)
class Plan:
    """The decisions on one run. Sizes are in bytes. `peak_memory_bytes` and `seconds` are estimates
    for quantizing, without measuring quality and without the load check.
    """

    method: str
    scheme: Scheme
    format: str
    group_size: int
    """The group size that is used; CHANNEL for one scale per output."""
    kv: bool
    """Whether scales of an 8-bit KV cache are calibrated and written."""
    calibrated: bool
    """Whether calibration text runs through the model, if there is any. The estimates assume that
    there is."""
    needs_text: bool
    """Whether a run without calibration text is refused."""
    sequence_length: int
    """Tokens per calibration row; 0 without calibration."""
    convert_to: str | None
    """The dtype that the tensors outside the quantized layers are converted to; None: not
    converted."""
    linears: tuple[str, ...]
    """Prefixes of the quantized layers."""
    ignored: tuple[str, ...]
    """Prefixes of the linear layers that are not quantized."""
    budget: float | None
    """Mixed precision: the mean bits per weight of `linears`, scales included. None: all layers
    have the same scheme."""
    choices: tuple[Scheme, ...]
    """Mixed precision: the schemes that layers may get instead of `scheme`, besides staying
    unquantized."""
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    seconds: float
    flops_per_s: float
    """The speed that `seconds` assumes."""
    tensor_parallel: tuple[int, ...]
    """The tensor parallel sizes that work, of 1, 2, 4 and 8."""
    kernels: dict[str, str]
    """The kernels with which vLLM runs the layers, by target."""
    not_checkable_here: str | None
    """Why vLLM on this host cannot run the load check; None: it can."""
    notes: list[str]
    """Differences from the settings, and notes on serving."""
    others: Mapping[str, Scheme] = field(default_factory=dict)
    """Mixed precision, after the budget is spent: the layers with another scheme than `scheme`."""

    def scheme_of(self, prefix: str) -> Scheme:
        return self.others.get(prefix, self.scheme)

    def as_json(self) -> dict[str, Any]:
        args = self.scheme.weights
        return {
            "method": self.method,
            "scheme": str(self.scheme),
            "format": self.format,
            "bits": args.bits,
            "budget": self.budget,
            "others": {prefix: str(scheme) for prefix, scheme in self.others.items()},
            "group_size": self.group_size,
            "symmetric": args.symmetric,
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
        """For the terminal; notes follow the figures."""
        args = self.scheme.weights
        group = "one scale an output" if self.group_size == CHANNEL else f"groups {self.group_size}"
        table = Table(title="Plan", title_justify="left", show_header=False)
        table.add_column("")
        table.add_column("")
        table.add_row("method", self.method)
        sign = "symmetric" if args.symmetric else "asymmetric"
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
            "time (estimate)", f"{self.seconds:.0f} s {speed}; quality and load check excluded"
        )
        table.add_row("tensor parallel", ", ".join(map(str, self.tensor_parallel)))
        for target, name in self.kernels.items():
            table.add_row(f"kernel on {target}", name)
        if self.not_checkable_here:
            table.add_row("load check", f"none: {self.not_checkable_here}")
        for note in self.notes:
            table.add_row("note", note)
        return table
