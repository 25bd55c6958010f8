"""Batches of an image set: order, crop, flip, normalisation; of images in memory without workers or PIL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from datasets.augment import Mix, Policy
from datasets.photos import Crops, PhotoDraws, Photos, ResizedCrop
from datasets.rows import Rows
from datasets.samplers import Sampler, instance_balanced

#: Images and labels, and with mixing the partners' labels and the share of the first.
Batch = tuple[Tensor, ...]
#: Steps whose images go through an augmentation policy together: few large operations instead of many small ones.
POLICY_STEPS = 64


class Epochs(Protocol):
    """What gives batches in their order, again and again."""

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        ...


class Draws(NamedTuple):
    """One epoch's random numbers: order (N,), top (N,) and left (N,) crop offsets, flip (N,) bool; one row a step."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding by ``pad`` pixels, and a horizontal flip with probability 1/2 where ``flip``."""

    pad: int
    flip: bool

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, ...]:
        """``n`` random crops and flips: top (n,) and left (n,) in [0, 2 pad], flip (n,) bool."""
        top, left = torch.randint(2 * self.pad + 1, (2, n), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        return top, left, flip

    draws = Draws


def seeded(*numbers: int) -> Generator:
    """A generator whose stream follows from the numbers alone: the same on every device, in every later run."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))


def own_rows(n: int, batch_size: int, share: tuple[int, int]) -> list[Tensor]:
    """Of each step of an epoch of n rows, the rows (b,) that are this process's part: neighbours, equal but for one.

    ``share`` is (this process, number of processes); the parts of all processes make the step, in their order.
    """
    rank, processes = share
    return [rows.tensor_split(processes)[rank] for rows in torch.arange(n).split(batch_size)]


class Windows:
    """Images in a device's memory as uint8, zero-padded, channels last, each with its mirror image where flips occur.

    Every crop is then a view into that memory, and a batch of them is one gather. images (N, c, H, W) uint8.
    """

    def __init__(self, images: Tensor, augment: Augment, device: torch.device) -> None:
        self.index_device = device
        pad, (self.number, channels, height, width) = augment.pad, images.shape
        stored = F.pad(images.to(device), (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        stored = (torch.cat([stored, stored.flip(2)]) if augment.flip else stored).contiguous()
        image, row, pixel, _ = stored.stride()
        self.offsets = 2 * pad + 1
        # (N or 2 N, top, left, H, W c); the crops overlap in memory.
        self.views = stored.as_strided(
            (len(stored), self.offsets, self.offsets, height, width * channels), (image, row, pixel, row, 1)
        )
        self.shape = (-1, height, width, channels)

    def cut(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Crops at top, left (B,) int64 of the images at index (B,), mirrored where flip (B,): (B, H, W, c) uint8."""
        left = torch.where(flip, self.offsets - 1 - left, left)  # where that crop lies in the mirror image
        return self.views[index + flip * self.number, top, left].view(self.shape)

    def cuts(self, steps: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """:meth:`cut` of each step's draws."""
        for step in steps:
            yield self.cut(*step)

    def whole(self, steps: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images at each step's positions, which follow each other, without padding: (B, H, W, c) uint8."""
        for index in steps:
            yield self.views[int(index[0]) : int(index[-1]) + 1, 0, 0].view(self.shape)


class Batches:
    """Mini-batches of an image set on a device: images (B, c, H, W) float, labels (B,) int64.

    With ``augment``: in the sampler's order and augmented, an epoch's randomness fixed by (*seed, epoch); the last
    batch may be smaller. Without: file order, as they are. Pixels are scaled to [0, 1] and normalised per channel;
    images are in the channels-last memory format.

    Args:
        images, labels: (N, c, H, W) uint8, or photos that are decoded when they are wanted; (N,) int64.
        batch_size, mean, std, device, augment, seed: as above.
        sampler, epochs: the order of the images, and the number of epochs that a progressive one spreads over.
        policy: further changes of the cropped images, from ``AUGMENTATIONS``.
        mix: blends the images of a batch; it then has partners and a share too, see :class:`datasets.augment.Mix`.
        share: (this process, number of processes). All make the same draws, of which each takes its part of every
            batch, see :func:`own_rows`; without ``augment`` they take whole batches in turn. Policies and mixing have
            random numbers of their own in each process, and a batch is blended within its parts.
    """

    def __init__(
        self,
        images: Tensor | Photos | Rows,
        labels: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augment: Augment | ResizedCrop | None = None,
        seed: Sequence[int] = (0,),
        sampler: Sampler = instance_balanced,
        epochs: int = 1,
        policy: Policy | None = None,
        mix: Mix | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        assert not isinstance(images, Rows)  # RowBatches gives those
        self.pixels: Windows | Crops
        if isinstance(images, Photos):
            assert not isinstance(augment, Augment)
            self.pixels, width = Crops(images, augment, device), images.size
        else:
            assert not isinstance(augment, ResizedCrop)
            self.pixels, width = Windows(images, augment or Augment(pad=0, flip=False), device), images.shape[3]
        self.labels, self.classes, self.device = labels.to(self.pixels.index_device), labels.cpu(), device
        row = [(1 / (255 * s), -m / s) for m, s in zip(mean, std)] * width  # channels last
        self.scale, self.shift = torch.tensor(row, device=device).T.contiguous()
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.sampler, self.epochs, self.policy, self.mix, self.share = sampler, epochs, policy, mix, share

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def draws(self, epoch: int) -> Draws | PhotoDraws:
        """All random numbers of an epoch of cropped batches."""
        assert self.augment is not None
        generator = seeded(*self.seed, epoch)
        order = self.sampler(self.classes, epoch, self.epochs, generator)
        return self.augment.draws(order, *self.augment.draw(len(order), generator))

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without its ``first`` ones: those that follow are the same."""
        if self.augment is None:
            mine, every = self.share
            steps = torch.arange(len(self.labels)).split(self.batch_size)[mine::every]
            for index, images in zip(steps, self.pixels.whole(steps)):
                yield self._normalise(images.float()), self._labels(slice(int(index[0]), int(index[-1]) + 1))
            return
        for number, (images, labels) in enumerate(self.cut(self.draws(epoch), epoch, first), start=first):
            yield self.mix(images, labels, self._stream(epoch, 2, number)) if self.mix else (images, labels)

    def positions(self, epoch: int, step: int) -> Tensor:
        """Which images (B,) a step (both from 0) shows, of all processes together."""
        steps: tuple[Tensor, ...] = self.draws(epoch).order.split(self.batch_size)
        return steps[step]

    def cut(self, draws: Draws | PhotoDraws, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The batches of given images and crops, without the ``first`` ones, before mixing."""
        rows = own_rows(len(draws.order), self.batch_size, self.share)
        several = POLICY_STEPS if self.policy and isinstance(self.pixels, Windows) else 1
        begun, skipped = divmod(first, several)  # a policy changes the images of several steps together
        sizes = [len(step) for step in rows[begun * several :]]
        if not sizes:
            return
        groups = [sizes[i : i + several] for i in range(0, len(sizes), several)]
        index = torch.cat(rows[begun * several :])
        mine = (draw[index].to(self.pixels.index_device) for draw in draws)
        steps = list(zip(*(draw.split([sum(group) for group in groups]) for draw in mine)))
        for number, (group, step, images) in enumerate(zip(groups, steps, self.pixels.cuts(steps)), start=begun):
            if self.policy:
                stream = self._stream(epoch, 1, number)
                images = self.policy(images.permute(0, 3, 1, 2), stream).permute(0, 2, 3, 1).contiguous()
            wanted = zip(images.split(group), *(each.split(group) for each in step))
            for part, *draw in islice(wanted, skipped if number == begun else 0, None):
                augment = self.augment
                pixels = augment.jittered(part, *draw) if isinstance(augment, ResizedCrop) else part.float()
                yield self._normalise(pixels), self._labels(draw[0])

    def _labels(self, which: Tensor | slice) -> Tensor:
        return self.labels[which].to(self.device, non_blocking=True)

    def _stream(self, epoch: int, kind: int, number: int) -> Generator:
        """Random numbers of their own for what comes after cropping, so that crops and order do not depend on it.

        They follow from the step's, or the group of steps', number alone, so that an epoch can begin at any step.
        """
        rank = self.share[0]
        return seeded(*self.seed, epoch, kind, number, *([rank] if rank else []))

    def _normalise(self, images: Tensor) -> Tensor:
        """(B, H, W, c) float in [0, 255], which is overwritten -> (B, c, H, W) float, channels last in memory."""
        rows = images.view(*images.shape[:2], -1).mul_(self.scale).add_(self.shift)
        return rows.view(images.shape).permute(0, 3, 1, 2)
