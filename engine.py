"""The only loops over batches: one training epoch, the predictions of a test set, and what to keep of a run.

:class:`TrainStep` is a step of training, read top to bottom in :meth:`TrainStep.plain`; what makes it fast (mixed
precision, torch.compile, CUDA graphs) is around it and changes no equation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from datasets.batches import Batch, Epochs
from losses import total_weight
from models import Network, fold
from utils.distributed import all_reduce_sum, broadcast_model, gather_in_order, interruptible, world_size
from utils.errors import Diverged, UsageError
from utils.graphs import Graphed
from utils.metrics import Figure, Report, report
from utils.proof import Proven, bound, compiled
from utils.resume import TrainState
from utils.typed import require
from utils.types import StateDict

M = TypeVar("M", bound=nn.Module)
#: How many times its beginning an epoch's loss is where a training has diverged.
DIVERGED = 1000.0


class TrainStats(NamedTuple):
    """Means over an epoch's images, as the model saw them: augmented, before each step. Loss in nats.

    ``first`` is the mean loss of the epoch's first step.
    """

    loss: float
    top1: float
    first: float


#: How many times as long as in an evaluation an image takes in training: backward is twice forward.
TRAINING = 3


def cosine(epoch: int, epochs: int, warmup: int = 0) -> float:
    """The learning rate's factor in an epoch (from 0): half a cosine from 1 to 0, as CosineAnnealingLR has it.

    With ``warmup`` it first rises evenly, 1/w, 2/w ... 1 (LDAM-DRW's five epochs); the cosine takes the others.
    """
    if epoch < warmup:
        return (epoch + 1) / warmup
    return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


def make_sgd(parameters: Iterable[Parameter], lr: float, momentum: float, wd: float, nesterov: bool) -> SGD:
    """torch's SGD in its fused form: all parameters in one kernel, the same equations.

    Momentum begins as zeros instead of not at all, and on a GPU the learning rate is a tensor there: a CUDA graph then
    finds both where it recorded them. Set it by :func:`set_lr`.
    """
    parameters = list(parameters)
    optimizer = SGD(parameters, lr, momentum=momentum, weight_decay=wd, nesterov=nesterov, fused=True)
    if parameters[0].is_cuda:
        optimizer.param_groups[0]["lr"] = torch.tensor(lr, device=parameters[0].device)
    for parameter in parameters if momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class TrainStep:
    """One optimizer step: images (B, c, H, W), labels (B,) -> loss () in nats and number of hits (), on the device.

    It never waits for a GPU. A mixed batch has partners (B,) and a share () too, see :class:`datasets.augment.Mix`;
    hits are counted against ``labels``. Parameters that do not require a gradient are neither differentiated through
    nor stepped, so a frozen backbone costs a forward pass only.

    Of several processes each has its part of the batch, and with ``accum`` goes through it in smaller parts. The
    gradients, each times its part's :func:`losses.total_weight`, add up to the whole batch's; the mean of all
    processes' losses is its loss.

    Args:
        model: trained in the mode (train or eval) that it is in.
        criterion: (logits (B, C), labels (B,)) -> scalar; it always gets float32 logits.
        optimizer: steps the parameters; see :func:`make_sgd`.
        amp: dtype of the backbone's arithmetic, None for float32. Weights, classifier and loss stay in float32.
        ema: decay of the averaged copy of the model, which is updated after every step; 0 for none.
        project: puts weights back where they must be, after every step.
        accum: in how many parts one process's images go through the network; BatchNorm in train mode sees them apart.
        compile: run the model through torch.compile, once per batch shape: off, auto or on.
        graph: run the step as a CUDA graph: off, auto or on. Both prove themselves (:class:`utils.proof.Proven`);
            what does not is left out where it is auto, and an error where it is on.
        say: gets the line that says so.

    Attributes:
        averaged: what to evaluate: the exponential moving average of weights and BatchNorm statistics, or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: SGD,
        *,
        amp: torch.dtype | None = None,
        ema: float = 0.0,
        project: Callable[[], None] | None = None,
        accum: int = 1,
        compile: str = "off",
        graph: str = "off",
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.device = next(model.parameters()).device
        self.network: Callable[[Tensor], Tensor] = model
        if world_size() > 1:  # static_graph cannot be had with no_sync
            self.network = DistributedDataParallel(model, static_graph=accum == 1, gradient_as_bucket_view=True)
        self.amp, self.ema, self.project, self.accum = amp, ema, project, accum
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # makes the tensors of its state
        self.averaged = copy.deepcopy(model).requires_grad_(False) if ema else model
        near, self.faster = bound(amp, self.device), None if compile == "off" else compiled(model)
        self.compiling = Proven("--compile", compile == "on", near, same_draws=False, say=say)
        self.graph = None if graph == "off" else Graphed(must=graph == "on", bound=near, say=say)

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return self.graph(self._ungraphed, self.changing, *batch) if self.graph else self._ungraphed(*batch)

    def _ungraphed(self, *batch: Tensor) -> tuple[Tensor, ...]:
        if self.faster is None:
            return self.plain(*batch)
        return self.compiling(self._compiled, self.plain, self.changing, *batch)

    def _compiled(self, *batch: Tensor) -> tuple[Tensor, ...]:
        assert self.faster is not None
        plain, self.network = self.network, self.faster
        try:
            return self.plain(*batch)
        finally:
            self.network = plain

    def plain(
        self, images: Tensor, labels: Tensor, partners: Tensor | None = None, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The step itself, operation by operation."""
        mean_weight = self._mean_weight(labels)
        parts = zip(*(t.tensor_split(self.accum) for t in (images, labels, labels if partners is None else partners)))
        losses, hits = [], []
        self.optimizer.zero_grad(set_to_none=True)
        for number, (image, label, partner) in enumerate(parts, start=1):
            with self._adding_up(number == self.accum):
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None, cache_enabled=False):
                    logits = forward(self.network, image)
                loss = self._loss(logits, label, mean_weight)
                if share is not None:
                    loss = share * loss + (1 - share) * self._loss(logits, partner, mean_weight)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            hits.append((logits.detach().argmax(dim=1) == label).sum())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.project:
            self.project()
        if self.ema:
            self._average()
        return torch.stack(losses).sum(), torch.stack(hits).sum()

    def _mean_weight(self, labels: Tensor) -> Tensor | None:
        """The weight of the batch over the number of processes; None where a single part is the batch."""
        if world_size() * self.accum == 1:
            return None
        return all_reduce_sum(total_weight(self.criterion, labels)) / world_size()

    def _loss(self, logits: Tensor, labels: Tensor, mean_weight: Tensor | None) -> Tensor:
        """The loss of a part, scaled to its weight."""
        loss: Tensor = self.criterion(logits, labels)
        return loss if mean_weight is None else loss * (total_weight(self.criterion, labels) / mean_weight)

    def _adding_up(self, is_last: bool) -> AbstractContextManager[None]:
        """In the last part DDP takes the mean of the processes' gradients; those before stay with their process."""
        if isinstance(self.network, DistributedDataParallel) and not is_last:
            return self.network.no_sync()
        return nullcontext()

    def use_loss(self, criterion: nn.Module) -> None:
        """Changes the loss."""
        if criterion is self.criterion:
            return
        self.criterion = criterion
        if self.graph:
            self.graph.forget()

    def state_dict(self) -> StateDict:
        """Weights, momentum, averaged weights and loss scale."""
        return {
            "model": self.model.state_dict(),
            "momentum": self._momentum(),
            "averaged": self.averaged.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state, in place."""
        self.model.load_state_dict(state["model"])
        for buffer, value in zip(self._momentum(), state["momentum"]):
            buffer.copy_(value)
        if self.ema:
            self.averaged.load_state_dict(state["averaged"])
        self.scaler.load_state_dict(state["scaler"])

    def own_state(self) -> StateDict:
        """What differs between processes: BatchNorm's statistics, of the average too."""
        return {"model": dict(self.model.named_buffers()), "averaged": dict(self.averaged.named_buffers())}

    def load_own_state(self, state: StateDict) -> None:
        """Goes on from a state of this process."""
        for module, values in ((self.model, state["model"]), (self.averaged, state["averaged"])):
            for name, buffer in module.named_buffers():
                buffer.copy_(values[name])

    def _momentum(self) -> list[Tensor]:
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    def changing(self) -> dict[str, list[Tensor]]:
        """Every tensor that a step changes and the next one depends on, by kind."""
        averaged = [] if self.averaged is self.model else [self.averaged]
        scale = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler.is_enabled() else []
        return {
            "weights": list(self.model.parameters()),
            "statistics": list(self.model.buffers()),
            "momentum": self._momentum(),
            "averages": [v for model in averaged for v in model.parameters()],
            "averaged statistics": [v for model in averaged for v in model.buffers()],
            "loss scale": [v for v in scale if v is not None],
        }

    @torch.no_grad()
    def _average(self) -> None:
        for average, value in zip(self.averaged.state_dict().values(), self.model.state_dict().values()):
            if value.is_floating_point():
                average.lerp_(value, 1 - self.ema)
            else:
                average.copy_(value)


def train_epoch(
    step: Callable[..., tuple[Tensor, ...]],
    batches: Iterable[Batch],
    epoch: int,
    lr: float,
    state: TrainState | None = None,
) -> TrainStats:
    """One step per batch, in the mode that the model is in; waits for the device once, at the end.

    All processes return the same means, over the images of all, and fail alike.

    ``epoch`` (from 0) and ``lr`` are for the message of a loss that is not finite. ``state`` notes every step; it
    may bring what the first steps of the epoch measured, which are then not among ``batches``.

    Raises:
        UsageError: a batch of one image whose last feature map is one pixel.
        Diverged: a loss that is not finite; found at the end of the epoch, raised with its step and the last good loss.
        Interrupted: see :meth:`utils.resume.TrainState.advance`.
    """
    measured = state.measured if state else []
    for batch in batches:
        found = step(*batch)
        found += (torch.full((), len(batch[1]), device=found[0].device),)  # filled there: a copy would wait
        if state:
            state.advance(*found)
        else:
            measured.append(found)
    columns = (torch.stack(column) for column in zip(*measured))
    losses, hits, sizes = (all_reduce_sum(column.double()).tolist() for column in columns)
    losses = [value / world_size() for value in losses]
    for number, value in enumerate(losses, start=1):
        if not math.isfinite(value):
            before = losses[number - 2] if number > 1 else "none"
            where = f"step {number} of {len(losses)} of epoch {epoch + 1}"
            raise Diverged(f"the loss is {value} at {where} (loss before: {before}, lr {lr:g})", step=number)
    loss = sum(value * size for value, size in zip(losses, sizes)) / sum(sizes)
    return TrainStats(loss, sum(hits) / sum(sizes), losses[0])


def is_diverged(stats: TrainStats, classes: int) -> bool:
    """Whether an epoch's loss is not finite, or has risen to :data:`DIVERGED` times what it was.

    That is its first step's loss or that of a guess among so many classes, log C, whichever is larger.
    """
    return not math.isfinite(stats.loss) or stats.loss > DIVERGED * max(stats.first, math.log(classes))


def forward(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The network's output; UsageError where BatchNorm in train mode is given a single value per channel."""
    try:
        return network(images)
    except ValueError as error:
        if len(images) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise UsageError("a last batch of one image, which BatchNorm cannot take", "another --batch_size") from None


def for_evaluation(model: M) -> M:
    """A copy in eval mode with BatchNorm in the convolutions and in the memory format in which these are fastest.

    On a CPU the first saves 13 to 24 % of ResNet-32's time and 6 % of ResNet-34's, the second up to a sixth.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(model, Network):
        fold(model)
    return model.to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: nn.Module, batches: Epochs, flip_tta: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of every image in eval mode: (N, C) float and labels (N,) int64, on the CPU. The model stays as it is.

    ``flip_tta`` averages the logits of each image and its mirror image. Several processes deal the batches out among
    them, see :class:`datasets.Batches`, with the first one's weights and statistics; each returns all logits.

    Raises:
        Diverged: a logit that is not finite.
        Interrupted: a signal has come, to a single process.
    """
    fast = broadcast_model(for_evaluation(model))
    logits, labels = [], []
    for images, targets in interruptible(batches.epoch()):
        output = fast(images)
        if flip_tta:
            output = (output + fast(images.flip(dims=(3,)))) / 2
        logits.append(output.cpu())
        labels.append(targets.cpu())
    outputs = torch.cat(gather_in_order(logits))
    if not bool(outputs.isfinite().all()):
        raise Diverged("the model's logits are not finite")
    return outputs, torch.cat(gather_in_order(labels))


def evaluate(model: nn.Module, batches: Epochs, class_counts: list[int], flip_tta: bool = False) -> Report:
    """The accuracies of :func:`utils.metrics.report` on a set of batches."""
    return report(*predict(model, batches, flip_tta), class_counts)


def is_due(epoch: int, epochs: int, every: int) -> bool:
    """Whether to evaluate after ``epoch`` (from 0): every so many epochs, and after each of the last five."""
    return (epoch + 1) % every == 0 or epoch >= epochs - 5


def evaluations(epochs: int, every: int) -> int:
    """How many epochs are followed by an evaluation, see :func:`is_due`."""
    return sum(is_due(epoch, epochs, every) for epoch in range(epochs))


class SelectionState(TypedDict):
    """What is saved of a :class:`Selection`."""

    epoch: int
    test: Report
    val: Report | None
    state: dict[str, Tensor]
    best_on_test: tuple[int, Report]
    _best: float


class Selection:
    """Keeps the weights that a rule selects among the evaluated epochs.

    last: the last epoch's. best_test: the highest top-1 on the test set, which LOS, Weight Balancing and LDAM-DRW
    publish. best_val: the highest ``by`` on the held-out images. Of equals the later wins, as in LOS (of the others'
    the earlier does). Of the settings of a sweep the best is chosen elsewhere, by :func:`experiment.sweeps.score_of`.

    Attributes:
        epoch, test, val, state: of the selected epoch (from 1), its reports and weights (on the CPU).
        best_on_test: (epoch, test report) of the best epoch on the test set, for comparison with papers that select so.
    """

    def __init__(self, rule: str, by: Figure = "class_mean") -> None:
        self.rule, self.by = rule, by
        self.epoch = 0
        self.test: Report = {}
        self.val: Report | None = None
        self.state: dict[str, Tensor] = {}
        self.best_on_test: tuple[int, Report] = (0, {})
        self._best = -1.0

    def offer(self, epoch: int, model: nn.Module, test: Report, val: Report | None) -> None:
        """Shows the rule an evaluated epoch (from 1)."""
        if not self.best_on_test[1] or test["top1"] >= self.best_on_test[1]["top1"]:
            self.best_on_test = (epoch, test)
        scores = {"last": float(epoch), "best_test": test["top1"], "best_val": val[self.by] if val else -1.0}
        score = scores[self.rule]
        if score >= self._best:
            self._best, self.epoch, self.test, self.val = score, epoch, test, val
            self.state = {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in model.state_dict().items()
            }

    def state_dict(self) -> StateDict:
        """What has been selected so far."""
        return {name: getattr(self, name) for name in ("epoch", "test", "val", "state", "best_on_test", "_best")}

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state."""
        vars(self).update(require(state, SelectionState, "a selection"))
