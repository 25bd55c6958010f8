"""Readers of the original data sets, and what is known of each: statistics, augmentation, recipes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from datasets.batches import Augment
from datasets.features import read_features
from datasets.files import Manifest
from datasets.listed import read_listed
from datasets.own import identity_of, read_files, read_npz, suited
from datasets.photos import ResizedCrop
from datasets.spec import DatasetSpec, ImageOptions, ImageSet, Recipe, Source
from utils.errors import UsageError
from utils.readers import read_json

DIGITS = [str(label) for label in range(10)]


def _read_cifar(name: str, data_dir: str) -> Source:
    import torchvision.datasets  # here, since it is slow to import

    reader = getattr(torchvision.datasets, name)
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
    sets = [ImageSet.of(torch.from_numpy(part.data).permute(0, 3, 1, 2), part.targets) for part in (train, test)]
    return Source(sets[0], sets[1], list(train.classes))


def read_cifar10(data_dir: str, image_options: ImageOptions) -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32x32, downloaded and checked by torchvision."""
    return _read_cifar("CIFAR10", data_dir)


def read_cifar100(data_dir: str, image_options: ImageOptions) -> Source:
    """CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32x32, downloaded and checked by torchvision."""
    return _read_cifar("CIFAR100", data_dir)


def known_class_names(name: str, data_dir: str, image_options: ImageOptions) -> list[str]:
    """The class names of a data set, found without its images: [] of one with published lists that is not prepared.

    Raises:
        UsageError: data of one's own are not laid out so.
    """
    if DATASETS[name].own:
        return identity_of(name, data_dir, image_options)[0]
    if DATASETS[name].photos:
        manifest = Manifest.load(Path(data_dir, name, "manifest.npz"))
        return manifest.class_names if manifest else []
    names = read_json(Path(__file__).with_name("class_names.json"))
    assert isinstance(names, dict)
    return list(names.get(name, DIGITS))


def read_digits(data_dir: str, image_options: ImageOptions) -> Source:
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
    whole = ImageSet.of(pixels, labels)
    train, test = (whole.take(torch.nonzero(part).flatten()) for part in (~is_test, is_test))
    return Source(train, test, DIGITS)


# Label Over-Smooth and Weight Balancing normalise CIFAR-100 with CIFAR-10's constants, so both do here.
_CIFAR = {
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "augment": Augment(pad=4, flip=True),
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "natural": True, "photos": True}
_OWN = {"mean": (), "std": (), "augment": ResizedCrop(), "own": True, "photos": True}
#: Stage 2 on photos, where nothing was published for Label Over-Smooth: this project's choice, but for the epochs of
#: Decoupling's cRT. Methods' learning rates follow the batch size; label_smooth stays auto.
_STAGE2: Recipe = {"finetune_epoch": 10, "views": 4, "feature_dtype": "float16", "flip_tta": False}
#: Decoupling (Kang et al., ICLR 2020; its configurations) on ImageNet-LT.
_DECOUPLING: Recipe = {"network": "resnext50_32x4d", "epochs": 90, "lr": 0.2, "batch_size": 512, "wd": 5e-4, **_STAGE2}

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
            recipes={
                "default": {
                    "network": "resnet8",
                    "epochs": 60,
                    "lr": 0.05,
                    "batch_size": 64,
                    # Chosen on a development split of the training pool by benchmarks/digits_recipe.py.
                    "finetune_epoch": 40,
                    "finetune_lr": 0.02,
                    "flip_tta": False,
                }
            },
        ),
        DatasetSpec(
            "imagenet_lt",
            partial(read_listed, "imagenet_lt"),
            augment=ResizedCrop(),
            published={"select": "best_val"},
            recipes={
                "decoupling": _DECOUPLING,
                # Alshammari et al., CVPR 2022, section 4.1; the weight decay they tuned is not published.
                "weight-balancing": {**_DECOUPLING, "epochs": 200, "lr": 0.01, "batch_size": 64, "jitter": 0.0},
            },
            **_IMAGENET,  # type: ignore[arg-type]
        ),
        DatasetSpec(
            "places_lt",
            partial(read_listed, "places_lt"),
            augment=ResizedCrop(),
            published={"select": "best_val"},
            recipes={
                "decoupling": {
                    **_DECOUPLING,
                    "network": "resnet152",
                    "pretrained_pth": "imagenet",
                    "train_scope": "last_block",
                    "epochs": 30,
                    "lr": 0.1,
                    "batch_size": 256,
                }
            },
            **_IMAGENET,  # type: ignore[arg-type]
        ),
        DatasetSpec(
            "inat2018",
            partial(read_listed, "inat2018"),
            augment=ResizedCrop(jitter=0),
            recipes={
                "decoupling": {**_DECOUPLING, "network": "resnet50", "wd": 1e-4, "finetune_epoch": 30},
                "weight-balancing": {
                    **_DECOUPLING,
                    "network": "resnet50",
                    "wd": 1e-4,
                    "epochs": 200,
                    "lr": 0.01,
                },
            },
            **_IMAGENET | {"mean": (0.466, 0.471, 0.380), "std": (0.195, 0.194, 0.192)},  # type: ignore[arg-type]
        ),
        DatasetSpec("folder", partial(read_files, "folder"), suited=partial(suited, "folder"), **_OWN),  # type: ignore[arg-type]
        DatasetSpec("csv", partial(read_files, "csv"), suited=partial(suited, "csv"), **_OWN),  # type: ignore[arg-type]
        DatasetSpec(
            "features",
            read_features,
            mean=(),
            std=(),
            augment=Augment(pad=0, flip=False),
            own=True,
            rows=True,
            recipes={"default": {"network": "features"}},
            published={"flip_tta": False, "features": "views"},
        ),
        DatasetSpec("npz", read_npz, suited=partial(suited, "npz"), **_OWN),  # type: ignore[arg-type]
    )
}
