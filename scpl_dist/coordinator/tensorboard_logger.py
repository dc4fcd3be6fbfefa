"""TensorBoard: event files in ``RUN/tensorboard``, for ``tensorboard --logdir runs``.

They are written record by record, which needs neither torch nor TensorFlow.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoard:
    def started(self, config: dict[str, Any], run_dir: Path, step: int) -> None:
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        now = time.time_ns()  # files are read in the order of their names
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")
        # TensorBoard forgets what earlier files have from this step on.
        self._add(step=step, session_log=SessionLog(status=SessionLog.START))
        text = "".join(f"    {key} = {json.dumps(value)}\n" for key, value in config.items())
        summary = Summary()
        value = summary.value.add(tag="config")
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = DT_STRING
        value.tensor.string_val.append(text.encode())
        self._add(step=step, summary=summary)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))

    def finished(self, code: int, result: dict[str, Any]) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()  # a coordinator that is killed loses nothing
