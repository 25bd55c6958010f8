"""What commands print: lines that a run can do without."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress

from utils.errors import disk_words

#: What a terminal would act upon, all but the ends of lines and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


#: What was printed before a run had a folder, for its log.txt; None once it has.
_early: list[str] | None = None


def keep_early() -> None:
    """A command begins: what it prints is kept for the log of its run."""
    global _early
    _early = []


def take_early() -> list[str]:
    """The texts that the command has printed so far; from now on none are kept."""
    global _early
    early, _early = _early or [], None
    return early


def plain(text: str) -> str:
    r"""A text without control characters, which names from files and folders may hold: "\x1b" in place of an escape."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def write(text: str, end: str = "\n") -> None:
    """Prints a text, :func:`plain`."""
    if _early is not None and text:
        _early.append(text)
    print(plain(text), end=end, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Prints a text; without standard output, as after "| head" or on a full disk, the run goes on."""
    try:
        write(text, end)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):
                print(f"note: standard output: {disk_words(error)}; the run goes on without", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time as a person says it: "under 1 s", "42 s", "12 min", "1 h 53 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, days = round(seconds / 3600), seconds / 86400
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{int(days)} d {hours % 24} h"


def about(seconds: float) -> str:
    """A time that is not known to the second: "about 42 s", "under 1 s"."""
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def step_time(seconds: float) -> str:
    """The time of something short: "12.5 ms", "3.99 s"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things: "1 epoch", "2,000 epochs"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def show_rest() -> None:
    """Prints what is still in the buffer of standard output, as :func:`show` does."""
    show("", end="")
