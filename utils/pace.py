"""How long a training still takes, from the steps and epochs so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from utils.console import about, counted

T = TypeVar("T")
#: Steps after which the pace is measured, the very first being slower than the others.
WARM_UP = 5
#: Seconds after which the time that is left is announced, and half of those that it must at least be.
ANNOUNCE_AFTER = 3.0


class Pace:
    """The pace of a training of so many epochs of so many steps, evaluations counted as steps.

    ``say`` is called once with the time that it takes.

    ``forecast``, where it is only a part of a command's work, gives the seconds that all of that still takes.
    ``is_announced``: that time has been said before.
    """

    def __init__(
        self,
        epochs: int,
        steps: float,
        say: Callable[[str], None],
        forecast: Callable[[], float | None] | None = None,
        is_announced: bool = False,
    ) -> None:
        self.epochs, self.steps, self.say, self.forecast = epochs, steps, say, forecast
        self.done = 0
        self._began = time.perf_counter()
        self.is_announced = is_announced

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the pace so far; None before the first epoch is over."""
        if self.forecast:
            return self.forecast()
        if not self.done:
            return None
        return (time.perf_counter() - self._began) / self.done * (self.epochs - self.done)

    def next_epoch(self) -> None:
        """One more is over."""
        self.done += 1
        left = self.left
        if left is not None:
            self._announce(left)

    def measured(self, steps: Iterable[T]) -> Iterator[T]:
        """Passes the steps of an epoch through; announces the time after the first ones."""
        began = 0.0
        for number, step in enumerate(steps):
            if number == WARM_UP:
                began = time.perf_counter()
            elapsed, timed = time.perf_counter() - began, number - WARM_UP
            if timed >= WARM_UP and elapsed > ANNOUNCE_AFTER:
                self._announce(elapsed / timed * (self.steps * (self.epochs - self.done) - number))
            yield step

    def _announce(self, seconds: float) -> None:
        is_long = seconds > 2 * ANNOUNCE_AFTER and time.perf_counter() - self._began > ANNOUNCE_AFTER
        if is_long and not self.is_announced:
            self.is_announced = True
            what = "in all" if self.forecast else f"for {counted(self.epochs - self.done, 'epoch')}"
            self.say(f"{about(seconds)} left {what}")
