"""What a run of stage 1 is made of: the runs of a sweep, network, batches, training step."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from datasets import AUGMENTATIONS, SAMPLERS, Batches, LongTailed, Mix
from engine import TrainStep, make_sgd
from losses import LOSSES, class_balanced_weights, make_loss, reweighted
from models import Network, build_model, pick_stem, trained_part
from models.heads import project_rows
from training.options import Options
from utils.distributed import rank, world_size
from utils.errors import UsageError
from utils.options import Resolved, changed, shown
from utils.resume import GLOBAL_GENERATORS
from utils.system import AMP, pick_amp, pick_graph

#: The options of each loss, with their defaults.
OF_LOSS = {
    name: {option: inspect.signature(make).parameters[parameter].default for option, parameter in options.items()}
    for name, (make, options) in LOSSES.items()
}
#: Those of all losses together; a run has a value for those that :func:`taken_by` names.
LOSS_OPTIONS = {option: default for options in OF_LOSS.values() for option, default in options.items()}
#: Networks that torch.compile makes faster on a CPU (1.05 to 1.15 times the channels-last step), and the number of
#: training images, epochs counted, from which on this is worth the minute that compiling takes.
COMPILED_ON_CPU = ("resnet20", "resnet32", "resnet44", "resnet56")
COMPILE_PAYS = 1_000_000


def make_runs(resolved: Resolved[Options], typed: Collection[str]) -> list[Options]:
    """The runs of a command: the product of the options that have several values, each run once.

    Every option of a run's loss has a value; one that its loss does not take is at the default, so that it makes no
    difference and no second run.

    Raises:
        UsageError: an option that none of the runs has a use for, or values that do not go together.
    """
    options, runs = resolved.options, resolved.runs(outermost="loss")
    if "constraint_radius" in typed and options.constraint == "none":
        raise UsageError("--constraint_radius without --constraint", "--constraint l2, maxnorm")
    if options.parallel is not None and len(runs) == 1:
        raise UsageError(f"--parallel {options.parallel} with a single run", "several values of --seed, --wd ...")
    for name in LOSS_OPTIONS:
        if name in typed and not any(name in taken_by(run) for run in runs):
            takers = [loss for loss, (_, parameters) in LOSSES.items() if name in parameters]
            also = {"cosine_scale": "--head cosine", "cb_beta": "--drw_epoch, "}.get(name, "")
            losses = f"--loss {', '.join(takers)}" if name != "cosine_scale" else ""
            raise UsageError(f"--{name} with --loss {shown(resolved.values('loss'))}", f"{also}{losses}")
    return list(dict.fromkeys(map(with_loss_options, runs)))


def taken_by(run: Options) -> set[str]:
    """The options of the table of losses that a run takes: its loss's, and what its head and --drw_epoch need."""
    needed = {"cosine_scale": run.head == "cosine", "cb_beta": run.drw_epoch is not None}
    return {*LOSSES[run.loss][1], *(name for name, is_needed in needed.items() if is_needed)}


def with_loss_options(run: Options) -> Options:
    """The run with a value for every option of its loss, and the default of those of other losses."""
    taken, defaults = taken_by(run), {field.name: field.default for field in dataclasses.fields(run)}
    own = LOSS_OPTIONS | OF_LOSS[run.loss]
    others = {name: defaults[name] for name in LOSS_OPTIONS if name not in taken}
    missing = {name: own[name] for name, value in run.loss_options.items() if value is None and name in taken}
    return changed(run, others | missing)


def resolve_auto(runs: Sequence[Options], device: torch.device, images: int, photos: bool = False) -> list[Options]:
    """The runs with ``auto`` replaced by what suits the device, a training set of so many images, and their number.

    Graphs and compiling stay ``auto`` where they suit, since they have yet to prove themselves (:mod:`utils.proof`).
    Runs on ``photos`` fill a GPU, and the CPUs that decode for it, alone.

    Raises:
        UsageError: what was asked for cannot be had on this device or with so many processes.
    """
    options, on_gpu, alone = runs[0], device.type == "cuda", world_size() == 1
    check_parts(runs, images)
    if options.sync_bn and (alone or not on_gpu):
        where = "one process" if alone else "a CPU"
        raise UsageError(f"--sync_bn on {where}", "several processes with a GPU each: torchrun --nproc-per-node=N")
    for name in ("graph", "compile"):
        if getattr(options, name) == "on" and not alone:
            raise UsageError(f"--{name} on with {world_size()} processes", "auto, off")
    if (options.parallel or 1) > 1 and not alone:
        raise UsageError(f"--parallel {options.parallel} with {world_size()} processes, which share a run", "1")
    has_compiler = on_gpu or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    if options.compile == "on" and not has_compiler:
        raise UsageError("--compile on: there is no C++ compiler", "auto, off, or install g++")
    if options.compile == "on" and (options.parallel or 1) > 1:
        raise UsageError(
            f"--compile on with --parallel {options.parallel}: it compiles for one at a time", "one of them"
        )
    pays = (
        not on_gpu
        and alone
        and options.parallel in (None, 1)
        and options.network in COMPILED_ON_CPU
        and images * options.epochs >= COMPILE_PAYS
    )
    shares = on_gpu and alone and options.compile != "on" and not photos
    return [
        dataclasses.replace(
            run,
            amp=pick_amp(run.amp, device),
            graph=pick_graph(run.graph, device),
            compile="off" if run.compile == "auto" and not (pays and has_compiler) else run.compile,
            parallel=run.parallel or (min(len(runs), 4) if shares else 1),
        )
        for run in runs
    ]


def check_parts(runs: Sequence[Options], images: int) -> None:
    """Raises UsageError where a step on a training set of so many images cannot be split as asked."""
    team, accum = world_size(), runs[0].accum
    words = " and ".join([f"{team} processes"] * (team > 1) + [f"--accum {accum}"] * (accum > 1))
    if team * accum > 1 and any(run.loss == "lade" for run in runs):
        raise UsageError(f"--loss lade with {words}: its regulariser is over the whole batch", "one process, --accum 1")

    def last(size: int) -> int:
        return images % size or size

    for size in dict.fromkeys(run.batch_size for run in runs):
        if last(size) < team * accum:
            fitting = [other for other in range(1, images + 1) if last(other) >= team * accum]
            nearest = min(fitting, key=lambda other: abs(other - size), default=None)
            raise UsageError(
                f"--batch_size {size} with {words}: the last batch has {last(size)} of {images} images",
                f"another --batch_size, {nearest} for instance" if nearest else f"at most {images} parts",
            )


def make_network(
    run: Options, data: LongTailed, device: torch.device, weights: Mapping[str, Tensor] | None = None
) -> Network:
    """A network initialised from the run's seed, then ``weights``, on its device in the channels-last memory format.

    With --sync_bn its BatchNorm takes the statistics of all processes' images.
    """
    with GLOBAL_GENERATORS:
        torch.manual_seed(run.drawn_seed)
        stem = pick_stem(run.network, data.train.side, run.stem)
        model = build_model(run.network, data.num_classes, data.channels, run.head, stem)
    model.load_state_dict(model.state_dict() | dict(weights or {}))
    if run.cosine_scale is not None:
        model.fc.get_buffer("scale").fill_(run.cosine_scale)
    if run.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    return model.to(device).to(memory_format=torch.channels_last)


def make_batches(run: Options, data: LongTailed, device: torch.device) -> Batches:
    """The run's training batches; the 1 keeps its random numbers apart from stage 2's."""
    spec, train = data.spec, data.train
    return Batches(
        train.images,
        train.labels,
        run.batch_size,
        spec.mean,
        spec.std,
        device,
        spec.augment,
        seed=(run.drawn_seed, 1),
        sampler=SAMPLERS[run.sampler],
        epochs=run.epochs,
        policy=AUGMENTATIONS[run.aug],
        mix=Mix(run.mixup, run.cutmix) if run.mixup or run.cutmix else None,
        share=(rank(), world_size()),
    )


def make_step(
    run: Options,
    model: Network,
    data: LongTailed,
    device: torch.device,
    compile: str = "off",
    graph: str = "off",
    say: Callable[[str], None] = print,
) -> TrainStep:
    """The run's training step: its loss, SGD on what --train_scope names, precision, average and constraint."""
    trained = trained_part(model, run.train_scope)
    return TrainStep(
        model,
        make_loss(run.loss, data.trained_counts, run.loss_options).to(device),
        make_sgd(trained.parameters(), run.lr, run.momentum, run.wd, run.nesterov),
        amp=AMP[run.amp],
        ema=run.ema,
        project=constraint(model.fc, run.constraint, run.constraint_radius),
        accum=run.accum,
        compile=compile,
        graph=graph,
        say=say,
    )


def deferred_loss(run: Options, criterion: nn.Module, class_counts: list[int]) -> nn.Module:
    """The loss from --drw_epoch on: the same with class-balanced weights (LDAM-DRW, Cao et al., NeurIPS 2019)."""
    assert run.cb_beta is not None
    return reweighted(criterion, class_balanced_weights(class_counts, run.cb_beta))


def last_loss(run: Options, data: LongTailed) -> nn.Module:
    """The loss of a run's last epoch."""
    loss = make_loss(run.loss, data.trained_counts, run.loss_options)
    return loss if run.drw_epoch is None else deferred_loss(run, loss, data.trained_counts)


def constraint(head: nn.Module, kind: str, radius: float) -> Callable[[], None] | None:
    """Projects the classifier's rows w_j (Weight Balancing, CVPR 2022), its bias left free; None for ``none``.

    l2: w_j <- r w_j / |w_j|, theirs with r = 1. maxnorm: w_j <- min(1, r / |w_j|) w_j (Eq. 5).
    """
    if kind == "none":
        return None
    return partial(project_rows, head.get_parameter("weight"), radius, onto=kind == "l2")
