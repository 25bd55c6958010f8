"""What stage 2 would take: some passes over the backbone and some steps of the classifiers, timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from engine import for_evaluation
from experiment.data import eval_batches
from retraining.features import features_of
from retraining.methods import Method, Trained
from retraining.results import FrozenBackbone
from retraining.settings import by_stream, cached_streams
from retraining.solver import Solver
from utils.console import counted, duration, step_time
from utils.system import peak_memory, step_seconds


def solver_steps(solver: Solver, batch: tuple[Tensor, Tensor], number: int) -> None:
    """So many steps on one batch of features (B, D) and labels (B,)."""
    solver.train_epoch(repeat(batch, number), 0.0, 1.0)


def dry_run(methods: Sequence[Method], frozen: FrozenBackbone) -> str:
    """How long the classifiers would take and how much memory, from ten steps of the backbone and of each group.

    A network that is trained too counts as three passes over the training images an epoch.
    """
    source, data, device = frozen.source, frozen.data, frozen.source.device
    model, (images, labels) = for_evaluation(source.model), next(iter(eval_batches(data, data.test, device).epoch()))

    of_batch = step_seconds(lambda number: [features_of(model, images) for _ in range(number)], device)
    of_image = of_batch / len(images)
    features, steps, epochs = features_of(model, images), 0.0, 0
    for stream, group in by_stream(methods).items():
        trained = [method for method in group if isinstance(method, Trained)]
        heads = [frozen.trainable_head(method) for method in trained if method.scope == "fc"]
        if stream is None:
            continue
        epochs += stream.epochs * (len(trained) - len(heads))
        if heads:
            size = min(stream.batch_size, len(data.train))
            rows = torch.arange(size, device=device) % len(features)
            batch, solver = (features[rows].float(), labels[rows]), Solver(heads)
            of_step = step_seconds(partial(solver_steps, solver, batch), device)
            steps += of_step * stream.epochs * -(-len(data.train) // stream.batch_size)
    arrays, lacking = source.arrays(cached_streams(methods))
    sides = 2 if source.flip else 1
    looked_at = lacking * len(data.train) + sides * (len(data.test) + (len(data.val) if data.val else 0))
    passes = of_image * (looked_at + 3 * epochs * len(data.train))
    disk = f"{lacking * source.array_bytes / 1e6:,.0f} MB in {source.cache_dir}"
    return (
        f"dry run: about {duration(passes + steps)} for {counted(len(methods), 'classifier')}, "
        f"{peak_memory(device)}, {disk}; "
        f"the backbone takes {duration(passes)} ({step_time(of_image)} an image, {lacking} of {arrays} passes over "
        f"the training images), the classifiers {duration(steps)}. No run was made."
    )
