"""Rows of features in place of images: they may be larger than memory, and are read when they are wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Rows:
    """Some rows (N, D) of an array, which comes in float32 whatever it is stored as.

    Stands where an array of features does: it has a length, a shape, rows by index, :meth:`split` and :meth:`to`.

    Args:
        array: (M, D) in floating point, mapped from a file perhaps.
        positions: (N,) int64, which of its rows these are.
        digest: a hash of the array.
        network: (n, D) float32 -> (n, D'), applied to what is read.
    """

    device = torch.device("cpu")

    def __init__(
        self, array: Tensor, positions: Tensor, digest: str, network: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.array, self.positions, self.digest, self.network = array, positions, digest, network

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.positions), self.array.shape[1]

    @property
    def nbytes(self) -> int:
        """What all of them take in float32."""
        return 4 * len(self) * self.array.shape[1]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.array, self.positions[index], self.digest, self.network)

    def split(self, size: int) -> Iterator[Rows]:
        """Neighbours, ``size`` of them at a time."""
        for positions in self.positions.split(size):
            yield Rows(self.array, positions, self.digest, self.network)

    def through(self, network: Callable[[Tensor], Tensor]) -> Rows:
        """The same rows, as a network sees them."""
        return Rows(self.array, self.positions, self.digest, network)

    @torch.no_grad()
    def to(self, device: torch.device) -> Tensor:
        """All of them, (N, D) float32 on a device."""
        first, last = int(self.positions[0]), int(self.positions[-1])
        is_run = last - first + 1 == len(self) and bool((self.positions.diff() == 1).all())
        found = self.array[first : last + 1] if is_run else self.array[self.positions]
        rows = found.to(device).float()
        return self.network(rows) if self.network else rows

    def fingerprint(self) -> str:
        """A hash that changes with the array or the choice of rows."""
        return hashlib.sha256(self.digest.encode() + self.positions.numpy().tobytes()).hexdigest()


class RowBatches:
    """Rows in their order, ``batch_size`` at a time, as :class:`datasets.Batches` gives images: (B, D), labels (B,).

    ``share`` is (this process, number of processes), which take whole batches in turn.
    """

    def __init__(
        self, rows: Rows, labels: Tensor, batch_size: int, device: torch.device, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.rows, self.labels, self.batch_size, self.device, self.share = rows, labels, batch_size, device, share

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches, the same in every epoch."""
        mine, every = self.share
        for index in torch.arange(len(self.labels)).split(self.batch_size)[mine::every]:
            yield self.rows[index].to(self.device), self.labels[index].to(self.device)
