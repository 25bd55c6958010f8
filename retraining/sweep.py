"""What a sweep of stage 2 is made of: the backbone with its data, and one result per setting."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from datasets import Batches, LongTailed
from engine import predict
from retraining.features import FeatureSource, Stream, predict_features
from retraining.methods import METHODS, Start
from retraining.settings import Setting
from retraining.solver import Trainee
from sweeps import Outcome
from utils.metrics import GROUPS, accuracies


class Result(Outcome):
    """What became of one classifier: its selection's state is the head's, or the network's (``network``).

    Attributes:
        head: the selected epoch's head, one of models.heads.HEADS, or the whole network.
        network: whether the backbone was trained too.
        records: one per epoch, for metrics.jsonl.
        seconds: time spent on the classifier itself; on the whole network where that is trained.
    """

    setting: Setting

    def __init__(self, setting: Setting, select: str) -> None:
        super().__init__(setting, select)
        self.network = setting.scope != "fc"
        self.head: nn.Module = nn.Identity()
        self.records: list[dict[str, Any]] = []

    @property
    def classifier(self) -> nn.Module:
        """The selected epoch's classifier alone."""
        return self.head.get_submodule("fc") if self.network else self.head

    def after(self, epoch: int, lr: float, train: tuple[float, float], seconds: float) -> bool:
        """Notes an epoch (from 0) of training loss and top-1 ``train``; False where the result has diverged."""
        if self.diverged is None and not math.isfinite(train[0]):
            self.diverged = epoch + 1
        if self.diverged is None:
            record = {"epoch": epoch + 1, "lr": lr, "train_loss": train[0], "train_top1": train[1], "seconds": seconds}
            self.records.append(record)
        return self.diverged is None

    def offer(self, epoch: int, head: nn.Module, test: Tensor, val: Tensor | None, data: LongTailed) -> None:
        """Measures logits (N, C) of the test and held-out images and shows them to the selection rule.

        ``epoch`` counts from 1; 0 stands for a method that trains nothing.
        """
        if not bool(test.isfinite().all()):
            self.diverged = epoch
            return
        test_report = accuracies(test.argmax(dim=1), data.test.labels, data.class_counts)
        val_report = None
        if val is not None and data.val is not None:
            val_report = accuracies(val.argmax(dim=1), data.val.labels, data.class_counts)
        self.selection.offer(epoch, head, test_report, val_report)
        if self.selection.epoch == epoch:
            self.head = copy.deepcopy(head)
        if self.records:
            groups = {f"test_{group}": test_report["groups"][group]["accuracy"] for group in GROUPS}
            self.records[-1] |= {"test_top1": test_report["top1"], **groups}
            if val_report is not None:
                self.records[-1]["val_class_mean"] = val_report["class_mean"]


class Lab:
    """One stage-1 network, and what its classifiers are made from and measured on.

    Attributes:
        source: where the features come from.
        data: the data set.
        start: what the methods start from.
    """

    def __init__(self, source: FeatureSource) -> None:
        self.source, self.data = source, source.data
        held_out = None if self.data.val is None else self._held_out
        head = copy.deepcopy(source.model.fc).requires_grad_(False)
        self.start = Start(head, self.data.trained_counts, self._clean, held_out)

    def _clean(self) -> tuple[Tensor, Tensor]:
        return self.source.evaluated("train")[0], self.source.labels

    def _held_out(self) -> tuple[Tensor, Tensor]:
        assert self.data.val is not None
        features = self.source.evaluated("val")
        return torch.stack(features).mean(dim=0), self.data.val.labels.to(features[0].device)

    def trainee(self, setting: Setting) -> Trainee:
        """A fresh classifier of a setting, ready for the solver."""
        method, values = METHODS[setting.method], setting.values
        head = method.head(self.start, values)
        return Trainee(
            head,
            lambda progress: method.loss(self.start, values, progress),
            values["finetune_lr"],
            values["finetune_wd"],
            (lambda: method.project(head, self.start, values)) if method.projects else None,
            values.get("maxnorm_every") == "step",
        )

    def measure(self, result: Result, head: nn.Module, epoch: int) -> None:
        """Evaluates a head on the backbone as it is after an epoch (from 0; -1 for stage 1's)."""
        stream = result.setting.stream
        val = None if self.data.val is None else self.logits(head, "val", stream, epoch)
        result.offer(epoch + 1, head, self.logits(head, "test", stream, epoch), val, self.data)

    def logits(self, head: nn.Module, part: str, stream: Stream | None, epoch: int) -> Tensor:
        """A head's logits (N, C) on "test" or "val" after an epoch; -1 is stage 1's backbone."""
        return predict_features(head, self.source.evaluated(part, stream, epoch), self.source.eval_batch)

    def logits_of(self, result: Result, part: str, flip: bool = True) -> Tensor:
        """The selected epoch's logits (N, C) on "test" or "val"; without flip averaging where ``flip`` is off."""
        if result.network:
            return self.network_logits(result.head, part, flip)
        features = self.source.evaluated(part, result.setting.stream, result.selection.epoch - 1)
        return predict_features(result.head, features if flip else features[:1], self.source.eval_batch)

    def network_logits(self, model: nn.Module, part: str, flip: bool = True) -> Tensor:
        """The same of a whole network."""
        images, spec, source = getattr(self.data, part), self.data.spec, self.source
        batches = Batches(images.images, images.labels, source.eval_batch, spec.mean, spec.std, source.device)
        return predict(model, batches, source.flip and flip)[0]

    def state_dict(self, result: Result) -> dict[str, Tensor]:
        """All weights of the selected epoch: the backbone's and the head's."""
        if result.network:
            return result.selection.state
        backbone = self.source.backbone(result.setting.stream, result.selection.epoch - 1)
        kept = {name: tensor for name, tensor in backbone.items() if not name.startswith("fc.")}
        return kept | {f"fc.{name}": tensor for name, tensor in result.selection.state.items()}
