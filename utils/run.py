"""A run folder: what a run prints, metrics.jsonl, TensorBoard scalars and the final plots, all in one place."""

from __future__ import annotations

import datetime
import json
import os
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

from utils.bar import bar
from utils.distributed import interruptible
from utils.files import require_writable
from utils.metrics import percent

T = TypeVar("T")

#: The columns of the epoch table: record key, heading, format of a number.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("epoch", "epoch", "d"),
    ("lr", "lr", ".2e"),
    ("train_loss", "loss", ".4f"),
    ("train_top1", "train %", "%"),
    ("val_class_mean", "val %", "%"),
    ("test_top1", "test %", "%"),
    ("test_many", "many %", "%"),
    ("test_medium", "medium %", "%"),
    ("test_few", "few %", "%"),
    ("seconds", "s", ".1f"),
)


def table_row(record: dict[str, Any] | None, columns: Iterable[tuple[str, str, str]] = COLUMNS) -> str:
    """One line of the epoch table; without a record, its heading. Missing values print as "-"."""
    cells = []
    for key, heading, form in columns:
        value = None if record is None else record.get(key)
        if record is None:
            text = heading
        elif form == "%":
            text = percent(value)
        else:
            text = "-" if value is None else format(value, form)
        cells.append(text.rjust(max(len(heading), 8 if form == ".2e" else 6)))
    return "  ".join(cells)


def make_folder(out: str, name: str, label: str) -> Path:
    """A new folder for a run, out/<name>/<date>-<time>_<label>; UsageError where it cannot be made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = Path(out, name)
    require_writable("--out", parent)
    for attempt in count(1):  # two runs may start in the same second
        folder = parent / (f"{stamp}_{label}" + (f"_{attempt}" if attempt > 1 else ""))
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    return folder


class Run:
    """What a run prints, measures and draws, in a folder of its own.

    Args:
        folder: exists, see :func:`make_folder`; None for a run that is recorded by another process, where nothing is
            written.
        prefix: begins every printed line, so that lines of runs side by side can be told apart.

    Attributes:
        epochs: the records passed to :meth:`log` so far.
        is_sweep: makes :meth:`log_many` brief.
        stopped: set to end this run, and its children, after the step that they are in.
        resumed: when and where the run went on after interruptions.
        resume_by: the command that goes on where this run is cut off; "" for a part of another run.
    """

    def __init__(self, folder: Path | None, prefix: str = "") -> None:
        self.folder, self.prefix, self.writes = folder or Path(os.devnull), prefix, folder is not None
        self.epochs: list[dict[str, Any]] = []
        self.resumed: list[dict[str, Any]] = []
        self.resume_by = ""
        self.is_sweep = False
        self.stopped = threading.Event()
        self.started = time.perf_counter()
        self._open = ExitStack()
        log, metrics = (folder / name if folder else os.devnull for name in ("log.txt", "metrics.jsonl"))
        self._log = self._open.enter_context(open(log, "a", buffering=1, encoding="utf-8"))
        self._metrics = self._open.enter_context(open(metrics, "w", buffering=1))
        self._lines: list[str] = []
        self._board = self._open.enter_context(SummaryWriter(str(folder))) if folder else None

    def child(self, name: str, prefix: str = "") -> Run:
        """One run of a sweep, in a folder inside this one's."""
        folder = self.folder / name
        if self.writes:
            folder.mkdir(exist_ok=True)  # the names differ, since the settings do; it exists where a sweep is resumed
        run = Run(folder if self.writes else None, prefix)
        run.stopped = self.stopped
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with self._open:  # closes the files
            if value is not None and not isinstance(value, BrokenPipeError):
                where = "" if self.is_sweep else f", in epoch {len(self.epochs) + 1}"
                why = str(value) or repr(value)
                self.say(f"ended early{where}: {' '.join(why.split())}")
                if self.resume_by and isinstance(value, KeyboardInterrupt):
                    value.add_note(f"to continue: {self.resume_by}")
                    self._log.write(f"to continue: {self.resume_by}\n")

    def state_dict(self) -> dict[str, Any]:
        """The records so far, see :class:`utils.resume.TrainState`."""
        return {"seconds": self.seconds, "epochs": self.epochs, "lines": self._lines, "resumed": self.resumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after these records; what was written after them is forgotten."""
        self.started = time.perf_counter() - state["seconds"]
        self.epochs, self.resumed = state["epochs"], state["resumed"]
        self._metrics.seek(0)
        self._metrics.truncate()
        self._lines = []
        for line in state["lines"]:
            self._record(line)
        if self._board:
            last = max((record["epoch"] for record in self.epochs), default=0)
            self._board.close()
            self._board = self._open.enter_context(SummaryWriter(str(self.folder), purge_step=last + 1))

    def _record(self, line: str) -> None:
        self._lines.append(line)
        self._metrics.write(line + "\n")

    @property
    def seconds(self) -> float:
        """Since the run began, interruptions left out."""
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        """Keeps a text in log.txt and prints it."""
        self._log.write(text + "\n")
        print(textwrap.indent(text, self.prefix), flush=True)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a small JSON file into the folder."""
        if self.writes:
            (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")

    def bar(self, steps: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Passes ``steps`` through with a progress bar, see :func:`utils.bar.bar`."""
        steps = interruptible(steps)
        return bar(steps, total, label) if self.writes else steps

    def log(self, record: dict[str, Any]) -> None:
        """One epoch: a table line, a line of metrics.jsonl, TensorBoard scalars. None stands for "not measured"."""
        if not self.epochs:
            self.say(table_row(None))
        self.epochs.append(record)
        self.say(table_row(record))
        self._record(json.dumps(record))
        for key, value in record.items():
            if self._board and key != "epoch" and value is not None:
                self._board.add_scalar(key.replace("_", "/", 1), value, record["epoch"])

    def log_many(self, records: dict[str, dict[str, Any]], heading: str) -> None:
        """One epoch of some classifiers, {setting: record}: as :meth:`log` does, or in a sweep as one line for all."""
        if not self.is_sweep:
            for record in records.values():
                self.log(record)
            return
        for name, record in records.items():
            self._record(json.dumps({"setting": name, **record}))
        measured = [record["test_top1"] for record in records.values() if "test_top1" in record]
        if measured:
            last = next(reversed(records.values()))
            low, high = percent(min(measured)), percent(max(measured))
            self.say(f"{heading}, epoch {last['epoch']}: {len(measured)} classifiers, test {low} to {high} %")
