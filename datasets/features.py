"""Features that somebody computed with any network, in place of images: a folder of .npy files, or an .npz.

``train_features`` (N, D) float16, bfloat16, float32 or float64 and ``train_labels`` (N,) whole numbers, the same of
``test`` and perhaps ``val``; and what may be beside them:

* ``class_names`` (C,), or class_names.txt with a name in each line;
* ``test_groups`` (N,), what each row came from: a camera, a patient;
* ``train_views_0``, ``train_views_1`` ... (N, D), features of augmented views of the training images, of which epoch e
  shows number e mod V.

A .npy file is mapped into memory and may be larger than it; bfloat16 is what ml_dtypes writes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.rows import Rows
from datasets.spec import CACHE, SPLITS, ImageOptions, ImageSet, Source
from utils.errors import UsageError
from utils.files import require_writable, write_text
from utils.readers import Array, Unreadable, map_array, read_arrays, read_bytes, read_sealed, sealed

LAYOUT = (
    "a folder with train_features.npy (N, D), train_labels.npy (N,), test_features.npy and test_labels.npy, or an .npz "
    "of the same names"
)
#: Bytes of features that are looked at together.
BLOCK_BYTES = 2**26
#: The largest number of a feature: squares of larger ones do not fit into float32.
LARGEST = 1e15
PARTS = ("features", "labels", "groups")
#: Augmented views of the training images, at most.
MOST_VIEWS = 1000


def read_features(data_dir: str, image_options: ImageOptions) -> Source:
    """The data set of a folder or an .npz.

    Raises:
        UsageError: an array is missing, damaged, of another kind or length, or not finite; a class has no training row.
    """
    place = Path(data_dir)
    arrays, stamps = open_arrays(place)
    sets: dict[str, ImageSet] = {}
    for split in SPLITS:
        if split == "val" and "val_features" not in arrays:
            continue
        for part in ("features", "labels"):
            if f"{split}_{part}" not in arrays:
                raise UsageError(f"--data_dir {data_dir} has no {split}_{part}", LAYOUT)
        features = as_floats(arrays[f"{split}_features"], f"{place}: {split}_features")
        labels = as_labels(arrays[f"{split}_labels"], len(features), f"{place}: {split}_labels")
        digest = checked_digest(features, f"{place}: {split}_features", stamps.get(f"{split}_features", ""))
        every, named = torch.arange(len(features)), arrays.get(f"{split}_groups")
        what = f"{place}: {split}_groups"
        groups, origins = (None, ()) if named is None else as_groups(named, len(features), what)
        views = read_views(arrays, place, features, stamps) if split == "train" else ()
        sets[split] = ImageSet(Rows(features, every, digest), labels, every, groups, origins, views)
    widths = {split: part.channels for split, part in sets.items()}
    if len(set(widths.values())) > 1:
        words = ", ".join(f"{width:,} in {split}" for split, width in widths.items())
        raise UsageError(f"{place}: features of several lengths, {words}", "one length in all splits")
    names = class_names(arrays, place, sets["train"].labels)
    for split, images in sets.items():
        if int(images.labels.max()) >= len(names):
            raise UsageError(
                f"{place}: {split}_labels has {int(images.labels.max())}, of {len(names)} classes",
                f"whole numbers from 0 to {len(names) - 1}",
            )
    return Source(sets["train"], sets["test"], names, sets.get("val"))


def read_views(arrays: dict[str, Array], place: Path, features: Tensor, stamps: dict[str, str]) -> tuple[Rows, ...]:
    """Features of augmented views of the training images, train_views_0 (N, D) and so on, in the images' order."""
    names = [f"train_views_{number}" for number in range(MOST_VIEWS)]
    views = []
    for name in names[: next((number for number, name in enumerate(names) if name not in arrays), MOST_VIEWS)]:
        view = as_floats(arrays[name], f"{place}: {name}")
        if view.shape != features.shape:
            raise UsageError(f"{place}: {name} is {tuple(view.shape)}", f"{tuple(features.shape)}, as train_features")
        digest = checked_digest(view, f"{place}: {name}", stamps.get(name, ""))
        views.append(Rows(view, torch.arange(len(view)), digest))
    return tuple(views)


def open_arrays(place: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays that are there, {name: array}, and of those of files of their own what tells the file from another."""
    wanted = [f"{split}_{part}" for split in SPLITS for part in PARTS] + ["class_names"]
    wanted += [f"train_views_{number}" for number in range(MOST_VIEWS)]
    try:
        if place.is_file():
            return read_arrays(place, wanted, others="VU"), {}
        paths = {name: place / f"{name}.npy" for name in wanted}
        paths = {name: path for name, path in paths.items() if path.exists()}
        arrays = {name: map_array(path, others="VU") for name, path in paths.items()}
    except Unreadable as error:
        raise UsageError(f"--data_dir {place}: {error}", LAYOUT) from None
    status = {name: path.stat() for name, path in paths.items()}
    return arrays, {name: f"{paths[name].resolve()} {each.st_size} {each.st_mtime_ns}" for name, each in status.items()}


def as_floats(array: Array, what: str) -> Tensor:
    """An array (N, D) in floating point as a tensor, which shares its memory; UsageError where it is none."""
    is_bfloat16 = array.dtype.kind == "V" and array.dtype.itemsize == 2
    if array.ndim != 2 or not array.size or not (array.dtype.kind == "f" or is_bfloat16) or array.dtype.itemsize > 8:
        raise UsageError(
            f"{what} is {array.dtype} {array.shape}", "(N, D) of float16, bfloat16, float32 or float64, not empty"
        )
    if is_bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def as_labels(array: Array, rows: int, what: str) -> Tensor:
    """Labels (N,) int64, of one for each row; UsageError where they are none."""
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != rows:
        raise UsageError(f"{what} is {array.dtype} {array.shape}", f"one whole number for each of {rows:,} rows")
    if labels.min() < 0 or labels.max() >= 2**31:
        raise UsageError(f"{what} has {labels.min() if labels.min() < 0 else labels.max()}", "whole numbers from 0")
    return torch.from_numpy(labels.astype(np.int64))


def as_groups(array: Array, rows: int, what: str) -> tuple[Tensor, tuple[str, ...]]:
    """(N,) int64 positions among the groups' names, which an array (N,) of whole numbers or texts has; and these."""
    if array.ndim != 1 or array.dtype.kind not in "iuU" or len(array) != rows:
        raise UsageError(f"{what} is {array.dtype} {array.shape}", f"a number or a text for each of {rows:,} rows")
    names, places = np.unique(array, return_inverse=True)
    return torch.from_numpy(places.astype(np.int64)), tuple(map(str, names.tolist()))


def checked_digest(features: Tensor, what: str, stamp: str) -> str:
    """A hash of features (N, D), all of which are finite; what is known of a file with the same ``stamp`` is kept.

    Raises:
        UsageError: a number is not finite.
    """
    home = CACHE.parent / "features"
    kept = home / f"{hashlib.sha256(stamp.encode(errors='surrogateescape')).hexdigest()[:16]}.json" if stamp else None
    if kept is not None and kept.exists():
        try:
            found = read_sealed(kept)
        except Unreadable:
            found = None
        if isinstance(found, list) and len(found) == 2 and found[0] == stamp and isinstance(found[1], str):
            return found[1]
    digest, first = hashlib.sha256(f"{tuple(features.shape)} {features.dtype}".encode()), 0
    for block in features.split(max(1, BLOCK_BYTES // (features.element_size() * features.shape[1]))):
        bad = torch.nonzero(~(block.abs() <= LARGEST).all(dim=1)).flatten()
        if len(bad):
            raise UsageError(
                f"{what}: row {first + int(bad[0]):,} is not finite, or too large",
                f"numbers up to {LARGEST:g}",
            )
        digest.update(block.contiguous().view(torch.uint8).numpy().tobytes())
        first += len(block)
    if kept is not None:
        require_writable("the folder", home)
        write_text(kept, sealed([stamp, digest.hexdigest()]))
    return digest.hexdigest()


def class_names(arrays: dict[str, Array], place: Path, labels: Tensor) -> list[str]:
    """The names that go with training labels (N,), or numbers; each class has a training row.

    Raises:
        UsageError: a class has none, or there are two of one name, or fewer names than classes.
    """
    listed, path = arrays.get("class_names"), place / "class_names.txt"
    names = [str(number) for number in range(int(labels.max()) + 1)]
    try:
        if listed is not None:
            names = [str(name) for name in listed.flatten().tolist()]
        elif place.is_dir() and path.exists():
            names = read_bytes(path).decode("utf-8-sig").splitlines()
    except (Unreadable, UnicodeError) as error:
        raise UsageError(f"{place}: class_names: {' '.join(str(error).split())}", "names in UTF-8") from None
    names = [unicodedata.normalize("NFC", name.strip()) for name in names]
    twice = next((name for place, name in enumerate(names) if name in names[:place] or not name), None)
    if twice is not None or len(names) <= int(labels.max()) or len(names) < 2:
        problem = f"{len(names)} class names, labels up to {int(labels.max())}"
        problem = problem if twice is None else f"class_names has {twice or 'an empty name'}{' twice' if twice else ''}"
        raise UsageError(f"{place}: {problem}", "a name for every class, each another, of two classes or more")
    counts = torch.bincount(labels, minlength=len(names))
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0])
        raise UsageError(
            f"{place}: class {empty} has no training row ({names[empty]})", "classes without gaps, each trained"
        )
    return names


def identity_of_features(data_dir: str) -> tuple[list[str], str]:
    """The class names of a data set of features, and "", since no list of files is kept of it."""
    arrays, _ = open_arrays(Path(data_dir))
    if "train_labels" not in arrays:
        raise UsageError(f"--data_dir {data_dir} has no train_labels", LAYOUT)
    labels = arrays["train_labels"]
    return class_names(arrays, Path(data_dir), as_labels(labels, len(labels), f"{data_dir}: train_labels")), ""
