"""What a run of stage 1 would take: some steps and a part of the evaluation, timed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count, islice

import torch

from datasets import LongTailed
from datasets.batches import Epochs
from engine import evaluations
from experiment.data import eval_batches
from training.options import Options
from training.recipe import make_batches, make_network, make_step
from utils.console import about, counted, duration, step_time
from utils.system import peak_memory, step_seconds


def dry_run(runs: Sequence[Options], data: LongTailed, device: torch.device) -> str:
    """How long the runs would take and how much memory, from ten steps and ten batches of the test set of each.

    Runs that differ in seed or rates alone are timed once. Steps are timed as they are without torch.compile and CUDA
    graphs, which make them faster.
    """
    first, of_kind = runs[0], dict[tuple[object, ...], tuple[float, float]]()
    for run in runs:
        if kind_of(run) not in of_kind:
            of_kind[kind_of(run)] = time_run(run, data, device)
    due = evaluations(first.epochs, first.eval_every)
    steps = {run: -(-len(data.train) // run.batch_size) for run in runs}
    epochs = [steps[run] * of_kind[kind_of(run)][0] for run in runs]
    of_evaluation = of_kind[kind_of(first)][1]
    whole = sum(epochs) * first.epochs + of_evaluation * due * len(runs)
    parallel = min(first.parallel or 1, len(runs))
    order = "one after the other" if parallel == 1 else f"less with {parallel} side by side"
    each = f"{len(runs)} runs, {order}, of " if len(runs) > 1 else ""
    size, of_step = min(first.batch_size, len(data.train)), of_kind[kind_of(first)][0]
    return (
        f"dry run: {about(whole)} for {each}{counted(first.epochs, 'epoch')}, {peak_memory(device)}; "
        f"{'of the first ' if len(runs) > 1 else ''}a step of {counted(size, 'image')} "
        f"takes {step_time(of_step)}, an epoch "
        f"{duration(epochs[0])}, each of {counted(due, 'evaluation')} {duration(of_evaluation)}. No run was made."
    )


def kind_of(run: Options) -> tuple[object, ...]:
    """What the time of a step depends on, of what a sweep may vary."""
    return run.batch_size, run.loss, run.aug, run.mixup > 0 or run.cutmix > 0, run.ema > 0


def time_run(run: Options, data: LongTailed, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation."""
    model = make_network(run, data, device)
    step = make_step(run, model.train(), data, device)
    training, test = endless(make_batches(run, data, device)), eval_batches(data, data.test, device)
    of_step = step_seconds(lambda number: [step(*batch) for batch in islice(training, number)], device)
    images, model = endless(test), model.eval()
    with torch.inference_mode():
        of_batch = step_seconds(lambda number: [model(batch[0]) for batch in islice(images, number)], device)
    return of_step, of_batch * len(test) * (2 if run.flip_tta else 1)


def endless(batches: Epochs) -> chain[tuple[torch.Tensor, ...]]:
    """The batches of one epoch after the other."""
    return chain.from_iterable(batches.epoch(number) for number in count())
