"""The softmax family: cross-entropies that differ in five small numbers per class and share one analytic gradient.

With logits z (C,), label y and, per class, scale s, offset a, margin m, smoothing e and weight w:

    p = softmax(s z + a - m_y 1_y)
    loss = w_y [-(1 - e_y) log p_y - (e_y / C) sum_j log p_j]          a batch: sum of losses / sum of weights
    d loss / d z = s w_y (p - (1 - e_y) 1_y - e_y / C)                 a batch: row by row, / sum of weights

Label smoothing and Label Over-Smooth set e, label-aware smoothing e by class, balanced softmax and logit adjustment a,
vector scaling s and a, LDAM m, class-balanced and generalised re-weighting w. With that gradient the re-training solver
trains many classifiers at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Label Over-Smooth's published setting on CIFAR-100-LT, d = 0.98 at C = 100, up to rounding: the true class
#: gets 1 + C (1 - d) / d = 1 + 2.04 times the probability of any other.
AUTO_EXCESS = 2.04


def auto_label_smooth(num_classes: int) -> float:
    """d = C / (C + 2.04): keeps the published ratio of true to other label, 3.04, at every number of classes.

    0.831 at C = 10, 0.980 at 100, 0.998 at 1000. Away from 100 classes this is an extrapolation of this project's;
    Label Over-Smooth (ICLR 2025) publishes 0.98 for CIFAR-100-LT only.
    """
    return num_classes / (num_classes + AUTO_EXCESS)


class SoftmaxLoss(nn.Module):
    """A member of the family: logits (B, C) float, labels (B,) int64 -> scalar, nats.

    Args:
        num_classes: C.
        scale, offset, margin, smooth, weight: s, a, m, e, w; one number or (C,).

    Raises:
        ValueError: e outside [0, 1], s or w not positive.
    """

    scale: Tensor
    offset: Tensor
    margin: Tensor
    smooth: Tensor
    weight: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        scale: Tensor | float = 1.0,
        offset: Tensor | float = 0.0,
        margin: Tensor | float = 0.0,
        smooth: Tensor | float = 0.0,
        weight: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        per_class = {"scale": scale, "offset": offset, "margin": margin, "smooth": smooth, "weight": weight}
        for name, value in per_class.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).expand(num_classes).clone())
        if not bool(((self.smooth >= 0) & (self.smooth <= 1)).all()):
            raise ValueError(f"smoothing {smooth} is not in [0, 1]")
        if not bool((self.weight > 0).all()):
            raise ValueError("weights must be positive")
        if not bool((self.scale > 0).all()):
            raise ValueError("scales must be positive")
        # Plain (smoothed) cross-entropy is a single call of torch's, a fifth of the kernels on a GPU.
        ones, zeros = torch.stack([self.scale, self.weight]), torch.stack([self.offset, self.margin])
        is_plain = bool((ones == 1).all()) and not zeros.any()
        self.plain_smooth = float(smooth) if is_plain and not isinstance(smooth, Tensor) else None

    def adjusted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """s z + a - m_y 1_y: logits (B, C), labels (B,) -> (B, C)."""
        margins = torch.zeros_like(logits).scatter_(1, labels[:, None], self.margin.to(logits.dtype)[labels][:, None])
        return self.scale * logits + self.offset - margins

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.plain_smooth is not None:
            return F.cross_entropy(logits, labels, label_smoothing=self.plain_smooth)
        log_p = self.adjusted(logits, labels).log_softmax(dim=1)
        smooth, weight = self.smooth[labels], self.weight[labels]
        true = log_p.gather(1, labels[:, None])[:, 0]
        losses = -(1 - smooth) * true - smooth * log_p.mean(dim=1)
        return (weight * losses).sum() / weight.sum()


def total_weight(loss: nn.Module, labels: Tensor) -> Tensor:
    """What a loss divides the sum over a batch by (): the weights of its labels (B,), or their number.

    The loss of a batch is the mean of its parts' losses, weighted by this.
    """
    if isinstance(loss, SoftmaxLoss):
        return loss.weight[labels].sum()
    return torch.full((), float(len(labels)), device=labels.device)


def cross_entropy(class_counts: Sequence[int], smooth: float = 0.0) -> SoftmaxLoss:
    """CE with labels smoothed by d: 1 - d + d/C for the true class, d/C for each other; class_counts (C,) give C alone.

    d = 0 is plain cross-entropy (Szegedy et al., CVPR 2016, smooth with 0.1); Label Over-Smooth (ICLR 2025) re-trains
    the classifier with d = 0.98 at C = 100, where the true class gets 0.0298 and the others 0.0098.
    """
    return SoftmaxLoss(len(class_counts), smooth=smooth)


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


def vector_scaling(class_counts: Sequence[int], gamma: float = 0.3, tau: float = 1.2) -> SoftmaxLoss:
    """CE(z / Delta + tau log pi), Delta_j = (n_max / n_j)^gamma (Kini et al., NeurIPS 2021); plain logits at test.

    Published with gamma 0.3 and tau 1.2 on CIFAR-100-LT, gamma 0.2 on CIFAR-10-LT. class_counts (C,), all above 0.
    """
    prior = class_frequencies(class_counts)
    return SoftmaxLoss(len(class_counts), scale=(prior / prior.max()) ** gamma, offset=tau * prior.log())


def class_temperatures(class_counts: Sequence[int], gamma: float = 0.2) -> SoftmaxLoss:
    """CE(z / Delta): class-dependent temperatures (Ye et al., 2020), :func:`vector_scaling` without a prior."""
    return vector_scaling(class_counts, gamma, tau=0.0)


def ldam(class_counts: Sequence[int], max_margin: float = 0.5, scale: float = 30.0) -> SoftmaxLoss:
    """CE(z - s m_y 1_y), m_j = max_margin n_j^(-1/4) / max_k n_k^(-1/4) (Cao et al., NeurIPS 2019; its code).

    z = s cos are the logits of a cosine head of that scale. Published on CIFAR-LT with max_margin 0.5 and scale 30.
    class_counts (C,).
    """
    margins = torch.tensor(class_counts, dtype=torch.float64) ** -0.25
    return SoftmaxLoss(len(class_counts), margin=scale * max_margin * margins / margins.max())


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


def reweighted(loss: nn.Module, weight: Tensor) -> SoftmaxLoss:
    """The same loss of the family with other class weights (C,): what deferred re-weighting (LDAM-DRW) changes to."""
    assert isinstance(loss, SoftmaxLoss)
    kept = {name: getattr(loss, name) for name in ("scale", "offset", "margin", "smooth")}
    return SoftmaxLoss(len(weight), **kept, weight=weight)


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
