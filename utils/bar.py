"""A progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from progress.bar import Bar

T = TypeVar("T")


def bar(steps: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes ``steps`` through; on a terminal with a progress bar and the time still needed."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield from steps
        return
    shown = Bar(label, max=total, suffix="%(index)d/%(max)d  ETA %(eta_td)s", width=24, hide_cursor=False)
    try:
        for step in steps:
            yield step
            shown.next()
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # clears the bar's line
