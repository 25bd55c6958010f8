"""Disks that fail: runs a command in a process of its own and lets a chosen operation on files fail.

What an operation is: making a file or folder, one write to a file, a flush, a rename, a link, a removal. Tests take a
few of them; :func:`every` goes through all.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import multiprocessing
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.transforms.v2.functional import resize

from datasets.checked import stores_of
from datasets.files import Manifest, read_image
from utils.arrays import open_array
from utils.checkpoints import Checkpoint, read

#: What takes room on a disk, and what changes it.
ROOM = ("make", "write")
CHANGE = (*ROOM, "flush", "rename", "remove")
#: Name of a fault -> what the disk says, which operations it refuses, and whether all after the first as well.
KINDS: dict[str, tuple[int, tuple[str, ...], bool]] = {
    "full": (errno.ENOSPC, ROOM, True),
    "broken": (errno.EIO, CHANGE, False),
    "read-only": (errno.EROFS, CHANGE, True),
}
#: What a process that is watched imports before it is forked.
PRELOADED = [
    *("main_stage1", "main_stage2", "compare", "datasets.prepare", "benchmarks.faults"),
    *("utils.board", "pandas", "matplotlib.backends.backend_agg", "scipy.optimize", "sklearn.datasets"),
    "torchvision.transforms.v2",
]


@dataclass(frozen=True)
class Fault:
    """The ``number``-th (from 0) operation of a kind under ``folder`` fails; a number below 0 never comes."""

    kind: str
    number: int
    folder: str = "."


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (1 with a traceback, too), what it printed, its operations one by one."""

    status: int
    said: str
    operations: tuple[str, ...]


class _Disk:
    """Stands between a process and the system: counts operations under the fault's folder and lets them fail."""

    def __init__(self, fault: Fault) -> None:
        self.code, self.refused, self.lasts = KINDS[fault.kind]
        self.number, self.folder, self.count = fault.number, os.path.realpath(fault.folder), 0
        self.operations: list[str] = []

    def maybe_fail(self, operation: str, path: Any) -> None:
        """Counts an operation on a path or a descriptor; raises OSError where it is to fail."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(self.folder + os.sep):
            return
        self.operations.append(operation)
        if operation not in self.refused:
            return
        number, self.count = self.count, self.count + 1
        if self.number >= 0 and (number == self.number or (self.lasts and number > self.number)):
            where = None if operation == "write" else os.fsdecode(path)  # as the system does
            raise OSError(self.code, os.strerror(self.code), where)

    def install(self) -> None:
        """For the rest of the process."""
        disk, plain = self, {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "unlink", "rmdir")}
        replace, link, opened = os.replace, os.link, io.open

        class Raw(io.FileIO):
            def write(self, content: Any) -> int:
                disk.maybe_fail("write", self.fileno())
                return super().write(content)

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, buffering, *args, **kwargs)
            if not os.path.exists(file) or "w" in mode:
                disk.maybe_fail("make", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            if flags & os.O_CREAT and not os.path.exists(path):
                disk.maybe_fail("make", path)
            return plain["open"](path, flags, *args, **kwargs)

        def hooked(operation: str, call: Callable[..., Any], first: Any, *args: Any, **kwargs: Any) -> Any:
            is_there = operation != "remove" or os.path.lexists(first)
            if is_there:
                disk.maybe_fail(operation, first)
            return call(first, *args, **kwargs)

        def to_second(operation: str, call: Callable[..., Any], first: Any, second: Any, **kwargs: Any) -> Any:
            disk.maybe_fail(operation, second)
            return call(first, second, **kwargs)

        system: Any = os
        builtins.open = io.open = open_file
        system.open = os_open
        for name, operation in {"write": "write", "fsync": "flush", "mkdir": "make", "unlink": "remove"}.items():
            setattr(system, name, partial(hooked, operation, plain[name]))
        system.replace, system.link = partial(to_second, "rename", replace), partial(to_second, "make", link)


def _watched(module: str, argv: Sequence[str], fault: Fault, folder: str, said: str, answer: Connection) -> None:
    os.chdir(folder)
    disk, status = _Disk(fault), 0
    with open(said, "w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        disk.install()
        try:
            import_module(module).main(list(argv))
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
    answer.send((status, tuple(disk.operations)))
    sys.stdout.flush()
    os._exit(0)  # as a process that is killed: nothing is tidied up


def attempt(module: str, argv: Sequence[str], fault: Fault, folder: Path) -> Ended:
    """Runs a module's ``main(argv)`` in ``folder``, in a process of its own, with a fault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which the server that forks needs to find them
    ours, theirs = context.Pipe()
    said = folder.parent / f"{folder.name}.said"
    process = context.Process(target=_watched, args=(module, argv, fault, str(folder), str(said), theirs))
    process.start()
    theirs.close()
    status, operations = ours.recv() if ours.poll(600) else (-1, ())
    process.join()
    return Ended(status, said.read_text(errors="replace"), operations)


def every(command: Stage | Prepare, base: Path, folder: Path) -> list[Fault]:
    """The faults of all kinds at every operation of a command, which runs once without any, on a copy of ``base``."""
    shutil.copytree(base, folder, symlinks=True)
    whole = attempt(command.module, command.argv, Fault("broken", -1), folder)
    assert whole.status == 0, whole.said
    numbers = {kind: sum(name in refused for name in whole.operations) for kind, (_, refused, _) in KINDS.items()}
    return [Fault(kind, number) for kind, most in numbers.items() for number in range(most)]


def stored(folder: Path) -> dict[str, Checkpoint]:
    """All checkpoints under a folder that bear a name, which must be whole: {path in it: checkpoint}."""
    names = (path for path in sorted(folder.rglob("*.pt*")) if path.is_file())
    others = (".", "state-", "batchnorm_")  # half written, to go on with, of a cache
    return {str(path.relative_to(folder)): read(path) for path in names if not path.name.startswith(others)}


def litter(folder: Path) -> list[str]:
    """What hidden files there are under a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file()]


@dataclass(frozen=True)
class Stage:
    """A training command that replaces an older result of its own, which lies in ``base``; what must hold after faults.

    Attributes:
        module, argv: the command.
        final: its final path.
    """

    module: str
    argv: tuple[str, ...]
    final: str

    def look(self, folder: Path, ended: Ended, before: dict[str, Checkpoint]) -> None:
        """Raises AssertionError unless the new weights stand whole or the old ones do, and a message says which."""
        after, old = stored(folder), before[self.final].sha256
        is_new = after[self.final].sha256 != old
        assert is_new or ended.status, "it ended well and has not published"
        kept = [file.sha256 for name, file in after.items() if name.startswith(f"{self.final}.prev")]
        assert not is_new or old in kept, "what was replaced has been lost"
        where = re.search(r"the weights are in (.*/checkpoint\.pt)", ended.said)
        assert where is None or where[1] in after, "the message names a file that is not there"


@dataclass(frozen=True)
class Prepare:
    """A data set that is prepared once more, from other lists: what must hold after faults."""

    argv: tuple[str, ...]
    home: str
    module: str = "datasets.prepare"

    def look(self, folder: Path, ended: Ended, before: dict[str, Checkpoint]) -> None:
        """Raises AssertionError unless there is a manifest, and what counts as its pixels is what its files show."""
        manifest = Manifest.load(folder / self.home / "manifest.npz")
        assert manifest is not None, "the manifest has been lost"
        found = stores_of(manifest, folder / self.home)
        assert ended.status or len(found) == len(manifest.splits), "it ended well and has no pixels"
        for path, (split, side) in found.items():
            for row, name in zip(open_array(path, str(manifest.about["pixels"])), manifest.splits[split].paths):
                shown = resize(read_image(folder / manifest.root / name), [side, side], antialias=True)
                assert np.array_equal(row, shown.permute(1, 2, 0)), f"{path} is not of this manifest"


def trial(command: Stage | Prepare, fault: Fault, base: Path, folder: Path) -> Ended:
    """Runs a command on a copy of ``base`` with a fault, looks at what is left, and runs it once more without.

    Raises:
        AssertionError, UsageError: a result has been lost, is half there, or is not said to be missing; a traceback; a
            hidden file that the next run has not swept up.
    """
    shutil.copytree(base, folder, symlinks=True)
    before = stored(folder)
    ended = attempt(command.module, command.argv, fault, folder)
    assert ended.status in (0, 1, 2) and "Traceback" not in ended.said, ended.said
    command.look(folder, ended, before)
    if ended.status:
        assert os.strerror(KINDS[fault.kind][0]) in ended.said, ended.said
    again = attempt(command.module, command.argv, Fault(fault.kind, -1), folder)
    assert again.status == 0, again.said
    command.look(folder, again, before)
    assert not litter(folder), litter(folder)
    return ended
