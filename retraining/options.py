"""The options of stage 2, and what must hold of them beside stage 1's file and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, TypeVar

import torch

from datasets import DATASETS, SAMPLERS, ImageSet, LongTailed
from experiment.data import load_data, load_data_of
from experiment.options import (
    HUGE,
    TrainOptions,
    checkpoint_option,
    fill_options,
    flags_of,
    needs_held_out,
    stage_option,
)
from experiment.pretrained import OWN_WEIGHTS, for_images_of, open_pretrained, read_weights, stored_as, without_size
from experiment.restore import open_checkpoint
from models import PretrainedNetwork
from models.given import STANDARDIZE
from retraining.features import DTYPES, FEATURES
from retraining.methods import METHODS, Auto, Method
from retraining.settings import TUNABLE, VAL, WITHOUT_STAGE1
from retraining.start import STARTS, without_stage1
from utils.checkpoints import IDENTITY, Checkpoint
from utils.console import show
from utils.distributed import world_size
from utils.errors import UsageError
from utils.options import Choice, Flag, Number, Resolved, Text, Value, Values, option, shown
from utils.system import AMP, pick_device

T = TypeVar("T", bound="Options")
SCOPES = ("fc", "last_block", "all")
#: Points of the class mean on held-out images that one image may make up without a word.
COARSE = 4.0


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 2's own options; those of every command are in experiment/options.py. None is the method's own value."""

    cur_stage: str = stage_option("stage2")
    method: str = option(
        "los", Choice(METHODS), "how the classifier is re-trained; see retraining/methods.py", "recipe", sweep=True
    )
    start: str | None = option(
        None,
        Text(f"{', '.join(STARTS)}, or a .npy of rows"),
        "the head that training starts from: stage 1's classifier, random weights, class means, balanced logistic "
        "regression, or the directions of a file's rows",
        "recipe",
        sweep=True,
    )
    finetune_epoch: int = option(20, Number(int, 1, 1_000_000), "epochs", "optimisation", sweep=True)
    finetune_lr: float | Literal["val"] | None = option(
        None,
        Number(float, 0, HUGE, above=True, words=("val",)),
        "learning rate, cosine to 0; val chooses it on held-out images",
        "optimisation",
        sweep=True,
    )
    finetune_wd: float | None = option(
        None, Number(float, 0, HUGE), "weight decay of the classifier", "optimisation", sweep=True
    )
    sampler: str | None = option(None, Choice(SAMPLERS), "which images an epoch shows", "recipe", sweep=True)
    finetune_scope: str = option(
        "fc", Choice(SCOPES), "what is trained: the classifier, or more with it", "network", sweep=True
    )
    label_smooth: float | Auto | Literal["val"] | None = option(
        None,
        Number(float, 0, 1, words=("auto", "val")),
        "label smoothing d: true class 1 - d + d/C, others d/C; auto is C/(C+2.04), which is 0.98 at C = 100; val "
        "chooses it on held-out images",
        "recipe",
        sweep=True,
    )
    tau: float | Literal["val"] | None = option(
        None, Number(float, 0, 10, words=("val",)), "tau-norm: power of the norm; val chooses it", "recipe", sweep=True
    )
    mla_tau: float | Literal["val"] | None = option(
        None, Number(float, 0, 10, words=("val",)), "mla: power of 1 / pi_j; val chooses it", "recipe", sweep=True
    )
    ncm_metric: str | None = option(
        None, Choice(("centred", "cosine", "l2")), "ncm: how distances are measured", "recipe", sweep=True
    )
    cb_form: str | None = option(
        None, Choice(("ce", "bce")), "class-balanced loss: cross-entropy, or BCE on softmax", "recipe", sweep=True
    )
    finetune_schedule: str | None = option(
        None,
        Choice(("cosine", "next")),
        "weight-decay, maxnorm: an epoch's own rate of the cosine, or the next one's, to 0 in the last epoch",
        "recipe",
        sweep=True,
    )
    drw: float | None = option(
        None, Number(float, 0, 1), "ldam: share of the epochs after which classes are weighted", "recipe", sweep=True
    )
    maxnorm_radius: float | Literal["published"] | None = option(
        None,
        Number(float, 0, HUGE, above=True, words=("published",)),
        "maxnorm: radius of the projection",
        "recipe",
        sweep=True,
    )
    maxnorm_every: str | None = option(
        None, Choice(("epoch", "step")), "maxnorm: when to project", "recipe", sweep=True
    )
    tail_neighbours: int | None = option(
        None,
        Number(int, 1, 1_000_000),
        "tail-sampling: nearest classes whose means and covariances are averaged",
        "recipe",
        sweep=True,
    )
    tail_alpha: float | None = option(
        None,
        Number(float, 0, HUGE),
        "tail-sampling: variance added in all directions, in mean variances within classes",
        "recipe",
        sweep=True,
    )
    h2t_rho: float | None = option(
        None, Number(float, 0, 1), "h2t: share of the channels taken from the other batch", "recipe", sweep=True
    )
    features: str = option(
        "views",
        Choice(FEATURES),
        "the frozen backbone's BatchNorm and augmentation: views, eval mode and --views augmented views; orbit, eval "
        "mode and all crops and flips; replay, train mode, so that its statistics drift",
        "network",
        published="replay",
    )
    views: int = option(
        20,
        Number(int, 0, 10_000),
        "augmented views of an image; epoch e shows view e mod V; 0: the image as it is",
        "data",
    )
    standardize: str = option(
        "none",
        Choice(STANDARDIZE),
        "features, or --pretrained: rows as they are, of length 1, or each number less its mean and over its standard "
        "deviation; all are then scaled alike to a norm of 12",
        "data",
    )
    val_split: float = option(
        0.0, Number(float, 0, 0.9), "features, or --pretrained: share of every class's training set to hold out", "data"
    )
    view_seed: int = option(
        0, Number(int, 0, 2**31 - 1), "seed of the views' crops and flips, shared by all --seed", "data"
    )
    feature_dtype: str = option(
        "float32",
        Choice(DTYPES),
        "how the cache stores features of training images; heads compute in float32 anyway",
        "machine",
    )
    amp: str = option(
        "off",
        Choice(AMP),
        "mixed precision of the frozen backbone on training images; test and held-out images go in float32",
        "machine",
    )
    cache_dir: str = option(
        "cache", Text("a folder"), "where features are kept; it may be deleted between runs", "files"
    )
    check_cache: bool = option(
        False, Flag(), "check all of what is kept there when it is opened; else of large files a sample", "files"
    )
    pretrained_pth: str | None = checkpoint_option("stage 1's checkpoint", "its run")
    pretrained: str | None = option(
        None,
        Text("timm, or a file"),
        "no stage 1: --network timm:NAME with its own weights, downloaded, or a file's, frozen as it is",
        "network",
        alone=OWN_WEIGHTS,
    )

    @property
    def has_stage1(self) -> bool:
        """Whether a classifier has been trained before, which methods may continue."""
        return self.pretrained is None and not DATASETS[self.dataset].rows


class Prepared(NamedTuple, Generic[T]):
    """What a command of stage 2 begins with: stage 1's file, the options, the device and the data."""

    parent: Checkpoint
    resolved: Resolved[T]
    device: torch.device
    data: LongTailed


def continue_stage1(cls: type[T], typed: Values) -> tuple[Checkpoint, Resolved[T]]:
    """Stage 1's file that the typed flags choose, and all options with it.

    Where methods are compared and none is typed, they are those that can follow stage 1's classifier.

    Raises:
        UsageError: see :func:`experiment.restore.open_checkpoint` and :func:`experiment.options.fill_options`; a
            stage-2 file, or a method that cannot follow stage 1's classifier.
    """
    if not follows_stage1(typed):
        return prepare(cls, typed)[:2]
    for name in ("standardize", "val_split"):
        if name in typed:
            raise UsageError(
                f"--{name} {shown(typed[name])} after stage 1",
                "--dataset features or --pretrained beside it, or without",
            )
    parent = open_checkpoint(typed, "stage1", cls)
    if parent.stage == "stage2":
        raise UsageError(f"--pretrained_pth {parent.path} is a stage-2 file", "a stage-1 file")
    resolved = fill_options(cls, typed, "stage2", file=parent)
    if parent.head != "linear" and "method" not in typed and "method" in resolved.axes:
        resolved = resolved.swept("method", methods_for_head(parent.head))
        show(f"{parent.path} has a {parent.head} head: {shown(resolved.values('method'))}")
    refuse_head(parent, resolved)
    return parent, resolved


def on_rows(typed: Values) -> bool:
    """Whether features are given."""
    return "pretrained_pth" not in typed and DATASETS[str(typed.get("dataset", "cifar100"))].rows


def follows_stage1(typed: Values) -> bool:
    """Whether there is a stage 1 to go on from: neither features are given nor a network that somebody trained."""
    return "pretrained" not in typed and not on_rows(typed)


def prepare_pretrained(cls: type[T], typed: Values, flag: str | None) -> Prepared[T]:
    """The same as :func:`prepare` of a network of timm's that somebody trained, which stands for stage 1's.

    Raises:
        UsageError: an option that has to do with stage 1, or with another network.
    """
    if "pretrained_pth" in typed:
        raise UsageError("--pretrained with --from", "one of the two")
    if "network" not in typed:
        raise UsageError("--pretrained without --network", "--network timm:NAME")
    if on_rows(typed):
        raise UsageError("--pretrained with --dataset features, which are given", "one of the two")
    if typed.get("features", "views") != "views":
        raise UsageError(f"--features {typed['features']} with --pretrained", "views")
    resolved = filled_without_stage1(cls, without_size(typed), "--pretrained")
    size = typed.get("image_size")
    wanted = replace(resolved.options, image_size=size) if isinstance(size, int) else resolved.options
    opened = open_pretrained(wanted.network, str(wanted.pretrained), wanted)
    options = replace(for_images_of(wanted, opened.shown), stem="pretrained")
    resolved = resolved.settled(options)
    device = pick_device(*options.place)
    data = load_data(options, val_fraction=options.val_split, val_seed=options.drawn_seed, shown=opened.shown)
    show(opened.about)
    parent = Checkpoint(
        None,
        options.network,
        data.num_classes,
        data.channels,
        PretrainedNetwork(opened.network, data.num_classes).state_dict(),
        data=stored_as(opened.shown),
        stem="pretrained",
        path=opened.path,
        sha256=opened.sha256,
    )
    return begun_without_stage1(Prepared(parent, resolved, device, data), typed, flag)


def filled_without_stage1(cls: type[T], typed: Values, what: str) -> Resolved[T]:
    """All options where ``what`` stands for stage 1; UsageError where heads are to continue its classifier."""
    resolved = fill_options(cls, typed, "stage2")
    if "stage1" in resolved.values("start"):
        others = ", ".join(start for start in STARTS if start != "stage1")
        raise UsageError(f"--start stage1: {what} has no stage 1", f"{others}, or a file of rows")
    return resolved if "finetune_scope" in typed else resolved.swept("finetune_scope", ("fc",))


def begun_without_stage1(prepared: Prepared[T], typed: Values, flag: str | None) -> Prepared[T]:
    """Itself, checked; says what methods start from."""
    require_held_out(prepared.parent, prepared.resolved, prepared.data, flag if flag and typed.get(flag) else None)
    if "start" not in typed:
        show(f"no stage 1: methods that would continue its classifier have --start {WITHOUT_STAGE1}")
    return prepared


def prepare_rows(cls: type[T], typed: Values, flag: str | None) -> Prepared[T]:
    """The same as :func:`prepare` where features are given: their network stands for stage 1's.

    Raises:
        UsageError: an option that has to do with images, or with stage 1's classifier.
    """
    resolved = filled_without_stage1(cls, typed, "--dataset features")
    scopes = [scope for scope in resolved.values("finetune_scope") if scope != "fc"]
    if scopes:
        raise UsageError(f"--finetune_scope {shown(scopes)}: --dataset features has no backbone", "fc")
    for name in ("features", "views", "view_seed", "feature_dtype", "amp", "cache_dir", "check_cache", "cur_stage"):
        if name in typed:
            raise UsageError(f"--{name} {shown(typed[name])} with --dataset features, which are given", "without it")
    options = resolved.options
    device = pick_device(*options.place)
    data = load_data(options, val_fraction=options.val_split, val_seed=options.drawn_seed)
    parent = without_stage1(data, options.standardize)
    return begun_without_stage1(Prepared(parent, resolved, device, data), typed, flag)


def prepare(cls: type[T], typed: Values, flag: str | None = None) -> Prepared[T]:
    """What :func:`continue_stage1` gives, with the device and the data that follow from it.

    ``flag`` is an option of the command that needs held-out images.

    Raises:
        UsageError: see there; or no held-out images where they are needed.
    """
    if "pretrained" in typed:
        return prepare_pretrained(cls, typed, flag)
    if on_rows(typed):
        return prepare_rows(cls, typed, flag)
    parent, resolved = continue_stage1(cls, typed)
    if world_size() > 1 and resolved.options.features == "replay":
        problem = f"--features replay with {world_size()} processes: its batches follow from each other"
        raise UsageError(problem, "views, orbit, or one process: without torchrun")
    device = pick_device(*resolved.options.place)
    data = load_data_of(parent, resolved.options)
    require_held_out(parent, resolved, data, flag if flag and typed.get(flag) else None)
    return Prepared(parent, resolved, device, data)


def origin(parent: Checkpoint) -> str:
    """What stage 2 begins from, in words."""
    if parent.stem == "pretrained":
        return f"{parent.network}, pretrained"
    return "features" if parent.path is None else str(parent.path)


def hash_of_stage1(typed: Values) -> str | None:
    """The hash of stage 1's file that the typed flags choose."""
    if on_rows(typed):
        return None
    if "pretrained" in typed:
        weights, options = str(typed["pretrained"]), Options(network=str(typed.get("network")))
        file = read_weights(weights)
        return file.sha256 if file else open_pretrained(options.network, weights, options).sha256
    return open_checkpoint(typed, "stage1", Options).sha256


def tunable_values(resolved: Resolved[T]) -> dict[str, tuple[Value, ...]]:
    """The values of every option that a classifier may take."""
    return {name: resolved.values(name) for name in TUNABLE}


def recipe_values(options: Options) -> dict[str, Value]:
    """What the data set's recipe says of the options that a classifier may take."""
    recipes = DATASETS[options.dataset].recipes
    recipe = recipes[options.recipe or next(iter(recipes))]
    return {name: value for name, value in recipe.items() if name in TUNABLE}


def refuse_unused(typed: Values, resolved: Resolved[T], methods: Sequence[Method]) -> None:
    """Raises UsageError where an option is typed that none of the methods has a use for."""
    options, names = resolved.options, shown(resolved.values("method"))
    scopes = shown(resolved.values("finetune_scope"))
    if not any(method.stream for method in methods):
        for name in ("momentum", "nesterov", "eval_every", "views", "view_seed"):
            if name in typed:
                raise UsageError(f"--{name} with --method {names}", "a method that trains something")
    for name in ("views", "view_seed"):
        if name in typed and options.features != "views":
            raise UsageError(f"--{name} with --features {options.features}", "--features views")
        if name in typed and all(method.scope != "fc" for method in methods):
            raise UsageError(f"--{name} with --finetune_scope {scopes}", "fc too")
    if options.amp != "off" and options.features == "replay":
        raise UsageError(f"--amp {options.amp} with --features replay, which is as published", "views, orbit")
    for name in ("feature_dtype", "amp"):
        if name in typed and not any(m.scope == "fc" and (m.stream or m.takes_features) for m in methods):
            used = f"--method {names} --finetune_scope {scopes}"
            raise UsageError(f"--{name} with {used}", "a method that takes features of training images, scope fc")


def refuse_head(parent: Checkpoint, resolved: Resolved[T]) -> None:
    """Raises UsageError where stage 1's classifier is not of the kind that a method continues from."""
    unfit = [name for name in resolved.values("method") if METHODS[str(name)].needs_linear]
    if parent.head != "linear" and unfit and {None, "stage1"} & set(resolved.values("start")):
        raise UsageError(
            f"--method {shown(unfit)}: {parent.path} has a {parent.head} head", shown(methods_for_head(parent.head))
        )


def methods_for_head(head: str) -> tuple[str, ...]:
    """The methods that can follow a stage 1 with this kind of classifier."""
    return tuple(name for name, method in METHODS.items() if head == "linear" or not method.needs_linear)


def note_few(val: ImageSet) -> None:
    """Says where so few images are held out that one of them moves their class mean by points."""
    counts = torch.bincount(val.labels)
    fewest, most = int(counts[counts > 0].min()), int(counts.max())
    step = 100 / (int((counts > 0).sum()) * fewest)
    if step >= COARSE:
        words = f"{fewest} to {most} images of a class are held out: one of the smallest moves the class mean"
        show(f"note: {words} by {step:.0f} points, so that what is chosen on them may be chance")


def require_held_out(parent: Checkpoint, resolved: Resolved[T], data: LongTailed, flag: str | None = None) -> None:
    """Checks that there are held-out images, stage 1's or the data set's, where ``flag`` or another option needs them.

    Raises:
        UsageError: there are none.
    """
    options, flags = resolved.options, needs_held_out(resolved)
    flags += [f"--{name} val" for name in VAL if "val" in resolved.values(name)]
    flags += [f"--{flag}"] if flag else []
    if data.val is not None:
        note_few(data.val)
    if flags and data.val is None and not options.has_stage1:
        raise UsageError(f"{flags[0]}: nothing is held out", "--val_split 0.1 beside it, or data with a part for it")
    if flags and data.val is None:
        head = "" if parent.head == "linear" else f" --head {parent.head}"
        names = [name for name in IDENTITY if name not in ("image_size", "stem") or data.train.is_photos]
        again = f"python main_stage1.py{flags_of(options, *names)}{head} --val_split 0.1"
        allowed = "last, best_test, or first" if flags[0] == "--select best_val" else "without it, or first"
        raise UsageError(f"{flags[0]}: {parent.path} was trained without held-out images", f"{allowed}: {again}")
