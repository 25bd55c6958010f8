"""The options of stage 1."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import AUGMENTATIONS, SAMPLERS
from experiment.options import HUGE, START_WORDS, TrainOptions, stage_option
from experiment.sweeps import Setting
from losses import LOSSES, takes_weights
from utils.errors import UsageError
from utils.options import Choice, Flag, Number, Text, option, spec_of
from utils.system import AMP

#: What is laid on the classifier's rows during training; see :func:`training.recipe.constraint`.
CONSTRAINTS = ("none", "l2", "maxnorm")


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 1's own options; those of every command are in experiment/options.py. The stronger recipes are off."""

    cur_stage: str = stage_option("stage1")
    epochs: int = option(200, Number(int, 1, 1_000_000), "epochs", "optimisation")
    lr: float = option(
        0.01,
        Number(float, 0, HUGE, above=True),
        "learning rate, cosine to 0",
        "optimisation",
        sweep=True,
        aliases=("learning_rate",),
    )
    wd: float = option(
        5e-3,
        Number(float, 0, HUGE),
        "weight decay of all parameters; the method is to tune it",
        "optimisation",
        sweep=True,
        aliases=("weight_decay",),
    )
    label_smooth: float = option(
        0.0, Number(float, 0, 1), "label smoothing d: true class 1 - d + d/C, others d/C", "recipe", sweep=True
    )
    loss: str = option("ce", Choice(LOSSES), "training loss; see losses/", "recipe", sweep=True)
    drw_epoch: int | None = option(
        None, Number(int, 0), "deferred re-weighting: epochs before classes get class-balanced weights", "recipe"
    )
    head: str = option("linear", Choice(("linear", "cosine")), "classifier; ldam needs cosine", "network")
    constraint: str = option("none", Choice(CONSTRAINTS), "norms of the classifier's rows, after every step", "recipe")
    constraint_radius: float = option(
        1.0, Number(float, 0, HUGE, above=True), "their norm (l2) or its limit (maxnorm)", "recipe"
    )
    sampler: str = option("instance", Choice(SAMPLERS), "which images an epoch shows", "recipe", sweep=True)
    aug: str = option("crop_flip", Choice(AUGMENTATIONS), "augmentation of training images", "recipe", sweep=True)
    mixup: float = option(
        0.0, Number(float, 0, 100), "mixup: parameter of the Beta distribution; 0 is off", "recipe", sweep=True
    )
    cutmix: float = option(
        0.0, Number(float, 0, 100), "CutMix: the same; with mixup too, one of them a batch", "recipe", sweep=True
    )
    ema: float = option(
        0.0,
        Number(float, 0, 1 - 1e-9),
        "averaged weights over about 1/(1-D) steps, then evaluated; 0 is off",
        "recipe",
        sweep=True,
    )
    warmup_epochs: int = option(0, Number(int, 0), "epochs in which the learning rate rises evenly", "optimisation")
    val_split: float = option(
        0.0, Number(float, 0, 0.5), "share of every class held out, never seen by the backbone", "data"
    )
    pretrained_pth: str | None = option(
        None,
        Text(),
        "start from this checkpoint's weights, not from random ones; imagenet: from torchvision's; none: random ones",
        "files",
        aliases=("from",),
    )
    train_scope: str = option(
        "all", Choice(("all", "last_block")), "what is trained: the rest keeps its weights", "network"
    )
    amp: str = option(
        "auto", Choice(("auto", *AMP)), "mixed precision; auto: bf16 on a GPU, off on a CPU", "machine", published="off"
    )
    compile: str = option(
        "auto",
        Choice(("auto", "on", "off")),
        "torch.compile; auto: long runs of narrow networks on a CPU, checked",
        "machine",
    )
    parallel: int | None = option(
        None, Number(int, 1, 64), "runs of a sweep at a time; None: up to 4 on a GPU and 1 on a CPU", "machine"
    )
    accum: int = option(
        1,
        Number(int, 1, 10**6),
        "parts of a step that follow each other, for memory; BatchNorm sees each by itself",
        "machine",
    )
    sync_bn: bool = option(False, Flag(), "BatchNorm over the images of all processes, on GPUs", "machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_split > 0 and self.pretrained_pth not in (None, *START_WORDS):
            raise UsageError("--val_split with --pretrained_pth, whose weights may know the images", "one of the two")
        if self.train_scope != "all" and self.pretrained_pth in (None, "none"):
            raise UsageError(
                f"--train_scope {self.train_scope} of random weights", "--pretrained_pth beside it, or all"
            )
        if self.loss == "ldam" and self.head != "cosine":
            raise UsageError(f"--loss ldam with --head {self.head}: its margins are for cosines", "--head cosine")
        if self.drw_epoch is not None and not takes_weights(self.loss):
            takers = ", ".join(loss for loss in LOSSES if takes_weights(loss))
            raise UsageError(f"--drw_epoch with --loss {self.loss}", takers)
        if self.drw_epoch is not None and self.drw_epoch >= self.epochs:
            raise UsageError(f"--drw_epoch {self.drw_epoch} of {self.epochs} epochs", "fewer than --epochs")
        if self.warmup_epochs >= self.epochs:
            raise UsageError(f"--warmup_epochs {self.warmup_epochs} of {self.epochs} epochs", "fewer than --epochs")
        if self.constraint != "none" and self.head == "cosine":
            raise UsageError(f"--constraint {self.constraint} with --head cosine, which has no norms", "--head linear")

    @property
    def setting(self) -> Setting:
        """What tables call this run: its loss, and the value of every option that a sweep may vary."""
        swept = [name for name, spec in spec_of(self).items() if spec.sweep and name != "loss"]
        return Setting(self.loss, {name: getattr(self, name) for name in swept})

    @property
    def loss_options(self) -> dict[str, float | None]:
        """The options of the table of losses, see :func:`losses.make_loss`."""
        return {
            "label_smooth": self.label_smooth,
            "la_tau": self.la_tau,
            "vs_gamma": self.vs_gamma,
            "focal_gamma": self.focal_gamma,
            "cb_beta": self.cb_beta,
            "ldam_margin": self.ldam_margin,
            "cosine_scale": self.cosine_scale,
            "las_head": self.las_head,
            "las_tail": self.las_tail,
            "grw_rho": self.grw_rho,
            "lade_alpha": self.lade_alpha,
            "lade_lambda": self.lade_lambda,
        }
