"""Where heads start that do not continue stage 1's classifier, and what stands for stage 1 where there is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import LongTailed
from datasets.rows import Rows
from models.given import GivenFeatures
from models.heads import make_linear
from retraining.methods import Stage1
from utils.checkpoints import Checkpoint
from utils.errors import UsageError
from utils.readers import Array, Unreadable, map_array

#: The factor of the cosine where rows are directions: LDAM-DRW's, and LIFT's (Shi et al., ICML 2024).
COSINE_SCALE = 30.0
#: L-BFGS: iterations at most, and scikit-learn's C: the inverse weight of the penalty beside the sum of the losses.
ITERATIONS, C = 200, 1.0
#: Bytes of rows that are read at a time.
BLOCK_BYTES = 2**26


def make_start(start: str, stage1: Stage1, seed: int) -> nn.Module:
    """The head that a method starts from, see :data:`STARTS`, or with the rows of a file."""
    make = STARTS.get(start)
    return make(stage1, seed) if make else directions(read_rows(start, stage1.weight), stage1)


def continued(stage1: Stage1, seed: int) -> nn.Module:
    """Stage 1's classifier."""
    return stage1.head


def fresh(stage1: Stage1, seed: int) -> nn.Module:
    """A classifier of random weights, as ``nn.Linear`` begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(stage1.weight.shape[1], stage1.num_classes).to(stage1.weight.device)


def class_means(stage1: Stage1, seed: int) -> nn.Module:
    """The directions of the class means of the training features, see :func:`directions`."""
    sums = torch.zeros_like(stage1.weight)
    for features, labels in stage1.clean():
        sums.index_add_(0, labels, features)
    return directions(sums, stage1)


def directions(rows: Tensor, stage1: Stage1) -> nn.Linear:
    """Rows (C, D) made alike in length, so that logits of a feature of mean norm are 30 times the cosine; no bias."""
    norms = [features.norm(dim=1) for features, _ in stage1.clean()]
    return make_linear(F.normalize(rows) * (COSINE_SCALE / torch.cat(norms).mean()))


def logistic(stage1: Stage1, seed: int) -> nn.Linear:
    """Balanced logistic regression, to the end by L-BFGS: sum_i w_i CE_i + |W|^2 / 2, w_i = N / (C n_y); bias free.

    scikit-learn's LogisticRegression(class_weight="balanced"), of rows that need not fit into memory.
    """
    from scipy.optimize import minimize  # here, since it is slow to import

    classes, width = stage1.weight.shape
    counts = torch.tensor(stage1.class_counts, dtype=torch.float64)
    weight = (counts.sum() / (classes * counts)).float().to(stage1.weight.device)

    def value(flat: Array) -> tuple[float, Array]:
        parameters = torch.from_numpy(flat).view(classes, width + 1)
        rows = parameters.float().to(stage1.weight.device)
        gradient, total = torch.zeros_like(parameters), parameters[:, :-1].square().sum().item() / (2 * C)
        for features, labels in stage1.clean():
            log_p = F.linear(features, rows[:, :-1], rows[:, -1]).log_softmax(dim=1)
            own = weight[labels]
            total -= float((own * log_p.gather(1, labels[:, None])[:, 0]).double().sum())
            slope = log_p.exp_()
            slope[torch.arange(len(labels)), labels] -= 1
            slope *= own[:, None]
            gradient[:, :-1] += (slope.T @ features).double().cpu()
            gradient[:, -1] += slope.sum(dim=0).double().cpu()
        gradient[:, :-1] += parameters[:, :-1] / C
        return total, gradient.flatten().numpy()

    found = minimize(
        value,
        np.zeros(classes * (width + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS, "ftol": 1e-8, "gtol": 1e-4 * float(counts.sum()) / classes},
    )
    rows = torch.from_numpy(found.x).view(classes, width + 1).float().to(stage1.weight.device)
    return make_linear(rows[:, :-1], rows[:, -1])


#: --start: (stage 1, seed) -> a head.
STARTS: dict[str, Callable[[Stage1, int], nn.Module]] = {
    "stage1": continued,
    "random": fresh,
    "class_mean": class_means,
    "logistic": logistic,
}


def read_rows(path: str, like: Tensor) -> Tensor:
    """The rows of a .npy file, of the shape (C, D) of ``like`` and on its device; UsageError where it has none."""
    words = f"{', '.join(STARTS)}, or a .npy of {len(like)} x {like.shape[1]} numbers"
    try:
        rows = torch.from_numpy(np.array(map_array(path)))
    except (Unreadable, TypeError) as error:
        raise UsageError(f"--start {path}: {error}", words) from None
    if rows.shape != like.shape or not rows.is_floating_point():
        raise UsageError(f"--start {path}: {str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape)}", words)
    if not bool(rows.isfinite().all() & (rows.norm(dim=1) > 0).all()):
        raise UsageError(f"--start {path}: a row is not finite, or zero", words)
    return rows.to(like)


def without_stage1(data: LongTailed, standardize: str) -> Checkpoint:
    """What stands for stage 1 where features are given: their network, with the statistics of the training rows."""
    rows = data.train.images
    assert isinstance(rows, Rows)
    network = GivenFeatures(data.num_classes, data.channels).requires_grad_(False)
    blocks = rows.split(max(1, BLOCK_BYTES // (4 * data.channels)))
    network.fit((block.to(rows.device) for block in blocks), standardize)
    return Checkpoint(None, "features", data.num_classes, data.channels, network.state_dict(), stem="rows")
