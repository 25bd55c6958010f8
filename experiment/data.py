"""The data set of a run and its batches for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import datasets
from datasets import Batches, ImageSet, LongTailed
from datasets.rows import RowBatches, Rows
from experiment.options import DataOptions, TrainOptions, image_options_of, needs_held_out
from experiment.pretrained import shown_as, shown_of
from models.given import Preprocessing
from utils.checkpoints import Checkpoint
from utils.console import counted, show
from utils.distributed import main_process_first, rank, world_size
from utils.errors import UsageError
from utils.options import Resolved

#: Images per step of an evaluation, by device; constants, so that stored and later figures agree to the last digit.
EVAL_BATCH = {"cpu": 50, "cuda": 500}


def load_data(
    options: DataOptions,
    val_fraction: float = 0.0,
    val_seed: int = 0,
    val_indices: list[int] | None = None,
    test_files: Sequence[str] = (),
    shown: Preprocessing | None = None,
) -> LongTailed:
    """The long-tailed data set of the options; the others go to :func:`datasets.load`.

    ``test_files`` are those that a checkpoint's --test_split has drawn, ``shown`` says how a pretrained network is to
    be shown the images.

    Raises:
        UsageError: also where --num_class disagrees with the data.
    """
    with main_process_first():
        data = datasets.load(
            options.dataset,
            options.data_dir,
            image_options=replace(image_options_of(options), test_files=tuple(test_files)),
            imb_type=options.imb_type,
            imb_ratio=options.imb_ratio,
            subset=options.subset,
            subset_seed=options.subset_seed,
            val_fraction=val_fraction,
            val_seed=val_seed,
            val_indices=val_indices,
        )
    data = shown_as(data, shown)
    untested = sorted(set(range(data.num_classes)) - set(data.test.labels.tolist()))
    if untested:
        some = ", ".join(data.class_names[i] for i in untested[:5]) + (" ..." if len(untested) > 5 else "")
        show(
            f"note: no test images of {counted(len(untested), 'class', 'classes')}, which count in no accuracy: {some}"
        )
    if options.num_class not in (None, data.num_classes):
        raise UsageError(f"--num_class {options.num_class}", f"{data.num_classes}, as {options.dataset} has")
    return data


def load_data_of(file: Checkpoint, options: DataOptions) -> LongTailed:
    """The data set of a checkpoint: its held-out and test images, as they are shown to its network."""
    kept = file.data
    tested, shown = kept.get("test_files", ()), shown_of(file)
    return load_data(options, val_indices=kept.get("val_indices"), test_files=tested, shown=shown)


def eval_batches(data: LongTailed, part: ImageSet, device: torch.device) -> Batches | RowBatches:
    """The plain batches of a test or validation split, of several processes each one's own."""
    size, share = EVAL_BATCH[device.type], (rank(), world_size())
    if isinstance(part.images, Rows):
        return RowBatches(part.images, part.labels, size, device, share)
    return Batches(part.images, part.labels, size, data.spec.mean, data.spec.std, device, share=share)


def require_val(data: LongTailed, resolved: Resolved[TrainOptions]) -> None:
    """Raises UsageError where something is to be chosen on held-out images and there are none."""
    for flag in needs_held_out(resolved):
        if data.val is None:
            raise UsageError(f"{flag} without held-out images", "--val_split F beside it, 0.1 for instance")
