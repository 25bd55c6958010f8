"""A progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from progress.bar import Bar

from utils.console import about, duration, show

T = TypeVar("T")
#: Seconds until the first line where there is no terminal.
FIRST_LINE = 60.0


def bar(steps: Iterable[T], total: int, label: str, left: float | None = None) -> Iterator[T]:
    """Passes ``steps`` through; on a terminal with a progress bar and the time still needed.

    The bar is drawn ten times a second at most. Elsewhere, as in a log, there is a line after :data:`FIRST_LINE`
    seconds, after twice as long, and so on. ``left`` are the seconds that the whole run still takes, where that is
    known: said in place of these steps' own.
    """
    began = drawn = time.monotonic()
    pause = FIRST_LINE
    if sys.stderr is None or not sys.stderr.isatty():
        for number, step in enumerate(steps, start=1):
            yield step
            now = time.monotonic()
            if now - began > pause and number < total:
                own = (now - began) / number * (total - number)
                words = about(own) if left is None else f"{about(max(own, left - (now - began)))} in all"
                pause = 2 * pause
                show(f"{label}: {number:,} of {total:,}, {words} left")
        return
    words = label if left is None else f"{label}, {duration(left)} left in all"
    shown = Bar(words, max=total, suffix="%(index)d/%(max)d  ETA %(eta_td)s", width=24, hide_cursor=False)
    try:
        for number, step in enumerate(steps, start=1):
            yield step
            if time.monotonic() - drawn > 0.1 or number == total:
                drawn = time.monotonic()
                shown.next(number - shown.index)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # clears the bar's line
