"""Data sets made long-tailed. ``DATASETS`` maps a --dataset name to what is known of it; :func:`load` splits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from datasets.augment import AUGMENTATIONS, Mix
from datasets.batches import Augment, Batches
from datasets.geometry import FITS
from datasets.longtail import IMB_TYPES, SUBSETS, choose_subset, class_sizes, hold_out
from datasets.photos import INPUTS, ResizedCrop
from datasets.readers import DATASETS, known_class_names
from datasets.samplers import SAMPLERS
from datasets.spec import DEFAULT_IMAGE_OPTIONS, NATURAL, DatasetSpec, ImageOptions, ImageSet, Natural
from utils.errors import UsageError

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "IMB_TYPES",
    "INPUTS",
    "NATURAL",
    "Natural",
    "FITS",
    "SAMPLERS",
    "known_class_names",
    "SUBSETS",
    "Augment",
    "Batches",
    "DatasetSpec",
    "ImageSet",
    "LongTailed",
    "Mix",
    "ResizedCrop",
    "ImageOptions",
    "load",
]


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set with its balanced test set.

    ``val`` are held-out images: the data set's own, or taken from the training set. ``class_counts`` (C,) are those of
    the long-tailed set before a validation split is held out of it: they define many/medium/few, so that the groups
    are the benchmark's whatever was held out.
    """

    spec: DatasetSpec
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    class_names: list[str]
    class_counts: list[int]

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)

    @property
    def channels(self) -> int:
        return self.train.channels

    @property
    def trained_counts(self) -> list[int]:
        """(C,) images that are trained on: without those held out."""
        counts: list[int] = torch.bincount(self.train.labels, minlength=self.num_classes).tolist()
        return counts

    def describe(self) -> str:
        """One line: images per split, classes, the largest and the smallest class."""
        val = "" if self.val is None else f", {len(self.val):,} held out for validation"
        counts, what = self.trained_counts, f"rows of {self.channels:,}" if self.train.is_rows else "images"
        return (
            f"{self.spec.name}: {len(self.train):,} training {what}{val}, {len(self.test):,} test {what.split()[0]}, "
            f"{self.num_classes} classes of {max(counts):,} to {min(counts):,} training {what.split()[0]}"
        )


def load(
    name: str,
    data_dir: str,
    *,
    image_options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    imb_type: str = "exp",
    imb_ratio: float | str = 100,
    subset: str = "first",
    subset_seed: int = 0,
    val_fraction: float = 0.0,
    val_seed: int = 0,
    val_indices: list[int] | None = None,
) -> LongTailed:
    """Reads a data set and makes its training set long-tailed; the test set stays as it is.

    Args:
        name: key of ``DATASETS``.
        data_dir: folder that holds the data, or receives the download.
        image_options: what a command says of its images, where the data set leaves it open.
        imb_type, imb_ratio: see :func:`datasets.longtail.class_sizes`; ratio ``natural`` takes all images.
        subset, subset_seed: which images of a class, see :func:`datasets.longtail.choose_subset`.
        val_fraction, val_seed: share of every class to hold out, see :func:`datasets.longtail.hold_out`; 0 for none.
        val_indices: an earlier run's held-out images instead, as positions in the source file.

    Raises:
        UsageError: the data is not there and cannot be had, or a class would be left without an image.
    """
    spec = DATASETS[name]
    source = spec.read(data_dir, image_options)
    full, class_names, val = source.train, source.class_names, source.val
    augment = source.augment or spec.augment
    if image_options.flip is not None:
        augment = replace(augment, flip=image_options.flip)
    if image_options.jitter is not None:
        if not isinstance(augment, ResizedCrop):
            raise UsageError(
                f"--jitter {image_options.jitter}: small images are cropped and mirrored alone", "without it"
            )
        augment = replace(augment, jitter=image_options.jitter)
    spec = replace(
        spec,
        mean=source.mean or spec.mean,
        std=source.std or spec.std,
        augment=augment,
        levels=source.levels,
        listing=source.listing,
        test_files=source.test_files,
    )
    available = torch.bincount(full.labels, minlength=len(class_names)).tolist()
    counts, n_max = available, min(available)
    if not isinstance(imb_ratio, str):
        counts = class_sizes(n_max, len(class_names), imb_ratio, imb_type)
    if min(counts) < 1:
        raise UsageError(f"--imb_ratio {imb_ratio} leaves a class of {name} with no image", f"1 to {n_max}")
    chosen = choose_subset(full.labels, counts, subset, subset_seed)
    if val is not None:  # published, or laid out beside the others
        if val_fraction:
            raise UsageError(f"--val_split {val_fraction}: {name} has held-out images of its own", "without it")
        return LongTailed(spec, full.take(chosen), val, source.test, class_names, counts)

    if val_indices is not None:
        held_out = torch.isin(full.indices[chosen], torch.tensor(val_indices, dtype=torch.int64))
        if int(held_out.sum()) != len(val_indices):
            raise UsageError(
                "the checkpoint's validation images are not in this long-tailed set",
                "the data set and subset that the checkpoint was trained on",
            )
    else:
        held_out = hold_out(full.labels[chosen], val_fraction, val_seed)
    val = full.take(chosen[held_out]) if held_out.any() else None
    return LongTailed(spec, full.take(chosen[~held_out]), val, source.test, class_names, counts)
