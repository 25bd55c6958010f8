"""Resume: all that a run needs to go on, in a file of its run folder that is replaced as a whole.

Order of images, crops, policies and mixing follow from seed, epoch and step (:class:`datasets.Batches`), so that of
them the position alone is saved; what follows from nothing else (weights, momentum, averages, loss scale, records, the
global generators) is saved as it is. A run that was resumed therefore ends in the bits of one that was not.
"""

from __future__ import annotations

import datetime
import io
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils import signals
from utils.distributed import all_reduce_max, broadcast_bytes, gather_bytes, rank, world_size
from utils.errors import UsageError, disk_words
from utils.files import atomic
from utils.readers import MOST_NUMBERS, Unreadable, parse_tensors, read_bytes, read_sealed, seal, sealed, unsealed
from utils.run import Run
from utils.system import machine
from utils.typed import require
from utils.types import StateDict

R = TypeVar("R")
FORMAT = 3  # 2 had no checksum
#: Seconds between saves where --save_every does not say.
INTERVAL = 600.0
NAME = re.compile(r"state-(\d{6,})\.pt")
FINISHED = "finished.json"
ANY = 2**40  # more epochs, and steps, than there can be
#: The global random generators are one for all threads: held by who seeds them and draws, or puts them back.
GLOBAL_GENERATORS = threading.Lock()


class Stateful(Protocol):
    """What can be saved and taken up again, as PyTorch's modules and optimizers."""

    def state_dict(self) -> StateDict: ...
    def load_state_dict(self, state: StateDict) -> object: ...


class Own(TypedDict):
    """What each process alone has: seconds of this epoch, what its steps measured, random numbers, and its parts."""

    spent: float
    measured: list[Tensor]
    random: StateDict
    parts: StateDict


class Saved(TypedDict):
    """What a state file holds; see :class:`TrainState`."""

    format: int
    name: str
    epoch: int
    step: int
    is_trained: bool
    inputs: dict[str, object]
    machine: dict[str, object]
    always: dict[str, StateDict]
    parts: dict[str, StateDict]
    own: list[Own]


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Makes a UsageError of what a state that is not as this code writes them leads to."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        words = f"{folder} has a state that is not of this run ({type(error).__name__}: {error})"
        raise UsageError(words, "a start without --resume") from None


class TrainState:
    """Where training is, and what belongs to it: saved while training goes on, and taken up again.

    ::

        with state.training("network", epochs, len(batches), step=step, evaluator=evaluator):
            for epoch in range(state.epoch, epochs):
                for batch in batches.epoch(epoch, first=state.step):
                    ...
                    state.advance(loss, hits)
                ...  # evaluation
                state.next_epoch()

    On a signal :meth:`advance` raises :class:`utils.signals.Interrupted`, and the state is saved on the way out.
    Several processes agree in every step; the first one writes, also what each has for itself: measured values, random
    numbers and, of a part that has a method ``own_state``, that.

    Args:
        run: the run, in whose folder the files are; its records are saved too.
        device: where ``measured`` is.
        every: epochs between saves; None for one every :data:`INTERVAL` seconds, also within an epoch.
        keep: how many of the latest files are kept.
        inputs: {what: value} of what the run was made from; a state with others is not continued.
        always: what is saved whatever is being trained.

    Attributes:
        epoch: epochs that are over.
        step: steps of the next epoch that are done.
        is_trained: what follows an epoch's steps, before its evaluation, is done too; to be set by who does it.
        measured: what each of those measured, as tensors.

    Raises:
        UsageError: the folder holds a state of other inputs, or the disk refuses to read one.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        every: int | None,
        keep: int,
        inputs: Mapping[str, object],
        **always: Stateful,
    ) -> None:
        self.run, self.device, self.every, self.keep, self.inputs = run, device, every, keep, dict(inputs)
        self.always: dict[str, Stateful] = {"run": run, **always}
        self.name = ""
        self.parts: dict[str, Stateful] = {}
        self._most = 0, 0
        self._number = 0
        self._damaged: list[Path] = []
        self._last_save = time.monotonic()
        self._begin_epoch(0)
        self._waiting = self._read()
        if self._waiting is None:
            run.forget()  # what it had recorded before it was cut off
            return
        with refusing(self.run.folder):
            self._require_same(self._waiting)
            for name, part in self.always.items():
                part.load_state_dict(self._waiting["always"][name])

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step, self.is_trained = epoch, 0, False
        self.measured: list[tuple[Tensor, ...]] = []
        self._spent, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since this epoch began, less that between an interruption and the run that went on."""
        return self._spent + time.perf_counter() - self._since

    @contextmanager
    def training(self, name: str, epochs: int = ANY, steps: int = ANY, /, **parts: Stateful) -> Iterator[None]:
        """So many epochs of so many steps of ``parts``, from the beginning or from where a state of that name ends."""
        self.name, self.parts, self._most = name, parts, (epochs, steps)
        self._begin_epoch(0)
        if self._waiting and self._waiting["name"] == name:
            with refusing(self.run.folder):
                self._take_up(self._waiting)
            self._waiting = None
        with signals.deferred():
            try:
                yield
            except signals.Interrupted as stop:
                if stop.between_steps:
                    self.save()
                raise
        self.name, self.parts = "", {}

    def advance(self, *measured: Tensor, steps: int = 1) -> None:
        """So many steps are done, and what they measured. Saves where it is time.

        Raises:
            Interrupted: a signal has come, to any of the processes.
        """
        self.step += steps
        if measured:
            self.measured.append(measured)
        self._save_if(self.every is None and self._is_time())

    def next_epoch(self) -> None:
        """An epoch is over, with its evaluation. Saves where it is time."""
        self._begin_epoch(self.epoch + 1)
        self._save_if(self._is_time() if self.every is None else self.epoch % self.every == 0)

    def _is_time(self) -> bool:
        return time.monotonic() - self._last_save >= INTERVAL

    def _save_if(self, is_due: bool) -> None:
        stop, due = all_reduce_max([signals.requested() or 0, int(is_due)])
        if stop:
            raise signals.Interrupted(stop, between_steps=True)
        if self.run.stopped.is_set():
            raise signals.Interrupted(signals.HANDLED[0], between_steps=True, why="another run of the sweep has failed")
        if due:
            self.save()

    def save(self) -> None:
        """Writes the state; where that fails, the file before it stands and the run says so."""
        self._last_save = time.monotonic()
        own = gather_bytes(_dump(self._own()))
        if rank() > 0:
            return
        content = {
            "format": FORMAT,
            "name": self.name,
            "epoch": self.epoch,
            "step": self.step,
            "is_trained": self.is_trained,
            "inputs": self.inputs,
            "machine": machine(self.device),
            "always": {name: part.state_dict() for name, part in self.always.items()},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "own": [_load(blob) for blob in own],
        }
        try:
            with atomic(self.run.folder / f"state-{self._number + 1:06d}.pt") as path:
                path.write_bytes(_dump(content))  # written directly, torch would hide why a disk refuses it
        except OSError as error:
            self.run.say(f"note: step {self.step} of epoch {self.epoch + 1} was not saved: {disk_words(error)}")
            return
        self._number += 1
        whole = [path for path in state_files(self.run.folder) if path not in self._damaged]
        for path in [*self._damaged, *whole[self.keep :]]:
            with suppress(OSError):
                path.unlink()
        self._damaged = []

    def _own(self) -> StateDict:
        """What this process alone has."""
        return {
            "spent": self.seconds,
            "measured": [torch.stack(column).cpu() for column in zip(*self.measured)],
            "random": random_states(self.device),
            "parts": {name: part.own_state() for name, part in self.parts.items() if hasattr(part, "own_state")},
        }

    def _read(self) -> StateDict | None:
        """The newest state that is whole; None where there is none."""
        blob, content = b"", None
        for path in state_files(self.run.folder) if self.run.writes else []:
            self._number = max(self._number, int(path.stem.removeprefix("state-")))
            try:
                blob = read_bytes(path, MOST_NUMBERS)
            except Unreadable as error:  # it may be whole
                raise UsageError(f"{path}: {error}", "the same once more, when the disk can be read") from None
            try:
                content = _load(blob)
                if "format" not in content:
                    raise Unreadable("no state of a run")
                break
            except Unreadable:
                blob = b""
                self._damaged.append(path)
        names = ", ".join(path.name for path in self._damaged)
        if self._damaged and not blob:
            raise UsageError(f"{self.run.folder}: {names} damaged, and no other state", "a start without --resume")
        if self._damaged:
            self.run.say(f"note: {names} is damaged; the state before it is taken")
        if world_size() > 1:
            blob = broadcast_bytes(blob)
            content = _load(blob) if blob else None
        return content

    def _require_same(self, state: StateDict) -> None:
        found = state.get("format")
        if found != FORMAT:
            raise UsageError(f"{self.run.folder} has a state of format {found}", f"{FORMAT}, or a new run")
        require(state, Saved, "a state")
        for what, value in self.inputs.items():
            if state["inputs"].get(what) != value:
                raise UsageError(f"{self.run.folder} was begun with another {what}", "the same, or a new run")
        now, before = machine(self.device), state["machine"]
        changed = [
            f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
        ]
        if changed:
            self.run.say(f"note: results may differ by rounding from an uninterrupted run's: {'; '.join(changed)}")

    def _take_up(self, state: StateDict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        own = state["own"][min(rank(), len(state["own"]) - 1)]
        for name, value in own["parts"].items():
            self.parts[name].load_own_state(value)  # type: ignore[attr-defined]
        if not (0 <= state["epoch"] <= self._most[0] and 0 <= state["step"] <= self._most[1]):
            raise ValueError(f"epoch {state['epoch']}, step {state['step']}")
        self.epoch, self.step, self._spent = state["epoch"], state["step"], own["spent"]
        self.is_trained = state["is_trained"]
        self.measured = list(zip(*(column.to(self.device).unbind() for column in own["measured"])))
        with GLOBAL_GENERATORS:
            set_random_states(own["random"], self.device)
        where = f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.run.resumed.append({"date": date, "at": where, **machine(self.device)})
        self.run.say(f"resumed after {where}")


def can_go_on(folder: Path) -> bool:
    """Whether a run could be resumed: a state of it is whole, or there is none yet. That of every run of a sweep."""
    for place in {path.parent for path in folder.rglob("state-*.pt")}:
        for path in state_files(place):
            with suppress(Unreadable):
                _load(read_bytes(path, MOST_NUMBERS))
                break
        else:
            return not state_files(place)
    return True


def state_files(folder: Path) -> list[Path]:
    """The states of a run folder, newest first."""
    found = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    numbers = {path: int(match[1]) for path in found if (match := NAME.fullmatch(path.name))}
    return sorted(numbers, key=lambda path: -numbers[path])


def complete(run: Run, result: R) -> R:
    """Marks a run as complete, with what its command returns (JSON), and removes its states; returns the result."""
    if run.writes:
        with run.side_output(FINISHED) as path:
            path.write_text(sealed({"result": result}))
    completed_run(run.folder)
    return result


def completed_run(folder: Path) -> StateDict | None:
    """What :func:`complete` noted in a run folder, {"result": ...}; None where the run is not complete.

    States that a complete run still has, since it was killed in its last moment, are removed.
    """
    try:
        noted = read_sealed(folder / FINISHED)
    except Unreadable:
        return None
    if not isinstance(noted, dict) or "result" not in noted:
        return None
    for state in state_files(folder):
        with suppress(OSError):
            state.unlink()
    return noted


def random_states(device: torch.device) -> StateDict:
    """The global random generators: Python's, NumPy's, PyTorch's and the GPU's."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: StateDict, device: torch.device) -> None:
    """Puts the global generators back to what :func:`random_states` gave."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def _dump(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return seal(file.getvalue())


def _load(blob: bytes) -> StateDict:
    """The content of a state file, or of a process's part of one; Unreadable where it is not what was written."""
    content = parse_tensors(unsealed(blob))
    if not isinstance(content, dict):
        raise Unreadable("no state of a run")
    return content
