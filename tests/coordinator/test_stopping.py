"""Early stopping: a run ends after the same epoch whoever is fast, and waits for an answer only where it may end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from scpl_dist.control.items import Checkpoint, Evaluate, Train
from scpl_dist.coordinator.events import Commit, Signal
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.run.scores import Sum
from tests.support import coordinator
from tests.support.coordinator import kinds, small, without_sequence

EPOCH = "tttevvx"


class Run(coordinator.Run):
    """A run of 8 epochs whose validation has so many of 100 right answers after each."""

    def __init__(self, right: Sequence[int], patience: int, epochs: int = 8, **options: Any) -> None:
        super().__init__(
            small(run__epochs=epochs, run__patience=patience, **options.pop("keys", {})), **options
        )
        self.right = right

    def answers(self, item: Evaluate, replica: int) -> dict[str, Sum]:
        right = self.right[item.epoch] if item.split == "validation" else 50
        accuracy = (right if item.last else 0, 100 if item.last else 0)
        return {"accuracy": accuracy, "loss": (float(right), 1 if item.last else 0)}

    def play_rushing(self) -> Run:
        """Let stage 0 do all that it is given before the others do one item."""
        finished = 0
        while finished < len(self.items()):
            while self.next_item is not None:
                self.done(0)
            for stage in self.stages[1:]:
                self.done(stage)
            finished += 1
        return self


def in_step(run: Run) -> Run:
    run.play()
    return run


@pytest.mark.parametrize("play", [in_step, Run.play_rushing])
@pytest.mark.parametrize(
    ("right", "patience", "epochs", "best"),
    [
        ([50, 60, 60, 70], 1, 3, 1),  # as good is not better
        ([50, 40, 55, 54, 53, 60], 2, 5, 2),
        ([50, 40, 30, 20, 10, 0, 0, 0], 7, 8, 0),  # which has run to its end
        ([50, 51, 52, 53, 54, 55, 56, 57], 1, 8, 7),
        ([0, 0, 0], 2, 3, 0),
    ],
)
def test_a_run_ends_where_its_patience_does_whoever_is_fast(
    right: list[int], patience: int, epochs: int, best: int, play: Callable[[Run], Run]
) -> None:
    run = Run(right, patience)
    run.start()
    play(run).leave()
    assert kinds(run.items()) == EPOCH * epochs + "cs"
    assert (run.end.code, run.result["epochs"], run.result["steps"]) == (0, epochs, 3 * epochs)
    assert run.result["stopped_early"] == (epochs < 8)
    assert run.result["best_epoch"] == best


def test_the_loss_may_be_watched_which_is_better_when_it_falls() -> None:
    right = [50, 60, 40, 45, 70]
    keys = {"run__watch": "loss", "checkpoint__best": True}
    run = Run(right, 2, keys=keys)
    run.start().play().leave()
    assert (run.result["epochs"], run.result["best_epoch"], run.result["watch"]) == (5, 2, "loss")
    assert [(commit.step, commit.best) for commit in run.only(Commit)] == [(3, True), (9, True), (15, False)]
    goes_on = Run([], 2, keys=keys, resume=run.only(Commit)[-1].position)
    assert kinds(goes_on.start().play().leave().items()) == "s"
    assert goes_on.result["metrics"] == run.result["metrics"]


def test_the_next_epoch_is_held_back_only_where_the_run_may_end() -> None:
    run = Run([50] * 8, 3)
    run.start()
    while run.next_item is not None:
        run.done(0)
    # Only the fourth epoch can be the third in a row without a better accuracy; nothing is known yet.
    assert kinds(run.items()) == EPOCH * 4
    for _ in range(len(EPOCH) * 4 - 2):
        run.done(1)
        run.done(2)
    assert run.next_item is None
    run.done(1)
    run.done(2)  # the last batch of the validation: the test does not matter
    assert kinds(run.items()) == EPOCH * 4 + "cs"


def test_a_run_that_goes_on_keeps_its_count_and_one_that_has_stopped_does_not_train_on() -> None:
    right = [50, 60, 55, 54, 53, 70]
    keys = {"checkpoint__every_steps": 2, "checkpoint__best": True}
    whole = Run(right, 3, keys=keys)
    whole.start().play().leave()
    assert (whole.result["epochs"], whole.result["stopped_early"]) == (5, True)
    for commit in whole.only(Commit):
        resumed = Run(right, 3, keys=keys, resume=commit.position)
        resumed.start().play().leave()
        rest = [item for item in whole.items_of(Train) if item.step >= commit.step]
        assert without_sequence(resumed.items_of(Train)) == without_sequence(rest)
        for key in ("epochs", "stopped_early", "accuracies", "best_epoch", "metrics"):
            assert resumed.result[key] == whole.result[key], key
    assert kinds(resumed.items()) == "s"
    (last,) = {item.step for item in whole.items_of(Checkpoint) if item.due and item.step == 15}
    assert last == commit.step


def test_a_signal_while_the_next_epoch_is_held_back_ends_the_run_with_what_is_decided() -> None:
    for right, code in (([50, 40], 0), ([50, 60], 143)):
        run = Run(right, 1)
        run.start()
        while run.next_item is not None:
            run.done(0)
        run.event(Signal("launcher", 15))
        while run.next_item is not None:
            run.done(0)
        for _ in run.items():
            run.done(1)
            run.done(2)
        run.leave()
        assert (run.end.code, kinds(run.items())) == (code, EPOCH * 2 + "cs")


def test_patience_without_a_held_out_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run.patience = 2: the data set 'digits' has no validation and no"):
        ItemSequence(small(run__patience=2), {"train": 50, "test": 0})
