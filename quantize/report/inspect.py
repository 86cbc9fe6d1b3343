"""The content of a checkpoint folder, from its config and its file headers. Called by cli.py."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from packhorse.quantize.model.checkpoint import REPORT, Checkpoint
from packhorse.quantize.model.dtypes import bits_of


def inspect(folder: Path) -> dict[str, Any]:
    """Architecture, quantization, bytes by dtype, side files, and the quality report's main parts.
    Raises BadInput.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    by_dtype: Counter[str] = Counter()
    for name in checkpoint.names():
        shape, dtype = checkpoint.shape_and_dtype(name)
        by_dtype[dtype] += math.prod(shape) * bits_of(dtype) // 8
    report_path = folder / REPORT
    report = json.loads(report_path.read_text(encoding="utf-8")) if report_path.is_file() else None
    return {
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "model_type": config.get("model_type"),
        "blocks": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "context": config.get("max_position_embeddings"),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "quantization": _quantization(config.get("quantization_config")),
        "tensors": len(checkpoint.names()),
        "weight_files": [path.name for path in checkpoint.weight_files()],
        "weight_bytes": checkpoint.weight_bytes(),
        "bytes_by_dtype": dict(by_dtype.most_common()),
        "side_files": checkpoint.side_files(),
        "report": report
        and {key: report[key] for key in ("method", "bytes", "quality", "weights_sha256", "notes")},
    }


def _quantization(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first scheme in full; `others` are the further schemes of a mixed checkpoint."""
    if config is None:
        return None
    groups = (config.get("config_groups") or {"": {"weights": config}}).values()
    kinds = [_kind(group) for group in groups if isinstance(group, dict)]
    return {
        "method": config.get("quant_method"),
        "format": config.get("format", config.get("checkpoint_format", config.get("version"))),
        **(kinds[0] if kinds else _kind({})),
        "others": kinds[1:],
        "kv_cache": bool(config.get("kv_cache_scheme")),
    }


def _kind(group: dict[str, Any]) -> dict[str, Any]:
    weights = group.get("weights") or {}
    activations = group.get("input_activations")
    group_size = weights.get("group_size", weights.get("q_group_size"))
    symmetric = weights.get("symmetric", weights.get("sym"))
    if symmetric is None and "zero_point" in weights:
        symmetric = not weights["zero_point"]
    return {
        "type": weights.get("type", "int"),
        "weight_bits": _bits(weights),
        "group_size": None if group_size == -1 else group_size,
        "symmetric": symmetric,
        "activation_bits": _bits(activations) if activations else 16,
    }


def _bits(number: dict[str, Any]) -> int | None:
    return number.get("num_bits", number.get("bits", number.get("w_bit")))


def _in_words(kind: dict[str, Any]) -> str:
    floating = "float " if kind["type"] == "float" else ""
    grid = "asymmetric, " if kind["symmetric"] is False else ""
    scales = f"groups of {kind['group_size']}" if kind["group_size"] else "one scale a channel"
    return (
        f"{kind['weight_bits']}-bit {floating}weights, {grid}{scales}, "
        f"{kind['activation_bits']}-bit activations"
    )


def as_table(folder: Path, facts: dict[str, Any]) -> Table:
    table = Table(title=str(folder), title_justify="left", show_header=False)
    table.add_row("architecture", f"{facts['architecture']} ({facts['model_type']})")
    table.add_row(
        "size",
        f"{facts['blocks']} blocks, hidden {facts['hidden_size']}, context {facts['context']}",
    )
    quantization = facts["quantization"]
    table.add_row("dtype", str(facts["dtype"]))
    if quantization is None:
        table.add_row("quantization", "none")
    else:
        kinds = "; ".join(_in_words(kind) for kind in (quantization, *quantization["others"]))
        table.add_row(
            "quantization", f"{quantization['method']} ({quantization['format']}): {kinds}"
        )
        if quantization["kv_cache"]:
            table.add_row("KV cache", "scales for 8-bit floats")
    parts = ", ".join(
        f"{dtype} {size / 1e6:.2f} MB" for dtype, size in facts["bytes_by_dtype"].items()
    )
    table.add_row(
        "weights",
        f"{facts['weight_bytes'] / 1e6:.2f} MB in {len(facts['weight_files'])} file(s): {parts}",
    )
    table.add_row("side files", ", ".join(facts["side_files"]) or "none")
    report = facts["report"]
    if report:
        after, before = report["quality"]["after"], report["quality"]["before"]
        if "score" in after:
            table.add_row(
                "score",
                f"{before['score']['exact_match']:.1%} -> {after['score']['exact_match']:.1%}",
            )
        if "perplexity" in after:
            table.add_row("perplexity", f"{before['perplexity']:.3f} -> {after['perplexity']:.3f}")
        table.add_row("weights sha256", report["weights_sha256"])
    return table
