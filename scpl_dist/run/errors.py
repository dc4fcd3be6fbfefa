"""Exceptions that cross the planes of a worker."""

from __future__ import annotations


class Aborted(Exception):
    """The run is over: a wait was ended from outside."""


class PeerLost(Exception):
    """The process of the worker `peer` is gone or its connection broke; None is one of several."""

    def __init__(self, peer: int | None, reason: str) -> None:
        whom = "a replica" if peer is None else f"rank {peer}"
        super().__init__(f"connection to {whom} broke: {reason}")
        self.peer = peer


class PreflightError(RuntimeError):
    """The check of a run failed by an error of the user's code, or did not end."""


class SetupError(Exception):
    """A worker cannot do what the run needs: its interface, its run folder or its model is another one."""


class NonFinite(Exception):
    """A loss is NaN or infinite, before the update that it would spoil; or what a checkpoint would keep is."""
