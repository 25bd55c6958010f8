"""The ways to re-train a classifier on frozen features. ``METHODS`` maps a --method name to one small class each.

A method is a dataclass: its fields are the options that it takes, with their defaults, and an instance of it is one
classifier to make. It says where its head starts, which loss it follows and what is done to the head afterwards. The
sampler is an option like any other, so that sampler and loss combine freely. C classes have n_j training images;
pi_j = n_j / sum n. Values published for another data set or batch size are marked so: the methods share a budget of
epochs and a batch size; learning rates are for 64 images per step, to which those published for larger batches are
scaled, and follow the batch size in proportion (Goyal et al., 2017). ``grid`` gives each method at most nine settings
to be tuned over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from datasets import SAMPLERS
from datasets.batches import Batch, seeded
from engine import cosine
from experiment.sweeps import Setting
from losses.softmax import (
    AUTO_EXCESS,
    SoftmaxLoss,
    balanced_softmax,
    class_balanced,
    class_balanced_weights,
    class_frequencies,
    class_temperatures,
    generalised_reweighting,
    label_aware_smoothing,
    ldam,
    logit_adjustment,
    reweighted,
    vector_scaling,
)
from losses.weighted import LADE, ClassBalancedBCE, ClassBalancedSigmoid, Focal
from models.heads import (
    MARC,
    SAMN,
    CosineHead,
    DisAlignHead,
    PrototypeHead,
    ScaledLinear,
    UnitLinear,
    make_linear,
    project_rows,
)
from retraining.features import FeatureSource, Stream
from retraining.generated import CHANGES_STREAM, TailSampler, fused
from utils.errors import UsageError
from utils.metrics import Figure, accuracies
from utils.options import Axes, Value

#: Images per step that the methods' learning rates are for; at other sizes they are scaled in proportion.
REFERENCE_BATCH = 64
#: A value that follows from the number of classes.
Auto = Literal["auto"]
#: Features (n, D) float32 and labels (n,) of some images after the other, so that they need not fit into memory.
Blocks = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage1:
    """What every method may start from.

    Attributes:
        head: stage 1's classifier, a linear or a cosine head.
        class_counts: (C,) images that are trained on.
        clean: -> features and labels of the training images, not augmented.
        held_out: -> those of the held-out images; None where stage 1 held none out.
    """

    head: nn.Module
    class_counts: list[int]
    clean: Callable[[], Blocks]
    held_out: Callable[[], Blocks] | None

    @property
    def linear(self) -> nn.Linear:
        """Stage 1's classifier, for methods that need a linear one."""
        assert isinstance(self.head, nn.Linear)
        return self.head

    @property
    def weight(self) -> Tensor:
        """Its rows (C, D)."""
        return self.head.get_parameter("weight")

    @property
    def num_classes(self) -> int:
        return len(self.weight)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the methods have in common.

    Attributes:
        name: its --method name.
        published: what --protocol published takes instead of a default that departs from the paper on purpose.
        tuned: {option: values} that the grid multiplies out.
        projects: whether :meth:`project` does anything.
        takes_scope: whether its head can also be trained together with the backbone.
        adjusts: whether it corrects a classifier for the training set's prior, which a balanced start does not have.
        needs_linear: whether it continues from stage 1's classifier as a linear one; others take a cosine head too.
        takes_features: whether its head is made from the features of training images.
        start: the head that it starts from, see :data:`retraining.start.STARTS`.
    """

    name: ClassVar[str]
    published: ClassVar[Mapping[str, Value]] = {}
    tuned: ClassVar[Axes] = {}
    projects: ClassVar[bool] = False
    takes_scope: ClassVar[bool] = False
    adjusts: ClassVar[bool] = False
    needs_linear: ClassVar[bool] = True
    takes_features: ClassVar[bool] = False

    start: str = "stage1"

    @property
    def stream(self) -> Stream | None:
        """What decides its batches; None where there is nothing to train."""
        return None

    @property
    def scope(self) -> str:
        """What is trained: fc, last_block or all."""
        return "fc"

    @property
    def setting(self) -> Setting:
        """What tables call it."""
        return Setting(self.name, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def options(cls) -> dict[str, Value]:
        """The options that it takes, with its defaults; None for those that the command always gives."""
        return {field.name: None if field.default is MISSING else field.default for field in fields(cls)}

    def head(self, stage1: Stage1) -> nn.Module:
        """A head of its own; features (B, D) -> logits (B, C)."""
        return make_linear(stage1.linear.weight, stage1.linear.bias)

    def finished(self, head: nn.Module) -> nn.Module:
        """The head to evaluate and store: one of ``models.heads.HEADS``."""
        return head.to_linear() if isinstance(head, ScaledLinear | MARC | SAMN | UnitLinear) else head

    def checked(self, typed: Collection[str]) -> Self:
        """Itself, with defaults that suit what was typed; UsageError where options do not go together."""
        return self

    def chosen(self, stage1: Stage1, by: Figure = "class_mean") -> Self:
        """Itself, with those options filled in that are found on held-out images, by a figure of their report."""
        return self

    def grid(self, num_classes: int) -> Axes:
        """What --tune tries around its options."""
        return self.tuned


M = TypeVar("M", bound=Method)


def best_held_out(method: M, option: str, values: Iterable[float], otherwise: float, stage1: Stage1, by: Figure) -> M:
    """A method whose option is ``val`` with the value of the best ``by`` on the held-out images.

    ``otherwise`` where there are none.
    """
    if getattr(method, option) != "val":
        return method
    make: Callable[..., M] = partial(replace, method)
    if stage1.held_out is None:
        return make(**{option: otherwise})
    held_out = stage1.held_out

    def score(value: float) -> float:
        head = make(**{option: value}).head(stage1)
        pairs = [(head(features).argmax(dim=1), labels) for features, labels in held_out()]
        predicted, labels = (torch.cat(part) for part in zip(*pairs))
        return accuracies(predicted, labels, stage1.class_counts)[by]

    return make(**{option: max(values, key=score)})


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """Methods that train: here stage 1's classifier, fine-tuned by SGD with cross-entropy.

    The learning rate is Label Over-Smooth's on CIFAR-100-LT, and this project's choice where nothing was published for
    stage 2.
    """

    tuned = {"finetune_wd": (0.0, 5e-4, 5e-3)}
    takes_scope = True

    seed: int
    batch_size: int
    finetune_epoch: int
    finetune_scope: str = "fc"
    sampler: str = "instance"
    finetune_lr: float = 5e-4
    finetune_wd: float = 0.0

    @property
    def stream(self) -> Stream:
        return Stream(self.seed, self.sampler, self.batch_size, self.finetune_epoch)

    @property
    def scope(self) -> str:
        return self.finetune_scope

    def batches(self, source: FeatureSource, stage1: Stage1) -> Callable[[int], Iterator[Batch]]:
        """Epoch (from 0) -> what heads are trained on: features (B, D) and labels (B,); the stream says all of it."""
        return partial(source.epoch, self.stream)

    def rate(self, epoch: int) -> float:
        """The learning rate's factor in an epoch (from 0)."""
        return cosine(epoch, self.finetune_epoch)

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        """The loss at a share ``progress`` of the epochs: (logits (B, C), labels (B,)) -> scalar, nats."""
        return SoftmaxLoss(stage1.num_classes)

    def project(self, head: nn.Module, stage1: Stage1) -> None:
        """Puts the head back where it must be, after every epoch or, with ``projects_each_step``, every step."""

    @property
    def projects_each_step(self) -> bool:
        """Whether :meth:`project` is called after every step, not after every epoch."""
        return False

    def at_batch_size(self) -> Self:
        """Itself, the learning rate in proportion to the batch size."""
        return replace(self, finetune_lr=self.finetune_lr * (self.batch_size / REFERENCE_BATCH))

    def grid(self, num_classes: int) -> Axes:
        """Learning rates five times lower and higher, times ``tuned``."""
        return {"finetune_lr": (self.finetune_lr / 5, self.finetune_lr, self.finetune_lr * 5), **self.tuned}


@dataclass(frozen=True, kw_only=True)
class Smoothed(Trained):
    """Those whose cross-entropy can have its labels smoothed: true class 1 - d + d/C, others d/C."""

    label_smooth: float = 0.0

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return SoftmaxLoss(stage1.num_classes, smooth=self.label_smooth)


@dataclass(frozen=True, kw_only=True)
class LOS(Trained):
    """Label Over-Smooth (Sun et al., ICLR 2025): cross-entropy with label smoothing d near 1, stage 1's classifier.

    The true class gets 1 - d + d/C, the others d/C. Published with d 0.98 on CIFAR-100-LT, lr 5e-4, no weight decay,
    instance-balanced. Needs no class counts. LORT, the method of the paper's preprint (arXiv 2403.00250v1), splits the
    label in the same way by its abstract; the bodies were not compared, and there is no method of that name here.
    """

    name = "los"
    tuned = {}
    published = {"label_smooth": 0.98}

    label_smooth: float | Auto = "auto"

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        assert not isinstance(self.label_smooth, str)
        return SoftmaxLoss(stage1.num_classes, smooth=self.label_smooth)

    def grid(self, num_classes: int) -> Axes:
        # The true class's label is 1 + excess times any other: at C = 100 d is 0.4, 0.8 and 0.98, from ordinary
        # smoothing to over-smoothing, since small networks want less than the published ResNet-34.
        smooths = tuple(num_classes / (num_classes + excess) for excess in (150.0, 25.0, AUTO_EXCESS))
        return {**super().grid(num_classes), "label_smooth": smooths}


@dataclass(frozen=True, kw_only=True)
class CE(Smoothed):
    """Cross-entropy, stage 1's classifier trained on: the plain baseline. Needs no class counts."""

    name = "ce"


@dataclass(frozen=True, kw_only=True)
class CRT(Smoothed):
    """Classifier re-training (Kang et al., ICLR 2020): a fresh classifier, cross-entropy, class-balanced sampling.

    Published with lr 0.2 at batch 512, weight decay 5e-4 and 10 epochs on ImageNet-LT; the lr is scaled to batch 64.
    Needs class counts through its sampler alone.
    """

    name = "crt"
    needs_linear = False

    start: str = "random"
    finetune_lr: float = 0.025
    finetune_wd: float = 5e-4
    sampler: str = "class"


@dataclass(frozen=True, kw_only=True)
class LWS(Smoothed):
    """Learnable weight scaling (Kang et al., ICLR 2020): z'_j = s_j (w_j f + b_j), s alone is trained, from 1.

    Published with class-balanced sampling, lr 0.2 at batch 512, weight decay 5e-4 and 5 epochs on ImageNet-LT; the lr
    is scaled to batch 64. Needs class counts through its sampler alone.
    """

    name = "lws"
    takes_scope = False

    finetune_lr: float = 0.025
    finetune_wd: float = 5e-4
    sampler: str = "class"

    def head(self, stage1: Stage1) -> nn.Module:
        return ScaledLinear(make_linear(stage1.linear.weight, stage1.linear.bias))


@dataclass(frozen=True, kw_only=True)
class Joint(Method):
    """Stage 1's classifier as it is, trained jointly with the backbone (Kang et al.'s name): what the others improve.

    Needs no class counts.
    """

    name = "joint"
    needs_linear = False

    def head(self, stage1: Stage1) -> nn.Module:
        return copy.deepcopy(stage1.head)


@dataclass(frozen=True, kw_only=True)
class TauNorm(Method):
    """tau-normalisation (Kang et al., ICLR 2020): w_j / |w_j|^tau, the bias dropped; post-hoc.

    tau ``val``: of 0, 0.1, ..., 2 the best on the held-out images, as published on ImageNet-LT; 1 where there are none.
    Weight Balancing took 1.9 after a tuned weight decay on CIFAR-100-LT, and kept the bias. Needs no class counts.
    """

    name = "tau-norm"
    tuned = {"tau": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    tau: float | Literal["val"] = "val"

    def chosen(self, stage1: Stage1, by: Figure = "class_mean") -> Self:
        return best_held_out(self, "tau", [i / 10 for i in range(21)], 1.0, stage1, by)

    def head(self, stage1: Stage1) -> nn.Module:
        assert not isinstance(self.tau, str)
        weight = stage1.linear.weight
        return make_linear(weight / weight.norm(dim=1, keepdim=True) ** self.tau)


@dataclass(frozen=True, kw_only=True)
class L2Norm(Method):
    """Weight Balancing's L2 normalisation (Alshammari et al., CVPR 2022): w_j / |w_j|, the bias kept; post-hoc.

    Published on CIFAR-100-LT, ImageNet-LT and iNaturalist 2018, no parameter. Needs no class counts.
    """

    name = "l2-norm"

    def head(self, stage1: Stage1) -> nn.Module:
        weight = stage1.linear.weight
        return make_linear(weight / weight.norm(dim=1, keepdim=True), stage1.linear.bias)


@dataclass(frozen=True, kw_only=True)
class NCM(Method):
    """Nearest class mean (Kang et al., ICLR 2020): argmin_j |f' - m_j|, m_j the mean of class j's training features.

    ncm_metric ``centred``: f' = (f - mean) / |f - mean|, the published code's default on ImageNet-LT; ``cosine``:
    f' = f / |f| and m_j of length 1; ``l2``: f' = f. The means are of images that are not augmented. Needs no class
    counts.
    """

    name = "ncm"
    tuned = {"ncm_metric": ("centred", "cosine", "l2")}
    needs_linear = False
    takes_features = True

    ncm_metric: str = "centred"

    def head(self, stage1: Stage1) -> nn.Module:
        head = PrototypeHead(stage1.weight.shape[1], stage1.num_classes).to(stage1.weight.device)
        head.unit.fill_(self.ncm_metric != "l2")
        if self.ncm_metric == "centred":
            number = 0
            for features, _ in stage1.clean():
                head.center += features.sum(dim=0)
                number += len(features)
            head.center /= number
        sums, images = torch.zeros_like(head.weight), torch.zeros_like(stage1.weight[:, 0], dtype=torch.int64)
        for features, labels in stage1.clean():
            sums.index_add_(0, labels, head.transform(features))
            images += torch.bincount(labels, minlength=stage1.num_classes)
        means = sums / images[:, None]
        head.weight.data.copy_(nn.functional.normalize(means) if self.ncm_metric == "cosine" else means)
        return head


@dataclass(frozen=True, kw_only=True)
class LogitAdjustmentPostHoc(Method):
    """Post-hoc logit adjustment (Menon et al., ICLR 2021): z_j - tau log pi_j, of stage 1's classifier.

    Published with tau 1 on CIFAR-LT and ImageNet-LT. Needs class counts.
    """

    name = "logit-adjustment-posthoc"
    adjusts = True
    tuned = {"la_tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)}

    la_tau: float = 1.0

    def head(self, stage1: Stage1) -> nn.Module:
        log_prior = class_frequencies(stage1.class_counts).log().to(stage1.linear.bias)
        return make_linear(stage1.linear.weight, stage1.linear.bias - self.la_tau * log_prior)


@dataclass(frozen=True, kw_only=True)
class MultiplicativeLogitAdjustment(Method):
    """Multiplicative logit adjustment (MLA; Hasegawa and Sato, ICLR 2025): z_j pi_j^(-tau) of stage 1's z; post-hoc.

    Weight and bias are scaled alike. tau ``val``: of 0, 0.05, ..., 1 the best on the held-out images; where there are
    none 0.65, published on CIFAR-100-LT with a ResNet-34, weight decay 5e-3 and a classifier fixed as an equiangular
    tight frame. All logits grow, so that probabilities need temperature scaling. Needs class counts.
    """

    name = "mla"
    adjusts = True
    tuned = {"mla_tau": (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1, 1.25)}

    mla_tau: float | Literal["val"] = "val"

    def chosen(self, stage1: Stage1, by: Figure = "class_mean") -> Self:
        return best_held_out(self, "mla_tau", [i / 20 for i in range(21)], 0.65, stage1, by)

    def head(self, stage1: Stage1) -> nn.Module:
        assert not isinstance(self.mla_tau, str)
        factors = (class_frequencies(stage1.class_counts) ** -self.mla_tau).to(stage1.linear.bias)
        return make_linear(factors[:, None] * stage1.linear.weight, factors * stage1.linear.bias)


@dataclass(frozen=True, kw_only=True)
class LogitAdjustment(Trained):
    """Logit-adjusted training (Menon et al., ICLR 2021): CE(z + tau log pi) in training, z at test.

    Published with tau 1 on CIFAR-LT and ImageNet-LT, there for whole networks. Needs class counts.
    """

    name = "logit-adjustment"
    tuned = {"la_tau": (0.5, 1.0, 1.5)}

    la_tau: float = 1.0

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return logit_adjustment(stage1.class_counts, self.la_tau)


@dataclass(frozen=True, kw_only=True)
class VectorScaling(Trained):
    """Vector scaling (Kini et al., NeurIPS 2021): CE(z_j / Delta_j + tau log pi_j), Delta_j = (n_max / n_j)^gamma.

    Plain logits at test. Published with gamma 0.3 and tau 1.2 on CIFAR-100-LT, gamma 0.2 on CIFAR-10-LT, there for
    whole networks. gamma 0 is logit-adjusted training. Needs class counts.
    """

    name = "vs"
    tuned = {"vs_gamma": (0.1, 0.2, 0.3)}

    vs_gamma: float = 0.3
    la_tau: float = 1.2

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return vector_scaling(stage1.class_counts, self.vs_gamma, self.la_tau)


@dataclass(frozen=True, kw_only=True)
class ClassTemperatures(Trained):
    """Class-dependent temperatures (CDT; Ye et al., 2020): CE(z_j / Delta_j), Delta_j = (n_max / n_j)^gamma.

    Plain logits at test: vector scaling without a prior. Published with gamma from [0, 0.4] on CIFAR-LT, for whole
    networks; 0.2 is this project's choice. Needs class counts.
    """

    name = "cdt"
    tuned = {"vs_gamma": (0.1, 0.2, 0.4)}

    vs_gamma: float = 0.2

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return class_temperatures(stage1.class_counts, self.vs_gamma)


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(Trained):
    """Balanced softmax (Ren et al., NeurIPS 2020): CE(z + log n) in training, z at test; no parameter.

    Published for whole networks on CIFAR-LT and, as here, for the classifier alone: Places-LT with lr 0.02 at batch
    256, weight decay 5e-4, 10 epochs; the lr is scaled to batch 64. Equals train-time logit adjustment with tau 1.
    Needs class counts.
    """

    name = "balanced-softmax"

    finetune_lr: float = 0.005
    finetune_wd: float = 5e-4

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return balanced_softmax(stage1.class_counts)


@dataclass(frozen=True, kw_only=True)
class FocalLoss(Trained):
    """Focal loss (Lin et al., ICCV 2017): -(1 - p_y)^gamma log p_y.

    p is a softmax here, a sigmoid in the paper, whose alpha is left out. gamma 1 is LDAM-DRW's for whole networks on
    CIFAR-LT, 2 the paper's for object detection. Needs no class counts.
    """

    name = "focal"
    tuned = {"focal_gamma": (0.5, 1.0, 2.0)}

    focal_gamma: float = 1.0

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return Focal(self.focal_gamma)


@dataclass(frozen=True, kw_only=True)
class ClassBalanced(Trained):
    """Class-balanced loss (Cui et al., CVPR 2019): weights (1 - beta) / (1 - beta^n_y), summing to C.

    cb_form ``ce``: weighted cross-entropy; ``bce``: binary cross-entropy between softmax and one-hot, as in Weight
    Balancing's code. beta 0.9999 is the paper's for whole networks on CIFAR-10-LT, and Weight Balancing's on
    CIFAR-100-LT. Needs class counts.
    """

    name = "class-balanced"
    tuned = {"cb_beta": (0.99, 0.999, 0.9999)}

    cb_beta: float = 0.9999
    cb_form: str = "ce"

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        if self.cb_form == "bce":
            return ClassBalancedBCE(stage1.class_counts, self.cb_beta)
        return class_balanced(stage1.class_counts, self.cb_beta)


@dataclass(frozen=True, kw_only=True)
class WeightDecay(ClassBalanced):
    """Weight Balancing's classifier with weight decay alone (CVPR 2022, "+ WD"): class-balanced loss, strong decay.

    Its own values were not released; lr, weight decay, schedule and loss are those of :class:`MaxNorm`. Its code steps
    the cosine before each epoch, so that rates are those of the ``next`` one, to 0 in the last: their sum over 10
    epochs is 18 % smaller. Needs class counts.
    """

    name = "weight-decay"
    published = {"finetune_epoch": 10, "finetune_schedule": "next"}
    tuned = {"finetune_wd": (0.02, 0.1, 0.5)}

    finetune_lr: float = 0.01
    finetune_wd: float = 0.1
    cb_form: str = "bce"
    finetune_schedule: str = "cosine"

    def rate(self, epoch: int) -> float:
        return cosine(epoch + (self.finetune_schedule == "next"), self.finetune_epoch)


@dataclass(frozen=True, kw_only=True)
class MaxNorm(WeightDecay):
    """Weight Balancing (CVPR 2022, Eq. 5): weight decay, class-balanced loss and w_j <- min(1, r / |w_j|) w_j.

    maxnorm_radius ``published``: r = min |w_j| + 0.1 (max |w_j| - min |w_j|) of stage 1's rows; maxnorm_every ``epoch``
    as in its code, ``step`` as in its text. The bias is free. Published with lr 0.01, weight decay 0.1, the ``bce``
    form, beta 0.9999 and 10 epochs at batch 64 on CIFAR-100-LT. label_smooth takes the ``ce`` form. Needs class counts
    for the loss, none for the projection.
    """

    name = "maxnorm"
    projects = True

    label_smooth: float = 0.0
    maxnorm_radius: float | Literal["published"] = "published"
    maxnorm_every: str = "epoch"

    def checked(self, typed: Collection[str]) -> Self:
        if self.label_smooth and self.cb_form == "bce" and "cb_form" in typed:
            raise UsageError("--method maxnorm with --label_smooth above 0 and --cb_form bce", "--cb_form ce")
        if self.maxnorm_every == "step" and self.finetune_scope != "fc":
            raise UsageError(f"--maxnorm_every step with --finetune_scope {self.finetune_scope}", "epoch")
        return replace(self, cb_form="ce") if self.label_smooth else self

    @property
    def projects_each_step(self) -> bool:
        return self.maxnorm_every == "step"

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        if self.label_smooth:
            return class_balanced(stage1.class_counts, self.cb_beta, self.label_smooth)
        return super().loss(stage1, progress)

    def project(self, head: nn.Module, stage1: Stage1) -> None:
        radius = self.maxnorm_radius
        if isinstance(radius, str):
            norms = stage1.linear.weight.norm(dim=1)
            radius = float(norms.min() + 0.1 * (norms.max() - norms.min()))
        project_rows(head.get_parameter("weight"), radius)


@dataclass(frozen=True, kw_only=True)
class _OnCosines(Trained):
    """Methods with a cosine head, from stage 1's directions."""

    needs_linear = False

    cosine_scale: float = 30.0

    def head(self, stage1: Stage1) -> nn.Module:
        head = CosineHead(stage1.weight.shape[1], stage1.num_classes, self.cosine_scale)
        head.weight = nn.Parameter(stage1.weight.detach().clone())
        return head.to(stage1.weight.device)


@dataclass(frozen=True, kw_only=True)
class Cosine(Smoothed, _OnCosines):
    """Cross-entropy on a cosine head (Gidaris and Komodakis, CVPR 2018): z_j = s cos(f, w_j), without bias.

    It starts from stage 1's directions. s is fixed; 30 is LDAM-DRW's for whole networks on CIFAR-LT. Needs no class
    counts.
    """

    name = "cosine"
    tuned = {"cosine_scale": (10.0, 20.0, 30.0)}


@dataclass(frozen=True, kw_only=True)
class LDAM(_OnCosines):
    """LDAM with deferred re-weighting (Cao et al., NeurIPS 2019): CE(s (cos - m_y 1_y)), m_j ~ n_j^(-1/4), at most m.

    From the share ``drw`` of the epochs on, with class-balanced weights of beta 0.9999. Published on CIFAR-LT for whole
    networks with m 0.5, s 30 and drw 0.8 (epoch 160 of 200). Needs class counts.
    """

    name = "ldam"
    tuned = {"ldam_margin": (0.1, 0.3, 0.5)}

    ldam_margin: float = 0.5
    drw: float = 0.8
    cb_beta: float = 0.9999

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        loss = ldam(stage1.class_counts, self.ldam_margin, self.cosine_scale)
        if progress < self.drw:
            return loss
        return reweighted(loss, class_balanced_weights(stage1.class_counts, self.cb_beta))


@dataclass(frozen=True, kw_only=True)
class LabelAwareSmoothing(Trained):
    """Label-aware smoothing (Zhong et al., MiSLAS, CVPR 2021): smoothing that grows with n_y from tail to head.

    e_y = tail + (head - tail) sin(pi (n_y - n_min) / (2 (n_max - n_min))). Published with class-balanced sampling, head
    0.4, tail 0.1, lr 0.02 at batch 128, weight decay 2e-4 and 10 epochs on CIFAR-100-LT at ratio 100; the lr is scaled
    to batch 64. Its code also learns a scale per class and lets BatchNorm adapt to the sampler, as --features replay
    does here. Needs class counts.
    """

    name = "label-aware-smoothing"
    tuned = {"las_head": (0.2, 0.4, 0.6)}

    finetune_lr: float = 0.01
    finetune_wd: float = 2e-4
    sampler: str = "class"
    las_head: float = 0.4
    las_tail: float = 0.1

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return label_aware_smoothing(stage1.class_counts, self.las_head, self.las_tail)


@dataclass(frozen=True, kw_only=True)
class DisAlign(Trained):
    """Distribution alignment (Zhang et al., CVPR 2021): z'_j = (1 + c a_j) z_j + c b_j, c = sigmoid(u f + v).

    The form of its classification code. Cross-entropy weighted by pi^(-rho); stage 1's classifier stays as it is. That
    code has rho 1.2, lr 0.1 at batch 256, weight decay 5e-4 on ImageNet-LT; the lr is scaled to batch 64. Needs class
    counts.
    """

    name = "disalign"
    tuned = {"grw_rho": (0.8, 1.2, 1.5)}
    takes_scope = False

    finetune_lr: float = 0.025
    finetune_wd: float = 5e-4
    grw_rho: float = 1.2

    def head(self, stage1: Stage1) -> nn.Module:
        head = DisAlignHead(stage1.linear.in_features, stage1.num_classes).to(stage1.linear.weight.device)
        head.weight.data.copy_(stage1.linear.weight)
        head.bias.data.copy_(stage1.linear.bias)
        return head

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return generalised_reweighting(stage1.class_counts, self.grw_rho)


@dataclass(frozen=True, kw_only=True)
class MarginCalibration(Trained):
    """MARC (Wang et al., ACML 2022): z'_j = a_j z_j + b_j |w_j|, a and b alone are trained, from 1 and 0.

    Cross-entropy weighted by pi^(-rho). Published with rho 1.2, weight decay 5e-4 and 2000 steps at batch 512 on
    CIFAR-LT, the lr rising from 0.05 to 0.1 and then a cosine; 0.1 is scaled to batch 64, the rise left out. Needs
    class counts.
    """

    name = "marc"
    tuned = {"grw_rho": (0.8, 1.2, 1.5)}
    takes_scope = False

    finetune_lr: float = 0.0125
    finetune_wd: float = 5e-4
    grw_rho: float = 1.2

    def head(self, stage1: Stage1) -> nn.Module:
        return MARC(make_linear(stage1.linear.weight, stage1.linear.bias))

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return generalised_reweighting(stage1.class_counts, self.grw_rho)


@dataclass(frozen=True, kw_only=True)
class LadeLoss(Trained):
    """LADE (Hong et al., CVPR 2021): CE(z + log pi) - alpha sum_j pi_j [E_j - L_j - lambda L_j^2].

    E_j is the mean logit of class j's images, L_j the log of a mean of exponentials, see losses/weighted.py. Published
    with alpha 0.1, lambda 0.01 on CIFAR-100-LT at ratio 100, for whole networks. Needs class counts.
    """

    name = "lade"
    tuned = {"lade_alpha": (0.02, 0.1, 0.5)}

    lade_alpha: float = 0.1
    lade_lambda: float = 0.01

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return LADE(stage1.class_counts, self.lade_alpha, self.lade_lambda)


@dataclass(frozen=True, kw_only=True)
class MonotoneNorms(Trained):
    """SAMN (CVPR 2026): rows w_j / |w_j| exp(1 / softplus(m_j)), biases b_j + exp(1 / softplus(m'_j)).

    m and m' alone are trained, by cross-entropy, from n_j / n_max, each as its isotonic regression, so that norms never
    fall from the largest class to the smallest. Published with lr 5e-4, no weight decay and 20 epochs on CIFAR-LT.
    Needs class counts for the start and the order.
    """

    name = "samn"
    takes_scope = False

    def head(self, stage1: Stage1) -> nn.Module:
        return SAMN(stage1.linear, stage1.class_counts)


@dataclass(frozen=True, kw_only=True)
class ClassBalancedSigmoidLoss(Trained):
    """Stage 2 of BCE3S (AAAI 2026): w_y sum_j BCE(sigmoid(z_j), [j = y]) with z_j = s w_j / |w_j| f + b_j.

    The weights w_y are :class:`ClassBalanced`'s (Cui et al., CVPR 2019). Published with lr 1e-4 at batch 64 and no
    weight decay on CIFAR-100-LT; MaxNorm is left out, as rows have one norm. s is fixed, the mean norm of stage 1's
    rows, and the bias starts shifted by one number, so that sum_j sigmoid(z_j) is 1 in the mean over training images:
    both are this project's, to start near a softmax classifier too. Needs class counts.
    """

    name = "cb-sigmoid"
    tuned = {"cb_beta": (0.99, 0.999, 0.9999)}
    takes_scope = False
    takes_features = True

    finetune_lr: float = 1e-4
    cb_beta: float = 0.9999

    def head(self, stage1: Stage1) -> nn.Module:
        head = UnitLinear(make_linear(stage1.weight, stage1.linear.bias), stage1.weight.norm(dim=1).mean())
        with torch.no_grad():
            logits = head(spaced(stage1, 2048))
            low, high = -logits.max() - math.log(stage1.num_classes), -logits.min()
            for _ in range(60):
                middle = (low + high) / 2
                is_low = (logits + middle).sigmoid().sum(dim=1).mean() < 1
                low, high = (middle, high) if is_low else (low, middle)
            head.bias.add_(middle)
        return head

    def loss(self, stage1: Stage1, progress: float) -> nn.Module:
        return ClassBalancedSigmoid(stage1.class_counts, self.cb_beta)


@dataclass(frozen=True, kw_only=True)
class TailSampling(Trained):
    """TailCalibX (Vigneswaran et al., ICVGIP 2021): CE on real features and on samples that fill the smaller classes.

    A sample is of N(mu, Sigma + alpha v I), drawn anew in every epoch, around a feature of its class: mu is the mean of
    that feature and of the k nearest class means, Sigma the mean of these classes' covariances. Published with k 3,
    alpha 0, lr 0.01 at batch 128, momentum 0.7, weight decay 5e-4 on CIFAR-100-LT at ratio 100, where features had
    length 1 and the classifier was a cosine one; the lr is scaled to batch 64. v, the mean variance within classes,
    makes alpha free of the features' scale, and is this project's: the code adds alpha to every element of Sigma. Its
    powers of features (1 at ratio 100, so none) are left out. Class means and covariances are those of images that are
    not augmented. Needs class counts for the number of samples, and through its sampler.
    """

    name = "tail-sampling"
    tuned = {"tail_neighbours": (1, 3, 10)}
    takes_scope = False

    finetune_lr: float = 0.005
    finetune_wd: float = 5e-4
    sampler: str = "class"
    tail_neighbours: int = 3
    tail_alpha: float = 0.0

    @property
    def stream(self) -> Stream:
        words = f"samples of {self.tail_neighbours} nearest classes, alpha {self.tail_alpha:g}"
        return super().stream._replace(change=words)

    def batches(self, source: FeatureSource, stage1: Stage1) -> Callable[[int], Iterator[Batch]]:
        sampler = TailSampler(stage1.class_counts, stage1.clean(), self.tail_neighbours, self.tail_alpha)
        return lambda epoch: sampler(source.epoch(self.stream, epoch), seeded(self.seed, CHANGES_STREAM, epoch))


@dataclass(frozen=True, kw_only=True)
class HeadToTail(Trained):
    """H2T (Li et al., AAAI 2024): CE; a share rho of the channels is that of another, instance-balanced batch.

    f' = m f + (1 - m) g for the i-th feature f of a class-balanced batch and the i-th, g, of an instance-balanced one,
    with f's label; m drops the floor of rho D channels, others in each step. Published with rho 0.3, in its code 0.25
    on CIFAR-100-LT at ratio 100, with lr 0.1 at batch 128, weight decay 5e-4 and 10 epochs; the lr is scaled to batch
    64. There on maps before pooling, here on pooled features, which is the same. Needs class counts through its sampler
    alone.
    """

    name = "h2t"
    tuned = {"h2t_rho": (0.15, 0.3, 0.5)}
    takes_scope = False

    finetune_lr: float = 0.05
    finetune_wd: float = 5e-4
    sampler: str = "class"
    h2t_rho: float = 0.3

    @property
    def stream(self) -> Stream:
        return super().stream._replace(change=f"fused by {self.h2t_rho:g}", second="instance")

    def checked(self, typed: Collection[str]) -> Self:
        if self.sampler == self.stream.second and "method" in typed:  # both batches would be the same
            allowed = ", ".join(name for name in SAMPLERS if name != self.sampler)
            raise UsageError(f"--sampler {self.sampler} with --method h2t, whose other batch has it", allowed)
        return self

    def batches(self, source: FeatureSource, stage1: Stage1) -> Callable[[int], Iterator[Batch]]:
        def epoch(number: int) -> Iterator[Batch]:
            own, second = (source.epoch(stream, number) for stream in self.stream.read)
            return fused(own, second, self.h2t_rho, seeded(self.seed, CHANGES_STREAM, number))

        return epoch


def spaced(stage1: Stage1, number: int) -> Tensor:
    """Features (at most ``number``, D) of training images, every k-th of them."""
    step, seen, rows = -(-sum(stage1.class_counts) // number), 0, list[Tensor]()
    for features, _ in stage1.clean():
        rows.append(features[-seen % step :: step])
        seen += len(features)
    return torch.cat(rows)


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Joint,
        LOS,
        CE,
        CRT,
        LWS,
        TauNorm,
        NCM,
        FocalLoss,
        ClassBalanced,
        LDAM,
        BalancedSoftmax,
        LogitAdjustment,
        LogitAdjustmentPostHoc,
        MultiplicativeLogitAdjustment,
        VectorScaling,
        ClassTemperatures,
        LabelAwareSmoothing,
        DisAlign,
        MarginCalibration,
        LadeLoss,
        L2Norm,
        WeightDecay,
        MaxNorm,
        Cosine,
        MonotoneNorms,
        ClassBalancedSigmoidLoss,
        TailSampling,
        HeadToTail,
    )
}
