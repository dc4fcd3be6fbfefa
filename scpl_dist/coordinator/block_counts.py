"""How many blocks each stage holds: in the present group, and in the next one."""

from __future__ import annotations

from collections.abc import Sequence

from scpl_dist.control.messages import Done
from scpl_dist.coordinator.balance import Balance
from scpl_dist.coordinator.members import Member
from scpl_dist.run import partition
from scpl_dist.run.config import Config
from scpl_dist.run.layout import Layout


class BlockCounts:
    """`config` is as the user wrote it: its first group cuts the blocks as that says."""

    def __init__(self, config: Config) -> None:
        cut = config.pipeline.partition
        self.present = list(cut) if isinstance(cut, list) else []  # empty until they are known
        self.wanted: list[int] = []  # of the next group, if it shall have others
        self._moving = False  # blocks, with the group that is being formed
        self._given = config
        self._balance = Balance()

    def of_next(self, shape: Sequence[int]) -> list[int]:
        """Of a group with so many workers in each stage; empty if nobody knows how many blocks there are."""
        # A group that was lost before it had built its blocks may have had another number of stages.
        fitting = (found for found in (self.wanted, self.present) if len(found) == len(shape))
        counts = next(fitting, [])
        self._moving = bool(self.wanted) and counts == self.wanted
        if not counts and self.present:
            costs = self._balance.costs(sum(self.present))
            counts = partition.balanced(costs, len(shape), [float(workers) for workers in shape])
        self.wanted = []
        return counts

    def shaped(self, shape: Sequence[int], counts: Sequence[int]) -> Config:
        """The configuration of that group."""
        config = self._given
        if not counts and len(shape) != config.layout.stages:  # nobody has built them yet
            pipeline = config.pipeline.model_copy(update={"partition": "uniform"})
            config = config.model_copy(update={"pipeline": pipeline})
        return config.shaped(shape, counts)

    def built(self, firsts: Sequence[Member]) -> None:
        """The first workers of all stages hold their blocks."""
        if all(member.blocks for member in firsts):
            self.present = [len(member.blocks) for member in firsts]

    def goes_on(self, now: float, pause_s: float) -> None:
        """Another group has begun, after a pause."""
        self._balance.regrouped()
        if self._moving:  # the pause after a loss is not the price of a move
            self._balance.moved(now, pause_s)

    def learn(self, member: Member, message: Done, workers: int) -> None:
        """What blocks took for an item, in a stage of so many; a group's first item also has what came before it."""
        before, member.block_seconds = member.block_seconds, message.stats.blocks
        if member.done < 0 or not member.first:
            return
        taken = {
            int(block): workers * (until - before.get(block, 0.0))
            for block, until in message.stats.blocks.items()
        }
        held = set(member.blocks)
        self._balance.learn({block: taken[block] for block in held & taken.keys() if taken[block] > 0})

    def better(self, layout: Layout, now: float, left_s: float | None) -> list[int] | None:
        """Counts to move to now, which the next group has; None to stay. `left_s` as for `Balance.better`."""
        if self._given.pipeline.balance != "auto" or not self.present:
            return None
        found = self._balance.better(self.present, layout.replicas, now, left_s)
        self.wanted = found or []
        return found
