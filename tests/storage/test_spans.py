from __future__ import annotations

from pathlib import Path
from typing import Any

from scpl_dist.run.phases import Phase
from scpl_dist.storage import spans
from scpl_dist.storage.spans import RECORD, SENT, Passed, Span

WHOSE: dict[str, Any] = {"rank": 1, "stage": 1, "replica": 0, "host": "a", "generation": "g"}
FORWARD = spans.PHASES.index(Phase.FORWARD)


def test_what_is_written_is_read_and_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    with spans.create(tmp_path, "stage1", WHOSE) as file:
        file.write(RECORD.pack(1.5, 2.5, 7, 6, 3, 1, FORWARD))
        file.write(RECORD.pack(2.0, 2.0, 9, 0, 0, 0, SENT))
        file.write(RECORD.pack(2.5, 3.5, 8, 7, 3, 0, FORWARD)[:-1])
    (found,) = spans.recordings(tmp_path)
    assert (found.rank, found.stage, found.host, found.boot) == (1, 1, "a", spans.boot())
    assert found.spans == [Span("forward", 1.5, 2.5, sequence=7, step=6, block=3, micro_batch=1)]
    assert found.messages == [Passed(sent=True, at=2.0, rank=0, number=9)]


def test_a_later_start_has_a_file_of_its_own(tmp_path: Path) -> None:
    for begin in (5.0, 1.0):
        with spans.create(tmp_path, "stage1", WHOSE) as file:
            file.write(RECORD.pack(begin, 6.0, 0, 0, -1, 0, FORWARD))
    assert [one.spans[0].begin for one in spans.recordings(tmp_path)] == [1.0, 5.0]
    (tmp_path / "trace" / "stage0.0.spans").write_text('{"rank": 0')  # killed while it began
    assert len(list(spans.recordings(tmp_path))) == 2
