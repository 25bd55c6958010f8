"""How a balanced data set becomes long-tailed: how many images of each class, which ones, which are held out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IMB_TYPES = ("exp", "step")
SUBSETS = ("first", "shuffled")


def class_sizes(n_max: int, num_classes: int, imb_ratio: float, imb_type: str = "exp") -> list[int]:
    """Images per class, largest first (Cui et al., CVPR 2019; step: Buda et al., 2018; both as in LDAM-DRW).

    exp: n_i = int(n_max * ratio^(-i / (C - 1))). step: n_max for the first half of the classes, int(n_max / ratio) for
    the rest. CIFAR-100 (n_max 500) at ratio 10 / 50 / 100: 19,573 / 12,608 / 10,847 images.
    """
    if imb_type == "exp":
        return [int(n_max * imb_ratio ** (-i / (num_classes - 1))) for i in range(num_classes)]
    head = num_classes // 2
    return [n_max] * head + [int(n_max / imb_ratio)] * (num_classes - head)


def choose_subset(labels: Tensor, class_counts: list[int], subset: str = "first", subset_seed: int = 0) -> Tensor:
    """Positions of the long-tailed subset, class by class.

    first: the first n_i images of class i in file order (LOS, Weight Balancing). shuffled: the classes' positions are
    shuffled in turn by NumPy's legacy generator from ``subset_seed``; 0 gives LDAM-DRW's subsets exactly.

    labels (N,) int64, class_counts (C,) -> (sum of class_counts,) int64.
    """
    generator = np.random.RandomState(subset_seed)
    chosen = []
    for label, count in enumerate(class_counts):
        positions = np.flatnonzero(labels.numpy() == label)
        if subset == "shuffled":
            generator.shuffle(positions)
        chosen.append(positions[:count])
    return torch.from_numpy(np.concatenate(chosen))


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Mask of the images held out for validation: ``fraction`` of every class, rounded, at random from ``seed``.

    A class of two or more gives at least one and keeps at least one; a class of one gives none.

    labels (N,) int64 -> (N,) bool.
    """
    mask = torch.zeros(len(labels), dtype=torch.bool)
    if fraction == 0:
        return mask
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        positions = torch.nonzero(labels == label).flatten()
        count = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        mask[positions[torch.randperm(len(positions), generator=generator)[:count]]] = True
    return mask
