"""``scpl-dist drain``: take a worker out of a run, and let the others go on.

drain --control plane--> coordinator --a checkpoint, then regroup--> the others share its blocks
"""

from __future__ import annotations

from pathlib import Path

import zmq

from scpl_dist.control import keys
from scpl_dist.control.codec import ProtocolError, decode, encode
from scpl_dist.control.messages import Alive, Drain, Refuse
from scpl_dist.control.sockets import dealer
from scpl_dist.run import config as configuration
from scpl_dist.storage.run_folder import RunFolder

ANSWER_S = 10.0


def drain(run_dir: Path, stage: int, replica: int) -> None:
    """Ask the coordinator of a run; returns when it has agreed.

    Raises:
        ValueError: no run is in progress in this folder, or the worker cannot be spared.
    """
    run = RunFolder(run_dir).in_progress()
    config = configuration.load(run_dir / "config.toml")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = dealer(context, run["control"], keys.load_client(config.control.keys))
    try:
        socket.connect(run["control"])
        socket.send(encode(Drain(stage=stage, replica=replica)))
        if not socket.poll(int(ANSWER_S * 1000)):
            raise ValueError(
                f"{run_dir}: the coordinator at {run['control']} did not answer within {ANSWER_S:g} s"
            )
        answer = decode(socket.recv())
    except ProtocolError as error:
        raise ValueError(f"{run_dir}: what answers at {run['control']} is no coordinator: {error}") from None
    finally:
        context.destroy(0)
    if isinstance(answer, Refuse):
        raise ValueError(f"--stage {stage}: {answer.reason}")
    assert isinstance(answer, Alive), answer
