"""Prometheus' checker judges configuration, rules and queries; Grafana's own types judge the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from scpl_dist.metrics import NAMES
from tests.programs import ROOT, find

PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "scpl.json").read_text())
# Series that Prometheus makes itself.
BUILT_IN = {"up", "ALERTS"}


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = find("promtool", "apt-get install prometheus")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def metrics_in(query: str) -> set[str]:
    """Names of series in a query: what stands before a selector or a range, and all words of our prefix."""
    return set(re.findall(r"\b(?:scpl_\w+|[A-Za-z_]\w*(?=\{))", query))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments[:2], PROMETHEUS / arguments[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_are_the_documented_set() -> None:
    assert {rule["alert"] for rule in RULES} == {
        "ScplCheckpointFailing",
        "ScplCheckpointStale",
        "ScplNoProgress",
        "ScplNonFiniteLoss",
        "ScplRestartLoop",
        "ScplStageDown",
        "ScplStageImbalance",
        "ScplTargetMissing",
    }
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
@pytest.mark.parametrize("broken", ["vector(0) > 1", "vector(1)"], ids=["never fires", "always fires"])
def test_rule_tests_notice_an_alert_that_is_broken(alert: str, broken: str, tmp_path: Path) -> None:
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == alert:
            rule["expr"] = broken
            rule.pop("for", None)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(PROMETHEUS / "rules_test.yml", tmp_path)
    done = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_every_metric_in_rules_and_dashboard_is_exported() -> None:
    used = set[str]().union(*(metrics_in(query) for query in [*queries(), *(rule["expr"] for rule in RULES)]))
    used |= metrics_in(DASHBOARD["templating"]["list"][0]["query"]["query"])
    assert used - BUILT_IN <= set(NAMES)
    assert len(used - BUILT_IN) > 20


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, (kind, _, labels) in NAMES.items():
        assert name.startswith("scpl_")
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|mib|percent)(_|$)", name)
        assert len(labels) <= 3


def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:query:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_every_query_is_about_the_chosen_coordinator() -> None:
    variable = DASHBOARD["templating"]["list"][0]["name"]
    for query in queries():
        selectors = re.findall(r"\bscpl_\w+(\{[^}]*\})?", query)
        assert all(f'instance="${variable}"' in selector for selector in selectors), query


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """What Grafana's types lose or change of our JSON; defaults that they add do not count."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key in theirs:
                yield from differences(value, theirs[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(mine, other, f"{path}[{number}]")
    elif ours != theirs:
        yield path


def through_grafana_types(dashboard: dict[str, Any]) -> list[str]:
    register_default_plugins()
    return list(differences(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))))


def test_dashboard_survives_grafanas_own_types() -> None:
    assert through_grafana_types(DASHBOARD) == []


@pytest.mark.parametrize("place", ["panel", "options", "custom"])
def test_a_key_that_grafana_does_not_know_is_noticed(place: str) -> None:
    dashboard: dict[str, Any] = json.loads(json.dumps(DASHBOARD))
    panel = next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries")
    custom = panel["fieldConfig"]["defaults"]["custom"]
    {"panel": panel, "options": panel["options"], "custom": custom}[place]["showPoint"] = "never"
    [lost] = through_grafana_types(dashboard)
    assert lost.endswith(".showPoint")


def test_panels_have_a_place_a_title_and_an_explanation() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"]
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_table_of_stages_renames_every_column_that_it_asks_for() -> None:
    [table] = [
        panel for panel in DASHBOARD["panels"] if panel["title"] == "Stages" and panel["type"] == "table"
    ]
    names = table["transformations"][1]["options"]["renameByName"]
    assert {f"Value #{target['refId']}" for target in table["targets"]} - set(names) == {"Value #A"}
    overridden = {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]}
    assert overridden <= set(names.values())
    assert {"Busy", "Waiting", "Blocked", "Queue"} <= set(names.values())


def test_provisioning_fits_dashboard_and_prometheus() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    uids |= {
        target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
    }
    assert uids == {source["uid"]}
    [job] = scrape["scrape_configs"]
    assert job["job_name"] == "scpl"  # the rules name it
