"""The ways to re-train a classifier on frozen features. ``METHODS`` maps a --method name to one small class each.

A method says where its head starts, which loss it follows, what is done to the head afterwards, and which options it
takes with which defaults. The sampler is an option like any other, so that sampler and loss combine freely. C classes
have n_j training images; pi_j = n_j / sum n. Values published for another data set or batch size are marked so: the
methods share a budget of epochs and a batch size; learning rates are for 64 images per step, to which those published
for larger batches are scaled, and follow the batch size in proportion (Goyal et al., 2017). ``grid`` gives each method
at most nine settings to be tuned over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses.softmax import (
    AUTO_EXCESS,
    SoftmaxLoss,
    balanced_softmax,
    class_balanced,
    class_balanced_weights,
    class_frequencies,
    generalised_reweighting,
    label_aware_smoothing,
    ldam,
    logit_adjustment,
    reweighted,
)
from losses.weighted import LADE, ClassBalancedBCE, Focal
from models.heads import MARC, CosineHead, DisAlignHead, PrototypeHead, ScaledLinear, make_linear, project_rows
from utils.metrics import accuracies
from utils.options import UsageError

#: One value per option: what one classifier is trained with.
Values = Mapping[str, Any]
#: Features (n, D) float32 and labels (n,) of some images after the other, so that they need not fit into memory.
Blocks = Iterable[tuple[Tensor, Tensor]]

#: Label Over-Smooth's on CIFAR-100-LT, and this project's choice where nothing was published for stage 2.
FINE_TUNE = {"finetune_lr": 5e-4, "finetune_wd": 0.0}


@dataclass(frozen=True)
class Start:
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


class Method:
    """What the methods have in common: stage 1's classifier, fine-tuned by SGD with a (smoothed) cross-entropy.

    Attributes:
        options: the options that a method takes, with its defaults; those of every trained method are in settings.py.
        published: what --protocol published takes instead of a default that departs from the paper on purpose.
        tuned: {option: values} that the grid multiplies out.
        is_trained: whether there is anything to train; post-hoc methods have none.
        projects: whether :meth:`project` does anything.
        takes_scope: whether its head can also be trained together with the backbone.
        needs_linear: whether it continues from stage 1's classifier as a linear one; others take a cosine head too.
    """

    options: Values = FINE_TUNE
    published: Values = {}
    tuned: Mapping[str, tuple[Any, ...]] = {"finetune_wd": (0.0, 5e-4, 5e-3)}
    is_trained = True
    projects = False
    takes_scope = True
    needs_linear = True

    def head(self, start: Start, values: Values) -> nn.Module:
        """A head of its own to train; features (B, D) -> logits (B, C)."""
        return make_linear(start.linear.weight, start.linear.bias)

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        """The loss at a share ``progress`` of the epochs: (logits (B, C), labels (B,)) -> scalar, nats."""
        return SoftmaxLoss(start.num_classes, smooth=values.get("label_smooth", 0.0))

    def project(self, head: nn.Module, start: Start, values: Values) -> None:
        """Puts the head back where it must be, after a step or an epoch."""

    def finished(self, head: nn.Module) -> nn.Module:
        """The head to evaluate and store: one of ``models.heads.HEADS``."""
        return head.to_linear() if isinstance(head, ScaledLinear | MARC) else head

    def settle(self, values: dict[str, Any], typed: Collection[str]) -> None:
        """Adapts defaults to the values that were typed; raises UsageError where those do not go together."""

    def resolve(self, start: Start, values: Values) -> Values:
        """The values with those filled in that are found on held-out images."""
        return values

    def grid(self, values: Values, num_classes: int) -> dict[str, tuple[Any, ...]]:
        """What --tune tries around ``values``: learning rates five times lower and higher, times ``tuned``."""
        lr = values.get("finetune_lr")
        rates = {} if lr is None else {"finetune_lr": (lr / 5, lr, lr * 5)}
        return {**rates, **self.tuned}


class LOS(Method):
    """Label Over-Smooth (Sun et al., ICLR 2025): cross-entropy with label smoothing d near 1, stage 1's classifier.

    The true class gets 1 - d + d/C, the others d/C. Published with d 0.98 on CIFAR-100-LT, lr 5e-4, no weight decay,
    instance-balanced. Needs no class counts. LORT, the method of the paper's preprint (arXiv 2403.00250v1), splits the
    label in the same way by its abstract; the bodies were not compared, and there is no method of that name here.
    """

    options = {**FINE_TUNE, "label_smooth": "auto"}
    tuned = {}
    published = {"label_smooth": 0.98}

    def grid(self, values: Values, num_classes: int) -> dict[str, tuple[Any, ...]]:
        # The true class's label is 1 + excess times any other: at C = 100 d is 0.4, 0.8 and 0.98, from ordinary
        # smoothing to over-smoothing, since small networks want less than the published ResNet-34.
        smooths = tuple(num_classes / (num_classes + excess) for excess in (150.0, 25.0, AUTO_EXCESS))
        return super().grid(values, num_classes) | {"label_smooth": smooths}


class CE(Method):
    """Cross-entropy, stage 1's classifier trained on: the plain baseline. Needs no class counts."""

    options = {**FINE_TUNE, "label_smooth": 0.0}


class CRT(Method):
    """Classifier re-training (Kang et al., ICLR 2020): a fresh classifier, cross-entropy, class-balanced sampling.

    Published with lr 0.2 at batch 512, weight decay 5e-4 and 10 epochs on ImageNet-LT; the lr is scaled to batch 64.
    Needs class counts through its sampler alone.
    """

    options = {"finetune_lr": 0.025, "finetune_wd": 5e-4, "label_smooth": 0.0, "sampler": "class"}
    needs_linear = False

    def head(self, start: Start, values: Values) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(values["seed"])
            return nn.Linear(start.weight.shape[1], start.num_classes).to(start.weight.device)


class LWS(Method):
    """Learnable weight scaling (Kang et al., ICLR 2020): z'_j = s_j (w_j f + b_j), s alone is trained, from 1.

    Published with class-balanced sampling, lr 0.2 at batch 512, weight decay 5e-4 and 5 epochs on ImageNet-LT; the lr
    is scaled to batch 64. Needs class counts through its sampler alone.
    """

    options = {"finetune_lr": 0.025, "finetune_wd": 5e-4, "label_smooth": 0.0, "sampler": "class"}
    takes_scope = False

    def head(self, start: Start, values: Values) -> nn.Module:
        return ScaledLinear(make_linear(start.linear.weight, start.linear.bias))


class PostHoc(Method):
    """Methods that train nothing."""

    options: Values = {}
    tuned: Mapping[str, tuple[Any, ...]] = {}
    is_trained = False
    takes_scope = False


class Joint(PostHoc):
    """Stage 1's classifier as it is, trained jointly with the backbone (Kang et al.'s name): what the others improve.

    Needs no class counts.
    """

    needs_linear = False

    def head(self, start: Start, values: Values) -> nn.Module:
        return copy.deepcopy(start.head)


class TauNorm(PostHoc):
    """tau-normalisation (Kang et al., ICLR 2020): w_j / |w_j|^tau, the bias dropped; post-hoc.

    tau ``val``: of 0, 0.1, ..., 2 the one of best class-mean accuracy on the held-out images, as published on
    ImageNet-LT; 1 where there are none. Weight Balancing took 1.9 after a tuned weight decay on CIFAR-100-LT, and kept
    the bias. Needs no class counts.
    """

    options = {"tau": "val"}
    tuned = {"tau": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}

    def resolve(self, start: Start, values: Values) -> Values:
        if values["tau"] != "val":
            return values
        if start.held_out is None:
            return {**values, "tau": 1.0}
        held_out = start.held_out

        def class_mean(tau: float) -> float:
            head = self.head(start, {"tau": tau})
            pairs = [(head(features).argmax(dim=1), labels) for features, labels in held_out()]
            predicted, labels = (torch.cat(part) for part in zip(*pairs))
            score: float = accuracies(predicted, labels, start.class_counts)["class_mean"]
            return score

        return {**values, "tau": max((i / 10 for i in range(21)), key=class_mean)}

    def head(self, start: Start, values: Values) -> nn.Module:
        weight = start.linear.weight
        return make_linear(weight / weight.norm(dim=1, keepdim=True) ** values["tau"])


class L2Norm(PostHoc):
    """Weight Balancing's L2 normalisation (Alshammari et al., CVPR 2022): w_j / |w_j|, the bias kept; post-hoc.

    Published on CIFAR-100-LT, ImageNet-LT and iNaturalist 2018, no parameter. Needs no class counts.
    """

    def head(self, start: Start, values: Values) -> nn.Module:
        weight = start.linear.weight
        return make_linear(weight / weight.norm(dim=1, keepdim=True), start.linear.bias)


class NCM(PostHoc):
    """Nearest class mean (Kang et al., ICLR 2020): argmin_j |f' - m_j|, m_j the mean of class j's training features.

    ncm_metric ``centred``: f' = (f - mean) / |f - mean|, the published code's default on ImageNet-LT; ``cosine``:
    f' = f / |f| and m_j of length 1; ``l2``: f' = f. The means are of images that are not augmented. Needs no class
    counts.
    """

    options = {"ncm_metric": "centred"}
    tuned = {"ncm_metric": ("centred", "cosine", "l2")}
    needs_linear = False

    def head(self, start: Start, values: Values) -> nn.Module:
        head = PrototypeHead(start.weight.shape[1], start.num_classes).to(start.weight.device)
        head.unit.fill_(values["ncm_metric"] != "l2")
        if values["ncm_metric"] == "centred":
            number = 0
            for features, _ in start.clean():
                head.center += features.sum(dim=0)
                number += len(features)
            head.center /= number
        sums, images = torch.zeros_like(head.weight), torch.zeros_like(start.weight[:, 0], dtype=torch.int64)
        for features, labels in start.clean():
            sums.index_add_(0, labels, head.transform(features))
            images += torch.bincount(labels, minlength=start.num_classes)
        means = sums / images[:, None]
        head.weight.data.copy_(nn.functional.normalize(means) if values["ncm_metric"] == "cosine" else means)
        return head


class LogitAdjustmentPostHoc(PostHoc):
    """Post-hoc logit adjustment (Menon et al., ICLR 2021): z_j - tau log pi_j, of stage 1's classifier.

    Published with tau 1 on CIFAR-LT and ImageNet-LT. Needs class counts.
    """

    options = {"la_tau": 1.0}
    tuned = {"la_tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)}

    def head(self, start: Start, values: Values) -> nn.Module:
        log_prior = class_frequencies(start.class_counts).log().to(start.linear.bias)
        return make_linear(start.linear.weight, start.linear.bias - values["la_tau"] * log_prior)


class LogitAdjustment(Method):
    """Logit-adjusted training (Menon et al., ICLR 2021): CE(z + tau log pi) in training, z at test.

    Published with tau 1 on CIFAR-LT and ImageNet-LT, there for whole networks. Needs class counts.
    """

    options = {**FINE_TUNE, "la_tau": 1.0}
    tuned = {"la_tau": (0.5, 1.0, 1.5)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return logit_adjustment(start.class_counts, values["la_tau"])


class BalancedSoftmax(Method):
    """Balanced softmax (Ren et al., NeurIPS 2020): CE(z + log n) in training, z at test; no parameter.

    Published for whole networks on CIFAR-LT and, as here, for the classifier alone: Places-LT with lr 0.02 at batch
    256, weight decay 5e-4, 10 epochs; the lr is scaled to batch 64. Equals train-time logit adjustment with tau 1.
    Needs class counts.
    """

    options = {"finetune_lr": 0.005, "finetune_wd": 5e-4}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return balanced_softmax(start.class_counts)


class FocalLoss(Method):
    """Focal loss (Lin et al., ICCV 2017): -(1 - p_y)^gamma log p_y.

    p is a softmax here, a sigmoid in the paper, whose alpha is left out. gamma 1 is LDAM-DRW's for whole networks on
    CIFAR-LT, 2 the paper's for object detection. Needs no class counts.
    """

    options = {**FINE_TUNE, "focal_gamma": 1.0}
    tuned = {"focal_gamma": (0.5, 1.0, 2.0)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return Focal(values["focal_gamma"])


class ClassBalanced(Method):
    """Class-balanced loss (Cui et al., CVPR 2019): weights (1 - beta) / (1 - beta^n_y), summing to C.

    cb_form ``ce``: weighted cross-entropy; ``bce``: binary cross-entropy between softmax and one-hot, as in Weight
    Balancing's code. beta 0.9999 is the paper's for whole networks on CIFAR-10-LT, and Weight Balancing's on
    CIFAR-100-LT. Needs class counts.
    """

    options = {**FINE_TUNE, "cb_beta": 0.9999, "cb_form": "ce"}
    tuned = {"cb_beta": (0.99, 0.999, 0.9999)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        if values["cb_form"] == "bce":
            return ClassBalancedBCE(start.class_counts, values["cb_beta"])
        return class_balanced(start.class_counts, values["cb_beta"], values.get("label_smooth", 0.0))


class WeightDecay(ClassBalanced):
    """Weight Balancing's classifier with weight decay alone (CVPR 2022, "+ WD"): class-balanced loss, strong decay.

    Its own values were not released; lr, weight decay and loss are those of :class:`MaxNorm`. Needs class counts.
    """

    options = {"finetune_lr": 0.01, "finetune_wd": 0.1, "cb_beta": 0.9999, "cb_form": "bce"}
    tuned = {"finetune_wd": (0.02, 0.1, 0.5)}


class MaxNorm(WeightDecay):
    """Weight Balancing (CVPR 2022, Eq. 5): weight decay, class-balanced loss and w_j <- min(1, r / |w_j|) w_j.

    maxnorm_radius ``published``: r = min |w_j| + 0.1 (max |w_j| - min |w_j|) of stage 1's rows; maxnorm_every ``epoch``
    as in its code, ``step`` as in its text. The bias is free. Published with lr 0.01, weight decay 0.1, the ``bce``
    form, beta 0.9999 and 10 epochs at batch 64 on CIFAR-100-LT. label_smooth takes the ``ce`` form. Needs class counts
    for the loss, none for the projection.
    """

    options = {
        **WeightDecay.options,
        "label_smooth": 0.0,
        "maxnorm_radius": "published",
        "maxnorm_every": "epoch",
    }

    projects = True

    def settle(self, values: dict[str, Any], typed: Collection[str]) -> None:
        if values["label_smooth"] and values["cb_form"] == "bce":
            if "cb_form" in typed:
                raise UsageError("--method maxnorm with --label_smooth above 0 and --cb_form bce", "--cb_form ce")
            values["cb_form"] = "ce"
        if values["maxnorm_every"] == "step" and values["finetune_scope"] != "fc":
            raise UsageError(f"--maxnorm_every step with --finetune_scope {values['finetune_scope']}", "epoch")

    def project(self, head: nn.Module, start: Start, values: Values) -> None:
        radius = values["maxnorm_radius"]
        if radius == "published":
            norms = start.linear.weight.norm(dim=1)
            radius = float(norms.min() + 0.1 * (norms.max() - norms.min()))
        project_rows(head.get_parameter("weight"), radius)


class Cosine(Method):
    """Cross-entropy on a cosine head (Gidaris and Komodakis, CVPR 2018): z_j = s cos(f, w_j), without bias.

    It starts from stage 1's directions. s is fixed; 30 is LDAM-DRW's for whole networks on CIFAR-LT. Needs no class
    counts.
    """

    options = {**FINE_TUNE, "label_smooth": 0.0, "cosine_scale": 30.0}
    tuned = {"cosine_scale": (10.0, 20.0, 30.0)}
    needs_linear = False

    def head(self, start: Start, values: Values) -> nn.Module:
        head = CosineHead(start.weight.shape[1], start.num_classes, values["cosine_scale"])
        head.weight = nn.Parameter(start.weight.detach().clone())
        return head.to(start.weight.device)


class LDAM(Cosine):
    """LDAM with deferred re-weighting (Cao et al., NeurIPS 2019): CE(s (cos - m_y 1_y)), m_j ~ n_j^(-1/4), at most m.

    From the share ``drw`` of the epochs on, with class-balanced weights of beta 0.9999. Published on CIFAR-LT for whole
    networks with m 0.5, s 30 and drw 0.8 (epoch 160 of 200). Needs class counts.
    """

    options = {**FINE_TUNE, "ldam_margin": 0.5, "cosine_scale": 30.0, "drw": 0.8, "cb_beta": 0.9999}
    tuned = {"ldam_margin": (0.1, 0.3, 0.5)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        loss = ldam(start.class_counts, values["ldam_margin"], values["cosine_scale"])
        if progress < values["drw"]:
            return loss
        return reweighted(loss, class_balanced_weights(start.class_counts, values["cb_beta"]))


class LabelAwareSmoothing(Method):
    """Label-aware smoothing (Zhong et al., MiSLAS, CVPR 2021): smoothing that grows with n_y from tail to head.

    e_y = tail + (head - tail) sin(pi (n_y - n_min) / (2 (n_max - n_min))). Published with class-balanced sampling, head
    0.4, tail 0.1, lr 0.02 at batch 128, weight decay 2e-4 and 10 epochs on CIFAR-100-LT at ratio 100; the lr is scaled
    to batch 64. Its code also learns a scale per class and lets BatchNorm adapt to the sampler, as --features replay
    does here. Needs class counts.
    """

    options = {"finetune_lr": 0.01, "finetune_wd": 2e-4, "las_head": 0.4, "las_tail": 0.1, "sampler": "class"}
    tuned = {"las_head": (0.2, 0.4, 0.6)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return label_aware_smoothing(start.class_counts, values["las_head"], values["las_tail"])


class DisAlign(Method):
    """Distribution alignment (Zhang et al., CVPR 2021): z'_j = (1 + c a_j) z_j + c b_j, c = sigmoid(u f + v).

    The form of its classification code. Cross-entropy weighted by pi^(-rho); stage 1's classifier stays as it is. That
    code has rho 1.2, lr 0.1 at batch 256, weight decay 5e-4 on ImageNet-LT; the lr is scaled to batch 64. Needs class
    counts.
    """

    options = {"finetune_lr": 0.025, "finetune_wd": 5e-4, "grw_rho": 1.2}
    tuned = {"grw_rho": (0.8, 1.2, 1.5)}
    takes_scope = False

    def head(self, start: Start, values: Values) -> nn.Module:
        head = DisAlignHead(start.linear.in_features, start.num_classes).to(start.linear.weight.device)
        head.weight.data.copy_(start.linear.weight)
        head.bias.data.copy_(start.linear.bias)
        return head

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return generalised_reweighting(start.class_counts, values["grw_rho"])


class MarginCalibration(Method):
    """MARC (Wang et al., ACML 2022): z'_j = a_j z_j + b_j |w_j|, a and b alone are trained, from 1 and 0.

    Cross-entropy weighted by pi^(-rho). Published with rho 1.2, weight decay 5e-4 and 2000 steps at batch 512 on
    CIFAR-LT, the lr rising from 0.05 to 0.1 and then a cosine; 0.1 is scaled to batch 64, the rise left out. Needs
    class counts.
    """

    options = {"finetune_lr": 0.0125, "finetune_wd": 5e-4, "grw_rho": 1.2}
    tuned = {"grw_rho": (0.8, 1.2, 1.5)}
    takes_scope = False

    def head(self, start: Start, values: Values) -> nn.Module:
        return MARC(make_linear(start.linear.weight, start.linear.bias))

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return generalised_reweighting(start.class_counts, values["grw_rho"])


class LadeLoss(Method):
    """LADE (Hong et al., CVPR 2021): CE(z + log pi) - alpha sum_j pi_j [E_j - L_j - lambda L_j^2].

    E_j is the mean logit of class j's images, L_j the log of a mean of exponentials, see losses/weighted.py. Published
    with alpha 0.1, lambda 0.01 on CIFAR-100-LT at ratio 100, for whole networks. Needs class counts.
    """

    options = {**FINE_TUNE, "lade_alpha": 0.1, "lade_lambda": 0.01}
    tuned = {"lade_alpha": (0.02, 0.1, 0.5)}

    def loss(self, start: Start, values: Values, progress: float) -> nn.Module:
        return LADE(start.class_counts, values["lade_alpha"], values["lade_lambda"])


METHODS: dict[str, Method] = {
    "joint": Joint(),
    "los": LOS(),
    "ce": CE(),
    "crt": CRT(),
    "lws": LWS(),
    "tau-norm": TauNorm(),
    "ncm": NCM(),
    "focal": FocalLoss(),
    "class-balanced": ClassBalanced(),
    "ldam": LDAM(),
    "balanced-softmax": BalancedSoftmax(),
    "logit-adjustment": LogitAdjustment(),
    "logit-adjustment-posthoc": LogitAdjustmentPostHoc(),
    "label-aware-smoothing": LabelAwareSmoothing(),
    "disalign": DisAlign(),
    "marc": MarginCalibration(),
    "lade": LadeLoss(),
    "l2-norm": L2Norm(),
    "weight-decay": WeightDecay(),
    "maxnorm": MaxNorm(),
    "cosine": Cosine(),
}
