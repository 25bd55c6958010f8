"""A progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from progress.bar import Bar

from utils.console import duration, show

T = TypeVar("T")
#: Seconds until the first line where there is no terminal.
FIRST_LINE = 60.0


def bar(steps: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes ``steps`` through; on a terminal with a progress bar and the time still needed.

    The bar is drawn ten times a second at most. Elsewhere, as in a log, there is a line after :data:`FIRST_LINE`
    seconds, after twice as long, and so on.
    """
    began = drawn = time.monotonic()
    pause = FIRST_LINE
    if sys.stderr is None or not sys.stderr.isatty():
        for number, step in enumerate(steps, start=1):
            yield step
            now = time.monotonic()
            if now - began > pause and number < total:
                pause, left = 2 * pause, (now - began) / number * (total - number)
                show(f"{label}: {number:,} of {total:,}, about {duration(left)} left")
        return
    shown = Bar(label, max=total, suffix="%(index)d/%(max)d  ETA %(eta_td)s", width=24, hide_cursor=False)
    try:
        for number, step in enumerate(steps, start=1):
            yield step
            shown.index = number
            if time.monotonic() - drawn > 0.1 or number == total:
                drawn = time.monotonic()
                shown.update()
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # clears the bar's line
