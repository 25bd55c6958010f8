"""Readers of the original data sets, and what is known of each: statistics, augmentation, recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor

from datasets.batches import Augment
from utils.options import UsageError


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: images (N, c, H, W) uint8, labels (N,) int64, indices (N,) int64 (positions in the source)."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Tensor) -> ImageSet:
        """The images at these positions (n,) int64."""
        return ImageSet(self.images[positions], self.labels[positions], self.indices[positions])


Read = Callable[[str], tuple[ImageSet, ImageSet, list[str]]]


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set.

    Attributes:
        name: its --dataset name.
        read: data_dir -> balanced (training set, test set, class names).
        mean, std: per-channel normalisation constants of pixels in [0, 1].
        augment: the training augmentation.
        embedded: whether it comes with the installation, so that no folder is read.
        recipe: option values that suit it, where they differ from the published CIFAR-100-LT ones (every script's
            defaults). Typed flags win over it.
    """

    name: str
    read: Read
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    embedded: bool = False
    recipe: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _image_set(images: Tensor, labels: Any) -> ImageSet:
    return ImageSet(images.contiguous(), torch.as_tensor(labels, dtype=torch.int64), torch.arange(len(images)))


def _read_cifar(reader: type[torchvision.datasets.CIFAR10], data_dir: str) -> tuple[ImageSet, ImageSet, list[str]]:
    # The LOS layout, data/cifar100/cifar-100-python, is found too.
    nested = Path(data_dir, reader.__name__.lower())
    root = nested if (nested / reader.base_folder).is_dir() else Path(data_dir)
    try:
        train, test = (reader(root=str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data_dir {data_dir}: {reader.base_folder} is missing or damaged, and could not be downloaded ({error})",
            f"put the unpacked folder {reader.base_folder}, or {reader.filename} "
            f"(from https://www.cs.toronto.edu/~kriz/cifar.html), into {data_dir}",
        ) from None
    sets = [_image_set(torch.from_numpy(part.data).permute(0, 3, 1, 2), part.targets) for part in (train, test)]
    return sets[0], sets[1], list(train.classes)


def read_cifar10(data_dir: str) -> tuple[ImageSet, ImageSet, list[str]]:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32x32, downloaded and checked by torchvision."""
    return _read_cifar(torchvision.datasets.CIFAR10, data_dir)


def read_cifar100(data_dir: str) -> tuple[ImageSet, ImageSet, list[str]]:
    """CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32x32, downloaded and checked by torchvision."""
    return _read_cifar(torchvision.datasets.CIFAR100, data_dir)


def read_digits(data_dir: str) -> tuple[ImageSet, ImageSet, list[str]]:
    """UCI handwritten digits inside scikit-learn: 1,797 grey images of 8x8; ``data_dir`` is not used.

    Test: the last 50 images of every class in file order. Training: the rest, at least 124 of every class.
    """
    from sklearn.datasets import load_digits  # here, since it is slow to import and only these need it

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]  # grey levels 0..16
    labels = torch.from_numpy(digits.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[torch.nonzero(labels == label).flatten()[-50:]] = True
    whole = _image_set(pixels, labels)
    train, test = (whole.take(torch.nonzero(part).flatten()) for part in (~is_test, is_test))
    return train, test, [str(label) for label in range(10)]


# Label Over-Smooth and Weight Balancing normalise CIFAR-100 with CIFAR-10's constants, so both do here.
_CIFAR = {
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "augment": Augment(pad=4, flip=True),
}

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec("cifar100", read_cifar100, **_CIFAR),  # type: ignore[arg-type]
        DatasetSpec("cifar10", read_cifar10, **_CIFAR),  # type: ignore[arg-type]
        DatasetSpec(
            "digits",
            read_digits,
            mean=(0.3058,),
            std=(0.3753,),
            augment=Augment(pad=1, flip=False),  # mirrored digits are other characters
            embedded=True,
            recipe={
                "network": "resnet8",
                "epochs": 60,
                "lr": 0.05,
                "batch_size": 64,
                # Chosen on a development split of the training pool by benchmarks/digits_recipe.py.
                "finetune_epoch": 40,
                "finetune_lr": 0.02,
                "flip_tta": False,
            },
        ),
    )
}
