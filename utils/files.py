"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.options import UsageError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends well and removed when it does not."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_target(flag: str, path: str | Path) -> None:
    """Checks that a report may be written to ``path``: a new file or an old one that is no checkpoint.

    Raises:
        UsageError: it is a folder, a device or a checkpoint, or its folder cannot be written to.
    """
    target = Path(path)
    if target.suffix in (".pt", ".pth", ".prev") or (target.exists() and not target.is_file()):
        raise UsageError(f"{flag} {path}", "the path of a plain file that is no checkpoint")
    if len(target.name) > 200:
        raise UsageError(f"{flag} {path}", "a shorter file name")
    require_writable(flag, target.parent)


def require_writable(flag: str, folder: str | Path) -> None:
    """Makes ``folder`` if it is missing and writes to it once, so that a run fails at its start and not at its end.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder, f".writable.{secrets.token_hex(4)}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: {error.strerror}", "a folder that can be written to") from None
