"""One checkpoint on the report page: labels, figures with their units, and rows of tables, as text
for the template. Called by page.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from packhorse.quantize.report import plots
from packhorse.quantize.report.verdict import Verdict, verdict

NOT_MEASURED = "–"
NAMED_ABOVE = 0.05
"""An unquantized tensor with less than this share of the unquantized bytes gets no line."""
_BLOCK = re.compile(r"\.(\d+)\.")
_FELL_BACK = re.compile(r"damp|nearest", re.IGNORECASE)

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class ReportView:
    """The view of one checkpoint. The plots are SVG; all other fields are plain text."""

    name: str
    title: str
    verdict: Verdict
    tiles: list[tuple[str, str, str]]
    """(figure, its name, a remark)."""
    key_figures: Rows
    """(name, before, after)."""
    domains: Rows
    sizes: Rows
    engine: Rows
    made: Rows
    stages: Rows
    layers: Rows
    layers_noted: int
    layer_plot: str
    histogram: str
    histogram_remark: str
    notes: list[str]


def figures(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The figures for comparing checkpoints; None for those that were not measured. Sizes in bytes,
    KL in nats, shares from 0 to 1.
    """
    quality = report["quality"]
    before, after = quality["before"], quality["after"]
    divergence = quality.get("distance") or {}
    weights = (report.get("weights") or {}).get("after") or {}
    found = verdict(report)
    score = (before.get("score") or {}).get("exact_match"), _score(after)
    return {
        "name": name,
        "source": report["source"],
        "method": report["method"],
        "scheme": _scheme(report["plan"]),
        "group_size": report["group_size"],
        "bytes": report["bytes"]["after"],
        "ratio": report["bytes"]["ratio"],
        "bits_per_weight": weights.get("bits_per_weight"),
        "score": score[1],
        "score_kept": score[1] / score[0] if score[0] and score[1] is not None else None,
        "perplexity": after.get("perplexity"),
        "perplexity_ratio": _ratio(before.get("perplexity"), after.get("perplexity")),
        "kl_mean": divergence.get("kl_mean"),
        "kl_p99": divergence.get("kl_p99"),
        "top1_agreement": divergence.get("top1_agreement"),
        "kernel": (report.get("proof") or {}).get("kernel"),
        "verdict": found.level,
        "sentence": found.sentence,
        "weights_sha256": report["weights_sha256"],
    }


def view_of(report: dict[str, Any], name: str, place: int) -> ReportView:
    """The view of a report. `place` makes the ids of its plots unique on the page."""
    rows = list(_layer_rows(report["layers"]))
    quality = report["quality"]
    histogram = (quality.get("distance") or {}).get("histogram")
    scheme, group = _scheme(report["plan"]), report["group_size"]
    grouping = "one scale an output" if group == -1 else f"groups of {group}"
    return ReportView(
        name=name,
        title=f"{report['source']}, {report['method']}: {scheme}, {grouping}, {report['format']}",
        verdict=verdict(report),
        tiles=_tiles(figures(report, name)),
        key_figures=list(_key_figures(report)),
        domains=_domains(quality),
        sizes=list(_sizes(report)),
        engine=list(_engine(report.get("proof"))),
        made=list(_made(report)),
        stages=[
            (stage["name"], seconds(stage["seconds"]), size(stage["peak_memory_bytes"]))
            for stage in report.get("stages", [])
        ],
        layers=rows,
        layers_noted=sum(bool(layer.get("note")) for layer in report["layers"]),
        layer_plot=_layer_plot(report["layers"], place),
        histogram=""
        if histogram is None
        else plots.histogram(histogram["edges"], histogram["counts"], f"moved-{place}"),
        histogram_remark=_histogram_remark(histogram),
        notes=report["notes"],
    )


def _tiles(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    bits = found["bits_per_weight"]
    smaller = f"{found['ratio']:.0%} of the original"
    return [
        (
            size(found["bytes"]),
            "weights",
            smaller + (f", {bits:.2f} bits a weight" if bits else ""),
        ),
        (percent(found["score_kept"]), "of the task score kept", "answers judged by exact match"),
        (number(found["kl_mean"], 3), "KL divergence, mean", "nats a token; 0 is no difference"),
        (percent(found["top1_agreement"]), "same likeliest token", "where the text is predicted"),
    ]


def _key_figures(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    before, after = report["quality"]["before"], report["quality"]["after"]
    divergence = report["quality"].get("distance") or {}
    yield "weights", size(report["bytes"]["before"]), size(report["bytes"]["after"])
    if after.get("score"):
        questions = after["score"]["questions"]
        yield (
            f"right answers, of {questions:,}",
            percent(_score(before)),
            percent(_score(after)),
        )
    if "perplexity" in after:
        yield "perplexity", number(before.get("perplexity")), number(after["perplexity"])
    if "kl_mean" in divergence:
        error = divergence.get("kl_mean_standard_error")
        spread = f" ± {number(error, 2)}" if error else ""
        yield "KL divergence, mean (nats)", "", number(divergence["kl_mean"], 3) + spread
        yield "KL divergence, median (nats)", "", number(divergence["kl_p50"], 3)
        yield "KL divergence, 99th percentile (nats)", "", number(divergence["kl_p99"], 3)
    if "positions" in divergence:
        yield "same likeliest token", "", percent(divergence["top1_agreement"])
        yield "overlap of the five likeliest", "", percent(divergence["top5_agreement"])
        yield "predictions compared", "", f"{divergence['positions']:,}"


def _domains(quality: dict[str, Any]) -> Rows:
    before = (quality["before"].get("score") or {}).get("by_domain", {})
    after = (quality["after"].get("score") or {}).get("by_domain", {})
    return [(name, percent(before.get(name)), percent(after[name])) for name in after]


def _sizes(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    weights = (report.get("weights") or {}).get("after")
    if not weights:
        return
    yield from _part("quantized layers", weights["quantized"])
    left = weights["left_alone"]
    yield from _part("left as they were", left)
    for tensor in left["largest"]:
        if tensor["bytes"] >= NAMED_ABOVE * left["bytes"]:
            yield f"of which {tensor['name']}", "", size(tensor["bytes"]), tensor["dtype"]
    yield from _part("all", weights)


def _part(label: str, part: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    if part:
        bits = number(part["bits_per_weight"], 3)
        yield label, f"{part['parameters']:,}", size(part["bytes"]), bits


def _engine(load_check: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    if not load_check:
        return
    yield "engine", f"{load_check['engine']}, {load_check['dtype']}"
    yield "kernel", load_check["kernel"]
    reference = load_check["reference"]
    if isinstance(reference, str):
        yield "compared with the codes", reference
    else:
        off = number(reference["logprob_difference_mean"], 3)
        yield "compared with the codes", f"{off} nats apart on average"
    if compared := load_check.get("compared"):
        yield "answers equal to the original's", percent(compared["answers_equal"])
        yield "log-probabilities moved by", f"{number(compared['logprob_difference_mean'], 3)} nats"
    if apart := load_check.get("distance"):
        bound = f"{number(apart['kl_at_least_mean'], 3)} nats over {apart['positions']:,} positions"
        yield "KL divergence, at least", bound
        yield "same likeliest token", percent(apart["top1_agreement"])


def _made(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    plan, text = report["plan"], report["calibration"]
    yield "source", report["source"]
    yield "method", report["method"]
    sign = "symmetric" if plan["symmetric"] else "asymmetric"
    yield "scheme", f"{_scheme(plan)}, {sign}, group size {report['group_size']}"
    yield "format", report["format"]
    yield "8-bit KV cache", "calibrated scales" if plan["kv_scales"] else "no scales"
    if text:
        yield "calibration", f"{', '.join(text['files'])}: {text['tokens']:,} tokens"
        yield "calibration sha256", text["sha256"]
    else:
        yield "calibration", "none: weights only"
    if report.get("seed") is not None:
        yield "seed", str(report["seed"])
    for kind, file in report["quality"]["measured_with"].items():
        yield f"measured with ({kind})", f"{file['file']}, sha256 {file['sha256']}"
    yield "computed in", (report["quality"].get("distance") or {}).get("computed_in", NOT_MEASURED)
    yield "weights sha256", report["weights_sha256"]
    yield "seconds", seconds(report["seconds"])
    yield "peak memory", size(report.get("peak_memory_bytes"))
    yield "versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())


def _layer_rows(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for layer in layers:
        errors = (number(layer.get(key), 3) for key in ("relative_error", "output_error"))
        yield layer["name"], str(layer["bits"]), *errors, layer.get("note", "")


def _layer_plot(layers: Sequence[dict[str, Any]], place: int) -> str:
    """The plot of errors by layer: of outputs where there was calibration text, else of weights."""
    key = "output_error" if any("output_error" in layer for layer in layers) else "relative_error"
    dots = []
    for layer in layers:
        block = _BLOCK.search(layer["name"])
        if block and layer.get(key) is not None:
            noted = bool(_FELL_BACK.search(layer.get("note", "")))
            kind = layer["name"].rpartition(".")[2]
            dots.append(plots.Dot(kind, int(block[1]), layer[key], noted))
    if not dots:
        return ""
    label = "relative error of outputs" if key == "output_error" else "relative error of weights"
    return plots.layers(dots, label, f"layers-{place}")


def _histogram_remark(histogram: dict[str, Any] | None) -> str:
    if histogram is None:
        return ""
    inside = sum(histogram["counts"])
    edges = histogram["edges"]
    zero = next(
        count
        for count, (left, right) in zip(histogram["counts"], pairwise(edges), strict=True)
        if left <= 0 <= right
    )
    all_of_them = inside + histogram["below"] + histogram["above"]
    return (
        f"{zero / all_of_them:.1%} of predictions lie in the middle bar. Not drawn: "
        f"{histogram['below']:,} below and {histogram['above']:,} above the range."
    )


def _scheme(plan: dict[str, Any]) -> str:
    """The scheme of most layers, and the budget of a mixed plan."""
    budget = plan.get("budget")
    return f"{plan['scheme']}, mixed to {budget:g} bits" if budget else str(plan["scheme"])


def _score(part: dict[str, Any]) -> float | None:
    return (part.get("score") or {}).get("exact_match")


def _ratio(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def size(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NOT_MEASURED
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{share:.1%}"


def number(value: float | None, digits: int = 4) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def seconds(value: float) -> str:
    return f"{value:,.1f} s" if value < 600 else f"{value / 60:,.0f} min"
