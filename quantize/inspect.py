"""What a checkpoint folder holds, from its config and its tensors' headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from quantize.checkpoint import REPORT, Checkpoint

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def inspect(folder: Path) -> dict[str, Any]:
    """Architecture, quantization, bytes by dtype, side files, and what the report says. Raises
    BadInput.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    by_dtype: Counter[str] = Counter()
    for name in checkpoint.names():
        shape, dtype = checkpoint.shape_and_dtype(name)
        by_dtype[dtype] += math.prod(shape) * BYTES.get(dtype, 0)
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
    if config is None:
        return None
    groups = config.get("config_groups") or {}
    group: dict[str, Any] = next(iter(groups.values()), {})
    weights = group.get("weights", config)
    activations = group.get("input_activations")
    return {
        "method": config.get("quant_method"),
        "format": config.get("format", config.get("checkpoint_format")),
        "weight_bits": weights.get("num_bits", weights.get("bits")),
        "group_size": weights.get("group_size"),
        "activation_bits": activations["num_bits"] if activations else 16,
        "kv_cache": bool(config.get("kv_cache_scheme")),
    }


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
        group = quantization["group_size"]
        scales = f"groups of {group}" if group else "one scale a channel"
        table.add_row(
            "quantization",
            f"{quantization['method']} ({quantization['format']}): "
            f"{quantization['weight_bits']}-bit weights, {scales}, "
            f"{quantization['activation_bits']}-bit activations",
        )
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
