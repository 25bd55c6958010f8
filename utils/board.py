"""TensorBoard's file of a run's scalars."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from utils.files import AppendedFile


class Board:
    """TensorBoard's file of scalars. Its own writer has a thread, which prints a traceback where the disk is full."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        place = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._added = AppendedFile(folder / f"events.out.tfevents.{place}", warn)
        self._is_begun = False

    def add(self, step: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def forget(self, step: int) -> None:
        """What was added from this step on counts no longer."""
        restart = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=restart))

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        head = [] if self._is_begun else [Event(wall_time=time.time(), file_version="brain.Event:2")]
        for each in (*head, event):
            RecordWriter(record).write(each.SerializeToString())
        self._is_begun = True
        self._added.write(record.getvalue())

    def close(self) -> None:
        self._added.close()
