"""``scpl-dist top``: the table of a run that goes on somewhere else.

    scpl-dist top RUN_DIR --reads run.json--> address --HTTP every few seconds--> coordinator's /status

It needs no access to the run but the port of its metrics.
"""

from __future__ import annotations

import json
import time
import urllib.request
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path

from rich.live import Live

from scpl_dist.commands import table
from scpl_dist.coordinator.status import Status
from scpl_dist.coordinator.table import StatusTable
from scpl_dist.storage.run_folder import RunFolder

PATIENCE = 3  # so often a run that has answered before may fail to


def url_of(target: str) -> str:
    """Address of a run's status, from its folder, or from the address of its metrics as ``127.0.0.1:9400``."""
    run = RunFolder(Path(target)).read("run.json")
    if run is not None:
        target = run["metrics"]
    elif Path(target).is_dir() or ":" not in target:
        raise ValueError(
            f"{target}: no run is in progress there (it has no run.json): give a run folder, or the address of a "
            "coordinator's metrics such as 127.0.0.1:9400"
        )
    url = target if target.startswith(("http://", "https://")) else f"http://{target}"
    return f"{url.removesuffix('/metrics').removesuffix('/status').rstrip('/')}/status"


def ask(url: str) -> Status:
    """The status of a run; `OSError` if nobody answers, or somebody else."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            status = json.loads(answer.read())
    except (ValueError, HTTPException):
        status = None
    if not isinstance(status, dict) or "workers" not in status:
        raise OSError("the answer is not that of a coordinator")
    return status


def follow(target: str, every_s: float, once: bool) -> int:
    """Draw the table until the run is over, or `once`; returns the exit code, 1 if nobody answered at all."""
    url, console, picture = url_of(target), table.console(), StatusTable()
    seen, missed = False, 0
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            try:
                status = ask(url)
            except OSError as error:
                text = f"nobody answers at {url}: {error}"
                ended = RunFolder(Path(target)).read("exit.json")
                if seen and ended is None and missed < PATIENCE:
                    missed += 1
                    time.sleep(every_s)
                    continue
                if ended is not None:
                    text = f"the run has ended: {ended['reason']}"
                elif seen:
                    text = "the run does not answer any more"
                console.print(text, markup=False, soft_wrap=True)
                return 0 if seen or ended else 1
            seen, missed = True, 0
            if live is None:
                console.print(picture.draw(status))
            else:
                live.update(picture.draw(status), refresh=True)
            if once:
                return 0
            time.sleep(every_s)
