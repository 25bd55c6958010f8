"""What a run of stage 1 is made of: settings, network, batches, the classifier's constraint, how steps are run."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasets import AUGMENTATIONS, SAMPLERS, Batches, LongTailed, Mix
from losses import LOSSES, SoftmaxLoss, make_loss
from models import Network, build_model, pick_stem
from models.heads import project_rows
from sweeps import Setting, distinct
from utils.distributed import processes, rank
from utils.options import Many, UsageError, shown
from utils.system import pick_amp, pick_graph

#: Options of the table of losses, with their defaults; a run has a value for those that :func:`taken_by` names.
LOSS_OPTIONS = {
    option: inspect.signature(make).parameters[parameter].default
    for make, options in LOSSES.values()
    for option, parameter in options.items()
}
#: Networks that torch.compile makes faster on a CPU (1.05 to 1.15 times the channels-last step), and the number of
#: training images, epochs counted, from which on this is worth the minute that compiling takes.
COMPILED_ON_CPU = ("resnet20", "resnet32", "resnet44", "resnet56")
COMPILE_PAYS = 1_000_000
#: What is laid on the classifier's rows during training; see :func:`constraint`.
CONSTRAINTS = ("none", "l2", "maxnorm")
_BUILDING = threading.Lock()  # PyTorch's global seed is one for all threads


def make_settings(options: Any, typed: Collection[str]) -> list[Setting]:
    """The product of all options that have several values, each with every default filled in; ``method`` is the loss.

    An option that a run's loss does not take is None there, so that it makes no difference and no second run.

    Raises:
        UsageError: an option that none of the runs has a use for, or values that do not go together.
    """
    names = [f.name for f in dataclasses.fields(options) if isinstance(f.metadata["kind"], Many) and f.name != "loss"]
    taken = {loss: taken_by(loss, options) for loss in options.loss}
    settings = []
    for loss in options.loss:
        for combination in product(*(getattr(options, name) or (None,) for name in names)):
            values = dict(zip(names, combination))
            for name, default in LOSS_OPTIONS.items():
                if name not in taken[loss]:
                    values[name] = None
                elif values[name] is None:
                    values[name] = default
            settings.append(Setting(loss, values))
    if "constraint_radius" in typed and options.constraint == "none":
        raise UsageError("--constraint_radius without --constraint", "--constraint l2, maxnorm")
    if options.parallel is not None and len(settings) == 1:
        raise UsageError(f"--parallel {options.parallel} with a single run", "several values of --seed, --wd ...")
    for name in LOSS_OPTIONS:
        if name in typed and not any(name in each for each in taken.values()):
            takers = [loss for loss, (_, parameters) in LOSSES.items() if name in parameters]
            also = {"cosine_scale": "--head cosine", "cb_beta": "--drw_epoch, "}.get(name, "")
            losses = f"--loss {', '.join(takers)}" if name != "cosine_scale" else ""
            raise UsageError(f"--{name} with --loss {shown(options.loss)}", f"{also}{losses}")
    return distinct(settings)


def taken_by(loss: str, options: Any) -> set[str]:
    """The options of the table of losses that a run takes: its loss's, and what its head and --drw_epoch need."""
    needed = {"cosine_scale": options.head == "cosine", "cb_beta": options.drw_epoch is not None}
    return {*LOSSES[loss][1], *(name for name, is_needed in needed.items() if is_needed)}


def one_run(options: Any, setting: Setting) -> Any:
    """The options of one run: single values, one name each."""
    return SimpleNamespace(**{**dataclasses.asdict(options), **setting.values, "loss": setting.method})


def check_recipe(options: Any) -> None:
    """Raises UsageError where options of stage 1 do not go together."""
    if "ldam" in options.loss and options.head != "cosine":
        raise UsageError(f"--loss ldam with --head {options.head}: its margins are for cosines", "--head cosine")
    if options.drw_epoch is not None:
        outside = [loss for loss in options.loss if not takes_weights(loss)]
        if outside:
            raise UsageError(
                f"--drw_epoch with --loss {shown(outside)}", ", ".join(loss for loss in LOSSES if takes_weights(loss))
            )
        if options.drw_epoch >= options.epochs:
            raise UsageError(f"--drw_epoch {options.drw_epoch} of {options.epochs} epochs", "fewer than --epochs")
    if options.warmup_epochs >= options.epochs:
        raise UsageError(f"--warmup_epochs {options.warmup_epochs} of {options.epochs} epochs", "fewer than --epochs")
    if options.constraint != "none" and options.head == "cosine":
        raise UsageError(f"--constraint {options.constraint} with --head cosine, which has no norms", "--head linear")


def takes_weights(name: str) -> bool:
    """Whether a loss can be re-weighted later on: one of the softmax family that has no class weights of its own."""
    loss = make_loss(name, [2, 1], {})
    return isinstance(loss, SoftmaxLoss) and bool((loss.weight == 1).all())


def settle(options: Any, device: torch.device, images: int, runs: int, photos: bool = False) -> Any:
    """The options with ``auto`` replaced by what suits the device, a training set of so many images and so many runs.

    Graphs and compiling stay ``auto`` where they suit, since they have yet to prove themselves (:mod:`utils.proof`).
    Runs on ``photos`` fill a GPU, and the CPUs that decode for it, alone.

    Raises:
        UsageError: what was asked for cannot be had on this device or with so many processes.
    """
    on_gpu, alone = device.type == "cuda", processes() == 1
    check_parts(options, images)
    if options.sync_bn and (alone or not on_gpu):
        where = "one process" if alone else "a CPU"
        raise UsageError(f"--sync_bn on {where}", "several processes with a GPU each: torchrun --nproc-per-node=N")
    for name in ("graph", "compile"):
        if getattr(options, name) == "on" and not alone:
            raise UsageError(f"--{name} on with {processes()} processes", "auto, off")
    if (options.parallel or 1) > 1 and not alone:
        raise UsageError(f"--parallel {options.parallel} with {processes()} processes, which share a run", "1")
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
    return dataclasses.replace(
        options,
        amp=pick_amp(options.amp, device),
        graph=pick_graph(options.graph, device),
        compile="off" if options.compile == "auto" and not (pays and has_compiler) else options.compile,
        parallel=options.parallel or (min(runs, 4) if shares else 1),
    )


def check_parts(options: Any, images: int) -> None:
    """Raises UsageError where a step on a training set of so many images cannot be split as asked."""
    team, accum = processes(), options.accum
    words = " and ".join([f"{team} processes"] * (team > 1) + [f"--accum {accum}"] * (accum > 1))
    if team * accum > 1 and "lade" in options.loss:
        raise UsageError(f"--loss lade with {words}: its regulariser is over the whole batch", "one process, --accum 1")

    def last(size: int) -> int:
        return images % size or size

    for size in options.batch_size:
        if last(size) < team * accum:
            fitting = [other for other in range(1, images + 1) if last(other) >= team * accum]
            nearest = min(fitting, key=lambda other: abs(other - size), default=None)
            raise UsageError(
                f"--batch_size {size} with {words}: the last batch has {last(size)} of {images} images",
                f"another --batch_size, {nearest} for instance" if nearest else f"at most {images} parts",
            )


def make_network(
    one: Any, data: LongTailed, device: torch.device, weights: Mapping[str, Tensor] | None = None
) -> Network:
    """A network initialised from the run's seed, then ``weights``, on its device in the channels-last memory format.

    With --sync_bn its BatchNorm takes the statistics of all processes' images.
    """
    with _BUILDING:
        torch.manual_seed(one.seed)
        stem = pick_stem(one.network, data.train.side, one.stem)
        model = build_model(one.network, data.num_classes, data.channels, one.head, stem)
    model.load_state_dict(model.state_dict() | dict(weights or {}))
    if one.head == "cosine":
        model.fc.get_buffer("scale").fill_(one.cosine_scale)
    if one.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    return model.to(device).to(memory_format=torch.channels_last)


def make_batches(one: Any, data: LongTailed, device: torch.device) -> Batches:
    """The run's training batches; the 1 keeps its random numbers apart from stage 2's."""
    spec, train = data.spec, data.train
    return Batches(
        train.images,
        train.labels,
        one.batch_size,
        spec.mean,
        spec.std,
        device,
        spec.augment,
        seed=(one.seed, 1),
        sampler=SAMPLERS[one.sampler],
        epochs=one.epochs,
        policy=AUGMENTATIONS[one.aug],
        mix=Mix(one.mixup, one.cutmix) if one.mixup or one.cutmix else None,
        share=(rank(), processes()),
    )


def constraint(head: nn.Module, kind: str, radius: float) -> Callable[[], None] | None:
    """Projects the classifier's rows w_j (Weight Balancing, CVPR 2022), its bias left free; None for ``none``.

    l2: w_j <- r w_j / |w_j|, theirs with r = 1. maxnorm: w_j <- min(1, r / |w_j|) w_j (Eq. 5).
    """
    if kind == "none":
        return None
    return partial(project_rows, head.get_parameter("weight"), radius, onto=kind == "l2")
