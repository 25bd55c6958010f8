"""Stage 1: trains a backbone and its linear classifier on a long-tailed data set, with a tuned weight decay.

    python main_stage1.py --imb_ratio 100 --cur_stage stage1

is Label Over-Smooth's published command (CIFAR-100-LT, ResNet-34, 200 epochs of SGD, lr 0.01, weight decay 5e-3). To
expect, from others: 47.6 % (Zhao et al., NeurIPS 2025, same recipe, selection not stated); 46.76 % on the last epoch
without flip averaging (log of Weight Balancing's code, 320 epochs). On a CPU, a few seconds:

    python main_stage1.py --dataset digits

Options that take several values are swept, every combination in a run of its own:

    python main_stage1.py --imb_ratio 100 --wd 1e-3 5e-3 1e-2 --seed 0 1 2

Several GPUs share a run, each with its part of every batch:

    torchrun --nproc-per-node=4 main_stage1.py --imb_ratio 100
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from datasets import AUGMENTATIONS, SAMPLERS, LongTailed
from engine import Selection, TrainStep, cosine, make_sgd, set_lr, train_epoch
from losses import LOSSES, class_balanced_weights, make_loss, reweighted
from models import trained_part
from recipe import (
    CONSTRAINTS,
    check_recipe,
    constraint,
    make_batches,
    make_network,
    make_settings,
    one_run,
    settle,
)
from stages import (
    HUGE,
    START_WORDS,
    Evaluator,
    TrainOptions,
    begin,
    fill_options,
    final_path,
    find_run,
    finish,
    keep,
    load_data,
    make_state,
    open_checkpoint,
    packed,
    published_start,
    require_val,
    say_complete,
    stage_option,
    starting_weights,
)
from sweeps import (
    Outcome,
    Setting,
    choice_in_words,
    chosen_on,
    rows_that_stand,
    show_sweep,
    varying,
    write_sweep,
)
from utils import checkpoints
from utils.checkpoints import Checkpoint
from utils.distributed import by_first, joined, rank
from utils.metrics import Report
from utils.options import Choice, Diverged, Flag, Many, Number, Resolved, Text, UsageError, command, option, parse_typed
from utils.resume import complete, completed_run
from utils.run import Run
from utils.system import AMP, DEVICE_OPTIONS, pick_device, side_by_side


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 1's own options; those of every command are in stages.py. The stronger recipes are all off by default."""

    cur_stage: str = stage_option("stage1")
    epochs: int = option(200, Number(int, 1), "epochs")
    lr: Any = option(
        0.01, Many(Number(float, 0, HUGE, above=True)), "learning rate, cosine to 0", aliases=("learning_rate",)
    )
    wd: Any = option(5e-3, Many(Number(float, 0, HUGE)), "weight decay of all parameters; the method is to tune it")
    label_smooth: Any = option(0.0, Many(Number(float, 0, 1)), "label smoothing d: true class 1 - d + d/C, others d/C")
    loss: Any = option("ce", Many(Choice(LOSSES)), "training loss; see losses/")
    drw_epoch: int | None = option(
        None, Number(int, 0), "deferred re-weighting: epochs before classes get class-balanced weights"
    )
    head: str = option("linear", Choice(("linear", "cosine")), "classifier; ldam needs cosine")
    constraint: str = option("none", Choice(CONSTRAINTS), "norms of the classifier's rows, after every step")
    constraint_radius: float = option(1.0, Number(float, 0, HUGE, above=True), "their norm (l2) or its limit (maxnorm)")
    sampler: Any = option("instance", Many(Choice(SAMPLERS)), "which images an epoch shows")
    aug: Any = option("crop_flip", Many(Choice(AUGMENTATIONS)), "augmentation of training images")
    mixup: Any = option(0.0, Many(Number(float, 0, 100)), "mixup: parameter of the Beta distribution; 0 is off")
    cutmix: Any = option(0.0, Many(Number(float, 0, 100)), "CutMix: the same; with mixup too, one of them a batch")
    ema: Any = option(
        0.0, Many(Number(float, 0, 1 - 1e-9)), "averaged weights over about 1/(1-D) steps, then evaluated; 0 is off"
    )
    warmup_epochs: int = option(0, Number(int, 0), "epochs in which the learning rate rises evenly")
    val_split: float = option(0.0, Number(float, 0, 0.5), "share of every class held out, never seen by the backbone")
    pretrained_pth: str | None = option(
        None,
        Text(),
        "start from this checkpoint's weights, not from random ones; imagenet: from torchvision's; none: random ones",
    )
    train_scope: str = option("all", Choice(("all", "last_block")), "what is trained: the rest keeps its weights")
    amp: str = option(
        "auto", Choice(("auto", *AMP)), "mixed precision; auto: bf16 on a GPU, off on a CPU", published="off"
    )
    compile: str = option(
        "auto", Choice(("auto", "on", "off")), "torch.compile; auto: long runs of narrow networks on a CPU, checked"
    )
    parallel: int | None = option(
        None, Number(int, 1, 64), "runs of a sweep at a time; if not given, up to 4 on a GPU and 1 on a CPU"
    )
    accum: int = option(
        1, Number(int, 1, 10**6), "parts of a step that follow each other, for memory; BatchNorm sees each by itself"
    )
    sync_bn: bool = option(False, Flag(), "BatchNorm over the images of all processes, on GPUs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_split > 0 and self.pretrained_pth not in (None, *START_WORDS):
            raise UsageError("--val_split with --pretrained_pth, whose weights may know the images", "one of the two")
        if self.train_scope != "all" and self.pretrained_pth in (None, "none"):
            raise UsageError(
                f"--train_scope {self.train_scope} of random weights", "--pretrained_pth beside it, or all"
            )
        check_recipe(self)


class Trained(Outcome):
    """One run of a sweep, in a folder of its own, which may have no room for its ``file``."""

    folder: Path
    file: Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What is to be known of a run that is complete, as JSON; its weights are in its folder."""
        return {
            "selection": self.selection.state_dict() | {"state": {}},
            "seconds": self.seconds,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.selection.load_state_dict(state["selection"])
        self.seconds, self.diverged = state["seconds"], state["diverged"]


@command
@joined()
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the selected epoch's report on the test set, of a sweep the chosen run's."""
    typed = parse_typed(Options, argv, "main_stage1.py", __doc__)
    typed, resumed = by_first(lambda: find_run(Options, typed, "main_stage1.py", hash_of_start))
    if resumed and resumed.is_complete:
        report: Report = say_complete(resumed)
        return report
    start = open_start(typed)
    resolved = fill_options(Options, typed, "stage1", file=start)
    settings = make_settings(resolved.options, typed)
    seed = settings[0].values["seed"]
    device = pick_device(*(getattr(resolved.options, name) for name in DEVICE_OPTIONS))
    data = load_data(resolved.options, val_fraction=resolved.options.val_split, val_seed=seed)
    options: Any = settle(resolved.options, device, len(data.train), len(settings), data.train.is_photos)
    require_val(data, options)
    if options.pretrained_pth == "imagenet":
        start = published_start(options.network)
    if start:
        starting_weights(start, data, options.head)  # fails now where it would fail later
    resolved = Resolved(options, resolved.sources)
    with begin(resolved, "stage1", data, device, typed, start, resumed, len(settings)) as run:
        run.is_sweep = len(settings) > 1
        if start and start.num_classes != data.num_classes:
            run.say(f"from {start.path}, of {start.num_classes} classes: the classifier begins anew")
        if options.compile != "off":
            run.say("torch.compile: the first steps take up to a minute")
        if len(settings) > 1:
            results = train_many(settings, options, data, device, run, start, argv)
            return by_first(lambda: complete(run, conclude(results, options, run)))
        one = one_run(options, settings[0])
        selection = train(one, data, device, run, start)
        end = (run, "stage1", one, data, selection, argv, device, start)
        return by_first(lambda: complete(run, finish(run, packed(*end, head=one.head), selection)))


def open_start(typed: Mapping[str, Any]) -> Checkpoint | None:
    """The file that training starts from, for its network and weights, not for its data; None where it is none."""
    if typed.get("pretrained_pth", "none") in START_WORDS:
        return None
    return replace(open_checkpoint(typed, "stage1", Options), data={})


def hash_of_start(typed: Mapping[str, Any]) -> str | None:
    """The hash of that file."""
    start = open_start(typed)
    return None if start is None else start.sha256


def train(one: Any, data: LongTailed, device: torch.device, run: Run, start: Checkpoint | None) -> Selection:
    """The experiment: one run, with single values ``one`` of all options."""
    class_counts = data.trained_counts
    model = make_network(one, data, device, starting_weights(start, data, one.head) if start else None)
    trained = trained_part(model, one.train_scope)
    batches = make_batches(one, data, device)
    step = TrainStep(
        model,
        make_loss(one.loss, class_counts, vars(one)).to(device),
        make_sgd(trained.parameters(), one.lr, one.momentum, one.wd, one.nesterov),
        amp=AMP[one.amp],
        ema=one.ema,
        project=constraint(model.fc, one.constraint, one.constraint_radius),
        accum=one.accum,
        compile=one.compile,
        graph=one.graph,
        say=run.say,
    )
    evaluator = Evaluator(run, data, device, one, one.epochs)
    state = make_state(run, one, data, device)
    criterion, drw_epoch = step.criterion, one.drw_epoch
    if drw_epoch is not None:
        weighted = reweighted(criterion, class_balanced_weights(class_counts, one.cb_beta)).to(device)

    with state.training("", step=step, evaluator=evaluator):
        for epoch in range(state.epoch, one.epochs):
            lr = one.lr * cosine(epoch, one.epochs, one.warmup_epochs)
            set_lr(step.optimizer, lr)
            step.use_loss(criterion if drw_epoch is None or epoch < drw_epoch else weighted)
            model.train(trained is model)  # what is frozen keeps its BatchNorm statistics too
            trained.train()
            steps = batches.epoch(epoch, first=state.step)
            bar = run.bar(steps, len(batches) - state.step, f"epoch {epoch + 1}/{one.epochs}")
            stats = train_epoch(step, bar, epoch, lr, state)
            evaluator.after(epoch, step.averaged, stats, lr, state.seconds)
            state.next_epoch()

    return evaluator.selection


def train_many(
    settings: Sequence[Setting],
    options: Any,
    data: LongTailed,
    device: torch.device,
    run: Run,
    start: Checkpoint | None,
    argv: Sequence[str],
) -> list[Trained]:
    """One run for every setting, each with a folder and a checkpoint of its own inside the sweep's."""
    names = ["seed", *varying(settings)] + ["loss"] * (len(options.loss) > 1)
    finishing = threading.Lock()  # Matplotlib draws one figure at a time
    finished: list[Trained] = []
    others = {setting.values["seed"] for setting in settings[1:]} - {settings[0].values["seed"]}
    data_of = {  # which images are held out follows from the seed
        seed: load_data(options, val_fraction=options.val_split, val_seed=seed) for seed in others if options.val_split
    }

    def task(setting: Setting) -> Trained:
        one, result = one_run(options, setting), Trained(setting, options.select)
        mine = data_of.get(one.seed, data)
        number = f"run {settings.index(setting) + 1} of {len(settings)}"
        label = "_".join(f"{name}{getattr(one, name)}" for name in names if getattr(one, name) is not None)
        folder = label if len(label) < 200 else number.replace(" ", "_")
        result.folder = run.folder / folder
        done = by_first(lambda: completed_run(result.folder))
        if done:
            result.load_state_dict(done["result"])
            if result.diverged is None and run.writes:
                result.file = checkpoints.read(result.folder / "checkpoint.pt")
            finished.append(result)
            return result
        with run.child(folder, f"{label}  " if options.parallel > 1 else "") as child:
            child.say(f"\n{number}: {label}")
            try:
                result.selection = train(one, mine, device, child, start)
            except Diverged as error:
                child.say(f"stopped: {error}")
                result.diverged = len(child.epochs) + 1
            result.seconds = child.seconds
            with finishing:
                finished.append(result)
                by_first(lambda: end(child, one, mine, result))
        return result

    def end(child: Run, one: Any, mine: LongTailed, result: Trained) -> None:
        if result.diverged is None:
            what = (child, "stage1", one, mine, result.selection, argv, device, start)
            result.file = packed(*what, head=one.head)
            finish(child, result.file, result.selection, is_final=False)
        if result.diverged is not None or (child.folder / "checkpoint.pt").is_file():
            complete(child, result.state_dict())

    try:
        return side_by_side(task, settings, options.parallel, device, run.stopped)
    except BaseException:
        if rank() == 0:
            write_sweep(finished, run, "loss")
        raise


def conclude(results: Sequence[Trained], options: Any, run: Run) -> Report:
    """Shows the sorted table of a sweep and makes the best setting's first seed stage 1's result: its test report."""
    rows = rows_that_stand(results, run, "a lower --lr or --wd may help", "loss")
    chosen: Trained = rows[0].results[0]
    sweep = chosen_on(results)
    chosen.file.metrics |= {"sweep": sweep} if sweep else {}
    ending = keep(chosen.file, run, final_path(options, "stage1"), chosen.folder / "checkpoint.pt")
    show_sweep(results, rows, run, "wd", f"{options.dataset}, ratio {options.imb_ratio}, {options.network}", "loss")
    name = chosen.setting.describe(["seed", *varying([result.setting for result in results])])
    run.say(f"{choice_in_words(sweep)}; saved: {name}")
    run.say(f"{ending()}; all runs in {run.folder}")
    return chosen.selection.test


if __name__ == "__main__":
    main(sys.argv[1:])
