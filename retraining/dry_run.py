"""What stage 2 would take: some passes over the backbone and some steps of the classifiers, timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from engine import TRAINING
from retraining.forecast import image_seconds
from retraining.methods import Method, Trained
from retraining.results import FrozenBackbone
from retraining.settings import by_stream, cached_streams
from retraining.solver import Solver
from utils.console import about, counted, duration, step_time
from utils.distributed import launched
from utils.system import peak_memory, step_seconds


def solver_steps(solver: Solver, batch: tuple[Tensor, Tensor], number: int) -> None:
    """So many steps on one batch of features (B, D) and labels (B,)."""
    solver.train_epoch(repeat(batch, number), 0.0, 1.0)


def dry_run(methods: Sequence[Method], frozen: FrozenBackbone, every: int) -> str:
    """How long the classifiers would take and how much memory, from ten steps of the backbone and of each group.

    A network that is trained too counts as three passes over the training images an epoch. There are ``every`` epochs
    between evaluations. Processes share the passes that features take.
    """
    source, data, device = frozen.source, frozen.data, frozen.source.device
    of_image, steps, epochs = image_seconds(frozen), 0.0, 0
    for stream, group in by_stream(methods).items():
        trained = [method for method in group if isinstance(method, Trained)]
        heads = [frozen.trainable_head(method) for method in trained if method.scope == "fc"]
        if stream is None:
            continue
        epochs += stream.epochs * (len(trained) - len(heads))
        if heads:
            size = min(stream.batch_size, len(data.train))
            batch = torch.randn(size, source.width, device=device), data.train.labels[:size].to(device)
            of_step = step_seconds(partial(solver_steps, Solver(heads), batch), device)
            steps += of_step * stream.epochs * -(-len(data.train) // stream.batch_size)
    streams = cached_streams(methods)
    arrays, lacking = source.arrays(streams)
    looked_at = source.images_left(streams, every) / launched() + TRAINING * epochs * len(data.train)
    passes = of_image * looked_at
    disk = f"{lacking * source.array_bytes / 1e6:,.0f} MB in {source.cache_dir}"
    return (
        f"dry run: {about(passes + steps)} for {counted(len(methods), 'classifier')}, "
        f"{peak_memory(device)}, {disk}; "
        f"the backbone takes {duration(passes)} ({step_time(of_image)} an image, {lacking} of {arrays} passes over "
        f"the training images), the classifiers {duration(steps)}. No run was made."
    )
