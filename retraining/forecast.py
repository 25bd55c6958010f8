"""How long stage 2 takes: what it still has to do, and how long each part of that has taken so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from engine import TRAINING, for_evaluation
from experiment.data import eval_batches
from retraining.methods import Method, Trained
from retraining.results import FrozenBackbone
from retraining.settings import cached_streams
from utils.system import step_seconds


def image_seconds(frozen: FrozenBackbone) -> float:
    """Seconds that the backbone takes for a training image, from ten steps."""
    source, data = frozen.source, frozen.data
    model, (images, _) = for_evaluation(source.model), next(iter(eval_batches(data, data.test, source.device).epoch()))

    def steps(number: int) -> None:
        for _ in range(number):
            source.look(model, images, source.amp)

    return step_seconds(steps, source.device) / len(images)


class Forecast:
    """How long the classifiers of a command still take, all of them, at the pace so far.

    Args:
        methods: those that are not finished.
        frozen: the backbone.
        every: epochs between evaluations.
    """

    def __init__(self, methods: Sequence[Method], frozen: FrozenBackbone, every: int) -> None:
        self.frozen, self.every = frozen, every
        self._epochs = {method: method.finetune_epoch for method in methods if isinstance(method, Trained)}
        self._seconds: dict[str, float] = {}
        self._done = Counter[str]()
        self._timed: float | None = None

    def begin(self, methods: Sequence[Trained], epochs: int) -> None:
        """An epoch of these begins now, with so many left."""
        self._epochs |= dict.fromkeys(methods, epochs)
        self._began, self._passes = time.perf_counter(), self.frozen.source.seconds

    def end(self, methods: Sequence[Trained], epochs: int) -> None:
        """An epoch of these has ended, evaluated where that was due, with so many left; the next begins."""
        scope, source = methods[0].scope, self.frozen.source
        spent = time.perf_counter() - self._began - (source.seconds - self._passes)
        self._seconds[scope] = self._seconds.get(scope, 0.0) + spent
        self._done[scope] += len(methods)
        self.begin(methods, epochs)

    def left(self) -> float | None:
        """Seconds; None before the first epoch has ended."""
        epochs = Counter[str]()
        for method, number in self._epochs.items():
            epochs[method.scope] += number
        if epochs["fc"] and not self._done["fc"]:
            return None
        heads = [method for method, number in self._epochs.items() if number and method.scope == "fc"]
        images = self.frozen.source.images_left(cached_streams(heads), self.every)
        seconds = images * self._image() if images else 0.0
        return seconds + sum(number * self._epoch(scope) for scope, number in epochs.items() if number)

    def _epoch(self, scope: str) -> float:
        if self._done[scope]:
            return self._seconds[scope] / self._done[scope]
        return TRAINING * len(self.frozen.data.train) * self._image()

    def _image(self) -> float:
        source = self.frozen.source
        if source.images and source.seconds:
            return source.seconds / source.images
        if self._timed is None:  # all that has been asked for so far was in the cache
            self._timed = image_seconds(self.frozen)
        return self._timed
