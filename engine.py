"""The only loops over batches: one training epoch, the predictions of a test set, and what to keep of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets import Batches
from utils.metrics import Report, report
from utils.options import Diverged, UsageError

M = TypeVar("M", bound=nn.Module)


class TrainStats(NamedTuple):
    """Means over an epoch's images, as the model saw them: augmented, before each step. Loss in nats."""

    loss: float
    top1: float


def train_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], criterion: nn.Module, optimizer: Optimizer
) -> TrainStats:
    """One optimizer step per batch (images (B, c, H, W), labels (B,)), in the mode that the model is in.

    Parameters that do not require a gradient are neither differentiated through nor stepped, so a frozen backbone
    costs a forward pass only.

    Raises:
        UsageError: a batch of one image whose last feature map is one pixel.
        Diverged: a loss that is not finite; found at the end of the epoch, told with its step, lr and the loss before.
    """
    losses, correct, sizes = [], [], []
    for images, labels in batches:
        logits = forward(model, images)
        loss = criterion(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        correct.append((logits.detach().argmax(dim=1) == labels).sum())
        sizes.append(len(labels))
    per_step = torch.stack(losses).tolist()
    for step, value in enumerate(per_step, start=1):
        if not math.isfinite(value):
            before = per_step[step - 2] if step > 1 else "none"
            lr = optimizer.param_groups[0]["lr"]
            raise Diverged(f"the loss is {value} at step {step} of {len(per_step)} (loss before: {before}, lr {lr:g})")
    total = sum(sizes)
    loss_sum = sum(value * size for value, size in zip(per_step, sizes))
    return TrainStats(loss_sum / total, int(torch.stack(correct).sum()) / total)


def forward(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The network's output; UsageError where BatchNorm in train mode is given a single value per channel."""
    try:
        return network(images)
    except ValueError as error:
        if len(images) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise UsageError("a last batch of one image, which BatchNorm cannot take", "another --batch_size") from None


def for_evaluation(model: M) -> M:
    """A copy in eval mode and in the memory format in which convolutions are fastest (up to 1.2x on a CPU)."""
    return copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches, flip_tta: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of every image in eval mode: (N, C) float and labels (N,) int64, on the CPU. The model stays as it is.

    ``flip_tta`` averages the logits of each image and its mirror image.

    Raises:
        Diverged: a logit that is not finite.
    """
    fast = for_evaluation(model)
    logits, labels = [], []
    for images, targets in batches.epoch():
        output = fast(images)
        if flip_tta:
            output = (output + fast(images.flip(dims=(3,)))) / 2
        logits.append(output.cpu())
        labels.append(targets.cpu())
    outputs = torch.cat(logits)
    if not bool(outputs.isfinite().all()):
        raise Diverged("the model's logits are not finite")
    return outputs, torch.cat(labels)


def evaluate(model: nn.Module, batches: Batches, class_counts: list[int], flip_tta: bool = False) -> Report:
    """The accuracies of :func:`utils.metrics.report` on a set of batches."""
    return report(*predict(model, batches, flip_tta), class_counts)


def is_due(epoch: int, epochs: int, every: int) -> bool:
    """Whether to evaluate after ``epoch`` (from 0): every so many epochs, and after each of the last five."""
    return (epoch + 1) % every == 0 or epoch >= epochs - 5


class Selection:
    """Keeps the weights that a rule selects among the evaluated epochs.

    last: the last epoch's. best_test: the highest top-1 on the test set, later epochs winning ties (what LOS, Weight
    Balancing and LDAM-DRW publish). best_val: the highest class mean on the held-out images.

    Attributes:
        epoch, test, val, state: of the selected epoch (from 1), its reports and weights (on the CPU).
        oracle: (epoch, test report) of the best epoch on the test set, for comparison with papers that select so.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.epoch = 0
        self.test: Report = {}
        self.val: Report | None = None
        self.state: dict[str, Tensor] = {}
        self.oracle: tuple[int, Report] = (0, {})
        self._best = -1.0

    def offer(self, epoch: int, model: nn.Module, test: Report, val: Report | None) -> None:
        """Shows the rule an evaluated epoch (from 1)."""
        if not self.oracle[1] or test["top1"] >= self.oracle[1]["top1"]:
            self.oracle = (epoch, test)
        score: Any = {"last": epoch, "best_test": test["top1"], "best_val": val and val["class_mean"]}[self.rule]
        if score >= self._best:
            self._best, self.epoch, self.test, self.val = score, epoch, test, val
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
