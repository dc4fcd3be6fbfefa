"""``report.html``: one file with data, style and script in it, so that it opens anywhere, without a network."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import time
from pathlib import Path
from string import Template
from typing import Any

from scpl_dist.commands import report_data
from scpl_dist.control.messages import VERSION
from scpl_dist.coordinator.page import asset
from scpl_dist.run import config as configuration


def page(run_dir: Path) -> str:
    """The page of a run, or of the folder of a comparison; ValueError if it is neither."""
    return _page(_comparison(run_dir) if (run_dir / "comparison.csv").is_file() else _run(run_dir))


def _run(run_dir: Path) -> dict[str, Any]:
    run = report_data.of_run(run_dir)
    parts = [run["name"]]
    title = run["name"]
    path = run_dir / "config.toml"
    if path.is_file():
        config = configuration.load(path)
        stages = f"{config.pipeline.stages} stage" + ("s" if config.pipeline.stages > 1 else "")
        workers = f" by {config.layout.world} workers" if config.layout.world > config.pipeline.stages else ""
        title = f"{config.run.method}: {config.model.name} on {config.data.name}"
        parts += [f"{stages}{workers}", f"batch {config.data.batch_size}", f"seed {config.run.seed}"]
    if run["begun"] is not None:
        parts.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(run["begun"])))
    bad = run["state"] == "killed" or run["state"].startswith("failed")
    return {"title": title, "subtitle": " · ".join(parts), "state": run["state"], "bad": bad, "runs": [run]}


def _comparison(folder: Path) -> dict[str, Any]:
    with (folder / "comparison.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = [row[:-1] for row in csv.reader(file)]  # without the reason of a failure
    note, _, heads, *_ = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    columns = zip(heads.strip("| ").split(" | "), zip(*rows, strict=True), strict=True)
    told = [(head, cells) for head, cells in columns if any(cells)]
    order = [row[0].replace(",", "").replace(" ", "-") for row in rows]
    places = {
        (order.index(method), path.parent.name): path.parent
        for path in folder.glob("*/metrics.jsonl")
        if (method := path.parent.name.rpartition("-seed")[0]) in order
    }
    seeds = len({name.rpartition("-seed")[2] for _, name in places}) > 1
    return {
        "title": "Comparison of methods",
        "subtitle": folder.resolve().name,
        "note": note,
        "table": {
            "heads": [head for head, _ in told],
            "rows": [list(cells) for cells in zip(*(cells for _, cells in told), strict=True)],
        },
        "runs": [
            report_data.of_run(path, name if seeds else rows[place][0])
            for (place, name), path in sorted(places.items())
        ],
    }


def _page(data: dict[str, Any]) -> str:
    style, script = asset("page.css"), asset("charts.js") + asset("report.js")
    data["footer"] = (
        f"scpl_dist {VERSION}, {time.strftime('%Y-%m-%d %H:%M')}. The page holds all of its data."
    )
    # A text in the data must not end the element that it is in.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    allowed = f"style-src {_source(style)}; script-src {_source(script)}"
    policy = f"default-src 'none'; img-src data:; {allowed}; base-uri 'none'; form-action 'none'"
    return Template(asset("report.html")).substitute(
        policy=policy, title=html.escape(data["title"]), style=style, script=script, data=text
    )


def _source(content: str) -> str:
    """As a content security policy names what is in the page itself."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
