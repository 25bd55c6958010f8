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

import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from datasets import Batches, LongTailed
from engine import Selection, cosine, is_diverged, set_lr, train_epoch
from experiment.data import load_data, require_val
from experiment.options import START_WORDS, fill_options
from experiment.record import (
    STATE,
    Evaluator,
    begin,
    check_places,
    finish,
    following,
    make_checkpoint,
    model_size,
    note_balance,
    save_weights,
)
from experiment.restore import final_path, imagenet_start, open_checkpoint, starting_weights
from experiment.resuming import Resumed, find_run, make_state, say_complete
from experiment.sweeps import (
    Result,
    choice_in_words,
    chosen_on,
    ranked_rows,
    show_sweep,
    varying,
    write_sweep,
)
from experiment.threads import settle_threads
from models import trained_part
from training.dry_run import dry_run
from training.options import Options
from training.recipe import deferred_loss, last_loss, make_batches, make_network, make_runs, make_step, resolve_auto
from utils import checkpoints
from utils.checkpoints import Checkpoint, Data
from utils.command import command
from utils.console import about, counted, duration, show
from utils.distributed import on_main_process, process_group, rank
from utils.errors import Diverged, UsageError
from utils.metrics import Report, percent
from utils.options import Values, parse_typed
from utils.resume import complete, completed_run, refusing
from utils.run import Run
from utils.system import pick_device, side_by_side
from utils.types import StateDict


class RunResult(Result):
    """One run of a sweep, in a folder of its own, which may have no room for its ``file``."""

    file: Checkpoint

    def __init__(self, run: Options, folder: Path) -> None:
        super().__init__(run.setting, run.select, run.select_by)
        self.folder = folder

    def state_dict(self) -> StateDict:
        """What is to be known of a run that is complete, as JSON; its weights are in its folder."""
        return {
            "selection": self.selection.state_dict() | {"state": {}},
            "seconds": self.seconds,
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.selection.load_state_dict(state["selection"])
        self.seconds, self.diverged = state["seconds"], state["diverged"]


@command
@process_group()
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the selected epoch's report on the test set, of a sweep the chosen run's."""
    typed = parse_typed(Options, argv, "main_stage1.py", __doc__)
    typed, found = on_main_process(lambda: find_run(Options, typed, "main_stage1.py", hash_of_start))
    resumed = found and Resumed(*found)  # which is a plain tuple when it comes from another process
    if resumed and resumed.is_complete:
        return cast(Report, say_complete(resumed))
    start = open_start(typed)
    resolved = fill_options(Options, typed, "stage1", file=start)
    runs = make_runs(resolved, typed)
    if resolved.options.print_options:
        show(resolved.table())
        return Report()
    device = pick_device(*resolved.options.place)
    data = load_data(resolved.options, val_fraction=runs[0].val_split, val_seed=runs[0].drawn_seed)
    runs = resolve_auto(runs, device, len(data.train), data.train.is_photos)
    if len(runs) == 1 and not runs[0].deterministic:
        runs = [replace(runs[0], threads=measured_threads(runs[0], data, device))]
    options = runs[0]
    require_val(data, resolved)
    if options.pretrained_pth == "imagenet":
        start = imagenet_start(options.network)
    if start:
        starting_weights(start, data, options.head)  # fails now where it would fail later
    resolved = resolved.settled(options)
    state = STATE * model_size(options, data)[1] * (options.parallel or 1)
    if options.dry_run:
        on_main_process(lambda: check_places(options, device, model_size(options, data)[1], state, resumed, len(runs)))
        show(dry_run(runs, data, device))
        return Report()
    with begin(resolved, "stage1", data, device, typed, start, resumed, state, len(runs)) as run:
        run.is_sweep = len(runs) > 1
        if start and start.num_classes != data.num_classes:
            run.say(
                f"from {start.path}, of {counted(start.num_classes, 'class', 'classes')}: the classifier begins anew"
            )
        note_balance(
            run, ((f"--loss {o.loss} with --sampler {o.sampler}", o.sampler, last_loss(o, data)) for o in runs)
        )
        steps = options.epochs * -(-len(data.train) // options.batch_size)
        if options.ema and steps * (1 - options.ema) < 0.5:
            run.say(
                f"note: --ema {options.ema} over {counted(steps, 'step')}: the average stays near the initial weights"
            )
        if options.compile != "off":
            run.say("torch.compile: the first steps take up to a minute")
        if len(runs) > 1:
            results = train_many(runs, data, device, run, start, argv)
            return on_main_process(lambda: complete(run, conclude(results, options, run)))
        selection = train(options, data, device, run, start)
        end = (run, "stage1", options, data, selection, argv, device, start)
        return on_main_process(lambda: complete(run, finish(run, make_checkpoint(*end, head=options.head), selection)))


def measured_threads(options: Options, data: LongTailed, device: torch.device) -> int | None:
    """--threads, or the number that a long run on a busy machine is settled on."""
    shape = data.channels, data.train.side, data.train.side
    images = options.epochs * len(data.train)
    network = partial(make_network, options, data, device)
    return settle_threads(network, shape, images, device, options.threads, trains=True)


def open_start(typed: Values) -> Checkpoint | None:
    """The file that training starts from, for its network, weights and normalisation, not for its data; None: none."""
    if typed.get("pretrained_pth", "none") in START_WORDS:
        return None
    file = open_checkpoint(typed, "stage1", Options)
    kept = Data(mean=file.data["mean"], std=file.data["std"]) if file.data else Data()
    return replace(file, data=kept)


def hash_of_start(typed: Values) -> str | None:
    """The hash of that file."""
    start = open_start(typed)
    return None if start is None else start.sha256


def train(options: Options, data: LongTailed, device: torch.device, run: Run, start: Checkpoint | None) -> Selection:
    """The experiment: one run."""
    model = make_network(options, data, device, starting_weights(start, data, options.head) if start else None)
    trained = trained_part(model, options.train_scope)
    batches = make_batches(options, data, device)
    step = make_step(options, model, data, device, options.compile, options.graph, run.say)
    evaluator = Evaluator(run, data, device, options, options.epochs)
    state = make_state(run, options, vars(options), data, device)
    criterion = deferred = step.criterion
    if options.drw_epoch is not None:
        deferred = deferred_loss(options, criterion, data.trained_counts).to(device)

    with state.training("", options.epochs, len(batches), step=step, evaluator=evaluator):
        whole = len(batches) + evaluator.as_steps(options.batch_size) / options.epochs
        run.begin_training(options.epochs - state.epoch, whole, options.eval_every)
        for epoch in range(state.epoch, options.epochs):
            lr = options.lr * cosine(epoch, options.epochs, options.warmup_epochs)
            set_lr(step.optimizer, lr)
            step.use_loss(criterion if options.drw_epoch is None or epoch < options.drw_epoch else deferred)
            model.train(trained is model)  # what is frozen keeps its BatchNorm statistics too
            trained.train()
            steps = batches.epoch(epoch, first=state.step)
            bar = run.bar(steps, len(batches) - state.step, f"epoch {epoch + 1}/{options.epochs}")
            try:
                stats = train_epoch(step, bar, epoch, lr, state)
            except Diverged as error:
                note_images(run, batches, data, epoch, error)
                raise
            if is_diverged(stats, data.num_classes):
                risen = f"the loss has risen from {stats.first:.3g} to {stats.loss:.3g} in epoch {epoch + 1}"
                raise Diverged(f"{risen} (lr {lr:g})")
            evaluator.after(epoch, step.averaged, stats, lr, state.seconds)
            state.next_epoch()

    return evaluator.selection


def note_images(run: Run, batches: Batches, data: LongTailed, epoch: int, error: Diverged) -> None:
    """Notes which images were in the step whose loss is not finite: positions in the data set's own training images."""
    if error.step is not None:
        rows = batches.positions(epoch, error.step - 1)
        content = {"epoch": epoch + 1, "step": error.step, "images": data.train.indices[rows].tolist()}
        run.write_json("diverged.json", content)
        run.say("its images are in diverged.json; if they are well, a lower --lr or --wd may help")


def train_many(
    runs: Sequence[Options],
    data: LongTailed,
    device: torch.device,
    run: Run,
    start: Checkpoint | None,
    argv: Sequence[str],
) -> list[RunResult]:
    """Every run of a sweep, each with a folder and a checkpoint of its own inside the sweep's."""
    first = runs[0]
    names = ["seed", *varying([each.setting for each in runs])] + ["loss"] * (len({each.loss for each in runs}) > 1)
    finishing = threading.Lock()  # Matplotlib draws one figure at a time
    finished: list[RunResult] = []
    times: list[float] = []
    seeds = {each.drawn_seed for each in runs} - {first.drawn_seed} if first.val_split else set()
    data_of = {  # which images are held out follows from the seed
        seed: load_data(first, val_fraction=first.val_split, val_seed=seed) for seed in seeds
    }

    def task(options: Options) -> RunResult:
        mine = data_of.get(options.drawn_seed, data)
        number = f"run {runs.index(options) + 1} of {len(runs)}"
        values = {name: getattr(options, name) for name in names}
        label = "_".join(f"{name}{value}" for name, value in values.items() if value is not None)
        result = RunResult(options, run.folder / (label if len(label) < 200 else number.replace(" ", "_")))
        done = on_main_process(lambda: earlier(result))
        if done:
            with refusing(run.folder):
                result.load_state_dict(done["result"])
            finished.append(result)
            return result
        with run.child(result.folder.name, f"{label}  " if (first.parallel or 1) > 1 else "") as child:
            left = (len(runs) - len(finished)) * statistics.fmean(times) / (first.parallel or 1) if times else 0
            child.say(f"\n{number}: {label}{f', {about(left)} left for all' if left else ''}")
            try:
                result.selection = train(options, mine, device, child, start)
            except Diverged as error:
                child.say(f"stopped: {error}")
                result.diverged = len(child.epochs) + 1
            result.seconds = child.seconds
            with finishing:
                finished.append(result)
                times.append(result.seconds)
                on_main_process(lambda: end(child, options, mine, result))
        return result

    def earlier(result: RunResult) -> StateDict | None:
        """What a run noted that has been completed before this sweep was resumed; its weights are read."""
        done = completed_run(result.folder)
        if done and done["result"]["diverged"] is None:
            try:
                result.file = checkpoints.read(result.folder / "checkpoint.pt")
            except UsageError as error:
                run.say(f"note: {error.args[0]}; this run is made again")
                return None
        return done

    def end(child: Run, options: Options, mine: LongTailed, result: RunResult) -> None:
        if result.diverged is None:
            what = (child, "stage1", options, mine, result.selection, argv, device, start)
            result.file = make_checkpoint(*what, head=options.head)
            finish(child, result.file, result.selection, is_final=False)
        if result.diverged is not None or (child.folder / "checkpoint.pt").is_file():
            complete(child, result.state_dict())

    try:
        return side_by_side(task, runs, first.parallel or 1, device, run.stopped)
    except BaseException:
        if rank() == 0:
            write_sweep(finished, run, "loss")
        raise


def conclude(results: Sequence[RunResult], options: Options, run: Run) -> Report:
    """Shows the sorted table of a sweep and makes the best setting's first seed stage 1's result: its test report."""
    rows = ranked_rows(results, run, "a lower --lr or --wd may help", "loss")
    chosen = rows[0].results[0]
    sweep = chosen_on(results)
    if sweep:
        chosen.file.metrics["sweep"] = sweep
    ending = save_weights(chosen.file, run, final_path(options, "stage1"))
    show_sweep(results, rows, run, "wd", f"{options.dataset}, ratio {options.imb_ratio}, {options.network}", "loss")
    name = chosen.setting.describe(["seed", *varying([result.setting for result in results])])
    run.say(f"{choice_in_words(results)}: {name}")
    accuracy = percent(chosen.selection.test["top1"])
    run.say(f"test top-1 {accuracy} % of that run; {ending()}, in {duration(run.seconds)}; all runs in {run.folder}")
    run.say(f"next: {following(chosen.file)}")
    return chosen.selection.test


if __name__ == "__main__":
    main(sys.argv[1:])
