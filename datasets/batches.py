"""Batches of an image set that lives in memory: shuffle, crop, flip and normalisation without workers or PIL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from datasets.samplers import Sampler, instance_balanced

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding by ``pad`` pixels, and a horizontal flip with probability 1/2 where ``flip``."""

    pad: int
    flip: bool


class Draws(NamedTuple):
    """One epoch's random numbers: order (N,), top (N,) and left (N,) crop offsets, flip (N,) bool; one row a step."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


def draw_windows(n: int, augment: Augment, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` random crops and flips: top (n,) and left (n,) in [0, 2 pad], flip (n,) bool."""
    top, left = torch.randint(2 * augment.pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5 if augment.flip else torch.zeros(n, dtype=torch.bool)
    return top, left, flip


def seeded(*numbers: int) -> Generator:
    """A generator whose stream follows from the numbers alone: the same on every device, in every later run."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))


def crop_flip(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts one window out of each indexed image and mirrors some, as one gather.

    padded (N, c, H + 2 pad, W + 2 pad); index, top, left (B,) int64; flip (B,) bool; size (H, W) -> (B, c, H, W).
    """
    height, width = size
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(len(index), width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    channels = torch.arange(padded.shape[1], device=padded.device)
    return padded[index[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]


class Batches:
    """Mini-batches of an in-memory image set on a device: pairs of images (B, c, H, W) float and labels (B,) int64.

    With ``augment``: in the sampler's order and augmented, an epoch's randomness fixed by (*seed, epoch); the last
    batch may be smaller. Without: file order, as they are. Pixels are scaled to [0, 1] and normalised per channel.
    ``epochs`` is the number of epochs that a progressive sampler spreads over.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        augment: Augment | None = None,
        seed: Sequence[int] = (0,),
        sampler: Sampler = instance_balanced,
        epochs: int = 1,
    ) -> None:
        pad = augment.pad if augment else 0
        self.size = (images.shape[2], images.shape[3])
        self.images = F.pad(images, (pad, pad, pad, pad)).to(device)
        self.labels = labels.to(device)
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.sampler, self.epochs = sampler, epochs

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def draws(self, epoch: int) -> Draws:
        """All random numbers of an epoch of augmented batches."""
        assert self.augment is not None
        generator = seeded(*self.seed, epoch)
        order = self.sampler(self.labels.cpu(), epoch, self.epochs, generator)
        return Draws(order, *draw_windows(len(order), self.augment, generator))

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        if self.augment is not None:
            yield from self.cut(self.draws(epoch))
            return
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size)):
            yield self._normalise(images), labels

    def cut(self, draws: Draws) -> Iterator[Batch]:
        """The batches of given images, crops and flips."""
        steps = zip(*(draw.to(self.images.device).split(self.batch_size) for draw in draws))
        for order, top, left, flip in steps:
            images = crop_flip(self.images, order, top, left, flip, self.size)
            yield self._normalise(images), self.labels[order]

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)
