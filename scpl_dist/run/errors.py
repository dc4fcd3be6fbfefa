"""Exceptions that cross the planes of a worker."""

from __future__ import annotations


class Aborted(Exception):
    """The run is over: a wait was ended from outside."""


class Regrouped(Exception):
    """The workers meet anew, without one or with another: a wait was ended, and the run goes on from its last cut."""


class PeerLost(Exception):
    """The process of the worker `peer` is gone or its connection broke; None is one of several."""

    def __init__(self, peer: int | None, reason: str) -> None:
        whom = "another worker" if peer is None else f"rank {peer}"
        super().__init__(f"connection to {whom} broke: {reason}")
        self.peer = peer


class PreflightError(RuntimeError):
    """The check of a run failed by an error of the user's code, or did not end."""


class SetupError(Exception):
    """A worker cannot do what the run needs: its interface, its run folder or its model is another one."""


class NonFinite(Exception):
    """A loss is NaN or infinite, before the update that it would spoil; or what a checkpoint would keep is.

    With the step and the micro-batch of the loss, as the worker may be some items further when it hears of it.
    """

    def __init__(self, reason: str, step: int | None = None, micro_batch: int | None = None) -> None:
        super().__init__(reason)
        self.step = step
        self.micro_batch = micro_batch
