"""A run folder: what a run prints, metrics.jsonl, TensorBoard scalars and the final plots, all in one place."""

from __future__ import annotations

import datetime
import json
import os
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TypedDict, TypeVar

from utils.bar import bar
from utils.console import counted, duration, plain, show, take_early
from utils.distributed import interruptible
from utils.errors import Unsaved, UsageError, disk_words
from utils.files import AppendedFile, atomic, lock, require_writable, sweep
from utils.metrics import FIGURES, percent
from utils.pace import Pace
from utils.typed import require
from utils.types import Record, StateDict, epoch_of

T = TypeVar("T")

#: The columns of the epoch table: record key, heading, format of a number.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("epoch", "epoch", "d"),
    ("lr", "lr", ".2e"),
    ("train_loss", "loss", ".4f"),
    ("train_top1", "train %", "%"),
    *((f"val_{key}", f"val {words} %", "%") for key, words in FIGURES.items()),
    ("test_top1", "test %", "%"),
    ("test_many", "many %", "%"),
    ("test_medium", "medium %", "%"),
    ("test_few", "few %", "%"),
    ("seconds", "train s", ".1f"),
    ("left", "left", "time"),
)


def table_row(record: Record | None, measured: Collection[str]) -> str:
    """One line of the epoch table; without a record, its heading. Missing values print as "-".

    Of the figures of held-out images it has those that are ``measured``.
    """
    cells = []
    for key, heading, form in COLUMNS:
        if key.startswith("val_") and key not in measured:
            continue
        value = None if record is None else record.get(key)
        if record is None:
            text = heading
        elif form == "%":
            text = percent(value)
        elif form == "time":
            text = duration(value) if value else "-"
        else:
            text = "-" if value is None else format(value, form)
        cells.append(text.rjust(max(len(heading), 8 if form == ".2e" else 6)))
    return "  ".join(cells)


def one_line(error: Exception) -> str:
    """An error in one line, of a disk with what is free there."""
    if isinstance(error, OSError) and error.errno is not None:
        return disk_words(error)
    return " ".join(str(error.args[0] if isinstance(error, UsageError) else error).split()) or repr(error)


class RunState(TypedDict):
    """What is saved of a :class:`Run`."""

    seconds: float
    epochs: list[Record]
    lines: list[str]
    resumed: list[dict[str, object]]


def make_folder(out: str, name: str, label: str) -> Path:
    """A new folder for a run, out/<name>/<date>-<time>_<label>; UsageError where it cannot be made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = Path(out, name)
    require_writable("--out", parent)
    sweep(parent, deep=True)
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

    No disk ends a run that is training: what cannot be written is said once, and left out.

    Args:
        folder: exists, see :func:`make_folder`; None for a run that is recorded by another process, where nothing is
            written.
        prefix: begins every printed line, so that lines of runs side by side can be told apart.
        is_locked: it is the command's own run: no other process may open the folder meanwhile, and log.txt begins with
            what the command has printed so far.

    Raises:
        UsageError: another process has the folder.

    Attributes:
        epochs: the records passed to :meth:`log` so far.
        is_sweep: makes :meth:`log_many` brief.
        stopped: set to end this run, and its children, after the step that they are in.
        resumed: when and where the run went on after interruptions.
        pace: how fast its training is, see :meth:`begin_training`.
        resume_by: the command that goes on where this run is cut off; "" for a part of another run.
    """

    def __init__(self, folder: Path | None, prefix: str = "", is_locked: bool = False) -> None:
        self.folder, self.prefix, self.writes = folder or Path(os.devnull), prefix, folder is not None
        self.epochs: list[Record] = []
        self.resumed: list[dict[str, object]] = []
        self.resume_by = ""
        self.is_sweep = False
        self.stopped = threading.Event()
        self.started = time.perf_counter()
        self._open = ExitStack()
        self._is_warned = False
        self._lines: list[str] = []
        self.pace = Pace(0, 0, self.say)
        self._every, self._has_heading = 1, False
        self._log = self._metrics = self._board = None
        if folder and is_locked:
            self._open.enter_context(lock(folder, wait=0, doing="run"))
        if folder:
            self._log, self._metrics = (
                AppendedFile(folder / name, self._warn) for name in ("log.txt", "metrics.jsonl")
            )
            from utils.board import Board  # here, since it is slow to import

            self._board = Board(folder, self._warn)
            for each in (self._log, self._metrics, self._board):
                self._open.callback(each.close)
            for text in take_early() if is_locked else ():
                self._note(text)

    def child(self, name: str, prefix: str = "") -> Run:
        """One run of a sweep, in a folder inside this one's."""
        folder, run = self.folder / name, None
        if self.writes:
            try:
                folder.mkdir(exist_ok=True)  # the names differ, since the settings do; a resumed sweep has it
                run = Run(folder, prefix)
            except OSError as error:
                self.say(f"note: {disk_words(error)}; the run goes on without a folder")
        if run is None:
            run = Run(None, prefix)
            run.folder = folder
        run.stopped = self.stopped
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with self._open:  # closes the files
            if value is not None and not isinstance(value, BrokenPipeError):
                if isinstance(value, Unsaved):  # not early
                    self.say(str(value))
                    return
                where = "" if self.is_sweep else f", in epoch {len(self.epochs) + 1}"
                why = str(value) or repr(value)
                words = f"ended early{where}: {' '.join(why.split())}"
                (self._note if self.is_sweep else self.say)(words)  # its runs and the command say it too
                if self.resume_by and isinstance(value, KeyboardInterrupt):
                    value.add_note(f"to continue: {self.resume_by}")
                    self._note(f"to continue: {self.resume_by}")

    def state_dict(self) -> StateDict:
        """The records so far, see :class:`utils.resume.TrainState`."""
        return {"seconds": self.seconds, "epochs": self.epochs, "lines": self._lines, "resumed": self.resumed}

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on after these records; what was written after them is forgotten."""
        require(state, RunState, "a run")
        self.started = time.perf_counter() - state["seconds"]
        self.epochs, self.resumed = state["epochs"], state["resumed"]
        self.forget(1 + max(map(epoch_of, self.epochs), default=0))
        self._lines = state["lines"]
        if self._metrics:
            self._metrics.write("".join(f"{line}\n" for line in self._lines).encode())

    def forget(self, epoch: int = 1) -> None:
        """Removes all records; TensorBoard shows none from ``epoch`` on."""
        self._lines = []
        if self._metrics and self._board:
            is_new = self._metrics.empty()
            if not is_new:
                self._board.forget(epoch)

    @property
    def seconds(self) -> float:
        """Since the run began, interruptions left out."""
        return time.perf_counter() - self.started

    def _note(self, text: str) -> None:
        """Keeps a text in log.txt."""
        if self._log:
            self._log.write(f"{plain(text)}\n".encode(errors="surrogateescape"))

    def say(self, text: str) -> None:
        """Keeps a text in log.txt and prints it."""
        self._note(text)
        show(textwrap.indent(text, self.prefix))

    def _warn(self, text: str) -> None:
        """Says the first time that something has no room in the folder."""
        if not self._is_warned:
            self._is_warned = True
            self.say(text)

    @contextmanager
    def side_output(self, name: str) -> Iterator[Path]:
        """A path to write what lies beside the weights to, the folder's file ``name``: whole or not there.

        Whatever goes wrong in the block is one line, and the run goes on.
        """
        try:
            with atomic(self.folder / name) as path:
                yield path
        except Exception as error:  # a disk, or a library that a name or a number does not suit
            self.say(f"note: no {name}: {one_line(error)}")

    def write_json(self, name: str, content: object) -> None:
        """Writes a small JSON file into the folder."""
        if self.writes:
            with self.side_output(name) as path:
                path.write_text(json.dumps(content, indent=1) + "\n")

    def begin_training(
        self, epochs: int, steps: float, every: int, forecast: Callable[[], float | None] | None = None
    ) -> None:
        """So many epochs of so many steps begin, of which the run will say how long they take.

        Of those that are evaluated, every so many and the last are rows of its table; all are in metrics.jsonl.
        ``forecast``, see :class:`utils.pace.Pace`, says it where there is more to do than these.
        """
        announced = self.pace.is_announced and forecast is not None
        self.pace, self._every = Pace(epochs, steps, self.say, forecast, announced), every

    def bar(self, steps: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Passes ``steps`` through with a progress bar, see :func:`utils.bar.bar`."""
        steps = interruptible(steps)
        if not self.writes:
            return steps
        return bar(self.pace.measured(steps) if self.pace.steps else steps, total, label, self.pace.left)

    def log(self, record: Record) -> None:
        """One epoch: a table line, a line of metrics.jsonl, TensorBoard scalars. None stands for "not measured"."""
        self.pace.next_epoch()
        self.epochs.append(record)
        if "test_top1" in record and self._has_row(record):  # on a terminal the bar shows the others
            if not self._has_heading:
                self._has_heading = True
                self.say(table_row(None, record))
            self.say(table_row({**record, "left": self.pace.left}, record))
        self._measured(record)
        if self._board:
            known = {key: value for key, value in record.items() if key != "epoch" and value is not None}
            self._board.add(epoch_of(record), {key.replace("_", "/", 1): value for key, value in known.items()})

    def _has_row(self, record: Record) -> bool:
        return epoch_of(record) % self._every == 0 or self.pace.done == self.pace.epochs

    def _measured(self, record: Mapping[str, object]) -> None:
        self._lines.append(json.dumps(record))
        if self._metrics:
            self._metrics.write(f"{self._lines[-1]}\n".encode())

    def log_many(self, records: dict[str, Record], heading: str) -> None:
        """One epoch of some classifiers, {setting: record}: as :meth:`log` does, or in a sweep as one line for all."""
        if not self.is_sweep:
            for record in records.values():
                self.log(record)
            return
        self.pace.next_epoch()
        for name, record in records.items():
            self._measured({"setting": name, **record})
        measured = [value for record in records.values() if (value := record.get("test_top1")) is not None]
        if measured and self._has_row(next(iter(records.values()))):
            last = next(reversed(records.values()))
            low, high = percent(min(measured)), percent(max(measured))
            test = low if low == high else f"{low} to {high}"
            left = f", {duration(self.pace.left)} left in all" if self.pace.left else ""
            self.say(f"{heading}, epoch {last['epoch']}: {counted(len(measured), 'classifier')}, test {test} %{left}")
