"""A live table of a run that goes on somewhere else, from its metrics.

    scpl-dist top RUN_DIR --reads run.json--> URL --HTTP every few seconds--> coordinator's /metrics

It sees what Prometheus sees, so it needs no access to the run but the metrics port.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LIMIT_S = 5.0


class Sample:
    """The metrics of one moment.

    Args:
        text: exposition of a coordinator.
        now: monotonic seconds.
    """

    def __init__(self, text: str, now: float) -> None:
        self.now = now
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """A value; None if there is no such series."""
        return self._values.get((name, frozenset(labels.items())))

    def labels(self, name: str, label: str) -> list[str]:
        """The values of a label."""
        found = {dict(labels)[label] for series, labels in self._values if series == name}
        return sorted(found, key=lambda text: (len(text), text))

    def of_stage(self, name: str, stage: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of all series of a stage."""
        return [
            (dict(labels), value)
            for (series, labels), value in self._values.items()
            if series == name and ("stage", stage) in labels
        ]


def url_of(target: str) -> str:
    """Address of the metrics of a run.

    Args:
        target: a run folder, or an address such as ``http://127.0.0.1:9400/metrics`` or ``127.0.0.1:9400``.

    Raises:
        ValueError: neither.
    """
    file = Path(target) / "run.json"
    if file.is_file():
        url: str = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        return url
    if Path(target).is_dir() or ":" not in target:
        raise ValueError(
            f"{target}: no run is in progress there (it has no run.json): give a run folder, or the address of a "
            "coordinator's metrics such as 127.0.0.1:9400"
        )
    url = target if target.startswith(("http://", "https://")) else f"http://{target}"
    return url if url.endswith("/metrics") else f"{url.rstrip('/')}/metrics"


def scrape(url: str) -> Sample:
    """Read the metrics.

    Raises:
        OSError: nobody answers.
    """
    with urllib.request.urlopen(url, timeout=_LIMIT_S) as answer:
        text: str = answer.read().decode()
    return Sample(text, time.monotonic())


def picture(new: Sample, old: Sample | None) -> Group:
    """A row for each stage, and a line about the run.

    Args:
        new: the present metrics.
        old: earlier ones, so that shares and rates are those of the time between; None takes those since the start.
    """
    table = Table(box=None, pad_edge=False)
    for name in (
        "stage",
        "workers",
        "step",
        "loss",
        "busy",
        "waiting",
        "blocked",
        "queue",
        "MB/s sent",
        "host",
    ):
        table.add_column(name, justify="left" if name == "host" else "right")
    for stage in new.labels("scpl_stage_up", "stage"):
        table.add_row(*_cells(new, old, stage))
    return Group(table, Text(_status(new)))


def _cells(new: Sample, old: Sample | None, stage: str) -> Iterator[str]:
    def grown(name: str) -> float:
        before = old.value(name, stage=stage) if old is not None else None
        return max(0.0, (new.value(name, stage=stage) or 0.0) - (before or 0.0))

    yield stage
    yield f"{new.value('scpl_stage_replicas', stage=stage) or 0:.0f}"
    step, losses = new.value("scpl_step", stage=stage), new.of_stage("scpl_loss", stage)
    yield "" if step is None else f"{step:.0f}"
    yield f"{sum(loss for _, loss in losses):.4f}" if losses else ""
    times = [grown(f"scpl_stage_{kind}_seconds_total") for kind in ("busy", "waiting", "blocked")]
    for seconds in times:
        yield f"{seconds / sum(times):.0%}" if sum(times) else ""
    queue = new.value("scpl_queue_depth", stage=stage)
    yield "" if queue is None else f"{queue:.0f}"
    passed = new.now - old.now if old is not None else 0.0
    yield f"{grown('scpl_transport_sent_bytes_total') / passed / 1e6:.2f}" if passed else ""
    hosts = sorted({labels["host"] for labels, _ in new.of_stage("scpl_stage_info", stage)})
    yield ", ".join(hosts) or "not here yet"


def _status(new: Sample) -> str:
    epoch, speed = new.value("scpl_epoch"), new.value("scpl_samples_per_second")
    parts = [*new.labels("scpl_run_info", "method"), f"epoch {(epoch or 0) + 1:.0f}"]
    for split in new.labels("scpl_accuracy_ratio", "split"):
        parts.append(f"{split} accuracy {new.value('scpl_accuracy_ratio', split=split) or 0:.4f}")
    if speed is not None:
        parts.append(f"{speed:.0f} samples/s")
    saved = new.value("scpl_checkpoints_total")
    parts.append(f"{saved or 0:.0f} checkpoints")
    return ", ".join(parts)


def follow(target: str, every_s: float, once: bool) -> int:
    """Draw the table until the run is over.

    Args:
        target: see `url_of`.
        every_s: seconds between two looks.
        once: draw it once and end.

    Returns:
        Exit code: 0, or 1 if nobody answered at all.

    Raises:
        ValueError: see `url_of`.
    """
    url, console, old = url_of(target), Console(), None
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            try:
                new = scrape(url)
            except OSError as error:
                if old is None:
                    console.print(f"nobody answers at {url}: {error}", markup=False, soft_wrap=True)
                    return 1
                console.print(
                    f"the run does not answer any more{_ended(target)}", markup=False, soft_wrap=True
                )
                return 0
            if live is None:
                console.print(picture(new, old))
            else:
                live.update(picture(new, old), refresh=True)
            old = new
            if once:
                return 0
            time.sleep(every_s)


def _ended(target: str) -> str:
    """How the run in a folder ended."""
    file = Path(target) / "exit.json"
    return f": {json.loads(file.read_text(encoding='utf-8'))['reason']}" if file.is_file() else ""
