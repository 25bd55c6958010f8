"""What a data set is: its splits, and what is known of it before it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from datasets.batches import Augment
from datasets.photos import Photos, ResizedCrop
from datasets.rows import Rows
from utils.options import Value
from utils.readers import read_bytes

#: --imb_ratio of a training set that is taken as it is.
Natural = Literal["natural"]
NATURAL: Natural = "natural"


#: Where what was found of a data set's files is kept; it may be deleted.
CACHE = Path("cache", "images")
SPLITS = ("train", "val", "test")
#: Files that :meth:`ImageSet.sample` looks at.
SAMPLED = 256


@dataclass(frozen=True)
class ImageSet:
    """A split: images, labels (N,) int64, indices (N,) int64 (positions in the source).

    The images are (N, c, H, W) uint8 in memory, photos that are decoded when they are wanted, or rows of features.
    ``groups`` (N,) int64, positions in ``group_names``, say what each came from, where that is known. ``views`` are
    other rows of features of each.
    """

    images: Tensor | Photos | Rows
    labels: Tensor
    indices: Tensor
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    views: tuple[Rows, ...] = ()

    @classmethod
    def of(cls, images: Tensor | Photos, labels: Tensor | Sequence[int]) -> ImageSet:
        """All images of a source, in its order."""
        images = images.contiguous() if isinstance(images, Tensor) else images
        return cls(images, torch.as_tensor(labels, dtype=torch.int64), torch.arange(len(images)))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.images.channels if isinstance(self.images, Photos) else self.images.shape[1]

    @property
    def is_rows(self) -> bool:
        return isinstance(self.images, Rows)

    @property
    def is_photos(self) -> bool:
        return isinstance(self.images, Photos)

    @property
    def read(self) -> str:
        """Where the pixels come from, in words."""
        return self.images.read if isinstance(self.images, Photos) else "memory"

    @property
    def side(self) -> int:
        """The larger side of what networks see, in pixels."""
        return self.images.size if isinstance(self.images, Photos) else max(self.images.shape[2:], default=1)

    def take(self, positions: Tensor) -> ImageSet:
        """The images at these positions (n,) int64."""
        groups = None if self.groups is None else self.groups[positions]
        views = tuple(view[positions] for view in self.views)
        own = self.images[positions], self.labels[positions], self.indices[positions]
        return ImageSet(*own, groups, self.group_names, views)

    def summary(self) -> str:
        """A hash of what the images are, wherever they lie: of pixels in memory, of photos their names and sizes."""
        if not isinstance(self.images, Photos):
            return self.fingerprint()
        names = "\n".join(self.images.paths).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.images.sizes.numpy().tobytes()).hexdigest()

    def sample(self) -> str:
        """A hash of up to 256 files of photos, evenly spread; "" of images in memory, which :meth:`summary` knows."""
        if not isinstance(self.images, Photos) or not self.images.paths:
            return ""
        digest = hashlib.sha256()
        for position in range(0, len(self), max(1, len(self) // SAMPLED)):
            digest.update(read_bytes(self.images.path(position)))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash that changes with images or labels."""
        if not isinstance(self.images, Tensor):
            own = " ".join(part.fingerprint() for part in (self.images, *self.views))
            return own if self.is_photos else f"{own} {hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()}"
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageOptions:
    """What a command says of its images, where a data set leaves it open; None where the data set is to choose.

    Attributes:
        image_size: side in pixels that networks see.
        mean, std: per-channel normalisation constants of pixels in [0, 1].
        jitter, flip: of the training augmentation.
        how: one of :data:`datasets.photos.INPUTS`.
        workers: processes that decode.
        levels: of 16-bit grey images, the values that become black and white.
        fit: one of :data:`datasets.geometry.FITS`.
        class_level: of a folder of one's own, how many folders below the split's the classes are.
        test_split, test_seed: share of every class that is tested where one's own data have no test set, and its seed.
        test_files: the images of that test set, where an earlier run has drawn it.
        skip_damaged, drop_duplicates: go on without damaged files, or training images that are in other splits.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    jitter: float | None = None
    flip: bool | None = None
    how: str = "files"
    workers: int = 0
    levels: tuple[int, int] | None = None
    fit: str = "crop"
    class_level: int = 1
    test_split: float = 0.0
    test_seed: int = 0
    skip_damaged: bool = False
    drop_duplicates: bool = False
    test_files: tuple[str, ...] = ()


DEFAULT_IMAGE_OPTIONS = ImageOptions()  # nothing chosen


class Source(NamedTuple):
    """A data set as it was read. What is None is as :class:`DatasetSpec` has it; ``val`` None: there is none.

    ``listing`` is a hash of the list of files, wherever they lie, ``test_files`` are the names of a test set that was
    split off, and ``levels`` is as in :class:`ImageOptions`.
    """

    train: ImageSet
    test: ImageSet
    class_names: list[str]
    val: ImageSet | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | ResizedCrop | None = None
    levels: tuple[int, int] | None = None
    listing: str = ""
    test_files: tuple[str, ...] = ()


Recipe = Mapping[str, Value]
#: Option values that suit a data set, where they differ from the published CIFAR-100-LT ones (every script's defaults).
NO_RECIPE: Recipe = MappingProxyType({})


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set.

    Attributes:
        name: its --dataset name.
        read: (data_dir, image_options) -> its splits.
        mean, std: per-channel normalisation constants of pixels in [0, 1].
        augment: the training augmentation.
        embedded: whether it comes with the installation, so that no folder is read.
        own: whether it is the user's: anything may be in it, and its folder names it.
        rows: whether it has features in place of images, so that there is no stage 1.
        natural: whether it is long-tailed as it is, so that there is no --imb_ratio to choose.
        photos: whether its images may be files of many sizes, which --image_size, --input and --workers are for.
        recipes: {--recipe name: option values}; the first is the default. Typed flags win over it.
        published: what --protocol published takes where that differs for it.
        suited: (data_dir, image_options) -> option values that depend on the data; they come after the recipe's.
        levels, listing, test_files: see :class:`Source`.
    """

    name: str
    read: Callable[[str, ImageOptions], Source]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | ResizedCrop
    embedded: bool = False
    own: bool = False
    rows: bool = False
    natural: bool = False
    photos: bool = False
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: MappingProxyType({"default": NO_RECIPE}))
    published: Recipe = field(default_factory=lambda: NO_RECIPE)
    suited: Callable[[str, ImageOptions], Recipe] | None = None
    levels: tuple[int, int] | None = None
    listing: str = ""
    test_files: tuple[str, ...] = ()
