"""What Grafana draws of a dashboard from the answers of a real Prometheus: values of variables, lines, tables.

It knows what this project's dashboard uses, and no more: anything else is a `KeyError` or an `AssertionError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Panel = dict[str, Any]
Row = dict[str, str | float]
Ask = Callable[..., Any]
"""An endpoint of Prometheus' API and its parameters; answers with the data."""


@dataclass(frozen=True)
class Line:
    """One series of a panel, by the name in its legend."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Board:
    """A dashboard and the Prometheus that it asks.

    Attributes:
        json: the dashboard.
        ask: how to ask.
        rate_interval: what Grafana puts in the place of `$__rate_interval`.
        range_s: how far back the panels look, in seconds.
    """

    json: dict[str, Any]
    ask: Ask
    rate_interval: str
    range_s: int

    @property
    def panels(self) -> list[Panel]:
        return [panel for panel in self.json["panels"] if panel["type"] != "row"]

    def choices(self, variable: str) -> list[str]:
        """What can be chosen for a variable of the dashboard."""
        [found] = [entry for entry in self.json["templating"]["list"] if entry["name"] == variable]
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", found["query"]["query"])
        assert asked is not None
        series, label = asked.groups()
        values: list[str] = self.ask(f"label/{label}/values", **{"match[]": series})
        return values

    def lines(self, panel: Panel) -> list[Line]:
        """What a panel with a course over time shows."""
        now = float(self.ask("query", query="time()")["result"][1])
        drawn = []
        for target in panel["targets"]:
            asked = {"query": self._expression(target), "start": now - self.range_s, "end": now, "step": 1}
            for series in self.ask("query_range", **asked)["result"]:
                values = tuple(float(value) for _, value in series["values"])
                drawn.append(Line(_legend(target["legendFormat"], series["metric"]), values))
        return drawn

    def table(self, panel: Panel) -> list[Row]:
        """What a panel with a table shows: rows of columns by their titles."""
        frames = []
        for target in panel["targets"]:
            value = "Value" if len(panel["targets"]) == 1 else f"Value #{target['refId']}"
            found = self.ask("query", query=self._expression(target))["result"]
            frames.append([{**row["metric"], "Time": "", value: float(row["value"][1])} for row in found])
        rows: list[Row] = [row for frame in frames for row in frame]
        for step in panel["transformations"]:
            rows = {"merge": _merged, "organize": _organized}[step["id"]](rows, step["options"])
        return rows

    def _expression(self, target: dict[str, Any]) -> str:
        text: str = target["expr"].replace("$__rate_interval", self.rate_interval)
        for variable in self.json["templating"]["list"]:
            text = text.replace(f"${variable['name']}", self.choices(variable["name"])[0])
        assert "$" not in text, text
        return text


def _legend(template: str, labels: dict[str, str]) -> str:
    """The name of a series; a label that it does not have would be empty there."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels[match[1]], template)


def _merged(rows: list[Row], options: dict[str, Any]) -> list[Row]:
    """Rows become one where what both of them have is equal."""
    assert options == {}
    merged: list[Row] = []
    for row in rows:
        for other in merged:
            if all(other[key] == row[key] for key in other.keys() & row.keys()):
                other.update(row)
                break
        else:
            merged.append(dict(row))
    return merged


def _organized(rows: list[Row], options: dict[str, Any]) -> list[Row]:
    """Columns that are shown, under their titles."""
    hidden = {name for name, excluded in options["excludeByName"].items() if excluded}
    titles = options["renameByName"]
    return [
        {titles.get(name, name): value for name, value in row.items() if name not in hidden} for row in rows
    ]
