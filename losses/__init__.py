"""Losses: one family per file. ``LOSSES`` maps a --loss name to what makes it; :func:`make_loss` does so.

An instance maps (logits (B, C), labels (B,)) to a scalar in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from losses.softmax import (
    SoftmaxLoss,
    auto_label_smooth,
    balanced_softmax,
    class_balanced,
    class_balanced_weights,
    class_temperatures,
    cross_entropy,
    generalised_reweighting,
    label_aware_smoothing,
    ldam,
    logit_adjustment,
    reweighted,
    total_weight,
    vector_scaling,
)
from losses.weighted import LADE, ClassBalancedBCE, ClassBalancedSigmoid, focal

__all__ = [
    "LOSSES",
    "SoftmaxLoss",
    "auto_label_smooth",
    "balances",
    "class_balanced_weights",
    "make_loss",
    "total_weight",
    "reweighted",
    "takes_weights",
]

#: The maker, which takes class_counts (C,) first, and {option of the command: the maker's parameter}.
LOSSES: dict[str, tuple[Callable[..., nn.Module], Mapping[str, str]]] = {
    "ce": (cross_entropy, {"label_smooth": "smooth"}),
    "balanced-softmax": (balanced_softmax, {}),
    "logit-adjustment": (logit_adjustment, {"la_tau": "tau"}),
    "vs": (vector_scaling, {"vs_gamma": "gamma", "la_tau": "tau"}),
    "cdt": (class_temperatures, {"vs_gamma": "gamma"}),
    "ldam": (ldam, {"ldam_margin": "max_margin", "cosine_scale": "scale"}),
    "class-balanced": (class_balanced, {"cb_beta": "beta", "label_smooth": "smooth"}),
    "class-balanced-bce": (ClassBalancedBCE, {"cb_beta": "beta"}),
    "class-balanced-sigmoid": (ClassBalancedSigmoid, {"cb_beta": "beta"}),
    "generalised-reweighting": (generalised_reweighting, {"grw_rho": "rho"}),
    "label-aware-smoothing": (label_aware_smoothing, {"las_head": "head", "las_tail": "tail"}),
    "focal": (focal, {"focal_gamma": "gamma"}),
    "lade": (LADE, {"lade_alpha": "alpha", "lade_lambda": "lam"}),
}


def make_loss(name: str, class_counts: Sequence[int], values: Mapping[str, float | None]) -> nn.Module:
    """A loss of the table for class_counts (C,), with those of its options that ``values`` gives; None for its own."""
    make, options = LOSSES[name]
    given = {parameter: values[option] for option, parameter in options.items() if values.get(option) is not None}
    return make(class_counts, **given)


def balances(loss: nn.Module) -> bool:
    """Whether a loss makes up for the classes' sizes by weights, temperatures or a prior."""
    parts = dict(loss.named_buffers())
    used = [parts[name] for name in ("weight", "scale", "offset", "log_prior") if name in parts]
    return any(bool((part != part[0]).any()) for part in used)


def takes_weights(name: str) -> bool:
    """Whether a loss can be re-weighted later on: one of the softmax family that has no class weights of its own."""
    loss = make_loss(name, [2, 1], {})
    return isinstance(loss, SoftmaxLoss) and bool((loss.weight == 1).all())
