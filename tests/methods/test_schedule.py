from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from torch import nn

from scpl_dist.methods import Method, resolve
from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.lowering import lower
from scpl_dist.methods.schedule import Action, Kind, ScheduleError, StageSpec, simulate
from scpl_dist.methods.task import Classification
from scpl_dist.run import partition
from scpl_dist.run.config import load
from tests.support.pictures import picture


class Local(LocalMethod):
    name = "local"

    def __init__(self) -> None:
        pass  # a schedule needs neither configuration nor model

    def trainable(self, index: int, block: nn.Module, before: object, after: object) -> TrainableBlock:
        raise NotImplementedError


def stream(stages: int, blocks_per_stage: int = 1, items: int = 5) -> list[list[Action]]:
    specs = [
        StageSpec(k, stages, range(k * blocks_per_stage, (k + 1) * blocks_per_stage)) for k in range(stages)
    ]
    return [
        [action for _ in range(items) for action in lower(Local().train(spec, 1), spec)] for spec in specs
    ]


def method(name: str, micro_batches: int = 1, **pipeline: object) -> Method:
    values = {f"pipeline.{key}": value for key, value in pipeline.items()}
    values |= {"run.method": name, "pipeline.micro_batches": micro_batches}
    return resolve(name)(load(values=values), 16, Classification(10))


def programs(chosen: Method, stages: int, blocks: int = 1, items: int = 1) -> list[list[Action]]:
    parts = chosen.config.pipeline.micro_batches
    specs = [StageSpec(k, stages, range(k * blocks, (k + 1) * blocks)) for k in range(stages)]
    return [
        [action for _ in range(items) for action in lower(chosen.train(spec, parts), spec)] for spec in specs
    ]


def of_micro_batch(number: int, *kinds: str) -> list[Action]:
    return [Action(Kind(kind), micro_batch=number) for kind in kinds]


def texts(actions: Iterable[Action]) -> str:
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
    first = Local().train(StageSpec(0, 2, range(2)), 1)
    assert texts(first) == "LOAD.0 F0.0 LOSS0.0 B0.0 STEP0 F1.0 SEND_F.0 LOSS1.0 B1.0 STEP1"
    last = Local().train(StageSpec(1, 2, range(2, 4)), 1)
    assert texts(last) == "RECV_F.0 F2.0 LOSS2.0 B2.0 STEP2 F3.0 LOSS3.0 B3.0 STEP3"


def test_micro_batches_that_are_compared_go_forward_twice() -> None:
    chosen, spec = method("scpl", 2), StageSpec(0, 2, range(2))
    parts = chosen.train(spec, 2)
    of_first = "LOAD.0 F0.0 E0.0 LOAD.1 F0.1 E0.1 LOSS0 R0.0 B0.0 R0.1 B0.1 STEP0"
    of_second = "F1.0 SEND_F.0 E1.0 F1.1 SEND_F.1 E1.1 LOSS1 R1.0 B1.0 R1.1 B1.1 STEP1"
    assert texts(parts) == f"{of_first} {of_second}"
    frozen = texts(lower(chosen.train(spec, 2), spec, frozen={0}))
    assert frozen.startswith("LOAD.0 F0.0 LOAD.1 F0.1 ROOM_F.0 F1.0 SEND_F.0 E1.0 ROOM_F.1 F1.1")
    assert texts(chosen.train(spec, 1)) == texts(Local().train(spec, 1))


def test_a_frozen_block_only_goes_forward_where_blocks_learn_alone() -> None:
    spec = StageSpec(0, 2, range(3), replicas=2)
    assert texts(lower(Local().train(spec, 1), spec, frozen={0, 2})) == (
        "LOAD.0 F0.0 F1.0 GATHER1.0 LOSS1.0 B1.0 SUM1 ROOM_F.0 F2.0 SEND_F.0 STEP1"
    )
    assert (
        texts(lower(Local().train(spec, 1), spec, frozen={0, 1, 2}))
        == "LOAD.0 F0.0 F1.0 ROOM_F.0 F2.0 SEND_F.0"
    )


def test_where_gradients_are_handed_on_they_end_at_the_first_block_that_learns() -> None:
    first, second = (StageSpec(stage, 2, range(2 * stage, 2 * stage + 2)) for stage in range(2))
    chosen = resolve("bp")(load(None, ["run.method=bp", "pipeline.recompute=true"]), 4, Classification(10))

    def lowered(*frozen: int) -> list[str]:
        specs = first, second
        return [texts(lower(chosen.train(spec, 1), spec, frozen=set(frozen), local=False)) for spec in specs]

    forward = "LOAD.0 F0.0 ROOM_F.0 F1.0 SEND_F.0"
    assert lowered(0, 1) == [
        forward,
        "RECV_F.0 F2.0 F3.0 R3.0 LOSS3.0 B3.0 R2.0 B2.0 STEP2 STEP3",
    ]
    assert lowered(0, 1, 2)[1] == "RECV_F.0 F2.0 F3.0 R3.0 LOSS3.0 B3.0 STEP3"
    assert lowered(0, 3) == [
        f"{forward} RECV_B.0 R1.0 B1.0 STEP1",
        "RECV_F.0 F2.0 F3.0 R3.0 LOSS3.0 B3.0 R2.0 B2.0 ROOM_B.0 SEND_B.0 STEP2",
    ]


@pytest.mark.parametrize(("name", "parts"), [("scpl", 1), ("scpl", 3), ("bp", 1), ("gpipe", 3)])
def test_every_message_finds_its_receiver_whatever_is_frozen(name: str, parts: int) -> None:
    chosen = method(name, parts)
    for counts in ((1, 1, 2), (2, 2), (4,), (3, 1)):
        specs = [StageSpec(k, len(counts), blocks) for k, blocks in enumerate(partition.split(counts))]
        for size in range(4):
            for frozen in itertools.combinations(range(4), size):
                simulate(
                    [
                        lower(chosen.train(spec, parts), spec, True, set(frozen), chosen.local)
                        if name != "scpl"
                        else lower(chosen.train(spec, parts), spec, False, set(frozen))
                        for spec in specs
                    ],
                    capacity=1,
                )


def test_replicas_add_up_gradients_while_the_next_block_computes() -> None:
    spec = StageSpec(0, 2, range(3), replicas=2)
    assert texts(lower(Local().train(spec, 1), spec)) == (
        "LOAD.0 F0.0 GATHER0.0 LOSS0.0 B0.0 SUM0 F1.0 GATHER1.0 LOSS1.0 B1.0 SUM1 STEP0 "
        "ROOM_F.0 F2.0 SEND_F.0 GATHER2.0 LOSS2.0 B2.0 SUM2 STEP1 STEP2"
    )
    spec = StageSpec(1, 2, range(2, 4), replicas=2)
    assert texts(lower(method("bp").train(spec, 1), spec)) == (
        "RECV_F.0 F2.0 F3.0 GATHER3.0 LOSS3.0 B3.0 B2.0 ROOM_B.0 SEND_B.0 SUM2 SUM3 STEP2 STEP3"
    )


def test_a_block_is_there_while_something_is_done_with_it_and_the_next_one_is_fetched_meanwhile() -> None:
    spec = StageSpec(0, 2, range(3))
    assert texts(lower(Local().train(spec, 1), spec, offload=True)) == (
        "LOAD.0 HAVE0 FETCH1 F0.0 LOSS0.0 B0.0 STEP0 PUT0 HAVE1 FETCH2 F1.0 LOSS1.0 B1.0 STEP1 PUT1 "
        "ROOM_F.0 HAVE2 FETCH0 F2.0 SEND_F.0 LOSS2.0 B2.0 STEP2 PUT2"
    )
    spec = StageSpec(1, 2, range(2, 4), replicas=2)  # no sum travels while its block is away
    assert texts(lower(Local().train(spec, 1), spec, offload=True)) == (
        "RECV_F.0 HAVE2 FETCH3 F2.0 GATHER2.0 LOSS2.0 B2.0 SUM2 STEP2 PUT2 "
        "HAVE3 FETCH2 F3.0 GATHER3.0 LOSS3.0 B3.0 SUM3 STEP3 PUT3"
    )
    spec = StageSpec(0, 1, range(2))
    assert texts(lower(method("al").evaluate(spec, 1), spec, offload=True)) == (
        "LOAD.0 HAVE0 FETCH1 F0.0 PUT0 HAVE1 FETCH0 F1.0 PRED1.0 DEC1.0 PUT1 HAVE0 DEC0.0 COUNT.0"
    )


def test_the_length_of_the_whole_gradient_is_added_up_in_the_first_stage_before_any_update() -> None:
    chosen = method("bp")
    specs = [StageSpec(k, 3, range(2 * k, 2 * k + 2)) for k in range(3)]
    lowered = [lower(chosen.train(spec, 1), spec, clip=True) for spec in specs]
    ends = [texts(actions).partition("B")[2] for actions in lowered]
    assert ends[0].endswith("B0.0 RECV_N NORM1 NORM0 TOTAL ROOM_F SEND_T STEP0 STEP1")
    assert ends[1].endswith("SEND_B.0 RECV_N NORM3 NORM2 ROOM_B SEND_N RECV_T ROOM_F SEND_T STEP2 STEP3")
    assert ends[2].endswith("SEND_B.0 NORM5 NORM4 ROOM_B SEND_N RECV_T STEP4 STEP5")
    simulate(lowered, capacity=1)
    alone = StageSpec(0, 1, range(2))
    assert texts(lower(chosen.train(alone, 1), alone, clip=True)).endswith("NORM1 NORM0 TOTAL STEP0 STEP1")


@pytest.mark.parametrize("name", ["scpl", "al", "bp", "gpipe"])
def test_a_stage_waits_for_room_before_the_work_whose_result_it_sends(name: str) -> None:
    for spec in (StageSpec(k, 3, range(2 * k, 2 * k + 2)) for k in range(3)):
        for program in (method(name).train(spec, 1), method(name).evaluate(spec, 1)):
            written = list(program)
            lowered = lower(written, spec)
            assert [a for a in lowered if a.kind not in (Kind.ROOM_F, Kind.ROOM_B)] == written
            for number, action in enumerate(lowered):
                if action.kind is Kind.SEND_F:
                    before = [str(a) for a in lowered[number - 2 : number]]
                    assert before == ["ROOM_F.0", f"F{spec.blocks[-1]}.0"]
                elif action.kind is Kind.SEND_B:
                    assert str(lowered[number - 1]) == "ROOM_B.0"


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["scpl", "early_exit", "al", "bp", "gpipe"])
def test_each_update_of_replicas_follows_one_sum_of_complete_gradients(name: str, parts: int) -> None:
    chosen = method(name, 1 if name in ("scpl", "bp") else parts)
    parts = chosen.config.pipeline.micro_batches
    for stage in range(2):
        spec = StageSpec(stage, 2, range(2 * stage, 2 * stage + 2), replicas=3)
        actions = lower(chosen.train(spec, parts), spec)
        for block in range(2 * stage, 2 * stage + 2):
            own = [action.kind for action in actions if action.block == block]
            assert own[-2:] == [Kind.SUM, Kind.STEP]
            assert own.count(Kind.SUM) == own.count(Kind.STEP) == 1
            assert own.count(Kind.BACKWARD) == parts


def test_an_evaluation_goes_forward_and_predicts_at_the_last_block() -> None:
    assert texts(Local().evaluate(StageSpec(0, 2, range(2)), 1)) == "LOAD.0 F0.0 F1.0 SEND_F.0"
    assert texts(Local().evaluate(StageSpec(1, 2, range(2, 4)), 1)) == "RECV_F.0 F2.0 F3.0 PRED3.0 COUNT.0"


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


def test_back_propagation_lets_one_stage_work_at_a_time() -> None:
    assert picture(programs(method("bp"), 3, items=2), capacity=2) == "\n".join(
        [
            "stage 0 F0 .  .  .  .  .  .  B0 B0 F1 .  .  .  .  .  .  B1 B1",
            "stage 1 .  F0 .  .  .  B0 B0 .  .  .  F1 .  .  .  B1 B1 .  .",
            "stage 2 .  .  F0 B0 B0 .  .  .  .  .  .  F1 B1 B1 .  .  .  .",
        ]
    )


def test_gpipe_goes_forward_with_all_micro_batches_and_back_in_reverse() -> None:
    assert picture(programs(method("gpipe", 4), 3), capacity=2) == "\n".join(
        [
            "stage 0 F0 F1 F2 F3 .  .  .  .  .  .  B3 B3 B2 B2 B1 B1 B0 B0",
            "stage 1 .  F0 F1 F2 F3 .  .  .  B3 B3 B2 B2 B1 B1 B0 B0 .  .",
            "stage 2 .  .  F0 F1 F2 F3 B3 B3 B2 B2 B1 B1 B0 B0 .  .  .  .",
        ]
    )


def test_recomputation_repeats_the_forward_before_each_backward() -> None:
    assert picture(programs(method("gpipe", 3, recompute=True), 2), capacity=2) == "\n".join(
        [
            "stage 0 F0 F1 F2 .  .  .  .  R2 B2 B2 R1 B1 B1 R0 B0 B0",
            "stage 1 .  F0 F1 F2 R2 B2 B2 R1 B1 B1 R0 B0 B0 .  .  .",
        ]
    )


def test_1f1b_alternates_after_filling_and_has_the_same_bubble() -> None:
    assert picture(programs(method("gpipe", 4, schedule="1f1b"), 3), capacity=2) == "\n".join(
        [
            "stage 0 F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3",
            "stage 1 .  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3 .  .",
            "stage 2 .  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 .  .  .  .",
        ]
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(
    ("stages", "blocks", "parts", "capacity"),
    [*itertools.product([1, 2, 3, 5, 8], [1, 2], [1, 2, 3, 8, 11], [1, 2, 4])],
)
def test_a_split_batch_passes_all_stages_with_the_known_bubble(
    schedule: str, stages: int, blocks: int, parts: int, capacity: int
) -> None:
    rows = simulate(programs(method("gpipe", parts, schedule=schedule), stages, blocks), capacity)
    work = blocks * parts * 3  # forward 1, backward 2
    assert all(sum(end - start for start, end, _ in row) == work for row in rows)
    bubble = (stages - 1) * blocks * 3
    if schedule == "gpipe" or capacity > 1:
        assert max(end for row in rows for _, end, _ in row) == work + bubble
    for row in rows:
        order = [action.micro_batch for *_, action in row if action.kind is Kind.BACKWARD][::blocks]
        assert order == sorted(order, reverse=schedule == "gpipe")
        assert [action.kind for *_, action in row][-blocks:] == [Kind.STEP] * blocks


def live(program: Iterable[Action]) -> int:
    """The most block activations that a stage keeps for a backward pass at any time of its program.

    A block whose activations are computed again keeps its input only, which is not counted until then.
    """
    actions = list(program)
    again = {(action.block, action.micro_batch) for action in actions if action.kind is Kind.RECOMPUTE}
    held: set[tuple[int, int]] = set()
    most = 0
    for action in actions:
        key = (action.block, action.micro_batch)
        if action.kind is Kind.RECOMPUTE or (action.kind is Kind.FORWARD and key not in again):
            held.add(key)
        elif action.kind is Kind.BACKWARD:
            held.discard(key)
        most = max(most, len(held))
    return most


@pytest.mark.parametrize(("stages", "parts"), [*itertools.product([1, 2, 4, 8], [1, 3, 8, 16])])
def test_1f1b_keeps_as_many_micro_batches_as_stages_follow_and_gpipe_all(stages: int, parts: int) -> None:
    one_by_one = programs(method("gpipe", parts, schedule="1f1b"), stages, blocks=2)
    assert [live(program) for program in one_by_one] == [2 * min(parts, stages - k) for k in range(stages)]
    assert {live(program) for program in programs(method("gpipe", parts), stages, blocks=2)} == {2 * parts}
    assert {
        live(program) for program in programs(method("gpipe", parts, recompute=True), stages, blocks=2)
    } == {1}
    assert {live(program) for program in programs(method("bp"), stages, blocks=2)} == {2}
    assert {live(program) for program in programs(method("bp", recompute=True), stages, blocks=2)} == {1}
    assert {live(program) for program in programs(method("scpl", parts), stages, blocks=2)} == {1}


def test_methods_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"pipeline.micro_batches = 4: .* run.method = \"gpipe\""):
        method("bp", 4)
    with pytest.raises(ValueError, match=r"optimizer.clip_norm = 1.0 and pipeline.replicas = 2: with bp all"):
        resolve("bp")(
            load(values={"run.method": "bp", "optimizer.clip_norm": 1.0, "pipeline.replicas": 2}),
            16,
            Classification(10),
        )


def test_a_schedule_whose_stages_wait_for_each_other_is_refused() -> None:
    wait, other = of_micro_batch(0, "RECV_B", "SEND_F"), of_micro_batch(0, "RECV_F", "SEND_B")
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 at RECV_B.0, stage 1 at RECV_F.0"):
        simulate([wait, other], capacity=2)


def test_a_message_that_nobody_takes_is_refused() -> None:
    with pytest.raises(ScheduleError, match="never takes"):
        simulate([of_micro_batch(0, "ROOM_F", "SEND_F"), []], capacity=2)


def test_a_message_without_room_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"stage 0: nothing waits for room before SEND_F\.0"):
        simulate([of_micro_batch(0, "SEND_F"), of_micro_batch(0, "RECV_F")], capacity=2)


def test_messages_in_another_order_are_refused() -> None:
    sends = of_micro_batch(0, "ROOM_F", "SEND_F") + of_micro_batch(1, "ROOM_F", "SEND_F")
    takes = of_micro_batch(1, "RECV_F") + of_micro_batch(0, "RECV_F")
    with pytest.raises(ScheduleError, match="meets"):
        simulate([sends, takes], capacity=2)


def test_a_full_channel_holds_the_sender_back() -> None:
    sends = [action for m in range(3) for action in of_micro_batch(m, "ROOM_F", "SEND_F")]
    first, *others = (action for m in range(3) for action in of_micro_batch(m, "RECV_F"))
    work = Action(Kind.FORWARD, 1, 0)
    takes = [work, first, work, *others]
    [row, _] = simulate([sends, takes], capacity=1)
    assert [start for start, _, action in row if action.kind is Kind.ROOM_F] == [0, 1, 2]


def test_no_two_actions_have_the_same_text() -> None:
    every = [Action(*parts) for parts in itertools.product(Kind, [-1, 0, 1, 12], [-1, 0, 2, 12])]
    assert len({str(action) for action in every}) == len(every)
