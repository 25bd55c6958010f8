"""What ends a command with a message instead of a traceback."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


class UsageError(Exception):
    """A mistake in what was asked for. Shown as two lines, the problem and what is allowed; exit status 2."""

    def __init__(self, problem: str, allowed: str) -> None:
        super().__init__(problem, allowed)

    def __str__(self) -> str:
        problem, allowed = (text.replace("\n", " ") for text in self.args)
        return f"error: {problem}\nallowed: {allowed}"


class Diverged(Exception):
    """Training cannot go on (a loss that is not finite). Shown without a traceback; exit status 1.

    ``step`` is the step of the epoch, from 1, where it is one step's loss.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Unsaved(Exception):
    """Finished weights that could not be put where they belong. Shown without a traceback; exit status 1."""


#: What a disk says that is full, over a quota or a limit, broken, gone or not to be written to.
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ETIMEDOUT),
)


def disk_words(error: OSError) -> str:
    """A disk's error in one line: what it is, the file, and how much is free on the disk of its folder."""
    words = error.strerror or str(error)
    if not error.filename:
        return words
    place = Path(os.fsdecode(error.filename)).absolute()
    there = next(folder for folder in place.parents if folder.is_dir())
    try:
        free = f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB free on the disk of {there})"
    except OSError:
        free = ""
    return f"{words}: {os.fsdecode(error.filename)}{free}"
