"""Losses outside the softmax family, for autograd: focal, class-balanced binary cross-entropies, LADE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.softmax import class_balanced_weights, class_frequencies


class Focal(nn.Module):
    """Mean over B of -(1 - p_y)^gamma log p_y (Lin et al., ICCV 2017; here p is a softmax, and there is no alpha).

    logits (B, C), labels (B,) -> scalar, nats. gamma 2 is the paper's; LDAM-DRW's CIFAR-LT baseline takes 1.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, labels, reduction="none")
        rest = (-torch.expm1(log_p)).clamp(min=1e-12)  # at 0 a power below 1 has no derivative
        return -(rest**self.gamma * log_p).mean()


def focal(class_counts: Sequence[int], gamma: float = 1.0) -> Focal:
    """Focal loss with LDAM-DRW's gamma; it needs no class counts."""
    return Focal(gamma)


class _ClassBalanced(nn.Module):
    """Losses with the weights of :func:`losses.softmax.class_balanced_weights`."""

    weight: Tensor

    def __init__(self, class_counts: Sequence[int], beta: float = 0.9999) -> None:
        super().__init__()
        self.register_buffer("weight", class_balanced_weights(class_counts, beta).float())


class ClassBalancedBCE(_ClassBalanced):
    """Class-balanced loss as Weight Balancing's code has it: binary cross-entropy between softmax and one-hot.

    mean over B and C of w_y BCE(p_j, [j = y]), with the weights of :func:`losses.softmax.class_balanced_weights`.
    About 1/C the size of a cross-entropy, so that a weight decay of 0.1 beside it is far stronger than it looks.

    logits (B, C), labels (B,) -> scalar, nats.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        probabilities = logits.softmax(dim=1)
        bad = probabilities.isnan()  # torch's loss ends the program at a NaN; here it comes out as a NaN
        losses = F.binary_cross_entropy(probabilities.masked_fill(bad, 0.5), targets, reduction="none").mean(dim=1)
        return (self.weight[labels] * losses.masked_fill(bad.any(dim=1), torch.nan)).mean()


class ClassBalancedSigmoid(_ClassBalanced):
    """Class-balanced sigmoid loss (Cui et al., CVPR 2019): mean over B of w_y sum_j BCE(sigmoid(z_j), [j = y]).

    The weights are those of :func:`losses.softmax.class_balanced_weights`. logits (B, C), labels (B,) -> scalar, nats.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
        return (self.weight[labels] * losses).mean()


class LADE(nn.Module):
    """Balanced softmax plus alpha times LADE's regulariser (Hong et al., CVPR 2021; its code).

    The regulariser is - sum_j pi_j [E_j - L_j - lam L_j^2] with E_j the mean logit j of the batch's images of class j
    (0 where there is none) and L_j = log mean_i exp(z_ij - log pi_j - log C) over all images of the batch.

    Published: alpha 0.1, lam 0.01 on CIFAR-100-LT at ratio 100. logits (B, C), labels (B,) -> scalar, nats.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Sequence[int], alpha: float = 0.1, lam: float = 0.01) -> None:
        super().__init__()
        self.register_buffer("log_prior", class_frequencies(class_counts).log().float())
        self.alpha, self.lam = alpha, lam

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        members = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        first = (logits * members).sum(dim=0) / members.sum(dim=0).clamp(min=1)
        spread = logits - self.log_prior - math.log(logits.shape[1])
        second = spread.logsumexp(dim=0) - math.log(len(logits))
        bound = first - second - self.lam * second**2
        return F.cross_entropy(logits + self.log_prior, labels) - self.alpha * (self.log_prior.exp() * bound).sum()
