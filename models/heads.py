"""Classifier heads on frozen features. ``HEADS`` maps the name in a checkpoint to a module: features (B, D) -> (B, C).

Every head has ``weight`` (C, D), whose rows are what weight norms are measured on. Those with ``to_linear`` are linear
in the features: they are trained in their own parameters and stored as a linear head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """z_j = s cos(f, w_j), without bias (Gidaris and Komodakis, CVPR 2018, who learn s); s is fixed, LDAM-DRW's 30."""

    scale: Tensor

    def __init__(self, num_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        nn.init.uniform_(self.weight, -1, 1)
        self.weight.data = F.normalize(self.weight.data)  # rows of length 1, as LDAM-DRW's
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, features: Tensor) -> Tensor:
        cosines: Tensor = F.linear(F.normalize(features), F.normalize(self.weight))
        return self.scale * cosines


class PrototypeHead(nn.Module):
    """Nearest class mean: z_j = -|f' - m_j|^2 + |f'|^2 = 2 f' m_j - |m_j|^2 (Kang et al., ICLR 2020).

    f' = f - center, scaled to length 1 where ``unit`` says so. The term |f'|^2 changes neither ranking nor softmax.
    """

    center: Tensor
    unit: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features), requires_grad=False)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("unit", torch.tensor(False))

    def transform(self, features: Tensor) -> Tensor:
        """Features f (B, D) -> f' (B, D)."""
        moved = features - self.center
        return torch.where(self.unit, F.normalize(moved), moved)  # no branch, which an exported graph could not have

    def forward(self, features: Tensor) -> Tensor:
        return 2 * F.linear(self.transform(features), self.weight) - self.weight.square().sum(dim=1)


class DisAlignHead(nn.Module):
    """z'_j = (1 + c a_j) z_j + c b_j with confidence c = sigmoid(u f + v) (Zhang et al., DisAlign, CVPR 2021).

    z = W f + b is stage 1's classifier, which stays as it is. As in its classification code a starts at 1, so that
    z' = (1 + c) z at first, b at 0 and u at 0.1; v starts at 0 here.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_classes), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.shift = nn.Parameter(torch.zeros(num_classes))
        self.confidence = nn.Linear(num_features, 1)
        nn.init.constant_(self.confidence.weight, 0.1)
        nn.init.zeros_(self.confidence.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits = F.linear(features, self.weight, self.bias)
        confidence = self.confidence(features).sigmoid()
        aligned: Tensor = (1 + confidence * self.scale) * logits + confidence * self.shift
        return aligned


class ScaledLinear(nn.Module):
    """z'_j = s_j (w_j f + b_j): learnable weight scaling, s from 1 (Kang et al., ICLR 2020); the bias is scaled too."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, features: Tensor) -> Tensor:
        scaled: Tensor = self.scale * self.linear(features)
        return scaled

    def to_linear(self) -> nn.Linear:
        """The linear head of the same logits."""
        scale = self.scale.detach()
        return make_linear(scale[:, None] * self.linear.weight, scale * self.linear.bias)


class MARC(nn.Module):
    """z'_j = a_j z_j + b_j |w_j| with z = W f + bias (Wang et al., MARC, ACML 2022); a starts at 1, b at 0."""

    norms: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(linear.out_features))
        self.shift = nn.Parameter(torch.zeros(linear.out_features))
        self.register_buffer("norms", linear.weight.detach().norm(dim=1))

    def forward(self, features: Tensor) -> Tensor:
        calibrated: Tensor = self.scale * self.linear(features) + self.shift * self.norms
        return calibrated

    def to_linear(self) -> nn.Linear:
        """The linear head of the same logits."""
        scale, shift = self.scale.detach(), self.shift.detach()
        return make_linear(scale[:, None] * self.linear.weight, scale * self.linear.bias + shift * self.norms)


class SAMN(nn.Module):
    """z_j = exp(1 / softplus(m_j)) w_j / |w_j| f + b_j + exp(1 / softplus(m'_j)) (SAMN, CVPR 2026).

    m and m' are :func:`pool_adjacent_violators` of ``scale`` and ``shift`` in the order of the classes' sizes, so that
    norms never fall from the largest class to the smallest; both start at n_j / n_max.
    """

    order: Tensor

    def __init__(self, linear: nn.Linear, class_counts: Sequence[int]) -> None:
        super().__init__()
        self.linear = make_linear(F.normalize(linear.weight), linear.bias).requires_grad_(False)
        counts = torch.tensor(class_counts).to(linear.weight)
        self.scale, self.shift = (nn.Parameter(counts / counts.max()) for _ in range(2))
        self.register_buffer("order", counts.argsort(descending=True, stable=True))

    def _factors(self, values: Tensor) -> Tensor:
        pooled = pool_adjacent_violators(values[self.order])
        return (1 / F.softplus(torch.zeros_like(values).scatter(0, self.order, pooled))).exp()

    def forward(self, features: Tensor) -> Tensor:
        logits = F.linear(features, self._factors(self.scale)[:, None] * self.linear.weight, self.linear.bias)
        return logits + self._factors(self.shift)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The linear head of the same logits."""
        weight = self._factors(self.scale)[:, None] * self.linear.weight
        return make_linear(weight, self.linear.bias + self._factors(self.shift))


class UnitLinear(nn.Module):
    """z_j = s w_j / |w_j| f + b_j: rows of one norm s, which is fixed (BCE3S, AAAI 2026)."""

    scale: Tensor

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("scale", scale)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.scale * F.normalize(self.weight), self.bias)

    def to_linear(self) -> nn.Linear:
        """The linear head of the same logits."""
        return make_linear(self.scale * F.normalize(self.weight), self.bias)


def pool_adjacent_violators(values: Tensor) -> Tensor:
    """The nearest sequence that never rises (isotonic regression): values (C,) -> (C,), means of blocks of them."""
    from scipy.optimize import isotonic_regression  # here, since it is slow to import and rarely needed

    edges = isotonic_regression(values.detach().double().cpu().numpy(), increasing=False).blocks
    sizes = torch.as_tensor(edges, device=values.device).diff()
    block = torch.arange(len(sizes), device=values.device).repeat_interleave(sizes)
    means = values.new_zeros(len(sizes)).index_add(0, block, values) / sizes
    return means[block]


@torch.no_grad()
def project_rows(weight: Tensor, radius: float, onto: bool = False) -> None:
    """Puts the rows of a weight (C, D) inside a sphere, w_j <- min(1, r / |w_j|) w_j, or ``onto`` it, in place."""
    weight.mul_((radius / weight.norm(dim=1, keepdim=True)).clamp(max=math.inf if onto else 1.0))


def make_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear head of copies of a weight (C, D) and a bias (C,), zero where there is none."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    linear.weight, linear.bias = (nn.Parameter(part.detach().clone()) for part in (weight, bias))
    return linear


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "cosine": CosineHead,
    "prototypes": PrototypeHead,
    "disalign": DisAlignHead,
}


def head_name(head: nn.Module) -> str:
    """The key of ``HEADS`` that a head is stored under."""
    return next(name for name, kind in HEADS.items() if type(head) is kind)
