"""SIGINT (Ctrl-C) and SIGTERM: a run that can be resumed finishes its step and saves; anything else ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)
#: torchrun passes on what a terminal has already sent: of several processes, signals so close (seconds) are one.
ECHO = 3.0


class Interrupted(KeyboardInterrupt):
    """A signal ends the process.

    Attributes:
        between_steps: it was raised where everything is in a state that can be saved, not by the signal itself.
        is_second: one has come before, which has not ended the process yet.
        status: the exit status that shells give to the signal: 130 or 143.
    """

    def __init__(self, number: int, between_steps: bool = False, why: str = "", is_second: bool = False) -> None:
        super().__init__(why or signal.Signals(number).name)
        self.between_steps, self.is_second, self.status = between_steps, is_second, 128 + number


class _Requests:
    """The first signal that this process has got, and how many of its threads will look for one by themselves."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.process = os.getpid()
        self.came = 0.0
        self.looking = 0
        self.lock = threading.Lock()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal where somebody looks for it; a second one, or any other, ends the process at once."""
        is_echo = self.number is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if is_echo and time.monotonic() - self.came < ECHO:
            return
        if self.number is not None or not self.looking:
            is_second, self.number = self.number is not None, number
            raise Interrupted(number, is_second=is_second)
        self.number, self.came = number, time.monotonic()
        if int(os.environ.get("RANK", 0)) == 0 and os.getpid() == self.process:  # not in its workers
            name = signal.Signals(number).name
            # print() is not re-entrant, and the signal may have come in the middle of one
            with suppress(OSError):  # a terminal that is gone must not end the step
                os.write(2, f"\n{name}: finishing the step and saving; once more ends at once\n".encode())


_requests = _Requests()


@contextmanager
def handled() -> Iterator[None]:
    """Handles both signals until the block ends. Does nothing outside of the main thread.

    What a signal leaves half built, in the import of a library for instance, may fail again when it is removed: then
    nothing is printed about that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests.number, _requests.process = None, os.getpid()
    wanted = [number for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, _requests.handle) for number in wanted}
    report = sys.unraisablehook
    sys.unraisablehook = lambda error: report(error) if _requests.number is None else None
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """In this block a first signal is only noted; call :func:`requested` or :func:`check` between steps."""
    with _requests.lock:
        _requests.looking += 1
    try:
        yield
    finally:
        with _requests.lock:
            _requests.looking -= 1


def requested() -> int | None:
    """The number of the signal that asks this process to end; None for none."""
    return _requests.number


def check() -> None:
    """Raises Interrupted where a signal has come that was only noted."""
    if _requests.number is not None:
        raise Interrupted(_requests.number, between_steps=True)
