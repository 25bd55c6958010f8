"""Stage 2: freezes stage 1's backbone and re-trains its classifier, by one method and setting or by many at once.

    python main_stage2.py --imb_ratio 100 --cur_stage stage2 --label_smooth 0.98

is Label Over-Smooth's published command (20 epochs of SGD on ``fc``, lr 5e-4, no weight decay). It continues from the
file that main_stage1.py left for the same data. To expect, from others: 53.92 % on CIFAR-100-LT at ratio 100 (Zhao et
al., NeurIPS 2025, selection not stated). Options that take several values are swept, on one pass over the backbone:

    python main_stage2.py --imb_ratio 100 --label_smooth 0.9 0.95 0.98 0.99 --method los crt --seed 0 1 2
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets import SAMPLERS, LongTailed
from engine import TrainStep, cosine, is_due, make_sgd, set_lr, train_epoch
from losses import auto_label_smooth
from models import trained_part
from models.heads import head_name
from retraining.features import DTYPES, FEATURES, Stream
from retraining.methods import METHODS
from retraining.settings import TUNABLE, Setting, by_stream, make_settings
from retraining.solver import Solver, heads_that_fit
from retraining.sweep import Finished, Lab, Result, Results, name_of
from stages import (
    EVAL_BATCH,
    HUGE,
    TrainOptions,
    begin,
    calibrated,
    fill_options,
    find_run,
    finish,
    flags_of,
    load_data,
    make_state,
    open_checkpoint,
    packed,
    restore,
    say_complete,
    stage_option,
)
from sweeps import choice_in_words, chosen_on, rows_that_stand, short, show_sweep, varying
from utils.checkpoints import IDENTITY, Checkpoint
from utils.distributed import require_single
from utils.files import require_room
from utils.metrics import Report, report
from utils.options import (
    Choice,
    Diverged,
    Many,
    Number,
    Resolved,
    Text,
    UsageError,
    command,
    option,
    parse_typed,
    shown,
)
from utils.resume import TrainState, complete
from utils.run import Run
from utils.system import DEVICE_OPTIONS, pick_device

SCOPES = ("fc", "last_block", "all")


@dataclass(frozen=True)
class Options(TrainOptions):
    """Stage 2's own options; those of every command are in stages.py. None is the method's own value."""

    cur_stage: str = stage_option("stage2")
    method: Any = option("los", Many(Choice(METHODS)), "how the classifier is re-trained; see retraining/methods.py")
    finetune_epoch: Any = option(20, Many(Number(int, 1)), "epochs")
    finetune_lr: Any = option(None, Many(Number(float, 0, HUGE, above=True)), "learning rate, cosine to 0")
    finetune_wd: Any = option(None, Many(Number(float, 0, HUGE)), "weight decay of the classifier")
    sampler: Any = option(None, Many(Choice(SAMPLERS)), "which images an epoch shows")
    finetune_scope: Any = option("fc", Many(Choice(SCOPES)), "what is trained: the classifier, or more with it")
    label_smooth: Any = option(
        None,
        Many(Number(float, 0, 1, words=("auto",))),
        "label smoothing d: true class 1 - d + d/C, others d/C; auto is C/(C+2.04), which is 0.98 at C = 100",
    )
    tau: Any = option(None, Many(Number(float, 0, 10, words=("val",))), "tau-norm: power of the norm; val chooses it")
    ncm_metric: Any = option(None, Many(Choice(("centred", "cosine", "l2"))), "ncm: how distances are measured")
    cb_form: Any = option(None, Many(Choice(("ce", "bce"))), "class-balanced loss: cross-entropy, or BCE on softmax")
    drw: Any = option(None, Many(Number(float, 0, 1)), "ldam: share of the epochs after which classes are weighted")
    maxnorm_radius: Any = option(
        None, Many(Number(float, 0, HUGE, above=True, words=("published",))), "maxnorm: radius of the projection"
    )
    maxnorm_every: Any = option(None, Many(Choice(("epoch", "step"))), "maxnorm: when to project")
    features: str = option(
        "views",
        Choice(FEATURES),
        "the frozen backbone's BatchNorm and augmentation: views, eval mode and --views augmented views; orbit, eval "
        "mode and all crops and flips; replay, train mode, so that its statistics drift",
        published="replay",
    )
    views: int = option(
        20, Number(int, 0, 10_000), "augmented views of an image; epoch e shows view e mod V; 0: the image as it is"
    )
    view_seed: int = option(0, Number(int, 0, 2**31 - 1), "seed of the views' crops and flips, shared by all --seed")
    feature_dtype: str = option(
        "float32", Choice(DTYPES), "how the cache stores features of training images; heads compute in float32 anyway"
    )
    cache_dir: str = option("cache", Text("a folder"), "where features are kept; it may be deleted between runs")
    pretrained_pth: str | None = option(None, Text(), "stage 1's checkpoint; without it, the one it left by default")


@command
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the chosen setting's report on the test set."""
    require_single("main_stage2.py")
    typed = parse_typed(Options, argv, "main_stage2.py", __doc__)
    typed, resumed = find_run(Options, typed, "main_stage2.py", hash_of_stage1)
    if resumed and resumed.is_complete:
        report_then: Report = say_complete(resumed)
        return report_then
    parent, resolved = continue_stage1(typed, Options)
    options: Any = resolved.options
    device = pick_device(*(getattr(options, name) for name in DEVICE_OPTIONS))
    data = load_data(options, val_indices=parent.data.get("val_indices", []))
    require_held_out(parent, options, data)
    wanted = {name: getattr(options, name) for name in TUNABLE}
    settings = make_settings(options.method, wanted, typed, data.num_classes, published=options.protocol == "published")
    refuse_unused(typed, options, settings)
    refuse_head(parent, options.method)
    with begin(resolved, "stage2", data, device, typed, parent, resumed) as run:
        lab = make_lab(parent, data, device, options, run)
        run.say(f"from {parent.path}: {describe(settings)}")
        if "los" in options.method and data.num_classes != 100 and "auto" in (options.label_smooth or ("auto",)):
            smooth = short(auto_label_smooth(data.num_classes))
            run.say(f"label_smooth auto is {smooth} here: this project's extrapolation of 0.98 at 100 classes")
        results = retrain(settings, lab, options, run)
        run.say(lab.source.size)
        return complete(run, conclude(results, lab, options, run, argv, parent))


def continue_stage1(typed: Mapping[str, Any], cls: type[Options]) -> tuple[Checkpoint, Resolved[Options]]:
    """Stage 1's file that the typed flags choose, and all options with it.

    Raises:
        UsageError: see :func:`stages.open_checkpoint` and :func:`stages.fill_options`; or a stage-2 file.
    """
    parent = open_checkpoint(typed, "stage1", cls)
    if parent.stage == "stage2":
        raise UsageError(f"--pretrained_pth {parent.path} is a stage-2 file", "a stage-1 file")
    return parent, fill_options(cls, typed, "stage2", file=parent)


def hash_of_stage1(typed: Mapping[str, Any]) -> str | None:
    """The hash of stage 1's file that the typed flags choose."""
    return open_checkpoint(typed, "stage1", Options).sha256


def refuse_unused(typed: Mapping[str, Any], options: Any, settings: Sequence[Setting]) -> None:
    """Raises UsageError where an option is typed that none of the settings has a use for."""
    if not any(setting.stream for setting in settings):
        for name in ("momentum", "nesterov", "eval_every", "views", "view_seed"):
            if name in typed:
                raise UsageError(f"--{name} with --method {shown(options.method)}", "a method that trains something")
    for name in ("views", "view_seed"):
        if name in typed and options.features != "views":
            raise UsageError(f"--{name} with --features {options.features}", "--features views")
        if name in typed and all(setting.scope != "fc" for setting in settings):
            raise UsageError(f"--{name} with --finetune_scope {shown(options.finetune_scope)}", "fc too")
    if "feature_dtype" in typed and not any(s.scope == "fc" and (s.stream or s.method == "ncm") for s in settings):
        used = f"--method {shown(options.method)} --finetune_scope {shown(options.finetune_scope)}"
        raise UsageError(f"--feature_dtype with {used}", "a method that takes features of training images, scope fc")


def refuse_head(parent: Checkpoint, methods: Sequence[str]) -> None:
    """Raises UsageError where stage 1's classifier is not of the kind that a method continues from."""
    unfit = [name for name in methods if METHODS[name].needs_linear]
    if parent.head != "linear" and unfit:
        raise UsageError(
            f"--method {shown(unfit)}: {parent.path} has a {parent.head} head", shown(fitting(parent.head))
        )


def fitting(head: str) -> list[str]:
    """The methods that can follow a stage 1 with this kind of classifier."""
    return [name for name, method in METHODS.items() if head == "linear" or not method.needs_linear]


def require_held_out(parent: Checkpoint, options: Any, data: LongTailed, flag: str | None = None) -> None:
    """Checks that there are held-out images, stage 1's or the data set's, where ``flag`` or another option needs them.

    Raises:
        UsageError: there are none.
    """
    needed = {"--select best_val": options.select == "best_val", "--tau val": "val" in (options.tau or ())}
    flags = [name for name, is_on in needed.items() if is_on] + ([flag] if flag else [])
    if flags and data.val is None:
        head = "" if parent.head == "linear" else f" --head {parent.head}"
        again = f"python main_stage1.py{flags_of(options, *IDENTITY)}{head} --val_split 0.1"
        allowed = "last, best_test, or first" if flags[0].startswith("--select") else "without it, or first"
        raise UsageError(f"{flags[0]}: {parent.path} was trained without held-out images", f"{allowed}: {again}")


def make_lab(parent: Checkpoint, data: LongTailed, device: torch.device, options: Any, run: Run) -> Lab:
    """Stage 1's network with its feature source."""
    source = FEATURES[options.features](
        restore(parent, data),
        data,
        device,
        options.cache_dir,
        str(parent.sha256),
        options.flip_tta,
        run.bar,
        EVAL_BATCH[device.type],
        options.views,
        options.view_seed,
        options.feature_dtype,
    )
    return Lab(source)


def retrain(settings: Sequence[Setting], lab: Lab, options: Any, run: Run) -> list[Result]:
    """Makes every classifier: those that see the same batches side by side, on one pass over the backbone."""
    results: list[Result] = []
    run.is_sweep = len(settings) > 1
    finished = Finished(lab, options.select)
    state = make_state(run, options, lab.data, lab.source.device, finished=finished)
    groups = by_stream(settings)
    cached = [s for s, group in groups.items() if s is not None and any(setting.scope == "fc" for setting in group)]
    require_room({options.cache_dir: lab.source.missing(cached)}, f"--features {options.features}")
    for stream, group in groups.items():
        if stream is None:
            results += post_hoc(group, lab, options.select)
            continue
        heads = [setting for setting in group if setting.scope == "fc"]
        parts = in_memory(heads, stream, lab, run, finished) + [[s] for s in group if s.scope != "fc"]
        for part in parts:
            found = finished.find(part)
            if found is None:
                train = train_heads if part[0].scope == "fc" else train_network
                found = train(part, stream, lab, options, run, state)
                finished.add(found)
            results += found
    return results


def post_hoc(settings: Sequence[Setting], lab: Lab, select: str) -> list[Result]:
    """Methods that train nothing."""
    results = []
    for setting in settings:
        began, passes = time.perf_counter(), lab.source.seconds
        method = METHODS[setting.method]
        values = method.resolve(lab.start, setting.values)
        head = method.head(lab.start, values)
        result = Result(Setting(setting.method, values), select)
        result.seconds = time.perf_counter() - began - (lab.source.seconds - passes)
        lab.measure(result, head, epoch=-1)
        results.append(result)
    return results


def in_memory(
    settings: Sequence[Setting], stream: Stream, lab: Lab, run: Run, finished: Finished
) -> list[Sequence[Setting]]:
    """The settings in groups whose classifiers can be trained side by side; says so where they are several.

    Raises:
        UsageError: see :func:`retraining.solver.heads_that_fit`.
    """
    if not settings:
        return []
    classes, features = lab.start.weight.shape
    if stream.describe() not in finished.fits:
        fit = heads_that_fit(len(settings), classes, features, stream.batch_size, lab.source.device)
        finished.fits[stream.describe()] = fit
    fit = finished.fits[stream.describe()]
    groups = [settings[first : first + fit] for first in range(0, len(settings), fit)]
    if len(groups) > 1:
        heads = f"{len(settings)} heads of {classes} x {features}"
        run.say(f"{heads}: {fit} fit in memory at a time, {len(groups)} passes")
    return groups


def train_heads(
    settings: Sequence[Setting], stream: Stream, lab: Lab, options: Any, run: Run, state: TrainState
) -> list[Result]:
    """Trains classifiers on a frozen backbone, all on the same batches."""
    results = [Result(setting, options.select) for setting in settings]
    trainees = [lab.trainee(setting) for setting in settings]
    solver = Solver(trainees, options.momentum, options.nesterov, graph=options.graph, say=run.say)

    with state.training(name_of(settings[0]), solver=solver, results=Results(results, lab)):
        for epoch in range(state.epoch, stream.epochs):
            rate = cosine(epoch, stream.epochs)
            train = solver.train_epoch(lab.source.epoch(stream, epoch), epoch / stream.epochs, rate, state)
            seconds, due = state.seconds, is_due(epoch, stream.epochs, options.eval_every)
            if due:
                lab.make_features(stream, epoch)
            for result, trainee, stats in zip(results, trainees, train):
                is_well = result.after(epoch, trainee.lr * rate, stats, seconds)
                if is_well and due:
                    lab.measure(result, METHODS[result.setting.method].finished(trainee.head), epoch)
            whole = [result for result in results if result.diverged is None]
            run.log_many({result.setting.describe(): result.records[-1] for result in whole}, stream.describe())
            state.next_epoch()

    for result, spent in zip(results, solver.seconds):
        result.seconds = spent
    return results


def train_network(
    settings: Sequence[Setting], stream: Stream, lab: Lab, options: Any, run: Run, state: TrainState
) -> list[Result]:
    """Trains a classifier together with the backbone or its last block: the ordinary loop, for one setting."""
    (setting,) = settings
    method, values = METHODS[setting.method], setting.values
    result = Result(setting, options.select)
    model = copy.deepcopy(lab.source.model).to(memory_format=torch.channels_last)
    model.load_state_dict(lab.source.backbone(None, -1))
    model.fc = method.head(lab.start, values)
    trained = trained_part(model, setting.scope)
    batches = lab.source.train_batches(stream)
    lr, wd = values["finetune_lr"], values["finetune_wd"]
    optimizer = make_sgd(trained.parameters(), lr, options.momentum, wd, options.nesterov)
    step = TrainStep(model, method.loss(lab.start, values, 0.0), optimizer)

    with state.training(name_of(setting), step=step, result=Results([result], lab)):
        for epoch in range(state.epoch, stream.epochs):
            rate = cosine(epoch, stream.epochs)
            model.train(options.features == "replay")
            trained.train()
            set_lr(optimizer, lr * rate)
            step.use_loss(method.loss(lab.start, values, epoch / stream.epochs).to(lab.source.device))
            steps = batches.epoch(epoch, first=state.step)
            bar = run.bar(steps, len(batches) - state.step, f"epoch {epoch + 1}/{stream.epochs}")
            try:
                stats = train_epoch(step, bar, epoch, lr * rate, state)
                if not state.is_trained:
                    method.project(model.fc, lab.start, values)
                    state.is_trained = True
                seconds, logits = state.seconds, None
                if is_due(epoch, stream.epochs, options.eval_every):
                    val = lab.network_logits(model, "val") if lab.data.val else None
                    logits = lab.network_logits(model, "test"), val
                result.seconds += seconds
                result.after(epoch, lr * rate, stats, seconds)
                if logits:
                    result.offer(epoch + 1, model, *logits, lab.data)
            except Diverged:
                result.diverged = epoch + 1
                break
            run.log_many({setting.describe(): result.records[-1]}, setting.describe(["seed", "finetune_scope"]))
            state.next_epoch()
    return [result]


#: What may help where every setting diverges.
HINT = "a lower --finetune_lr may help"


def conclude(
    results: list[Result], lab: Lab, options: Any, run: Run, argv: Sequence[str], parent: Checkpoint
) -> Report:
    """Shows the sorted table of a sweep and saves the best setting's classifier; returns its test report."""
    rows, data, settings = rows_that_stand(results, run, HINT), lab.data, [result.setting for result in results]
    chosen, sweep = rows[0].results[0], chosen_on(results)

    def table() -> None:
        if len(results) > 1:
            show_sweep(results, rows, run, "label_smooth", f"{data.spec.name}, ratio {options.imb_ratio}", "method")
            name = chosen.setting.describe(["seed", *varying(settings)])
            run.say(f"{choice_in_words(sweep)}; saved: {name}")

    run.epochs = chosen.records
    chosen.selection.test = report(lab.logits_of(chosen, "test"), data.test.labels, data.class_counts)
    if data.val is not None:
        chosen.selection.val = calibrated(lab.logits_of(chosen, "val"), data.val.labels, data.class_counts)
    chosen.selection.state = lab.state_dict(chosen)
    stored = dataclasses.asdict(options) | dict.fromkeys(TUNABLE) | dict(chosen.setting.values)
    stored["method"] = chosen.setting.method
    device, head = lab.source.device, head_name(chosen.classifier)
    file = packed(run, "stage2", options, data, chosen.selection, argv, device, parent, stored, head, sweep)
    return finish(run, file, chosen.selection, beside=table)


def describe(settings: Sequence[Setting]) -> str:
    """The only setting, or how many there are."""
    return settings[0].describe() if len(settings) == 1 else f"{len(settings)} classifiers"


if __name__ == "__main__":
    main(sys.argv[1:])
