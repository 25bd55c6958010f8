"""What a run of stage 1 would take: some steps and a part of the evaluation, timed."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from itertools import islice

import torch

from datasets import LongTailed
from engine import is_due
from experiment.data import eval_batches
from training.options import Options
from training.recipe import make_batches, make_network, make_step
from utils.console import duration

#: Steps that are timed, after as many that are not.
STEPS = 10


def dry_run(runs: Sequence[Options], data: LongTailed, device: torch.device) -> str:
    """How long the runs would take and how much memory, from ten steps and ten batches of the test set of the first.

    Steps are timed as they are without torch.compile and CUDA graphs, which make them faster.
    """
    options = runs[0]
    model = make_network(options, data, device)
    batches = make_batches(options, data, device)
    step = make_step(options, model.train(), data, device)

    def seconds(passes: int) -> float:
        """Of one step, or one batch of the evaluation."""
        return (time.perf_counter() - began) / passes

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timed = 0
    for number, batch in enumerate(islice(batches.epoch(), 2 * STEPS)):
        if number == min(STEPS, len(batches) // 2):
            wait()
            began = time.perf_counter()
        step(*batch)
        timed += number >= min(STEPS, len(batches) // 2)
    wait()
    of_step = seconds(timed)
    test = eval_batches(data, data.test, device)
    with torch.inference_mode():
        began = time.perf_counter()
        evaluated = 0
        for images, _ in islice(test.epoch(), STEPS):
            model.eval()(images)
            evaluated += 1
        wait()
    of_evaluation = seconds(evaluated) * len(test) * (2 if options.flip_tta else 1)
    due = sum(is_due(epoch, options.epochs, options.eval_every) for epoch in range(options.epochs))
    epoch = of_step * len(batches)
    whole = (epoch * options.epochs + of_evaluation * due) * len(runs)
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB of memory"
    each = f"{len(runs)} runs, one after the other, of " if len(runs) > 1 else ""
    size = min(options.batch_size, len(data.train))
    return (
        f"dry run: about {duration(whole)} for {each}{options.epochs} epochs, {memory}; a step of {size} images takes "
        f"{1000 * of_step:.3g} ms, an epoch {duration(epoch)}, each of {due} evaluations {duration(of_evaluation)}. "
        "No run was made."
    )
