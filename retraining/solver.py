"""Trains S classifiers at once on one stream of features, each with its own head, loss, learning rate and decay.

Linear heads whose loss is of the softmax family are stepped together: one wide matrix product, (B, D) x (D, S C), the
analytic gradient of :class:`losses.softmax.SoftmaxLoss` and SGD's update with per-head learning rates. Every other head
is stepped by autograd and ``torch.optim.SGD`` on the same batches. Both equal S separate ``torch.optim.SGD`` runs, and
a single classifier is S = 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD

from engine import TrainStats
from losses.softmax import SoftmaxLoss
from utils.errors import UsageError
from utils.graphs import Graphed
from utils.resume import TrainState
from utils.system import free_memory
from utils.types import StateDict

#: Heads per matrix product on a CPU, at most, and the bytes of their weights: so much stays in its cache (CIFAR
#: sizes). For larger heads one product each is as fast and takes less memory.
CPU_CHUNK, CHUNK_BYTES = 8, 2**23
#: Steps that one part takes before the next part's turn, so that its weights are still in the cache; and the bytes of
#: their features, at most.
WINDOW, WINDOW_BYTES = 32, 2**25
#: Rows of so many numbers or more begin at multiples of 16: products with them are 1.2 to 1.4 times as fast.
ALIGNED_FROM = 640
#: Share of the free memory that the heads may take.
SHARE = 0.8

#: Parameters of the softmax family, a number for every head and class.
TABLES = ("scale", "offset", "margin", "smooth", "weight")

Steps = Iterable[tuple[Tensor, ...]]


@dataclass
class TrainableHead:
    """One classifier to train.

    Attributes:
        head: features (B, D) -> logits (B, C); up to date after every epoch.
        loss: share of the epochs that is over -> the loss of the next one.
        lr, wd: learning rate and weight decay; both act on weight and bias alike, as torch's SGD does.
        project: puts the head back where it must be; None for nothing to do.
        each_step: whether ``project`` is called after every step, not after every epoch.
    """

    head: nn.Module
    loss: Callable[[float], nn.Module]
    lr: float
    wd: float
    project: Callable[[], None] | None = None
    each_step: bool = False


class _Part(Protocol):
    """Some heads that are stepped together; a step returns their losses (nats) and hits (images): (S,) each."""

    places: list[int]

    def begin(self, progress: float, rates: Sequence[float]) -> None: ...
    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...
    def end(self) -> None: ...
    def state_dict(self) -> StateDict: ...
    def load_state_dict(self, state: StateDict) -> None: ...


class _LinearChunk:
    """Linear heads with losses of the softmax family: weight and momentum (S C, D + 1), the last column the bias."""

    def __init__(
        self, places: list[int], classifiers: Sequence[TrainableHead], momentum: float, nesterov: bool
    ) -> None:
        self.places, self.classifiers = places, classifiers
        first: nn.Linear = classifiers[0].head  # type: ignore[assignment]
        self.heads, self.classes = len(classifiers), first.out_features
        self.weight, self.velocity = (
            aligned(self.heads * self.classes, first.in_features + 1, first.weight) for _ in range(2)
        )
        self.velocity.zero_()
        self.rows = self.weight.view(self.heads, self.classes, -1)
        for classifier, row in zip(classifiers, self.rows):
            row[:, :-1] = classifier.head.get_parameter("weight").detach()
            row[:, -1] = classifier.head.get_parameter("bias").detach()
        self.momentum, self.nesterov = momentum, nesterov
        lr, wd = (
            torch.tensor([getattr(t, name) for t in classifiers]).to(self.weight)[:, None].expand(-1, self.classes)
            for name in ("lr", "wd")
        )
        self.lr, self.wd = lr.reshape(-1, 1), wd.reshape(-1, 1)
        self.decays = any(t.wd != 0 for t in classifiers)
        self.rate = torch.zeros_like(self.lr)
        self.graph: Graphed | None = None
        self.tables = {name: self.weight.new_zeros(self.heads, self.classes) for name in TABLES}
        self.scale, self.offset, self.margin, self.smooth, self.class_weight = self.tables.values()
        self.has_scales, self.has_offsets, self.is_unweighted = True, True, False

    def begin(self, progress: float, rates: Sequence[float]) -> None:
        losses: list[SoftmaxLoss] = [t.loss(progress) for t in self.classifiers]  # type: ignore[misc]
        tables = {name: torch.stack([getattr(loss, name) for loss in losses]) for name in TABLES}
        for name, table in tables.items():
            self.tables[name].copy_(table)  # in place, where a CUDA graph reads them
        # A step skips what no loss of the chunk has.
        before = self.has_scales, self.has_offsets, self.is_unweighted
        self.has_scales = bool((tables["scale"] != 1).any())
        self.has_offsets = bool(tables["offset"].any() or tables["margin"].any())
        self.is_unweighted = bool((tables["weight"] == 1).all())
        if self.graph and (self.has_scales, self.has_offsets, self.is_unweighted) != before:
            self.graph.forget()
        own = torch.tensor([rates[place] for place in self.places]).to(self.lr)
        self.rate.copy_(-own.repeat_interleave(self.classes)[:, None] * self.lr)

    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.graph:
            return self._step(features, labels)
        loss, hits = self.graph(self._step, self.changing, features, labels)
        return loss, hits

    def changing(self) -> dict[str, list[Tensor]]:
        """What a step changes: weight and momentum (S C, D + 1), apart for every head."""
        velocity = self.velocity.view(self.rows.shape)
        return {"weights": list(self.rows), "momentum": list(velocity)}

    @torch.no_grad()
    def _step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        inputs = aligned(len(features), features.shape[1] + 1, features)
        inputs[:, :-1], inputs[:, -1] = features, 1.0
        index = labels[:, None, None].expand(-1, self.heads, 1)
        wide = torch.mm(inputs, self.weight.T, out=aligned(len(inputs), len(self.weight), inputs))
        z = wide.view(len(inputs), self.heads, self.classes)
        hits = (z.gather(2, index)[:, :, 0] >= z.amax(dim=2)).sum(dim=0)
        if self.has_scales:
            z *= self.scale
        if self.has_offsets:
            z += self.offset
            z.scatter_add_(2, index, -self.margin.T[labels][:, :, None])
        log_p = z.log_softmax(dim=2)
        smooth = self.smooth.T[labels]  # (B, S)
        losses = (smooth - 1) * log_p.gather(2, index)[:, :, 0] - smooth * log_p.mean(dim=2)
        rows = log_p.exp_()
        rows -= (smooth / self.classes)[:, :, None]
        rows.scatter_add_(2, index, smooth[:, :, None] - 1)
        if self.is_unweighted:
            rows /= len(labels)
            loss = losses.mean(dim=0)
        else:
            weight = self.class_weight.T[labels]  # (B, S)
            weight = weight / weight.sum(dim=0)
            rows *= weight[:, :, None]
            loss = (losses * weight).sum(dim=0)
        if self.has_scales:
            rows *= self.scale
        flat = rows.view(len(labels), -1)
        if self.nesterov:
            gradient = flat.T @ inputs
            if self.decays:
                gradient.addcmul_(self.wd, self.weight)
            self.velocity.mul_(self.momentum).add_(gradient)
            update = gradient.add_(self.velocity, alpha=self.momentum)
        else:
            self.velocity.addmm_(flat.T, inputs, beta=self.momentum)
            if self.decays:
                self.velocity.addcmul_(self.wd, self.weight)
            update = self.velocity
        self.weight.addcmul_(self.rate, update)
        return loss, hits

    @torch.no_grad()
    def end(self) -> None:
        self._fill_heads()
        for classifier, row in zip(self.classifiers, self.rows):
            if classifier.project is not None:
                classifier.project()
                row[:, :-1].copy_(classifier.head.get_parameter("weight"))

    def _fill_heads(self) -> None:
        for classifier, row in zip(self.classifiers, self.rows):
            classifier.head.get_parameter("weight").copy_(row[:, :-1])
            classifier.head.get_parameter("bias").copy_(row[:, -1])

    def state_dict(self) -> StateDict:
        return {"weight": self.weight.contiguous(), "velocity": self.velocity.contiguous()}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        self.weight.copy_(state["weight"])
        self.velocity.copy_(state["velocity"])
        self._fill_heads()


class _Alone:
    """Any head, by autograd."""

    def __init__(self, place: int, classifier: TrainableHead, momentum: float, nesterov: bool) -> None:
        self.places, self.classifier = [place], classifier
        parameters = [p for p in classifier.head.parameters() if p.requires_grad]
        self.optimizer = SGD(
            parameters, classifier.lr, momentum=momentum, weight_decay=classifier.wd, nesterov=nesterov
        )

    def begin(self, progress: float, rates: Sequence[float]) -> None:
        self.loss = self.classifier.loss(progress).to(next(self.classifier.head.parameters()).device)
        self.optimizer.param_groups[0]["lr"] = self.classifier.lr * rates[self.places[0]]

    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier.head(features)
        loss: Tensor = self.loss(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.classifier.project is not None and self.classifier.each_step:
            self.classifier.project()
        return loss.detach()[None], (logits.detach().argmax(dim=1) == labels).sum()[None]

    def end(self) -> None:
        if self.classifier.project is not None:
            self.classifier.project()

    def state_dict(self) -> StateDict:
        return {"head": self.classifier.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        self.classifier.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


class Solver:
    """Trains classifiers side by side with SGD; ``momentum`` and ``nesterov`` are shared, as in ``torch.optim.SGD``.

    ``chunk`` is the number of linear heads per matrix product; None for up to 8 on a CPU, by their size, and all of
    them elsewhere. On a GPU ``graph`` is auto, on or off: their steps are CUDA graphs that prove themselves, see
    :class:`utils.proof.Proven`, whose line ``say`` gets.

    Attributes:
        seconds: (S,) time in each head's steps so far; heads that are stepped together share theirs evenly.
    """

    def __init__(
        self,
        classifiers: Sequence[TrainableHead],
        momentum: float = 0.9,
        nesterov: bool = False,
        chunk: int | None = None,
        graph: str = "auto",
        say: Callable[[str], None] = print,
    ) -> None:
        together = [i for i, classifier in enumerate(classifiers) if _is_linear(classifier)]
        self.device = next(classifiers[0].head.parameters()).device
        self.parts: list[_Part] = []
        if together:
            shape = classifiers[together[0]].head.get_parameter("weight").shape
            chunk = chunk or (cpu_chunk(*shape) if self.device.type == "cpu" else len(together))
            for first in range(0, len(together), chunk):
                places = together[first : first + chunk]
                has_graph = graph != "off" and self.device.type == "cuda"
                part = _LinearChunk(places, [classifiers[i] for i in places], momentum, nesterov)
                part.graph = Graphed(must=graph == "on", say=say) if has_graph else None
                self.parts.append(part)
        alone = [i for i in range(len(classifiers)) if i not in together]
        self.parts += [_Alone(i, classifiers[i], momentum, nesterov) for i in alone]
        self.seconds = [0.0] * len(classifiers)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """``sums`` is what an epoch has measured over ``images``: losses, hits, first losses, (3, S) of each part."""
        self.images = 0
        self.sums: list[Tensor | float] = [0.0] * len(self.parts)

    def train_epoch(
        self, steps: Steps, progress: float, rate: float | Sequence[float], state: TrainState | None = None
    ) -> list[TrainStats]:
        """One SGD step of every head on each (features (B, D), labels (B,)).

        ``progress`` is the share of the epochs that is over, ``rate`` multiplies the learning rates, one number for all
        heads or one for each. ``state`` is told of the steps and may have seen the first ones, which are then passed
        over. Returns what each head has measured.
        """
        done = state.step if state else 0
        if done == 0:
            self._begin_epoch()
        rates = [rate] * len(self.seconds) if isinstance(rate, float | int) else rate
        if not (state and state.is_trained):
            for part in self.parts:
                part.begin(progress, rates)
            with self._workers() as apply:
                for window in _windows(islice(iter(steps), done, None)):
                    found = list(apply(partial(self._advance, window), self.parts))
                    self.images += sum(len(labels) for _, labels in window)
                    self.sums = [before + sums for before, sums in zip(self.sums, found)]
                    if state:
                        state.advance(steps=len(window))
            for part in self.parts:
                part.end()
            if state:
                state.is_trained = True
        results = [TrainStats(0.0, 0.0, 0.0)] * len(self.seconds)
        for part, sums in zip(self.parts, self.sums):
            assert isinstance(sums, Tensor)
            for place, (loss_sum, correct, first) in zip(part.places, sums.T.tolist()):
                results[place] = TrainStats(loss_sum / self.images, correct / self.images, first)
        return results

    def state_dict(self) -> StateDict:
        """Weights and momentum of every head, and what the epoch has measured so far."""
        own = {"images": self.images, "sums": self.sums, "seconds": self.seconds}
        return {**own, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state."""
        self.images, self.seconds = state["images"], state["seconds"]
        self.sums = [value.to(self.device) if isinstance(value, Tensor) else value for value in state["sums"]]
        for part, stored in zip(self.parts, state["parts"]):
            part.load_state_dict(stored)

    def _advance(self, window: list[tuple[Tensor, ...]], part: _Part) -> Tensor:
        """A part's steps: its heads' sums of losses and hits and, at an epoch's beginning, first losses, (3, S)."""
        began = time.perf_counter()
        losses, hits = zip(*(part.step(features, labels) for features, labels in window))
        sizes = torch.tensor([float(len(labels)) for _, labels in window]).to(losses[0])
        first = losses[0] if self.images == 0 else torch.zeros_like(losses[0])
        sums = torch.stack([sizes @ torch.stack(losses), torch.stack(hits).sum(dim=0), first])
        for place in part.places:
            self.seconds[place] += (time.perf_counter() - began) / len(part.places)
        return sums

    @contextmanager
    def _workers(self) -> Iterator[Callable[..., Iterator[Tensor]]]:
        """A ``map`` over parts: on a CPU a thread for each, since small products gain little from two threads."""
        number = min(len(self.parts), torch.get_num_threads()) if self.device.type == "cpu" else 1
        if number == 1:
            yield map
            return
        with ThreadPoolExecutor(number, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield pool.map


def heads_that_fit(heads: int, classes: int, features: int, batch: int, device: torch.device) -> int:
    """How many of so many heads (C, D) can be trained at a time in :data:`SHARE` of the memory that is free.

    Counted are weight, momentum, the head itself and, of all heads, the best one that is kept on the CPU; and what a
    step takes of those heads that are stepped at a time, by autograd, which takes most.

    Raises:
        UsageError: not even one.
    """
    matrix, logits, cpu = 4 * classes * (features + 1), 4 * batch * classes, torch.device("cpu")
    active = torch.get_num_threads() * cpu_chunk(classes, features)

    def needed(number: int) -> dict[torch.device, int]:
        window = max(WINDOW_BYTES, 4 * batch * features)
        if device.type == "cpu":
            step = min(number, active) * (4 * matrix + 6 * logits)
            return {cpu: heads * matrix + number * 3 * matrix + step + window}
        # A CUDA graph keeps a step's memory for each batch size; while it proves itself, weight and momentum are there
        # four times more.
        return {cpu: heads * matrix, device: number * (11 * matrix + 8 * logits) + window}

    free = {place: int(SHARE * free_memory(place)) for place in needed(1)}
    for number in range(heads, 0, -1):
        lacking = [place for place, size in needed(number).items() if size > free[place]]
        if not lacking:
            return number
    place = lacking[0]
    need, room = (f"{size / 1e6:,.0f} MB" for size in (needed(1)[place], free[place]))
    raise UsageError(
        f"{heads} heads of {classes} x {features} need {need} of {place.type} memory one by one, {room} may be taken",
        "fewer values at once, a smaller --batch_size, or a machine with more memory",
    )


def cpu_chunk(classes: int, features: int) -> int:
    """Heads (C, D) per matrix product on a CPU."""
    return min(CPU_CHUNK, max(1, CHUNK_BYTES // (4 * classes * features)))


def _is_linear(classifier: TrainableHead) -> bool:
    return (
        type(classifier.head) is nn.Linear
        and not classifier.each_step
        and all(p.requires_grad for p in classifier.head.parameters())
        and isinstance(classifier.loss(0.0), SoftmaxLoss)
    )


def aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty matrix (rows, columns); see :data:`ALIGNED_FROM`."""
    return like.new_empty(rows, columns if columns < ALIGNED_FROM else -(-columns // 16) * 16)[:, :columns]


def _windows(steps: Iterator[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    for first in steps:
        number = min(WINDOW, max(1, WINDOW_BYTES // first[0].nbytes))
        yield [first, *islice(steps, number - 1)]
