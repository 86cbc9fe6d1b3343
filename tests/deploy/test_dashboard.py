"""The Grafana dashboard: what it asks for exists, everything has a unit and a name, Grafana finds
it; and the tool that draws it. That live data fills it: tests/e2e/test_prometheus.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy import promql
from tests.deploy.scraping import needs_prometheus, promtool

FOLDER = ROOT / "deploy/grafana"
PATH = FOLDER / "dashboards/packhorse.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
TOOL = ROOT / "tools/draw_dashboard.py"
UNITS = {"reqps", "s", "short", "none", "percentunit", "bytes", "watt", "celsius"}


def panels(dashboard: dict[str, Any] = DASHBOARD) -> list[dict[str, Any]]:
    """All but rows; those in a folded row too."""
    found = []
    for panel in dashboard["panels"]:
        found += panel["panels"] if panel["type"] == "row" else [panel]
    return found


def plain(expression: str) -> str:
    """With Grafana's variables replaced by something of their kind."""
    values = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*", "$model": ".*"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def expressions(dashboard: dict[str, Any] = DASHBOARD) -> list[str]:
    return [plain(target["expr"]) for panel in panels(dashboard) for target in panel["targets"]]


def problems(dashboard: dict[str, Any], known: promql.Known) -> list[str]:
    """What is wrong with a dashboard; nothing when all is well."""
    found = [text for expr in expressions(dashboard) for text in promql.problems(expr, known)]
    cells: dict[tuple[int, int], str] = {}
    every = [
        *dashboard["panels"],
        *(p for row in dashboard["panels"] for p in row.get("panels", ())),
    ]
    numbers = [panel["id"] for panel in every]
    found += [f"the id {n} is there twice" for n in set(numbers) if numbers.count(n) > 1]
    for panel in panels(dashboard):
        title, place = panel["title"], panel["gridPos"]
        unit = panel["fieldConfig"]["defaults"].get("unit", "")
        if unit not in UNITS and not unit.startswith("suffix:"):
            found.append(f"{title}: the unit {unit!r}")
        if not panel["description"]:
            found.append(f"{title}: no description")
        if place["x"] + place["w"] > 24:
            found.append(f"{title}: wider than the page")
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if (other := cells.setdefault((x, y), title)) != title:
                    found.append(f"{title}: on top of {other}")
        for part in (panel, *panel["targets"], *dashboard["templating"]["list"][1:]):
            if part["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
                found.append(f"{title}: not the chosen data source")
        for target in panel["targets"]:
            found += [f"{title}: {text}" for text in _target_problems(target, known)]
    return found


def _target_problems(target: dict[str, Any], known: promql.Known) -> Iterator[str]:
    expression, legend = target["expr"], target["legendFormat"]
    if not legend:
        yield f"no legend for {expression}"
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        if not re.search(rf"by \([^)]*\b{label}\b[^)]*\)", expression):
            yield f"the legend names {label}, which {expression} does not keep"
    if expression.count("{") != expression.count('instance=~"$instance"'):
        yield f"not only of the chosen servers: {expression}"
    for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
        for label in known.get(name, frozenset()) & {"model", "model_name"}:
            if f'{label}=~"$model"' not in matchers:
                yield f"not only of the chosen models: {name}{{{matchers}}}"
    if re.search(r"\[(?!\$__rate_interval\]|\$__range\])", expression):
        yield f"an interval that Grafana cannot choose: {expression}"


def changed(old: str, new: str) -> dict[str, Any]:
    text = PATH.read_text(encoding="utf-8")
    assert old in text
    broken: dict[str, Any] = json.loads(text.replace(old, new, 1))
    return broken


def test_the_dashboard_asks_for_what_servers_export() -> None:
    assert problems(DASHBOARD, promql.known()) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("packhorse_requests_total", "packhorse_request_total", "no server exports"),
        ("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage", "no server exports"),
        ("sum by (outcome)", "sum by (status)", "has the label status"),
        (r"direction=\"prompt\"", r"direction=\"in\"", "no direction=['in']"),
        ("sum by (le) (rate(", "sum by (le) rate((", "does not parse"),
        ('"{{outcome}}"', '"{{status}}"', "the legend names status"),
        ('"legendFormat": "p95"', '"legendFormat": ""', "no legend"),
        ('"unit": "reqps"', '"unit": "rps"', "the unit 'rps'"),
        ("[$__rate_interval]", "[5m]", "an interval that Grafana cannot choose"),
        (r"ready{instance=~\"$instance\"}", "ready{}", "not only of the chosen servers"),
        (r", model=~\"$model\"", "", "not only of the chosen models"),
        (r", model_name=~\"$model\"", "", "not only of the chosen models"),
        ('"uid": "${datasource}"', '"uid": "abc"', "not the chosen data source"),
        ('"x": 8', '"x": 7', "on top of"),
    ],
)
def test_a_broken_dashboard_is_found(old: str, new: str, problem: str) -> None:
    found = problems(changed(old, new), promql.known())
    assert any(problem in text for text in found), found


@needs_prometheus
def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"e{n}", "expr": expr} for n, expr in enumerate(expressions())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout


def test_the_menus_choose_data_source_servers_and_models() -> None:
    source, *menus = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    for menu, name in zip(menus, ("instance", "model"), strict=True):
        assert (menu["name"], menu["allValue"], menu["multi"]) == (name, ".*", True)
        found = re.fullmatch(r"label_values\((\w+)(?:{[^}]*})?, (\w+)\)", menu["definition"])
        assert found is not None
        assert menu["definition"] == menu["query"]["query"]
        assert found[2] == name
        assert name in promql.known()[found[1]] | promql.TARGET_LABELS


def test_gpu_panels_are_folded_at_the_end_and_no_other() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows if row["collapsed"]] == ["GPU"]
    assert rows[-1]["title"] == "GPU"
    for panel in panels():
        names = {n for t in panel["targets"] for n in promql.metric_names(plain(t["expr"]))}
        is_gpu = any(name.startswith("packhorse_gpu_") for name in names)
        assert is_gpu == (panel in rows[-1]["panels"])


def test_grafana_finds_data_source_and_dashboard_in_compose() -> None:
    sources = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/packhorse.yml").read_text())[
        "providers"
    ]
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    mounts = [volume.split(":") for volume in compose["grafana"]["volumes"]]
    assert ["../grafana/dashboards", provider["options"]["path"], "ro"] in mounts
    assert ["../grafana/provisioning", "/etc/grafana/provisioning", "ro"] in mounts


@pytest.fixture
def prometheus_of() -> Iterator[Callable[[Callable[[str], list[dict[str, Any]]]], str]]:
    """A Prometheus' API as far as the tool uses it: `answer` makes the series of an expression."""
    servers = []

    def serve(answer: Callable[[str], list[dict[str, Any]]]) -> str:
        class Api(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                asked = dict(urllib.parse.parse_qsl(query))
                targets = {"activeTargets": [{"scrapeInterval": "2s"}]}
                data = targets if path.endswith("targets") else {"result": answer(asked["query"])}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"status": "success", "data": data}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def drawn(url: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--prometheus", url, "--minutes", "5", "--until", "1000"]
    command += ["--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def series(expression: str) -> list[dict[str, Any]]:
    """Two of each but the GPU's, with gaps as 0/0 leaves them."""
    assert "$" not in expression
    assert promql.problems(expression, promql.known()) == []
    if "packhorse_gpu_" in expression:
        return []
    labels = re.findall(r"by \(([^)]*)\)", expression)
    keys = [label.strip() for label in labels[0].split(",")] if labels else []
    values = [[700 + 10 * n, "NaN" if n == 3 else str(n / 7)] for n in range(30)]
    return [
        {"metric": {key: f"{key}{number}" for key in keys}, "values": values} for number in (1, 2)
    ]


def test_the_picture_has_the_dashboards_shape_and_leaves_the_gpus_out(
    prometheus_of: Callable[..., str], tmp_path: Path
) -> None:
    from matplotlib import image

    done = drawn(prometheus_of(series), tmp_path / "new/d.png")
    assert (done.returncode, done.stderr) == (0, "")
    picture = image.imread(tmp_path / "new/d.png")
    height, width, _ = picture.shape
    assert (width, height > width) == (1824, True)


def test_a_folded_row_is_drawn_where_it_has_data(
    prometheus_of: Callable[..., str], tmp_path: Path
) -> None:
    """As the GPU's on a machine that has one: panels without data are then told."""
    small = {**DASHBOARD, "panels": DASHBOARD["panels"][-1:]}
    (tmp_path / "small.json").write_text(json.dumps(small))

    def all_but_power(expression: str) -> list[dict[str, Any]]:
        wanted = "packhorse_gpu_power_watts" not in expression
        return [{"metric": {"gpu": "0"}, "values": [[800, "0.5"], [900, "0.7"]]}] * wanted

    options = ("--dashboard", str(tmp_path / "small.json"))
    done = drawn(prometheus_of(all_but_power), tmp_path / "d.png", *options)
    assert (done.returncode, done.stderr) == (1, "no data: Power\n")


def test_an_empty_panel_is_told(prometheus_of: Callable[..., str], tmp_path: Path) -> None:
    small = {**DASHBOARD, "panels": panels()[:2]}
    (tmp_path / "small.json").write_text(json.dumps(small))

    def lacking(expression: str) -> list[dict[str, Any]]:
        return [] if "packhorse_ready" in expression else series(expression)

    url, options = prometheus_of(lacking), ("--dashboard", str(tmp_path / "small.json"))
    done = drawn(url, tmp_path / "d.png", *options)
    assert (done.returncode, done.stderr) == (1, "no data: Ready\n")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"), (0.0025, "s", "2.5 ms"), (0.00004, "s", "40 µs"), (3.0, "s", "3 s"),
        (300.0, "s", "5 min"), (0.25, "percentunit", "25%"), (12345.0, "reqps", "12,345 req/s"),
        (2.5, "suffix: tok/s", "2.5 tok/s"), (3 * 2**30, "bytes", "3 GiB"),
        (512.0, "bytes", "512 B"), (7.0, "short", "7"), (61.0, "celsius", "61 °C"),
    ],
)  # fmt: skip
def test_axes_have_units(
    monkeypatch: pytest.MonkeyPatch, value: float, unit: str, text: str
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from dashboard_sheet import formatted

    assert formatted(value, unit) == text
