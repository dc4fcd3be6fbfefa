from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from torch import nn

from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.unit import Unit
from scpl_dist.schedule import Action, Kind, Place, ScheduleError, picture, simulate


class Local(LocalMethod):
    name = "local"

    def __init__(self) -> None:
        pass  # a schedule needs neither configuration nor model

    def unit(self, index: int, block: nn.Module, before: object, after: object) -> Unit:
        raise NotImplementedError


def stream(stages: int, blocks_per_stage: int = 1, items: int = 5) -> list[list[Action]]:
    places = [
        Place(k, stages, range(k * blocks_per_stage, (k + 1) * blocks_per_stage)) for k in range(stages)
    ]
    return [[action for _ in range(items) for action in Local().train(place, 1)] for place in places]


def texts(actions: Iterator[Action]) -> str:
    return " ".join(map(str, actions))


def test_local_methods_stream_without_a_bubble_after_filling() -> None:
    assert picture(stream(3), capacity=2) == "\n".join(
        [
            "stage 0 F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 .  .",
            "stage 1 .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4 .",
            "stage 2 .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 F4 B4 B4",
        ]
    )


def test_a_stage_updates_each_block_before_the_next_and_sends_before_its_last_backward() -> None:
    first = Local().train(Place(0, 2, range(2)), 1)
    assert texts(first) == "LOAD.0 F0.0 LOSS0.0 B0.0 STEP0 F1.0 SEND_F.0 LOSS1.0 B1.0 STEP1"
    last = Local().train(Place(1, 2, range(2, 4)), 1)
    assert texts(last) == "RECV_F.0 F2.0 LOSS2.0 B2.0 STEP2 F3.0 LOSS3.0 B3.0 STEP3"


def test_an_evaluation_goes_forward_and_predicts_at_the_last_block() -> None:
    assert texts(Local().evaluate(Place(0, 2, range(2)), 1)) == "LOAD.0 F0.0 F1.0 SEND_F.0"
    assert texts(Local().evaluate(Place(1, 2, range(2, 4)), 1)) == "RECV_F.0 F2.0 F3.0 PRED3.0"


@pytest.mark.parametrize(
    ("stages", "blocks", "capacity"), [*itertools.product([1, 2, 5, 16], [1, 3], [1, 2, 4])]
)
def test_every_message_finds_its_receiver_for_any_size(stages: int, blocks: int, capacity: int) -> None:
    timeline = simulate(stream(stages, blocks, items=6), capacity)
    work = blocks * 6 * 3  # forward 1, backward 2
    assert all(sum(end - start for start, end, _ in row) == work for row in timeline)
    # Filling costs a stage's forward passes for each stage; after that nobody ever waits. With several blocks in a
    # stage, its earlier blocks are updated before its output leaves.
    fill = (stages - 1) * (3 * (blocks - 1) + 1)
    assert max(end for row in timeline for _, end, _ in row) == work + fill


def test_a_schedule_whose_stages_wait_for_each_other_is_refused() -> None:
    wait = [Action.from_text("RECV_B.0"), Action.from_text("SEND_F.0")]
    other = [Action.from_text("RECV_F.0"), Action.from_text("SEND_B.0")]
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 at RECV_B.0, stage 1 at RECV_F.0"):
        simulate([wait, other], capacity=2)


def test_a_message_that_nobody_takes_is_refused() -> None:
    with pytest.raises(ScheduleError, match="never takes"):
        simulate([[Action.from_text("SEND_F.0")], []], capacity=2)


def test_messages_in_another_order_are_refused() -> None:
    sends = [Action.from_text("SEND_F.0"), Action.from_text("SEND_F.1")]
    takes = [Action.from_text("RECV_F.1"), Action.from_text("RECV_F.0")]
    with pytest.raises(ScheduleError, match="meets"):
        simulate([sends, takes], capacity=2)


def test_a_full_channel_holds_the_sender_back() -> None:
    sends = [Action.from_text(text) for text in ("SEND_F.0", "SEND_F.1", "SEND_F.2")]
    takes = [Action.from_text(text) for text in ("F1.0", "RECV_F.0", "F1.0", "RECV_F.1", "RECV_F.2")]
    [row, _] = simulate([sends, takes], capacity=1)
    assert [start for start, _, _ in row] == [0, 1, 2]


@pytest.mark.parametrize("kind", list(Kind))
def test_the_text_form_and_the_action_are_inverse(kind: Kind) -> None:
    for block, micro_batch in itertools.product([None, 0, 12], [None, 0, 7]):
        action = Action(kind, block, micro_batch)
        assert Action.from_text(str(action)) == action


def test_a_text_that_is_no_action_is_named() -> None:
    with pytest.raises(ValueError, match=r"'G1\.0' is no action"):
        Action.from_text("G1.0")
