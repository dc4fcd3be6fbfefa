"""Whether blocks should move: what each of them costs where it runs, and what another cut would bring.

    seconds of a block = what it costs x how slow its worker is

The cost of a block is the least that it has ever taken; a worker is as slow as its blocks take longer than that now. So
a worker that is held back gets fewer blocks, and gets them back when it is not. Blocks that take next to nothing, as
frozen ones do, say nothing of their worker. A move costs a pause: it must bring `GAIN`, and the time that is needed to
earn it back must have passed before the next one. Load that comes and goes shall not move blocks for ever: the patience
doubles with each move, until a cut has lasted.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from scpl_dist.run import partition

GAIN = 1.1  # throughput that another cut must promise, as a factor
STEPS = 12  # that are looked at, and needed before anything is concluded
PATIENCE_S = 2.0  # for which another cut must have been better; more, if blocks have moved a short while ago
TELLING = 0.1  # of the slowest stage's seconds: who takes less does not show how slow its worker is
LASTED = 10  # times the patience: a cut that has been kept for so long was worth the move
_EARNED = 3.0  # times that a move must have brought what it cost before the next one


class Balance:
    """Learns from the seconds of training steps; of one coordinator."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS))
        self._least: dict[int, float] = {}
        self._better_since: float | None = None
        self._patience_s = PATIENCE_S  # of the next move, if it comes soon
        self._pause_s = 1.0  # that the last move took
        self._moved = float("-inf")

    def learn(self, seconds: Mapping[int, float]) -> None:
        """What some blocks took for one step, the micro-batch as a whole."""
        for block, taken in seconds.items():
            recent = self._recent[block]
            recent.append(taken)
            if len(recent) == STEPS:
                self._least[block] = min(self._least.get(block, taken), statistics.median(recent))

    def regrouped(self) -> None:
        """The run goes on in another group: its blocks may be elsewhere."""
        self._recent.clear()
        self._better_since = None

    def moved(self, now: float, pause_s: float) -> None:
        """Blocks are where they shall be, after a pause."""
        self._patience_s = 2 * self._patience(now)
        self._moved, self._pause_s = now, pause_s

    def _patience(self, now: float) -> float:
        lasted = now - self._moved >= LASTED * self._patience_s
        return PATIENCE_S if lasted else self._patience_s

    def costs(self, blocks: int) -> list[float]:
        """Seconds of each of so many blocks on a worker that nothing holds back; alike as long as one is not known."""
        known = self._least or {block: statistics.median(taken) for block, taken in self._recent.items()}
        if any(block not in known for block in range(blocks)):
            return [1.0] * blocks
        return [known[block] for block in range(blocks)]

    def better(
        self, counts: Sequence[int], workers: Sequence[int], now: float, left_s: float | None = None
    ) -> list[int] | None:
        """Block counts to move to now; None to stay.

        `workers` are those of each stage, `left_s` are the seconds that are left of the run, if that is known.
        """
        ranges = partition.split(counts)
        if any(len(self._recent[block]) < STEPS for held in ranges for block in held):
            return None
        present = {block: statistics.median(recent) for block, recent in self._recent.items()}
        costs = [self._least[block] for block in range(sum(counts))]
        taken = [sum(present[block] for block in held) for held in ranges]
        slowest = max(seconds / number for seconds, number in zip(taken, workers, strict=True))
        pace = [
            sum(costs[block] for block in held) / seconds if seconds > TELLING * slowest * number else 1.0
            for held, seconds, number in zip(ranges, taken, workers, strict=True)
        ]
        speeds = [one * number for one, number in zip(pace, workers, strict=True)]
        wanted = partition.balanced(costs, len(counts), speeds)
        cut = zip(partition.split(wanted), speeds, strict=True)
        promised = max(sum(costs[block] for block in held) / speed for held, speed in cut)
        if wanted == list(counts) or slowest < GAIN * promised:
            self._better_since = None
            return None
        gain = 1 - promised / slowest
        if left_s is not None and left_s * gain < self._pause_s:
            return None
        if self._better_since is None:
            self._better_since = now
        earned = self._moved + _EARNED * self._pause_s / gain
        return wanted if now >= self._better_since + self._patience(now) and now >= earned else None
