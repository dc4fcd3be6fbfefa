"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from scpl_dist.commands import report


@pytest.mark.parametrize(("metrics", "panels"), [({}, 3), ({"confusion": [[3, 1], [0, 0]]}, 4)])
def test_a_confusion_matrix_is_drawn_where_there_is_one(
    metrics: dict[str, Any], panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"event": "eval", "epoch": 0, "split": "test", "accuracy": 0.75, "correct": 3, "total": 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | metrics) + "\n")
    drawn: list[Any] = []
    monkeypatch.setattr(report, "_confusion", lambda axes, row: drawn.append((_confusion(axes, row), axes)))
    picture = matplotlib.image.imread(report.report(tmp_path))
    assert picture.shape[1] == {3: 13, 4: 18}[panels] * 120
    assert len(drawn) == panels - 3
    for _, axes in drawn:
        assert axes.images[0].get_array().tolist() == [[75, 25], [0, 0]]


_confusion = report._confusion
