"""What processes tell each other: it comes back as it was, or it is refused; nothing in it is run."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
from datetime import timedelta
from pathlib import Path

import pytest

from utils import messages
from utils.distributed import _Board
from utils.errors import Diverged, Unsaved, UsageError
from utils.messages import pack, unpack

VALUES = [
    None,
    [True, 3, -0.1, float("inf"), "\udc80 ü"],
    {"lr": (0.1, 0.2), "out": Path("a/b"), "dict": {"tuple": [], "path": "x"}},
    (Path("run"), {"top1": 1 / 3, "per_class": [0.1, None]}, False),
]


class Store(dict):
    """torchrun's store, in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        assert set(keys) <= set(self)

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= set(self)

    def get(self, key: str) -> bytes:
        return self[key]


@pytest.mark.parametrize("value", VALUES)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    found = unpack(pack(value).encode())
    assert found == value and repr(found) == repr(value)


@pytest.mark.parametrize(
    "error", [UsageError("--lr x", "a number"), Diverged("the loss is nan"), Unsaved("no room")], ids=str
)
def test_errors_come_back_with_their_words(error: Exception) -> None:
    value, found = unpack(pack((None, error)).encode())
    assert value is None and type(found) is type(error) and found.args == error.args


def test_a_disk_s_error_comes_back_with_its_file() -> None:
    found = unpack(pack(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b")).encode())
    assert isinstance(found, OSError) and (found.errno, found.filename) == (errno.ENOSPC, "a/b")


class Evil:
    """Pickled, it makes a file when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


STRAY = [
    *(pickle.dumps(Evil(), protocol) for protocol in range(6)),
    b"",
    b"\xff" * 100,
    b"[" * 100_000,
    b'{"error": ["eval", "1"]}',
    b'{"error": ["SystemExit", 1]}',
    b'{"error": []}',
    b'{"path": 3}',
    b'{"a": 1, "b": 2}',
    b'{"dict": 3}',
    b"[null, null]",
    b"0",
    b'{"tuple": [null, 1]}',
]


@pytest.mark.parametrize("stray", STRAY, ids=range(len(STRAY)))
def test_what_another_program_writes_is_refused_and_not_run(stray: bytes, workdir: Path) -> None:
    store = Store()
    board = _Board(store, 0, 2)
    store["1/1"] = stray
    with pytest.raises(UsageError, match="of none of the processes of this run"):
        board.has_ended()
    with pytest.raises(UsageError, match="of none of the processes of this run"):
        board.exchange(None, None, timedelta(seconds=1))
    assert not Path("pwned").exists()


def test_a_mutated_message_is_a_value_or_refused() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        blob = bytearray(pack(VALUES).encode())
        for _ in range(draw.randint(1, 5)):
            blob[draw.randrange(len(blob))] = draw.randrange(256)
        with contextlib.suppress(UsageError):
            unpack(bytes(blob[: draw.randint(0, len(blob))]))


def test_a_message_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = pack("x" * 1000)
    monkeypatch.setattr(messages, "LONGEST", 999)
    with pytest.raises(UsageError, match="a message of 1,002 bytes"):
        pack("x" * 1000)
    with pytest.raises(UsageError):
        unpack(text.encode())
