"""The exporter: the exact set of names, values of a real run, and HTTP."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scpl_dist.control.items import Train
from scpl_dist.control.messages import VERSION, Stats
from scpl_dist.coordinator.events import Committed, NotWritten, Signal
from scpl_dist.coordinator.metrics import NAMES, Exporter, RunCollector
from scpl_dist.run.phases import Phase
from tests.support.coordinator import Run, at_step

LIMIT_S = 20.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """An exporter of a run, read over HTTP."""

    def __init__(self, run: Run) -> None:
        self.lock = threading.Lock()
        self.collector = RunCollector(run.coordinator, self.lock, {"died": 2}, lambda: (5000.0, run.now))
        self.exporter = Exporter(self.collector, lambda: run.coordinator.unready(run.now), "127.0.0.1", 0)
        self.base = self.exporter.url.removesuffix("/metrics")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.base + path, timeout=LIMIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def samples(self) -> Samples:
        code, text = self.get("/metrics")
        assert code == 200
        families = text_string_to_metric_families(text)
        return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


@pytest.fixture
def scrape() -> Iterator[Scrape]:
    run = Run().start().play().leave()
    found = Scrape(run)
    yield found
    found.exporter.close()


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_the_names_are_exactly_these() -> None:
    assert set(NAMES) == {
        "scpl_run_info",
        "scpl_stage_info",
        "scpl_stage_up",
        "scpl_stage_replicas",
        "scpl_stage_last_progress_timestamp_seconds",
        "scpl_step",
        "scpl_epoch",
        "scpl_loss",
        "scpl_accuracy_ratio",
        "scpl_learning_rate",
        "scpl_samples_total",
        "scpl_microbatches_total",
        "scpl_stage_phase_seconds_total",
        "scpl_stage_busy_seconds_total",
        "scpl_stage_waiting_seconds_total",
        "scpl_stage_blocked_seconds_total",
        "scpl_queue_depth",
        "scpl_transport_sent_bytes_total",
        "scpl_transport_received_bytes_total",
        "scpl_memory_peak_bytes",
        "scpl_checkpoint_last_success_timestamp_seconds",
        "scpl_checkpoint_duration_seconds",
        "scpl_checkpoint_size_bytes",
        "scpl_checkpoints_total",
        "scpl_checkpoint_failures_total",
        "scpl_restarts_total",
        "scpl_nonfinite_loss_total",
        "scpl_stragglers_total",
        "scpl_control_rejected_total",
        "scpl_samples_per_second",
    }


def test_a_run_shows_every_name_and_no_other_label(scrape: Scrape) -> None:
    run = scrape.collector
    run.committed_at = 990.0
    coordinator = run._coordinator
    coordinator.last_commit = Committed(9, 1234, 0.5)
    found: dict[str, set[frozenset[str]]] = {}
    for name, labels in scrape.samples():
        found.setdefault(name, set()).add(frozenset(label for label, _ in labels))
    assert set(found) == set(NAMES)
    for name, (kind, _, names) in NAMES.items():
        assert found[name] == {frozenset(names)}, name
        assert name.endswith("_total") == (kind == "counter")


def test_values_are_those_of_the_run() -> None:
    run = Run().start().play(until=at_step(4))
    stats = Stats(
        busy=3.0, waiting=2.0, blocked=1.0, queue=2, bytes_sent=10, bytes_received=20, peak_memory=30
    )
    stats = replace(stats, phases={Phase.FORWARD: 1.5, Phase.EVALUATE: 0.5})
    run.beat(1, Phase.FORWARD, step=5, epoch=1, stats=stats)
    run.event(Committed(5, 1234, 0.5))
    scrape = Scrape(run)
    scrape.collector.committed_at = run.now - 3.0
    run.now += 7.0
    found = scrape.samples()
    scrape.exporter.close()
    expected = {
        key("scpl_run_info", method="scpl", version=VERSION): 1,
        key("scpl_stage_info", stage="1", host="host1", device="cpu"): 1,
        key("scpl_stage_up", stage="1"): 1,
        key("scpl_stage_last_progress_timestamp_seconds", stage="1"): 5000 - 7,
        key("scpl_step", stage="1"): 5,
        key("scpl_loss", stage="1", block="1"): 2.0,
        key("scpl_accuracy_ratio", split="validation"): 0.5,
        key("scpl_learning_rate"): run.items_of(Train)[4].schedule["lr"],
        key("scpl_samples_total"): 90,
        key("scpl_microbatches_total", stage="2", kind="train"): 5,
        key("scpl_microbatches_total", stage="2", kind="evaluate"): 3,
        key("scpl_stage_phase_seconds_total", stage="1", phase="forward"): 1.5,
        key("scpl_stage_phase_seconds_total", stage="1", phase="evaluate"): 0.5,
        key("scpl_stage_phase_seconds_total", stage="1", phase="send"): 0,
        key("scpl_stage_busy_seconds_total", stage="1"): 3,
        key("scpl_stage_waiting_seconds_total", stage="1"): 2,
        key("scpl_stage_blocked_seconds_total", stage="1"): 1,
        key("scpl_queue_depth", stage="1"): 2,
        key("scpl_transport_sent_bytes_total", stage="1"): 10,
        key("scpl_transport_received_bytes_total", stage="1"): 20,
        key("scpl_memory_peak_bytes", stage="1"): 30,
        key("scpl_checkpoints_total"): 1,
        key("scpl_checkpoint_size_bytes"): 1234,
        key("scpl_checkpoint_duration_seconds"): 0.5,
        key("scpl_checkpoint_last_success_timestamp_seconds"): 5000 - 10,
        key("scpl_restarts_total", reason="died"): 2,
        key("scpl_control_rejected_total", reason="garbage"): 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_counters_of_failures_exist_before_the_first_failure_and_count() -> None:
    run = Run()
    scrape = Scrape(run)
    before = scrape.samples()
    assert before[key("scpl_checkpoint_failures_total")] == before[key("scpl_nonfinite_loss_total")] == 0
    assert before[key("scpl_stage_up", stage="2")] == 0
    run.start()
    run.event(NotWritten("checkpoint", "full"))
    assert scrape.samples()[key("scpl_checkpoint_failures_total")] == 1
    assert scrape.samples()[key("scpl_stage_up", stage="2")] == 0
    scrape.exporter.close()


def test_health_is_about_the_process_and_readiness_about_progress() -> None:
    run = Run()
    run.hello(0)
    scrape = Scrape(run)
    assert scrape.get("/healthz") == (200, "ok\n")
    assert scrape.get("/readyz") == (503, "1 of 3 workers have joined; the run is gathering\n")
    for stage in (1, 2):
        run.hello(stage)
    run.start()
    assert scrape.get("/readyz") == (200, "ok\n")
    run.now += 11
    assert scrape.get("/readyz") == (503, "no stage has made progress for 11 s\n")
    run.event(Signal("launcher", 2))
    run.event(Signal("launcher", 2))
    assert scrape.get("/readyz")[0] == 503
    assert scrape.get("/healthz") == (200, "ok\n")
    scrape.exporter.close()


@pytest.mark.parametrize("path", ["/", "/metricsx", "/favicon.ico", "/../metrics"])
def test_other_paths_do_not_exist(scrape: Scrape, path: str) -> None:
    assert scrape.get(path)[0] == 404


def test_only_get_is_served(scrape: Scrape) -> None:
    connection = http.client.HTTPConnection(scrape.base.removeprefix("http://"), timeout=LIMIT_S)
    connection.request("POST", "/metrics", body=b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_client_that_says_nothing_holds_up_nobody(scrape: Scrape) -> None:
    host, _, port = scrape.base.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as silent:
        assert scrape.get("/healthz")[0] == 200
        silent.sendall(b"GET /met")
        assert scrape.get("/metrics")[0] == 200


def test_a_scrape_sees_the_state_between_two_events(scrape: Scrape) -> None:
    with scrape.lock:
        thread = threading.Thread(target=scrape.samples)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "while an event is handled a scrape waits"
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_taken_port_is_named_with_the_fix(scrape: Scrape) -> None:
    port = int(scrape.base.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"metrics\.port = {port}.*metrics\.port=0"):
        Exporter(scrape.collector, lambda: None, "127.0.0.1", port)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this host has no IPv6")
def test_an_ipv6_address_works() -> None:
    run = Run()
    exporter = Exporter(RunCollector(run.coordinator, threading.Lock()), lambda: None, "::1", 0)
    assert exporter.url.startswith("http://[::1]:")
    with urllib.request.urlopen(exporter.url, timeout=LIMIT_S) as answer:
        assert answer.status == 200
    exporter.close()
