"""One Prometheus exporter for the whole run, in the coordinator, which outlives every stage.

Values are read from the coordinator's state at the moment of a scrape, so training pays nothing for them, and a
stage that dies takes no metric with it. Labels are few: stage, phase, method, and names that are fixed in advance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scpl_dist.control.messages import VERSION
from scpl_dist.coordinator.machine import Coordinator
from scpl_dist.coordinator.members import Member
from scpl_dist.run.phases import OCCASIONAL, OUTSIDE, Phase

NAMES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "scpl_run_info": ("gauge", "The run; always 1.", ("method", "version")),
    "scpl_stage_info": ("gauge", "Where a stage runs; always 1.", ("stage", "host", "device")),
    "scpl_stage_up": ("gauge", "Whether all workers of a stage have joined and still work.", ("stage",)),
    "scpl_stage_replicas": ("gauge", "Workers of a stage that have joined and still work.", ("stage",)),
    "scpl_stage_last_progress_timestamp_seconds": ("gauge", "When a stage last made progress.", ("stage",)),
    "scpl_step": ("gauge", "Step that a stage is at.", ("stage",)),
    "scpl_epoch": ("gauge", "Epoch that the last stage is at.", ()),
    "scpl_loss": ("gauge", "Latest loss of a block.", ("stage", "block")),
    "scpl_accuracy_ratio": ("gauge", "Accuracy of the latest evaluation.", ("split",)),
    "scpl_learning_rate": ("gauge", "Latest learning rate.", ()),
    "scpl_samples_total": ("counter", "Training samples that went through all stages.", ()),
    "scpl_microbatches_total": ("counter", "Micro-batches that a stage has handled.", ("stage", "kind")),
    "scpl_stage_phase_seconds_total": ("counter", "Time of a stage by phase.", ("stage", "phase")),
    "scpl_stage_busy_seconds_total": ("counter", "Time in which a stage worked.", ("stage",)),
    "scpl_stage_waiting_seconds_total": ("counter", "Time in which a stage waited for input.", ("stage",)),
    "scpl_stage_blocked_seconds_total": ("counter", "Time in which the next stage had no room.", ("stage",)),
    "scpl_queue_depth": ("gauge", "Messages that wait in front of a stage.", ("stage",)),
    "scpl_transport_sent_bytes_total": ("counter", "Tensor bytes sent to neighbours.", ("stage",)),
    "scpl_transport_received_bytes_total": ("counter", "Tensor bytes from neighbours.", ("stage",)),
    "scpl_memory_peak_bytes": ("gauge", "Highest memory use of a stage.", ("stage",)),
    "scpl_checkpoint_last_success_timestamp_seconds": ("gauge", "When a checkpoint was last published.", ()),
    "scpl_checkpoint_duration_seconds": ("gauge", "Time to write the last checkpoint.", ()),
    "scpl_checkpoint_size_bytes": ("gauge", "Size of the last checkpoint.", ()),
    "scpl_checkpoints_total": ("counter", "Checkpoints published.", ()),
    "scpl_checkpoint_failures_total": ("counter", "Checkpoints that could not be published.", ()),
    "scpl_restarts_total": ("counter", "Earlier starts of this run, by what ended them.", ("reason",)),
    "scpl_nonfinite_loss_total": ("counter", "Losses that were NaN or infinite.", ()),
    "scpl_stragglers_total": ("counter", "Times a stage became a straggler.", ("stage",)),
    "scpl_control_rejected_total": (
        "counter",
        "Frames, workers and connections that were turned away.",
        ("reason",),
    ),
    "scpl_samples_per_second": ("gauge", "Training samples per second in steady state.", ()),
}
"""Every metric: kind, help, labels. Dashboards and rules may use these and no others."""

KINDS = ("train", "evaluate")
PHASES = frozenset(Phase) - OUTSIDE - OCCASIONAL
Row = tuple[str, tuple[str, ...], float]


class RunCollector(Collector):
    """Reads the coordinator's state at scrape time.

    Args:
        coordinator: its state is read under `lock`.
        lock: held by whoever changes the coordinator.
        restarts: how often the run was started again, by reason.
        clock: wall and monotonic seconds.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        lock: threading.Lock,
        restarts: Mapping[str, int] | None = None,
        clock: Callable[[], tuple[float, float]] = lambda: (time.time(), time.monotonic()),
    ) -> None:
        self._coordinator = coordinator
        self._lock = lock
        self._restarts = dict(restarts or {})
        self._clock = clock
        self.committed_at: float | None = None
        """Monotonic time of the last published checkpoint: its age stays right when the wall clock jumps."""

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return [_family(name) for name in NAMES]

    def collect(self) -> Iterable[Metric]:
        """The families with the values of this moment."""
        families = {name: _family(name) for name in NAMES}
        wall, monotonic = self._clock()
        with self._lock:
            for name, labels, value in self._rows(wall - monotonic):
                families[name].add_metric(labels, value)
        return families.values()

    def _rows(self, offset: float) -> Iterator[Row]:
        coordinator = self._coordinator
        yield "scpl_run_info", (coordinator.config.run.method, VERSION), 1.0
        for stage, replicas in enumerate(coordinator.layout.replicas):
            members = [member for member in coordinator.ordered() if member.stage == stage]
            up = 0 if coordinator.state == "over" else sum(not member.left for member in members)
            yield "scpl_stage_up", (str(stage),), float(up == replicas)
            yield "scpl_stage_replicas", (str(stage),), float(up)
            if members:
                yield from _stage_rows(str(stage), members, offset)
        last = coordinator.members.get(coordinator.config.pipeline.stages - 1)
        yield "scpl_epoch", (), float(last.epoch if last else 0)
        for reason, times in coordinator.rejected.items():
            yield "scpl_control_rejected_total", (reason,), float(times)
        for reason, times in self._restarts.items():
            yield "scpl_restarts_total", (reason,), float(times)
        yield "scpl_nonfinite_loss_total", (), float(coordinator.nonfinite_losses)
        yield "scpl_checkpoints_total", (), float(coordinator.checkpoints)
        yield "scpl_checkpoint_failures_total", (), float(coordinator.checkpoint_failures)
        if coordinator.last_commit is not None and self.committed_at is not None:
            yield "scpl_checkpoint_last_success_timestamp_seconds", (), self.committed_at + offset
            yield "scpl_checkpoint_duration_seconds", (), coordinator.last_commit.seconds
            yield "scpl_checkpoint_size_bytes", (), float(coordinator.last_commit.bytes)
        results = coordinator.flow.results if coordinator.flow else None
        yield "scpl_samples_total", (), float(results.samples if results else 0)
        if results is None:
            return
        if results.learning_rate is not None:
            yield "scpl_learning_rate", (), results.learning_rate
        if results.samples_per_second is not None:
            yield "scpl_samples_per_second", (), results.samples_per_second
        # Of each split the latest: a series must not vanish while the next epoch is half evaluated.
        latest = {
            split: value
            for epoch in sorted(results.accuracies)
            for split, value in results.accuracies[epoch].items()
        }
        for split, accuracy in latest.items():
            yield "scpl_accuracy_ratio", (split,), accuracy


def _stage_rows(stage: str, members: list[Member], offset: float) -> Iterator[Row]:
    """A stage with several workers has the sum of their times and bytes, and is as far as its slowest one."""
    stats = [member.stats for member in members]
    for host, device in sorted({(member.hello.host, member.hello.device) for member in members}):
        yield "scpl_stage_info", (stage, host, device), 1.0
    changed = min(member.changed for member in members)
    yield "scpl_stage_last_progress_timestamp_seconds", (stage,), changed + offset
    yield "scpl_step", (stage,), float(min(member.step for member in members))
    yield "scpl_stage_busy_seconds_total", (stage,), sum(one.busy for one in stats)
    yield "scpl_stage_waiting_seconds_total", (stage,), sum(one.waiting for one in stats)
    yield "scpl_stage_blocked_seconds_total", (stage,), sum(one.blocked for one in stats)
    yield "scpl_queue_depth", (stage,), float(max(one.queue for one in stats))
    yield "scpl_transport_sent_bytes_total", (stage,), float(sum(one.bytes_sent for one in stats))
    yield "scpl_transport_received_bytes_total", (stage,), float(sum(one.bytes_received for one in stats))
    yield "scpl_memory_peak_bytes", (stage,), float(max(one.peak_memory for one in stats))
    yield "scpl_stragglers_total", (stage,), float(sum(member.stragglings for member in members))
    first = members[0]
    for kind in KINDS:
        yield "scpl_microbatches_total", (stage, kind), float(first.micro_batches[kind])
    for phase in sorted(PHASES.union(*(one.phases for one in stats))):
        yield (
            "scpl_stage_phase_seconds_total",
            (stage, phase),
            sum(one.phases.get(phase, 0.0) for one in stats),
        )
    for block, loss in first.losses.items():
        yield "scpl_loss", (stage, block), loss


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    kind, text, labels = NAMES[name]
    family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    return family(name, text, labels=labels)


class Exporter:
    """The HTTP server: ``/metrics``, ``/healthz``, ``/readyz``, and 404 for everything else.

    Args:
        collector: what ``/metrics`` shows.
        unready: why the run makes no progress, or None; for ``/readyz``.
        host: address to serve on.
        port: port to serve on; 0 takes any free one.

    Raises:
        ValueError: the address cannot be bound; the message has the keys and the fix.
    """

    def __init__(self, collector: Collector, unready: Callable[[], str | None], host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(collector)

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif path == "/healthz":
                    self._answer(200, b"ok\n")
                elif path == "/readyz":
                    reason = unready()
                    self._answer(200 if reason is None else 503, f"{reason or 'ok'}\n".encode())
                else:
                    self._answer(404, b"try /metrics, /healthz or /readyz\n")

            def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """A scrape every few seconds is no news."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise ValueError(
                f"metrics.host = {host!r}, metrics.port = {port}: cannot listen there ({error.strerror}); choose "
                "another one, or -o metrics.port=0 for any free port"
            ) from None
        bound = self._server.server_address
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            import socket

            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking the name service for this host's name, which can take seconds."""
        import socketserver

        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
