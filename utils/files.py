"""Files that are either whole or not there, written by one process at a time, with nothing left behind.

Everything that is a result goes through :func:`atomic`: a temporary file in the same folder, flushed to the disk and
renamed. A temporary file's name says which process writes it, so that what killed processes left can be swept up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from utils.errors import UsageError, disk_words

#: Seconds after which a temporary file that names no process is taken for a killed one's.
OLD = 24 * 3600
#: Bytes of a file's name that its temporary name repeats: a name has 255 at most.
PREFIX = 100
#: Seconds between looks at a lock that another process holds.
PAUSE = 0.05
#: What a file system says that has no locks, no hard links, or no way to flush a folder.
LACKING = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EMLINK, errno.EXDEV)

_OWNED = re.compile(r"\..*\.(\d+)-(\d+)-([0-9a-f]{8})-([0-9a-f]{8})\.[0-9a-f]{8}\.tmp", re.DOTALL)
_OWNERLESS = re.compile(r"\.[0-9a-f]{8}\.tmp|\.writable\.[0-9a-f]{8}")


# Who writes: a process is known by number and start, since numbers are used again, on this host since it was started.


def start_of(pid: int) -> int:
    """When a process started, in clock ticks since the host did; 0 where that is not told (other than Linux).

    Raises:
        ProcessLookupError: it has ended.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            raise ProcessLookupError(pid) from None
        with suppress(PermissionError):  # somebody else's, and alive
            os.kill(pid, 0)
        return 0
    state, *fields = stat.rpartition(")")[2].split()  # a program's name may hold anything
    if state in "ZX":  # killed, and not yet missed by its parent
        raise ProcessLookupError(pid)
    return int(fields[18])


@cache
def _place() -> tuple[str, str]:
    """The host, or the container that numbers our processes, and when it was started: eight digits each."""
    try:
        numbers, boot = os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        numbers, boot = "", ""
    host = f"{socket.gethostname()} {numbers}"
    first, second = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in (host, boot))
    return first, second


def _is_gone(pid: int, start: int, host: str, boot: str) -> bool:
    """Whether a process has ended; False where that cannot be known, as of another host's."""
    if host != _place()[0]:
        return False
    try:
        return boot != _place()[1] or start_of(pid) != start
    except ProcessLookupError:
        return True


def _temporary(target: Path) -> Path:
    """A new name beside ``target`` that says which process it is of."""
    prefix = os.fsencode(target.name)[:PREFIX].decode("ascii", "replace").replace("\ufffd", "_")
    pid = os.getpid()
    owner = "-".join([str(pid), str(start_of(pid)), *_place()])
    return target.with_name(f".{prefix}.{owner}.{secrets.token_hex(4)}.tmp")


def sweep(folder: str | Path, deep: bool = False) -> None:
    """Removes the temporary and lock files that ended processes left in a folder; ``deep``, below it too.

    What names no process, as of older versions, is removed a day after it was last written to. What another host's or
    container's process left stays: whether that one lives cannot be known here.
    """
    found: Iterable[Path] = (Path(folder).rglob if deep else Path(folder).glob)(".*")
    with suppress(OSError):
        found = list(found)
        for path in [path for path in found if path.name.endswith(".lock")]:
            _remove_unheld(path)
        for path in [path for path in found if path.name.endswith(".tmp") or path.name.startswith(".writable.")]:
            with suppress(OSError):
                if _is_left(path):
                    path.unlink()


def _remove_unheld(path: Path) -> None:
    """Removes a lock file that a killed process left: nobody holds it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(descriptor, 100, 0)
            is_ours = content.startswith(b"process ") or (not content and _locks(path).exists())
            if is_ours and _is_file(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


def _locks(path: Path) -> Path:
    """What a lock file's name says that it locks."""
    return path.with_name(path.name.removeprefix(".").removesuffix(".lock"))


def _is_left(path: Path) -> bool:
    owned = _OWNED.fullmatch(path.name)
    if owned:
        return _is_gone(int(owned[1]), int(owned[2]), owned[3], owned[4])
    return _OWNERLESS.fullmatch(path.name) is not None and time.time() - path.lstat().st_mtime > OLD


# Writing


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``: when the block ends well it is flushed to the disk and renamed, else removed.

    Where ``path`` links to a file, that is replaced; a link to a device, a pipe or a folder is replaced itself. What
    killed processes left in the folder is swept up first.

    Raises:
        OSError: the disk refuses something, or ``path`` is a device, a pipe or a folder; it names ``path``. What was
            there stands.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file() and Path(path).is_symlink():
        target = Path(path).absolute()
    sweep(target.parent)
    temporary = _temporary(target)
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            if target.exists() and not target.is_file() and not target.is_symlink():
                raise OSError(errno.EISDIR, "No regular file", str(path))
            os.replace(temporary, target)
            flush(target.parent)
    finally:
        with suppress(OSError):  # the disk may refuse this too, and the first error is the one to tell
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Lets a disk's error in the block name ``path``: a write names no file, and a rename the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not str(error.filename or ".tmp").endswith(".tmp"):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: str | Path) -> None:
    """Waits until the disk holds a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING:
            raise
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all: UTF-8, and the bytes of file names that are no UTF-8 as they are."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def second_name(path: Path, other: Path) -> None:
    """Lets ``other`` name the file at ``path`` too, in place of what it named; a copy where the disk has no links."""
    with atomic(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno not in LACKING:
                raise
            shutil.copy2(path, temporary)


# Locks

#: Descriptors of the locks that this process holds.
_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, which shares its parent's locks: they must not outlive the parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lock(path: str | Path, wait: float = 60.0, doing: str = "written") -> Iterator[None]:
    """Holds the lock of ``path`` while the block runs: the file .NAME.lock beside it, which says who holds it.

    It binds those who ask for it, threads of one process too, and ends with its process, however that ends. Where the
    file system has no locks, the block runs without.

    Args:
        path: what is locked; it need not exist, but its folder must.
        wait: seconds to wait for another holder; 0 does not wait.
        doing: what holders do to it, for the message.

    Raises:
        UsageError: another process holds it: which one, and since when.
    """
    target = Path(path).resolve()
    name = target.name if len(os.fsencode(target.name)) < 200 else hashlib.sha256(os.fsencode(target.name)).hexdigest()
    file = target.with_name(f".{name}.lock")
    with naming(file):
        descriptor = _locked(file, time.monotonic() + wait)
    if descriptor is None:
        try:
            holder = file.read_text(errors="replace").strip()
        except OSError:
            holder = ""
        raise UsageError(
            f"{path} is being {doing} by {holder or 'another process'}",
            "once that one has ended" if wait == 0 else f"{wait:.0f} s have passed; once that one has ended",
        )
    try:
        yield
    finally:
        with suppress(OSError):  # first the name, while nobody else can hold it
            if descriptor in _held and _is_file(descriptor, file):
                file.unlink()
        if descriptor in _held:  # not in a forked child
            _held.remove(descriptor)
            os.close(descriptor)


def _locked(file: Path, deadline: float) -> int | None:
    """A descriptor that holds the lock; None where another one holds it until the deadline."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LACKING:
                os.close(descriptor)
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise
                if time.monotonic() >= deadline:
                    return None
                time.sleep(PAUSE)
                continue
        if _is_file(descriptor, file):  # else the holder before has just removed it
            _held.add(descriptor)
            with suppress(OSError):  # a full disk does not keep a lock from holding
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{_myself()}\n".encode(errors="replace"))
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _myself() -> str:
    """The process that runs, in words: number, host, start and command."""
    began = time.time()
    with suppress(OSError, ValueError, AttributeError):  # as exact as the host's clock
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        began -= uptime - start_of(os.getpid()) / os.sysconf("SC_CLK_TCK")
    since = datetime.fromtimestamp(began).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} since {since} on {socket.gethostname()} ({shlex.join(sys.argv)})"


# What is there


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Target:
    """A report that a flag asks for.

    Attributes:
        flag: "--csv", for messages.
        path: where it goes.
        begins: the first bytes of every file of its kind, or each that may be: a file of others is not replaced.
        holds: what stands in the first 4 KB of them.
    """

    flag: str
    path: str
    begins: bytes | tuple[bytes, ...]
    holds: bytes = b""


def require_targets(targets: Sequence[Target], read: Iterable[str | Path] = ()) -> None:
    """Checks that reports may be written: each to a new file, or to an earlier report of its kind.

    Args:
        targets: the reports.
        read: files that the command reads.

    Raises:
        UsageError: one is a folder, a device, a file of another kind, one that is read, or another report's; or its
            folder is not there or cannot be written to.
    """
    used = {Path(path).resolve(): f"{path}, which is read" for path in read}
    for target in targets:
        flag, path = f"{target.flag} {target.path}", Path(target.path)
        try:
            path.resolve()
        except (OSError, RuntimeError):  # links in a circle
            raise UsageError(flag, "the path of a plain file that is no checkpoint") from None
        if path.resolve() in used:
            raise UsageError(f"{flag} would replace {used[path.resolve()]}", "another file for each")
        used[path.resolve()] = f"{target.flag}'s file"
        if re.fullmatch(r"\.(pt|pth|tar|safetensors|prev\d*)", path.suffix):
            raise UsageError(flag, "the path of a plain file that is no checkpoint")
        if len(os.fsencode(path.name)) > 200:
            raise UsageError(flag, "a shorter file name")
        if not path.parent.is_dir():
            raise UsageError(f"{flag}: there is no folder {path.parent}", "a file in a folder that is there")
        if path.exists() or path.is_symlink():
            if not path.is_file():
                raise UsageError(flag, "the path of a plain file that is no checkpoint")
            with naming(path), open(path, "rb") as file:
                head = file.read(4096)
            if head and not (head.startswith(target.begins) and target.holds in head):
                raise UsageError(f"{flag} would replace a file of another kind", "a new file, or an earlier report")
        require_writable(target.flag, path.parent)


def require_writable(flag: str, folder: str | Path, make: bool = True) -> None:
    """Makes ``folder`` if it is missing and writes to it once, so that a run fails at its start and not at its end.

    What killed processes left in it is swept up. Without ``make``, a folder that was missing is removed again.

    Raises:
        UsageError: it cannot be made or written to.
    """
    missing = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        sweep(folder)
        probe = _temporary(Path(folder, "writable"))
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: {error.strerror}", "a folder that can be written to") from None
    finally:
        for place in [] if make else missing:
            with suppress(OSError):
                place.rmdir()


def require_room(needed: Mapping[str | Path, float], what: str) -> None:
    """Checks that disks have room for what will be written to folders, which need not exist yet.

    Args:
        needed: bytes for each folder; those on one disk are added.
        what: what takes the room, for the message.

    Raises:
        UsageError: a disk has less; with its folders, what they need and what is free, in MB.
    """
    disks: dict[int, list[tuple[str | Path, Path, float]]] = {}
    for folder, size in needed.items():
        there = next(place for place in (Path(folder).resolve(), *Path(folder).resolve().parents) if place.exists())
        disks.setdefault(there.stat().st_dev, []).append((folder, there, size))
    for parts in disks.values():
        total, free = sum(size for *_, size in parts), shutil.disk_usage(parts[0][1]).free
        if total > free:
            folders = " and ".join(str(folder) for folder, *_ in parts)
            raise UsageError(
                f"{what} needs {total / 1e6:,.0f} MB on the disk of {folders}, where {free / 1e6:,.0f} MB are free",
                "more room there, or a folder on another disk",
            )


class AppendedFile:
    """A file that a run adds to as it goes. A disk that refuses costs what is added meanwhile, not the run.

    Args:
        path: the file, made when something is added; what it holds already stays.
        warn: is told of every such loss.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self._file: io.FileIO | None = None

    def empty(self) -> bool:
        """Removes what it holds; whether that was nothing."""
        with suppress(OSError):
            size = os.stat(self.path).st_size
            os.truncate(self.path, 0)
            return size == 0
        return True

    def write(self, content: bytes) -> None:
        try:
            with naming(self.path):
                if (
                    self._file is None
                ):  # without a buffer nothing stays behind that would be written later, or fail then
                    self._file = open(self.path, "ab", buffering=0)
                end = os.fstat(self._file.fileno()).st_size
                try:
                    left = memoryview(content)
                    while left:
                        left = left[self._file.write(left) :]
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(self._file.fileno(), end)  # no half line for the next one to follow
                    raise
        except OSError as error:
            self.warn(f"note: {disk_words(error)}; the run goes on without what belongs there")

    def close(self) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
