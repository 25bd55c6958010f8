"""The softmax family: cross-entropies that differ in five small numbers per class and share one analytic gradient.

With logits z (C,), label y and, per class, scale s, offset a, margin m, smoothing e and weight w:

    p = softmax(s (z + a - m_y 1_y))
    loss = w_y [-(1 - e_y) log p_y - (e_y / C) sum_j log p_j]          a batch: sum of losses / sum of weights
    d loss / d z = s w_y (p - (1 - e_y) 1_y - e_y / C)                 a batch: row by row, / sum of weights

Label smoothing and Label Over-Smooth set e, label-aware smoothing e by class, balanced softmax and logit adjustment a,
LDAM m and s, class-balanced and generalised re-weighting w. With that gradient the re-training solver trains many
classifiers at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SoftmaxLoss(nn.Module):
    """A member of the family: logits (B, C) float, labels (B,) int64 -> scalar, nats.

    Args:
        num_classes: C.
        scale: s, one number.
        offset, margin, smooth, weight: a, m, e, w; one number or (C,).

    Raises:
        ValueError: e outside [0, 1], w or s not positive.
    """

    offset: Tensor
    margin: Tensor
    smooth: Tensor
    weight: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        scale: float = 1.0,
        offset: Tensor | float = 0.0,
        margin: Tensor | float = 0.0,
        smooth: Tensor | float = 0.0,
        weight: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        per_class = {"offset": offset, "margin": margin, "smooth": smooth, "weight": weight}
        for name, value in per_class.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).expand(num_classes).clone())
        if not bool(((self.smooth >= 0) & (self.smooth <= 1)).all()):
            raise ValueError(f"smoothing {smooth} is not in [0, 1]")
        if scale <= 0 or not bool((self.weight > 0).all()):
            raise ValueError("scale and weights must be positive")

    def adjusted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """s (z + a - m_y 1_y): logits (B, C), labels (B,) -> (B, C)."""
        margins = torch.zeros_like(logits).scatter_(1, labels[:, None], self.margin.to(logits.dtype)[labels][:, None])
        return self.scale * (logits + self.offset - margins)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = self.adjusted(logits, labels).log_softmax(dim=1)
        smooth, weight = self.smooth[labels], self.weight[labels]
        true = log_p.gather(1, labels[:, None])[:, 0]
        losses = -(1 - smooth) * true - smooth * log_p.mean(dim=1)
        return (weight * losses).sum() / weight.sum()


def balanced_softmax(class_counts: Sequence[int]) -> SoftmaxLoss:
    """CE(z + log n): the training loss of balanced softmax (Ren et al., NeurIPS 2020); no parameter.

    Equals train-time logit adjustment at tau = 1. class_counts (C,), all above 0.
    """
    return logit_adjustment(class_counts, tau=1.0)


def logit_adjustment(class_counts: Sequence[int], tau: float = 1.0) -> SoftmaxLoss:
    """CE(z + tau log pi), pi = n / sum n (Menon et al., ICLR 2021); plain logits at test.

    Published with tau = 1 for CIFAR-LT and ImageNet-LT. class_counts (C,), all above 0.
    """
    log_prior = torch.log(class_frequencies(class_counts))
    return SoftmaxLoss(len(class_counts), offset=tau * log_prior)


def ldam(class_counts: Sequence[int], max_margin: float = 0.5, scale: float = 30.0) -> SoftmaxLoss:
    """CE(s (z - m_y 1_y)), m_j = max_margin n_j^(-1/4) / max_k n_k^(-1/4) (Cao et al., NeurIPS 2019; its code).

    Expects the logits of a cosine head. Published on CIFAR-LT with max_margin 0.5 and scale 30. class_counts (C,).
    """
    margins = torch.tensor(class_counts, dtype=torch.float64) ** -0.25
    return SoftmaxLoss(len(class_counts), scale=scale, margin=max_margin * margins / margins.max())


def class_balanced_weights(class_counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n_j), scaled to sum to C: the inverse effective number (Cui et al., CVPR 2019).

    beta 0.9999 is the paper's best on CIFAR-10-LT (smaller ones on CIFAR-100-LT) and that of LDAM-DRW's and Weight
    Balancing's code on both. class_counts (C,) -> (C,) float64.
    """
    weights = (1 - beta) / (1 - beta ** torch.tensor(class_counts, dtype=torch.float64))
    return weights * len(class_counts) / weights.sum()


def class_balanced(class_counts: Sequence[int], beta: float = 0.9999, smooth: float = 0.0) -> SoftmaxLoss:
    """Smoothed cross-entropy with :func:`class_balanced_weights`; a batch's mean is over them, as in LDAM-DRW."""
    return SoftmaxLoss(len(class_counts), weight=class_balanced_weights(class_counts, beta), smooth=smooth)


def generalised_reweighting(class_counts: Sequence[int], rho: float = 1.2) -> SoftmaxLoss:
    """Cross-entropy with weights pi_j^(-rho) scaled to sum to C (Zhang et al., DisAlign, CVPR 2021).

    Published with rho 1.2 for ImageNet-LT; MARC takes the same loss and value on CIFAR-100-LT. class_counts (C,).
    """
    weights = class_frequencies(class_counts) ** -rho
    return SoftmaxLoss(len(class_counts), weight=weights * len(class_counts) / weights.sum())


def label_aware_smoothing(class_counts: Sequence[int], head: float = 0.4, tail: float = 0.1) -> SoftmaxLoss:
    """Smoothing that grows with the class count (Zhong et al., MiSLAS, CVPR 2021), in its concave form.

    e_j = tail + (head - tail) sin(pi (n_j - n_min) / (2 (n_max - n_min))).

    Published with (0.4, 0.1) for CIFAR-100-LT at ratio 100 and Places-LT, (0.3, 0) for ImageNet-LT and iNaturalist.
    As in its code the smoothed mass is spread over all classes, the true one included. class_counts (C,).
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    spread = counts.max() - counts.min()
    place = (counts - counts.min()) / spread if spread > 0 else torch.ones_like(counts)
    return SoftmaxLoss(len(class_counts), smooth=tail + (head - tail) * torch.sin(place * math.pi / 2))


def class_frequencies(class_counts: Sequence[int]) -> Tensor:
    """pi_j = n_j / sum n: class_counts (C,) -> (C,) float64; ValueError where a class has no image."""
    counts = torch.tensor(class_counts, dtype=torch.float64)
    if not bool((counts > 0).all()):
        raise ValueError("a class without training images has no prior")
    return counts / counts.sum()
