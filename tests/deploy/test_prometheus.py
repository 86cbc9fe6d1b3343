"""The scrape configuration and the alert rules of deploy/prometheus, by promtool, by a real
Prometheus over the echo engine, and name by name. With vLLM's: tests/e2e/test_prometheus.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, running_server
from tests.deploy import promql
from tests.deploy.scraping import (
    SHIPPED,
    needs_prometheus,
    promtool,
    running_prometheus,
    wait_until,
    written_config,
)

RULES = SHIPPED / "rules.yml"
RULES_TEST = SHIPPED / "rules_test.yml"
KEY = "a-key-for-tests-only"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


NAMES = [alert["alert"] for alert in alerts()]


def anchors(page: Path) -> set[str]:
    """What a link into a page of docs/ may point at."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


@needs_prometheus
def test_prometheus_takes_the_configuration_and_the_rules(tmp_path: Path) -> None:
    checked = promtool("check", "config", written_config(tmp_path, "packhorse:8000", KEY, "1s"))
    assert checked.returncode == 0, checked.stdout
    assert f"{len(NAMES)} rules found" in checked.stdout


@needs_prometheus
def test_the_alerts_fire_when_they_should_and_are_quiet_otherwise() -> None:
    tested = promtool("test", "rules", RULES_TEST)
    assert tested.returncode == 0, tested.stdout


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_has_a_firing_and_a_quiet_case(name: str) -> None:
    cases = [
        bool(case.get("exp_alerts"))
        for test in yaml.safe_load(RULES_TEST.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert {True, False} <= set(cases)


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_each_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    annotations = alert["annotations"]
    assert annotations["summary"]
    assert annotations["description"]
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    assert anchor in anchors(ROOT / page)


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_alerts_name_only_what_a_server_exports(alert: dict[str, Any]) -> None:
    assert promql.problems(alert["expr"], promql.known()) == []


def test_the_cases_are_of_metrics_that_a_server_exports() -> None:
    """A case may not make up a metric, nor a label, that rules then seem to find."""
    known = promql.known()
    for test in yaml.safe_load(RULES_TEST.read_text())["tests"]:
        for series in test["input_series"]:
            assert promql.problems(series["series"], known) == [], test["name"]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(packhorse_request_total[5m])", "no server exports packhorse_request_total"),
        ("vllm:gpu_cache_usage", "no server exports vllm:gpu_cache_usage"),
        ("packhorse_requests_total{status='ok'}", "no label status"),
        ("packhorse_requests_total{outcome=~'ok|fine'}", "no outcome=['fine']"),
        ("sum by (tenant) (rate(packhorse_requests_total[5m]))", "has the label tenant"),
        ("sum by (model) (rate(packhorse_http_connections_cut_total[5m]))", "has the label model"),
        ("rate(packhorse_first_token_seconds_count[5m])", "no server exports packhorse_first"),
        ("packhorse_ready / on (gpu) packhorse_engine_up", "has the label gpu"),
        ("sum(rate(packhorse_requests_total[5m])", "does not parse"),
        ("rate(packhorse_requests_total)", "does not parse"),
        ("ratio(packhorse_requests_total[5m])", "does not parse"),
    ],
)
def test_a_broken_expression_is_found(expression: str, problem: str) -> None:
    (found,) = promql.problems(expression, promql.known())
    assert problem in found


@needs_prometheus
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("prometheus.yml", "job_name: packhorse", "job-name: packhorse"),
        ("prometheus.yml", "scrape_configs:", "scrape_configs: ["),
        ("prometheus.yml", "type: Bearer", "type: Basic"),
        ("rules.yml", "packhorse_ready == 0", "packhorse_ready === 0"),
        ("rules.yml", "for: 10m", "for: ten minutes"),
        ("rules.yml", "annotations:", "annotation:"),
        ("rules.yml", "{{ $labels.instance }}", "{{ $labels.instance"),
    ],
)
def test_promtool_finds_a_broken_file(tmp_path: Path, file: str, old: str, new: str) -> None:
    config = written_config(tmp_path, "packhorse:8000", KEY, "1s")
    path = tmp_path / file
    text = (SHIPPED / file).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert promtool("check", "config", config).returncode != 0


@needs_prometheus
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("PackhorseDown", "up{job=", "up{jobb="),
        ("PackhorseNotReady", "packhorse_ready == 0", "packhorse_ready == 1"),
        ("PackhorseNotReady", "for: 10m", "for: 10h"),
        ("PackhorseEngineRestarted", "[10m]", "[100m]"),
        ("PackhorseErrors", "severity: critical", "severity: warning"),
        ("PackhorseKvCacheFull", "> 0.95", "> 0.99"),
    ],
)
def test_a_rule_that_means_something_else_fails_its_cases(
    tmp_path: Path, name: str, old: str, new: str
) -> None:
    text = RULES.read_text()
    assert old in text
    (tmp_path / "rules.yml").write_text(text.replace(old, new))
    document = yaml.safe_load(RULES_TEST.read_text())
    # Those of the alert alone: all of them take seconds.
    document["tests"] = [test for test in document["tests"] if test["name"].startswith(name + " ")]
    (tmp_path / RULES_TEST.name).write_text(yaml.safe_dump(document))
    assert promtool("test", "rules", tmp_path / RULES_TEST.name).returncode != 0


@needs_prometheus
def test_a_real_prometheus_scrapes_a_server_with_its_key_and_evaluates_all_rules(
    tmp_path: Path,
) -> None:
    one_key = {"PACKHORSE_AUTH__API_KEY": KEY}
    with running_server(tmp_path, "--engine", "echo", environment=one_key) as server:
        target = server.url.removeprefix("http://")
        with running_prometheus(tmp_path, target, key=KEY) as prometheus:
            prometheus.wait_for('up{job="packhorse"} == 1')
            prometheus.wait_for("packhorse_ready == 1")

            def rules() -> list[dict[str, Any]]:
                groups = prometheus.ask("rules")["groups"]
                return [rule for group in groups for rule in group["rules"]]

            wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "evaluated")
            assert {rule["name"]: rule["health"] for rule in rules()} == dict.fromkeys(NAMES, "ok")
            assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []
            server.stop()
            prometheus.wait_for('ALERTS{alertname="PackhorseDown", alertstate="pending"}')
