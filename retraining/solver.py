"""Trains S linear classifiers at once on one stream of features, each with its own loss, learning rate and decay.

One step is a wide matrix product, (B, D) x (D, S C), the analytic gradient of :class:`losses.softmax.SoftmaxLoss`, and
SGD's update with per-head learning rates; a single classifier is S = 1. It equals S separate ``torch.optim.SGD`` runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from losses.softmax import SoftmaxLoss

#: Heads per matrix product on a CPU: weights and momentum of so many stay in its cache (CIFAR sizes).
CPU_CHUNK = 8


class _Chunk:
    """Some heads that are stepped together: weight and momentum (S C, D + 1), the last column being the bias."""

    def __init__(
        self, weight: Tensor, losses: Sequence[SoftmaxLoss], lr: Tensor, wd: Tensor, momentum: float, nesterov: bool
    ) -> None:
        self.heads, self.classes = len(losses), weight.shape[0]
        self.weight = weight.repeat(self.heads, 1)
        self.velocity = torch.zeros_like(self.weight)
        self.momentum, self.nesterov = momentum, nesterov
        self.lr, self.wd = (v.repeat_interleave(self.classes)[:, None].to(weight) for v in (lr, wd))
        self.decays = bool((wd != 0).any())
        self.scale = torch.tensor([loss.scale for loss in losses]).to(weight)
        # (S, C) each; a step skips what no loss of the chunk has.
        self.offset, self.margin, self.smooth, self.class_weight = (
            torch.stack([getattr(loss, name) for loss in losses]).to(weight)
            for name in ("offset", "margin", "smooth", "weight")
        )
        self.is_plain = not self.offset.any() and not self.margin.any() and bool((self.scale == 1).all())
        self.is_unweighted = bool((self.class_weight == 1).all())

    def logits(self, inputs: Tensor) -> Tensor:
        """Inputs (B, D + 1) -> (B, S, C)."""
        return (inputs @ self.weight.T).view(len(inputs), self.heads, self.classes)

    def step(self, inputs: Tensor, labels: Tensor, rate: float) -> None:
        """One step on inputs (B, D + 1) and labels (B,); ``rate`` multiplies the learning rates."""
        index = labels[:, None, None].expand(-1, self.heads, 1)
        z = self.logits(inputs)
        if not self.is_plain:
            z = z + self.offset
            z.scatter_add_(2, index, -self.margin.T[labels][:, :, None])
            z *= self.scale[:, None]
        rows = z.softmax(dim=2)
        smooth = self.smooth.T[labels][:, :, None]  # (B, S, 1)
        rows -= smooth / self.classes
        rows.scatter_add_(2, index, smooth - 1)
        if self.is_unweighted:
            rows *= (self.scale / len(labels))[:, None]
        else:
            weight = self.class_weight.T[labels]  # (B, S)
            rows *= (self.scale * weight / weight.sum(dim=0))[:, :, None]
        flat = rows.view(len(labels), -1)
        if self.nesterov:
            gradient = flat.T @ inputs
            if self.decays:
                gradient.add_(self.wd * self.weight)
            self.velocity.mul_(self.momentum).add_(gradient)
            update = gradient.add_(self.velocity, alpha=self.momentum)
        else:
            self.velocity.addmm_(flat.T, inputs, beta=self.momentum)
            if self.decays:
                self.velocity.add_(self.wd * self.weight)
            update = self.velocity
        self.weight.sub_(self.lr * rate * update)


class LinearHeads:
    """S linear classifiers that start from the same weights.

    Args:
        weight, bias: (C, D) and (C,) float, where all start.
        losses: S members of the softmax family.
        lr, wd: S learning rates and weight decays; both act on weight and bias alike, as torch's SGD does.
        momentum, nesterov: shared, as in ``torch.optim.SGD``.
        chunk: heads per matrix product; None for 8 on a CPU, all elsewhere.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        losses: Sequence[SoftmaxLoss],
        lr: Sequence[float],
        wd: Sequence[float],
        momentum: float = 0.9,
        nesterov: bool = False,
        chunk: int | None = None,
    ) -> None:
        start = torch.cat([weight.detach(), bias.detach()[:, None]], dim=1)
        size = chunk or (CPU_CHUNK if start.device.type == "cpu" else len(losses))
        lrs, wds = torch.tensor(lr, dtype=torch.float64), torch.tensor(wd, dtype=torch.float64)
        self.chunks = [
            _Chunk(start, losses[i : i + size], lrs[i : i + size], wds[i : i + size], momentum, nesterov)
            for i in range(0, len(losses), size)
        ]

    def train_epoch(self, steps: Iterable[tuple[Tensor, Tensor]], rate: float = 1.0) -> None:
        """One SGD step of every head on each (features (B, D), labels (B,)), learning rates times ``rate``."""
        for features, labels in steps:
            inputs = _with_one(features)
            for chunk in self.chunks:
                chunk.step(inputs, labels, rate)

    def logits(self, features: Tensor) -> Iterable[Tensor]:
        """The logits (N, C) of each head in turn on features (N, D)."""
        inputs = _with_one(features)
        for chunk in self.chunks:
            yield from chunk.logits(inputs).unbind(dim=1)

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """The (weight (C, D), bias (C,)) of each head."""
        rows = [part for chunk in self.chunks for part in chunk.weight.view(chunk.heads, chunk.classes, -1)]
        return [(row[:, :-1].clone(), row[:, -1].clone()) for row in rows]


def _with_one(features: Tensor) -> Tensor:
    """Features (B, D) -> (B, D + 1), the last column 1: the bias becomes a weight."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
