"""Samplers: the order in which an epoch shows its images. ``SAMPLERS`` maps a --sampler name to one.

Kang et al. (Decoupling, ICLR 2020) draw class j with probability p_j = n_j^q / sum_i n_i^q: q = 1 instance-balanced,
0 class-balanced, 1/2 square-root; progressively-balanced moves from the first to the second over the epochs. As in
their training loop, an epoch is N images whatever the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

#: (labels (N,), epoch from 0, number of epochs, generator) -> positions (N,) int64.
Sampler = Callable[[Tensor, int, int, Generator], Tensor]


def instance_balanced(labels: Tensor, epoch: int, epochs: int, generator: Generator) -> Tensor:
    """Every image once, shuffled: p_j proportional to n_j."""
    return torch.randperm(len(labels), generator=generator)


def class_balanced(labels: Tensor, epoch: int, epochs: int, generator: Generator) -> Tensor:
    """p_j = 1/C, as the published class-aware sampler cycles within an epoch: see :func:`_from_classes`.

    The published cycles go on over epochs; here each epoch begins its own, so that it follows from its seed alone. The
    classes come in rounds of a fresh order, each giving four images in a row; Decoupling's configuration then
    shuffles a batch, which does not matter to a loss that is a mean over it.
    """
    present = labels.unique()
    run = 4
    rounds = -(-len(labels) // (run * len(present)))
    orders = [present[torch.randperm(len(present), generator=generator)] for _ in range(rounds)]
    classes = torch.cat(orders).repeat_interleave(run)[: len(labels)]
    return _from_classes(labels, classes, generator)


def square_root(labels: Tensor, epoch: int, epochs: int, generator: Generator) -> Tensor:
    """Images drawn with replacement with weight n_y^(-1/2), so that p_j is proportional to n_j^(1/2)."""
    weights = torch.bincount(labels)[labels].double() ** -0.5
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def progressively_balanced(labels: Tensor, epoch: int, epochs: int, generator: Generator) -> Tensor:
    """p_j(t) = (1 - t/T) n_j/N + (t/T)/C with t/T from 0 in the first epoch to 1 in the last, as published."""
    progress = epoch / (epochs - 1) if epochs > 1 else 1.0
    counts = torch.bincount(labels).double()
    law = (1 - progress) * counts / len(labels) + progress * (counts > 0) / (counts > 0).sum()
    classes = torch.multinomial(law, len(labels), replacement=True, generator=generator)
    return _from_classes(labels, classes, generator)


def _from_classes(labels: Tensor, classes: Tensor, generator: Generator) -> Tensor:
    """One image for each entry of ``classes`` (N,), cycling through the shuffled images of that class."""
    positions, number = torch.empty_like(classes), int(labels.max()) + 1
    for wanted, members in zip(_places(classes, number), _places(labels, number)):
        if len(wanted) == 0:
            continue
        rounds = -(-len(wanted) // len(members))
        cycle = torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)])
        positions[wanted] = cycle[: len(wanted)]
    return positions


def _places(labels: Tensor, classes: int) -> Sequence[Tensor]:
    """Where each class is: labels (N,) -> C times (n_j,), rising."""
    places: Sequence[Tensor] = labels.argsort(stable=True).split(torch.bincount(labels, minlength=classes).tolist())
    return places


SAMPLERS: dict[str, Sampler] = {
    "instance": instance_balanced,
    "class": class_balanced,
    "sqrt": square_root,
    "progressive": progressively_balanced,
}
