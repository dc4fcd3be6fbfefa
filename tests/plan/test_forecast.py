"""What a plan says about stages, with block times that are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist import data
from scpl_dist.plan import forecast
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from tests.support.command import called, scpl_dist

HEADING = [
    "block",
    "ms",
    "a",
    "step",
    "share",
    "parameters",
    "with",
    "heads",
    "MB",
    "a",
    "step",
    "sent",
    "on",
]


def plan(seconds: list[float], **values: object) -> forecast.Forecast:
    """A plan of the embedded model, whose four blocks take these times."""
    settings = config.load(values={key.replace("__", "."): value for key, value in values.items()})
    source = data.resolve(settings)
    made = Plan.plan(settings, source.classes, source.example())
    return forecast.forecast(made, source, lambda plan, source: seconds)


def test_the_stream_is_as_fast_as_its_slowest_stage() -> None:
    found = plan([0.03, 0.01, 0.01, 0.01])
    assert [cut.counts for cut in found.cuts] == [[4], [1, 3], [1, 1, 2], [1, 1, 1, 1]]
    assert [cut.seconds for cut in found.cuts] == pytest.approx([0.06, 0.03, 0.03, 0.03])
    assert [cut.speedup for cut in found.cuts] == pytest.approx([1, 2, 2, 2])
    assert found.present.counts == [2, 2]
    assert found.present.speedup == pytest.approx(1.5)


def test_replicas_share_the_time_of_their_stage() -> None:
    found = plan([0.03, 0.01, 0.01, 0.01], pipeline__replicas=[2, 1])
    assert found.present.seconds == pytest.approx(0.02)
    assert "[2, 2]  now, with pipeline.replicas = [2, 1]\n" in found.text()


def test_what_this_machine_allows_stands_beside_what_enough_devices_would_bring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "cores", lambda: 3)
    found = plan([0.01] * 4, runtime__threads=2, runtime__device="cpu")
    rows = [line.split() for line in found.text().splitlines()]
    assert [row[:3] for row in rows[7:11]] == [
        ["1", "1.00", "1.00"],
        ["2", "2.00", "1.50"],
        ["3", "2.00", "1.50"],
        ["4", "4.00", "1.50"],
    ]
    assert "this machine can keep 1.5\nof them busy" in found.text()


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({}, 1.0),
        ({"pipeline__wire_dtype": "bfloat16"}, 0.5),
        ({"runtime__precision": "bfloat16"}, 0.5),
        ({"data__augmentation": "strong"}, 2.0),
    ],
)
def test_a_link_carries_what_the_last_block_of_a_stage_gives(values: dict[str, object], scale: float) -> None:
    found = plan([0.03, 0.01, 0.01, 0.01], data__batch_size=100, **values)
    outputs = [shape.shape[1:].numel() * 4 * 100 * scale for shape in found.plan.shapes[1:]]
    assert found.sent == outputs
    assert [cut.bytes for cut in found.cuts] == [0, outputs[0], max(outputs[:2]), max(outputs[:3])]


def test_scales_of_8_bit_integers_count_too() -> None:
    found = plan([0.03, 0.01, 0.01, 0.01], data__batch_size=100, pipeline__wire_dtype="int8")
    assert [tuple(shape.shape[1:]) for shape in found.plan.shapes[1:3]] == [(16, 8, 8), (48, 4, 4)]
    assert found.sent[:2] == [
        100 * (16 * 64 + 16 * 4),
        100 * (48 * 16 + 4),
    ]  # a scale a channel, and one in all


def test_the_command_measures_and_prints_both_tables() -> None:
    lines = scpl_dist("plan", "-o", "data.batch_size=64").stdout.splitlines()
    assert lines[0].split() == HEADING
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert [line.split()[0] for line in lines[7:12]] == ["1", "2", "3", "4", "2"]
    assert float(lines[7].split()[1]) == 1.0
    assert "its stages wait for each other" in called("plan", "-o", "run.method=bp", code=2).stderr


def test_the_data_set_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def data(root):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
        "        calls.write('x')\n"
        "    return (TensorDataset(torch.zeros(64, 1, 16, 16), torch.arange(64) % 2),) * 2\n"
    )
    called("plan", "-o", f"data.name={file}:data", "-o", "data.batch_size=8", "-o", "metrics.port=0")
    assert (tmp_path / "calls").read_text() == "x"
