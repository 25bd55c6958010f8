"""Batches whose features a method changes: replaced by samples around them, or fused with those of other batches.

Both take the steps of an epoch as they pass, features (B, D) and labels (B,), whatever their source, and draw from one
generator in the order of the steps, so that an epoch's batches follow from its seed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Generator, Tensor

from datasets.batches import Batch
from retraining.features import BLOCK_BYTES
from utils.errors import UsageError
from utils.system import free_memory

#: Keeps these random numbers apart from those of order and crops (2) and of the views (3).
CHANGES_STREAM = 4


class TailSampler:
    """Gaussians around features, calibrated with the classes nearest to them (Vigneswaran et al., 2021).

    A feature f of class j stands for itself with probability n_j / n_max, and else for a sample of N(mu, Sigma): mu the
    mean of f and of the k nearest class means, Sigma the mean of these classes' covariances, and alpha v on its
    diagonal, v the mean variance within classes. Images that are drawn class-balanced so become the balanced set of
    real features and of samples that fill every class up to n_max.

    No covariance is formed: R^T e with e ~ N(0, I) has the covariance R^T R, and R is the class's residuals.

    Args:
        counts: (C,) images of each class.
        blocks: features (n, D) and labels (n,) of the training images, block after block.
        neighbours: k; all classes where there are fewer.
        alpha: as above.

    Attributes:
        means: (C, D) class means.
        roots: of each class R (r, D) with R^T R its covariance, r at most D and n_j.
        sampled: (C,) shares of the features that are replaced.
        noise: sqrt(alpha v).
    """

    def __init__(
        self, counts: Sequence[int], blocks: Iterable[tuple[Tensor, Tensor]], neighbours: int, alpha: float
    ) -> None:
        self.neighbours = min(neighbours, len(counts))
        residuals = sorted_by_class(counts, blocks)
        self.means, squares = residuals.new_empty(len(counts), residuals.shape[1]), 0.0
        self.roots: list[Tensor] = []
        for mean, rows in zip(self.means, residuals.split(list(counts))):
            mean.copy_(rows.mean(dim=0))
            rows -= mean
            squares += float(rows.square().sum())
            rows /= max(1, len(rows) - 1) ** 0.5
            self.roots.append(torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows)
        freedom = max(1, len(residuals) - len(counts)) * residuals.shape[1]
        self.noise = (alpha * squares / freedom) ** 0.5
        self.sampled = 1 - torch.tensor(counts, device=residuals.device) / max(counts)

    def __call__(self, steps: Iterator[Batch], generator: Generator) -> Iterator[Batch]:
        """The steps, with samples in place of some features; many at a time, since classes are gone through in turn."""
        for first in steps:
            window = [first, *islice(steps, max(1, BLOCK_BYTES // first[0].nbytes) - 1)]
            features, labels = (torch.cat(part) for part in zip(*window))
            drawn = torch.rand(len(labels), generator=generator).to(labels.device) < self.sampled[labels]
            features[drawn] = self.around(features[drawn], generator)
            yield from zip(features.split(len(first[1])), labels.split(len(first[1])))

    def around(self, features: Tensor, generator: Generator) -> Tensor:
        """A sample (m, D) around each of the features (m, D)."""
        k, rows = self.neighbours, max(1, BLOCK_BYTES // (4 * len(self.means)))
        distances = (torch.cdist(part, self.means) for part in features.split(rows))
        nearest = torch.cat([each.topk(k, largest=False).indices for each in distances]).flatten()
        sizes = torch.bincount(nearest, minlength=len(self.means)).tolist()
        by_class = (nearest.argsort(stable=True) // k).split(sizes)
        found = features / (k + 1)
        for mean, root, places in zip(self.means, self.roots, by_class):
            if len(places):
                drawn = torch.randn(len(places), len(root), generator=generator).to(root.device)
                found[places] += mean / (k + 1) + drawn @ root / k**0.5
        if self.noise:
            found += self.noise * torch.randn(found.shape, generator=generator).to(found.device)
        return found


def sorted_by_class(counts: Sequence[int], blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Features (N, D) of all blocks, class after class, of which there are counts (C,).

    Raises:
        UsageError: they do not fit into memory.
    """
    found, free = torch.empty(0), torch.tensor([0, *counts[:-1]]).cumsum(dim=0)
    for features, labels in blocks:
        if len(found) == 0:
            shape, room = (sum(counts), features.shape[1]), free_memory(features.device)
            if 4 * shape[0] * shape[1] > room:
                needed = f"--method tail-sampling holds {shape[0]} x {shape[1]} features in memory"
                raise UsageError(f"{needed}, of which {room / 1e6:,.0f} MB are free", "another method, or more memory")
            found, free = features.new_empty(shape), free.to(labels.device)
        order, here = labels.argsort(stable=True), torch.bincount(labels, minlength=len(counts))
        own = labels[order]
        rank = torch.arange(len(own), device=own.device) - (here.cumsum(dim=0) - here)[own]
        found[free[own] + rank] = features[order]
        free += here
    return found


def fused(steps: Iterable[Batch], others: Iterable[Batch], rho: float, generator: Generator) -> Iterator[Batch]:
    """The steps, with a share rho of the channels, others in each step, taken from other batches of the same sizes."""
    for (features, labels), (second, _) in zip(steps, others):
        taken = torch.zeros(features.shape[1], dtype=torch.bool)
        taken[torch.randperm(len(taken), generator=generator)[: int(rho * len(taken))]] = True
        yield torch.where(taken.to(features.device), second, features), labels
