"""Class priors: a classifier's probabilities where classes are otherwise frequent than where it was made.

Where p(x | j) stays and only the shares of the classes change, from ``source`` to ``test`` (Saerens, Latinne and
Decaestecker, Neural Computation 2002, Eq. 2.4):

    p'(j | x) = p(j | x) test_j / source_j / sum_i p(i | x) test_i / source_i = softmax(log p + log(test / source))_j

Priors are (C,) float64, of sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.readers import Unreadable, parse_json, read_bytes, read_table

#: EM ends after a step that moves less of the prior than this, or after so many steps.
TOLERANCE, MOST_STEPS = 1e-7, 2000
#: Bytes of a file of weights, at most.
MOST_BYTES = 2**26


def shares(weights: Sequence[float]) -> Tensor:
    """Weights (C,), not negative and not all 0, as the prior that they are proportional to."""
    values = torch.tensor(weights, dtype=torch.float64)
    values = values / values.max()  # whose sum is finite
    return values / values.sum()


def log_ratio(test: Tensor, source: Tensor) -> Tensor:
    """log(test / source), what is added to logits: (C,) float32, -inf for a class that is not there."""
    return (test.log() - source.log()).float()


def estimate(probabilities: Tensor, source: Tensor) -> Tensor:
    """The prior of unlabelled images by expectation maximisation, from ``source`` (Saerens et al., 2002, Eq. 2.9).

    E: p(j | x_k) with the prior so far, by Eq. 2.4; M: prior_j = the mean of p(j | x_k) over the images. Each step
    raises the likelihood of the images.

    probabilities (N, C) of a classifier that was made for ``source`` (C,) -> (C,).
    """
    rows, prior = probabilities.double(), source
    for _ in range(MOST_STEPS):
        ratio = prior / source
        updated = ratio * (rows.T @ (rows @ ratio).reciprocal()) / len(rows)
        moved = float((updated - prior).abs().sum())
        prior = updated
        if moved < TOLERANCE:
            break
    return prior / prior.sum()


def long_tailed(class_counts: Sequence[int], ratio: float, is_reversed: bool = False) -> Tensor:
    """A long-tailed test set's prior, test_j ~ ratio^(-r_j / (C - 1)) (Zhang et al., SADE, NeurIPS 2022).

    r_j is class j's place in the order of falling training images, from 0: SADE's forward long tail. Backward,
    ``is_reversed``, counts from the other end. class_counts (C,), ratio of the largest class to the smallest -> (C,).
    """
    order = torch.tensor(class_counts).argsort(descending=True, stable=True)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order.flip(0) if is_reversed else order] = torch.arange(len(order), dtype=torch.float64)
    return (-math.log(ratio) * places / max(1, len(order) - 1)).softmax(dim=0)


def read_prior(flag: str, path: str, class_names: Sequence[str]) -> Tensor:
    """The prior in a file: a CSV with the columns class (its name, or its number from 0) and weight, or a JSON list.

    Raises:
        UsageError: it cannot be read, lacks a class or has an unknown one or one twice; a weight is no number from 0
            up, or all are 0.
    """
    allowed = f"a CSV class,weight or a JSON list, with a weight from 0 up for each of {len(class_names)} classes"
    try:
        is_list = read_bytes(path, MOST_BYTES).lstrip()[:1] == b"["
        weights = _from_json(path) if is_list else _from_csv(path, class_names)
    except Unreadable as error:
        raise UsageError(f"{flag} {path}: {error}", allowed) from None
    if len(weights) != len(class_names):
        raise UsageError(f"{flag} {path}: {len(weights)} weights", allowed)
    for name, weight in zip(class_names, weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"{flag} {path}: the weight of class {name} is {weight}", allowed)
    if max(weights) == 0:
        raise UsageError(f"{flag} {path}: all weights are 0", allowed)
    return shares(weights)


def _from_json(path: str) -> list[float]:
    found = parse_json(read_bytes(path, MOST_BYTES))
    if not isinstance(found, list) or not all(type(value) in (int, float) for value in found):
        raise Unreadable("no list of numbers")
    return [_number(value) for value in found]


def _from_csv(path: str, class_names: Sequence[str]) -> list[float]:
    table = read_table(path)
    if list(table) != ["class", "weight"]:
        raise Unreadable(f"the columns {', '.join(map(str, table))[:100]}")
    classes = [str(name).strip() for name in table["class"]]
    places = {name: place for place, name in enumerate(class_names)}
    if not places.keys() & set(classes):  # numbers, then
        places = {str(place): place for place in range(len(class_names))}
    weights: dict[int, float] = {}
    for name, weight in zip(classes, table["weight"]):
        if name not in places or places[name] in weights:
            raise Unreadable(f"class {name[:100]} {'twice' if name in places else 'is unknown'}")
        weights[places[name]] = _number(weight)
    missing = [name for place, name in enumerate(class_names) if place not in weights]
    if missing:
        raise Unreadable(f"class {missing[0]} is missing")
    return [weights[place] for place in range(len(class_names))]


def _number(value: float | str) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise Unreadable(f"the weight {str(value)[:100]}") from None
