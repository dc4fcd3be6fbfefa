"""Prometheus' checker judges configuration, rules and queries; Grafana's own types judge the dashboard."""

from __future__ import annotations

import http.client
import json
import math
import re
import signal
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from scpl_dist.coordinator.metrics import NAMES
from tests.support.conduct import Running
from tests.support.panels import Board, Panel
from tests.support.ports import free_port
from tests.support.programs import ROOT, Program, find, run, until_nothing

PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "scpl.json").read_text())
# Series that Prometheus makes itself.
BUILT_IN = {"up", "ALERTS"}


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(find("promtool", "apt-get install prometheus"), *arguments)


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
def test_rule_tests_notice_an_alert_that_is_broken(alert: str, tmp_path: Path) -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())
    for test in tests["tests"]:  # those of other alerts would only take time
        test["alert_rule_test"] = [
            check for check in test.get("alert_rule_test", []) if check["alertname"] == alert
        ]
    tests["tests"] = [test for test in tests["tests"] if test["alert_rule_test"]]
    files = []
    for name, broken in (("never", "vector(0) > 1"), ("always", "vector(1)")):
        rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
        for rule in rules["groups"][0]["rules"]:
            if rule["alert"] == alert:
                rule["expr"] = broken
                rule.pop("for", None)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))
        (folder / "rules_test.yml").write_text(yaml.safe_dump(tests))
        files.append(folder / "rules_test.yml")
    done = promtool("test", "rules", *files)
    assert done.returncode != 0
    assert done.stdout.count("Unit Testing:") == 2
    assert "SUCCESS" not in done.stdout  # of one of the two
    assert f"alertname: {alert}," in done.stdout + done.stderr


def test_every_metric_in_rules_and_dashboard_is_exported() -> None:
    used = set[str]().union(*(metrics_in(query) for query in [*queries(), *(rule["expr"] for rule in RULES)]))
    used |= metrics_in(DASHBOARD["templating"]["list"][0]["query"]["query"])
    assert used - BUILT_IN <= set(NAMES)
    assert len(used - BUILT_IN) > 20


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, (_, labels, _) in NAMES.items():
        assert name.startswith("scpl_")
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


class Server:
    """A Prometheus of our configuration that watches one coordinator every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self.target = target
        self.port = free_port()
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / "rules.yml")]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        command = [find("prometheus", "apt-get install prometheus"), f"--config.file={path}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        self.program = Program(*command)

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of the HTTP API; None as long as it does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            response = connection.getresponse()
            if response.status == http.HTTPStatus.SERVICE_UNAVAILABLE:  # it listens, and is still loading
                return None
            answer = json.loads(response.read())
        except OSError:
            assert not self.program.ended, self.program.output
            return None
        finally:
            connection.close()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> dict[tuple[str, ...], float]:
        """Labels of every series of an instant query, job and instance left out, and its value."""
        data = self.ask("query", query=query)
        result = data["result"] if data else []
        return {
            tuple(
                value for key, value in sorted(row["metric"].items()) if key not in ("job", "instance")
            ): float(row["value"][1])
            for row in result
        }


def shows_something(board: Board, panel: Panel) -> None:
    """Lines with names of their own, a single value, or a row for each stage with all columns of the table."""
    title = panel["title"]
    if panel["type"] == "table":
        rows = board.table(panel)
        columns = {*panel["transformations"][-1]["options"]["renameByName"].values()}
        assert [row["Stage"] for row in rows] == ["0", "1"], rows
        assert all(set(row) == columns for row in rows), rows
    else:
        lines = board.lines(panel)
        assert len({line.name for line in lines}) == len(lines), (title, lines)
        assert all(math.isfinite(line.values[-1]) for line in lines), (title, lines)
        if panel["type"] == "stat":
            assert len(lines) == 1, (title, lines)
        else:
            assert len(lines) >= len(panel["targets"]), (title, lines)


@pytest.fixture
def run_and_prometheus(tmp_path: Path) -> Iterator[tuple[Running, Server]]:
    """A run of two stages that goes on until it is stopped, and a Prometheus that scrapes it."""
    port = free_port()
    settings = (
        f"metrics.port={port}",
        "run.epochs=50000",
        "checkpoint.every_steps=5",
        "runtime.max_restarts=10",
    )
    server = Server(tmp_path, f"127.0.0.1:{port}")
    with server.program, Running(tmp_path / "run", *settings) as running:
        yield running, server


def make_sense(server: Server) -> None:
    """The values of a run of two stages are what they should be."""
    assert server.values("up") == {("up",): 1}
    assert set(server.values("scpl_stage_up").values()) == {1}
    assert len(server.values("scpl_stage_up")) == 2
    assert all(value > 0 for value in server.values("scpl_loss").values())
    assert all(0 <= value <= 1 for value in server.values("scpl_accuracy_ratio").values())
    assert len(server.values("scpl_accuracy_ratio")) == 2
    assert server.values('rate(scpl_transport_sent_bytes_total{stage="0"}[8s])').popitem()[1] > 0
    assert server.values('rate(scpl_transport_received_bytes_total{stage="1"}[8s])').popitem()[1] > 0
    assert all(value > 2**20 for value in server.values("scpl_memory_peak_bytes").values())
    assert all(
        abs(value) < 60
        for value in server.values("time() - scpl_stage_last_progress_timestamp_seconds").values()
    )
    assert server.values("time() - scpl_checkpoint_last_success_timestamp_seconds").popitem()[1] < 60
    assert server.values("scpl_checkpoint_size_bytes").popitem()[1] > 1000


@pytest.mark.slow
def test_prometheus_sees_a_run_from_its_start_to_its_end(
    run_and_prometheus: tuple[Running, Server],
) -> None:
    running, server = run_and_prometheus
    until_nothing(lambda: not server.values("scpl_checkpoints_total > 0"))
    running.role("1").kill()  # a reason for a restart has a series from the first one on

    def missing() -> set[str]:
        assert not running.ended, running.output
        return set(NAMES) - {key[0] for key in server.values('{__name__=~"scpl_.+"}')}

    until_nothing(missing)
    until_nothing(lambda: not server.values("rate(scpl_samples_total[8s]) > 0"))
    until_nothing(lambda: len(server.values("scpl_accuracy_ratio")) < 2)  # validation is ahead of test

    def senseless() -> str:
        """What the values do not show; all at once, as one late scrape makes `up` 0 for a second."""
        try:
            make_sense(server)
        except (AssertionError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    until_nothing(senseless)
    kinds = "busy", "waiting", "blocked"
    spent = " + ".join(f"rate(scpl_stage_{kind}_seconds_total[8s])" for kind in kinds)
    assert len(server.values(spent)) == 2
    # A rate comes up to its value only when the series is as old as the window.
    until_nothing(
        lambda: {key: share for key, share in server.values(spent).items() if not 0.5 < share < 1.2}
    )

    # Every panel shows what it is for, and no rule is broken or fires.
    board = Board(DASHBOARD, server.ask, rate_interval="8s", range_s=20)
    assert board.choices("instance") == [server.target]
    for panel in board.panels:
        if panel["title"] != "Alerts":  # none is pending or firing
            shows_something(board, panel)
    rules = server.ask("rules")["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [alert for alert in server.ask("alerts")["alerts"] if alert["state"] == "firing"] == []

    running.signal(signal.SIGTERM)
    assert running.wait(60) == 143
    until_nothing(lambda: server.values("up == 1"))
    [alerts] = [panel for panel in board.panels if panel["title"] == "Alerts"]

    def unlisted() -> bool:
        return {"Alert": "ScplTargetMissing", "Severity": "warning"} not in [
            {title: row[title] for title in ("Alert", "Severity")} for row in board.table(alerts)
        ]

    until_nothing(unlisted)

    def unexpected() -> set[str]:
        return {alert["labels"]["alertname"] for alert in server.ask("alerts")["alerts"]} ^ {
            "ScplTargetMissing"
        }

    until_nothing(unexpected)
