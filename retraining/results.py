"""Stage 1's frozen backbone with its data, and what became of every classifier made on it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypedDict

from torch import Tensor, nn

from datasets import Batches, LongTailed
from engine import TrainStats, is_diverged, predict
from experiment.sweeps import Result
from retraining.features import FeatureSource, Stream, feature_blocks, head_logits
from retraining.methods import Method, Stage1, Trained
from retraining.solver import TrainableHead
from retraining.start import make_start
from utils.metrics import GROUPS, Figure, Logits, accuracies, predicted_classes
from utils.typed import require
from utils.types import Record, StateDict


class ResultState(TypedDict):
    """What is saved of a :class:`ClassifierResult`."""

    selection: StateDict
    records: list[Record]
    seconds: float
    diverged: int | None


class FinishedState(TypedDict):
    """What is saved of :class:`Finished`."""

    fits: dict[str, int]
    results: dict[str, StateDict]


class ClassifierResult(Result):
    """What became of one classifier: its selection's state is the head's, or the network's (``network``).

    Attributes:
        method: the method with its options.
        head: the selected epoch's head, one of models.heads.HEADS, or the whole network; on the CPU, its weights are
            those of the selection's state.
        network: whether the backbone was trained too.
        records: one per epoch, for metrics.jsonl.
        seconds: time spent on the classifier itself; on the whole network where that is trained.
    """

    def __init__(self, method: Method, select: str, by: Figure = "class_mean") -> None:
        super().__init__(method.setting, select, by)
        self.method = method
        self.network = method.scope != "fc"
        self.head: nn.Module = nn.Identity()
        self.records: list[Record] = []

    @property
    def classifier(self) -> nn.Module:
        """The selected epoch's classifier alone."""
        return self.head.get_submodule("fc") if self.network else self.head

    def after(self, epoch: int, lr: float, train: TrainStats, seconds: float, classes: int) -> bool:
        """Notes an epoch (from 0) of training loss and top-1 ``train``; False where the result has diverged."""
        if self.diverged is None and is_diverged(train, classes):
            self.diverged = epoch + 1
        if self.diverged is None:
            record: Record = {
                "epoch": epoch + 1,
                "lr": lr,
                "train_loss": train.loss,
                "train_top1": train.top1,
                "seconds": seconds,
            }
            self.records.append(record)
        return self.diverged is None

    def state_dict(self) -> StateDict:
        """The result so far; of its head the weights alone."""
        return {
            "selection": self.selection.state_dict(),
            "records": self.records,
            "seconds": self.seconds,
            "diverged": self.diverged,
        }

    def take_up(self, state: StateDict, head: nn.Module) -> None:
        """Goes on from a state; ``head``, of the right kind, gets the selected epoch's weights."""
        require(state, ResultState, "a classifier")
        self.selection.load_state_dict(state["selection"])
        self.records, self.seconds, self.diverged = state["records"], state["seconds"], state["diverged"]
        if self.selection.state:
            self.head = copy.deepcopy(head).cpu()
            self.head.load_state_dict(self.selection.state, assign=True)

    def offer(self, epoch: int, head: nn.Module, test: Logits, val: Logits | None, data: LongTailed) -> None:
        """Measures logits (N, C) of the test and held-out images and shows them to the selection rule.

        ``epoch`` counts from 1; 0 stands for a method that trains nothing.
        """
        reports = []
        for logits, images in ((test, data.test), (val, data.val)):
            if logits is None or images is None:
                continue
            predicted = predicted_classes(logits)
            if predicted is None:
                self.diverged = epoch
                return
            reports.append(accuracies(predicted, images.labels, data.class_counts))
        test_report, val_report = reports[0], reports[1] if len(reports) > 1 else None
        self.selection.offer(epoch, head, test_report, val_report)
        if self.selection.epoch == epoch:
            self.head = copy.deepcopy(head).cpu()
            self.head.load_state_dict(self.selection.state, assign=True)
        if self.records:
            groups = {f"test_{group}": test_report["groups"][group]["accuracy"] for group in GROUPS}
            self.records[-1] |= {"test_top1": test_report["top1"], **groups}
            if val_report is not None:
                self.records[-1][f"val_{self.selection.by}"] = val_report[self.selection.by]


class FrozenBackbone:
    """One stage-1 network, and what its classifiers are made from and measured on.

    Attributes:
        source: where the features come from.
        data: the data set.
        stage1: its classifier and what goes with it.
    """

    def __init__(self, source: FeatureSource) -> None:
        self.source, self.data = source, source.data
        clean, held_out = (partial(self._blocks, part) for part in ("train", "val"))
        head = copy.deepcopy(source.model.fc).requires_grad_(False)
        self.stage1 = Stage1(head, self.data.trained_counts, clean, held_out if self.data.val else None)
        self._starts: dict[tuple[str, int], Stage1] = {}

    def _blocks(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        labels: Tensor = getattr(self.data, part).labels
        return feature_blocks(self.source.evaluated(part), labels, self.data.num_classes, self.source.device)

    def start(self, method: Method) -> Stage1:
        """What a method starts from: stage 1, with another head in place of its classifier where --start says so."""
        if method.start == "stage1":
            return self.stage1
        key = method.start, getattr(method, "seed", 0) if method.start == "random" else 0
        if key not in self._starts:
            head = make_start(method.start, self.stage1, key[1]).requires_grad_(False)
            self._starts[key] = dataclasses.replace(self.stage1, head=head)
        return self._starts[key]

    def fresh(self, method: Method) -> nn.Module:
        """What a method's training begins with and its result keeps: the classifier, or the network with it."""
        head = method.head(self.start(method))
        if method.scope == "fc":
            return method.finished(head)
        model = copy.deepcopy(self.source.model)
        model.fc = head
        return model

    def trainable_head(self, method: Trained) -> TrainableHead:
        """A fresh classifier of a method, ready for the solver."""
        start = self.start(method)
        head = method.head(start)
        return TrainableHead(
            head,
            lambda progress: method.loss(start, progress),
            method.finetune_lr,
            method.finetune_wd,
            (lambda: method.project(head, start)) if method.projects else None,
            method.projects_each_step,
        )

    def make_features(self, stream: Stream, epoch: int) -> None:
        """Makes what :meth:`measure` will need after an epoch (from 0): the only part of it that takes long."""
        for part in ("test", "val") if self.data.val else ("test",):
            self.source.evaluated(part, stream, epoch)

    def measure(self, result: ClassifierResult, head: nn.Module, epoch: int) -> None:
        """Evaluates a head on the backbone as it is after an epoch (from 0; -1 for stage 1's)."""
        stream = result.method.stream
        val = None if self.data.val is None else self.logits(head, "val", stream, epoch)
        result.offer(epoch + 1, head, self.logits(head, "test", stream, epoch), val, self.data)

    def logits(self, head: nn.Module, part: str, stream: Stream | None, epoch: int) -> Logits:
        """A head's logits (N, C) on "test" or "val" after an epoch; -1 is stage 1's backbone."""
        return head_logits(head, self.source.evaluated(part, stream, epoch), self.source.eval_batch)

    def logits_of(self, result: ClassifierResult, part: str, flip: bool = True) -> Logits:
        """The selected epoch's logits (N, C) on "test" or "val"; without flip averaging where ``flip`` is off."""
        head = copy.deepcopy(result.head).to(self.source.device)
        if result.network:
            return self.network_logits(head, part, flip)
        features = self.source.evaluated(part, result.method.stream, result.selection.epoch - 1)
        return head_logits(head, features if flip else features[:1], self.source.eval_batch)

    def network_logits(self, model: nn.Module, part: str, flip: bool = True) -> Tensor:
        """The same of a whole network."""
        images, spec, source = getattr(self.data, part), self.data.spec, self.source
        batches = Batches(images.images, images.labels, source.eval_batch, spec.mean, spec.std, source.device)
        return predict(model, batches, source.flip and flip)[0]

    def state_dict(self, result: ClassifierResult) -> dict[str, Tensor]:
        """All weights of the selected epoch: the backbone's and the head's."""
        if result.network:
            return result.selection.state
        backbone = self.source.backbone(result.method.stream, result.selection.epoch - 1)
        kept = {name: tensor for name, tensor in backbone.items() if not name.startswith("fc.")}
        return kept | {f"fc.{name}": tensor for name, tensor in result.selection.state.items()}


class Results:
    """The results of some classifiers that are trained side by side, as one that can be saved."""

    def __init__(self, results: Sequence[ClassifierResult], frozen: FrozenBackbone) -> None:
        self.results, self.frozen = results, frozen

    def state_dict(self) -> StateDict:
        """The results so far."""
        return {"results": [result.state_dict() for result in self.results]}

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state."""
        for result, stored in zip(self.results, state["results"]):
            result.take_up(stored, self.frozen.fresh(result.method))


class Finished:
    """The results of classifiers whose training is over, as a run that is resumed needs them.

    Attributes:
        fits: how many classifiers of a group were trained at a time; memory decides it once.
    """

    def __init__(self, frozen: FrozenBackbone, select: str, by: Figure = "class_mean") -> None:
        self.frozen, self.select, self.by = frozen, select, by
        self.fits: dict[str, int] = {}
        self._states: dict[str, StateDict] = {}

    def add(self, results: Sequence[ClassifierResult]) -> None:
        """Notes results that will not change."""
        self._states |= {name_of(result.method): result.state_dict() for result in results}

    def __contains__(self, method: Method) -> bool:
        return name_of(method) in self._states

    def find(self, methods: Sequence[Method]) -> list[ClassifierResult] | None:
        """The results of these methods, where they are there."""
        states = [self._states.get(name_of(method)) for method in methods]
        results = []
        for method, state in zip(methods, states):
            if state is None:
                return None
            results.append(ClassifierResult(method, self.select, self.by))
            results[-1].take_up(state, self.frozen.fresh(method))
        return results

    def state_dict(self) -> StateDict:
        """The results so far."""
        return {"fits": self.fits, "results": self._states}

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state."""
        require(state, FinishedState, "finished classifiers")
        self.fits, self._states = state["fits"], state["results"]


def name_of(method: Method) -> str:
    """A text that no other method or options have."""
    return json.dumps([method.name, *method.setting.values.items()])
