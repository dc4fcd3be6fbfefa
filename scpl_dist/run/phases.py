"""What a worker does at a moment. The values are those of messages, metrics, exit.json and injected faults."""

from enum import StrEnum


class Phase(StrEnum):
    """One phase of a worker's life; its time is counted to exactly one of them."""

    STARTING = "starting"
    RECEIVE = "receive"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    SYNC = "sync"
    SEND = "send"
    ROOM = "room"
    DATA = "data"
    EVALUATE = "evaluate"
    CHECKPOINT = "checkpoint"
    OFFLOAD = "offload"
    IDLE = "idle"


WAITING = frozenset({Phase.RECEIVE, Phase.SYNC})  # for input, or for the other replicas
BLOCKED = Phase.ROOM  # by a neighbour that has no room
TRAINING = frozenset({Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER})  # what a block costs
OUTSIDE = frozenset({Phase.STARTING, Phase.IDLE})  # before and after the items: no time of the pipeline
# Who stands still in one of these waits for somebody else; in all others a worker is busy.
BLAMELESS = WAITING | {BLOCKED, Phase.IDLE}
# Not every training step has these: their time is shown once there is some.
OCCASIONAL = frozenset({Phase.SYNC, Phase.EVALUATE, Phase.CHECKPOINT, Phase.OFFLOAD})
