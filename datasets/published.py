"""The published long-tailed sets of photos: whose lists, which archives, where their files may lie, how many images.

``PUBLISHED`` maps a DATASET of ``python -m datasets.prepare`` to what is known of it; ``class_counts.json`` holds the
published images per class.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.files import Listing
from utils.errors import UsageError
from utils.readers import Unreadable, parse_json, read_bytes, read_json
from utils.types import Json

CLASS_COUNTS = Path(__file__).with_name("class_counts.json")
#: Listed paths that are tried in every layout, from all over the list.
TRIED = 20

#: Reads a file that may be needed for class names; None where there is none.
Find = Callable[[str], Path | None]


@dataclass(frozen=True)
class Published:
    """A published data set.

    A layout is where an image may lie, written with the last parts of its listed path: {group}/{folder}/{file};
    {nested} is the folder with "/" for "-". A file's archive and layouts are looked up by the first part of its path.

    Attributes:
        lists: split -> file names of its list, the first that is there is read.
        authors: who offers the lists.
        archives: the archives with the images and who offers them.
        layouts: where images may lie.
        fronts: folders that may come before every layout.
        names: (folder of each class, finder of files) -> class names.
    """

    lists: dict[str, tuple[str, ...]]
    authors: str
    archives: dict[str, str]
    layouts: dict[str, tuple[str, ...]]
    fronts: tuple[str, ...]
    names: Callable[[list[str], Find], list[str]]

    def describe(self) -> str:
        """What to get, and from whom, in one line."""
        files = ", ".join(" or ".join(names) for names in self.lists.values())
        return f"images: {'; '.join(dict.fromkeys(self.archives.values()))}. Lists: {files} from {self.authors}"


def read_published(name: str, root: Path, folder: Path, any_counts: bool) -> Listing:
    """A published data set's lists with paths as they are under ``root``.

    Args:
        name: key of ``PUBLISHED``.
        root: folder with the images.
        folder: where lists are looked for first; ``root`` is next.
        any_counts: take lists of other than the published numbers of images.

    Raises:
        UsageError: lists or images are not there; the lists contradict the published counts or each other.
    """
    source = PUBLISHED[name]

    def find(file: str) -> Path | None:
        return next((path for path in (folder / file, root / file) if path.is_file()), None)

    files = {split: next(filter(None, map(find, names)), None) for split, names in source.lists.items()}
    missing = [" or ".join(source.lists[split]) for split, file in files.items() if file is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: neither in {folder} nor in {root}", source.describe())
    listed = {split: read_list(file) for split, file in files.items() if file is not None}

    labels = {split: labels for split, (_, labels) in listed.items()}
    differs = difference(name, labels)
    if differs and not any_counts:
        allowed = f"the lists of {source.authors}; for a trial on a part of the data, --any_counts"
        raise UsageError(differs, allowed)
    folders = class_folders(listed)

    splits, layouts, origins = {}, {}, {}
    for split, (paths, _) in listed.items():
        part = paths[0].split("/")[0]
        if part not in source.layouts:
            raise UsageError(f"{files[split]}: {paths[0]}", f"paths that begin with {' or '.join(source.layouts)}")
        origins[split] = source.archives[part]
        candidates = [front + layout for front in source.fronts for layout in source.layouts[part]]
        layouts[split] = find_layout(root, paths, candidates, origins[split])
        splits[split] = ([place(path, layouts[split]) for path in paths], labels[split])
    about = {
        "counts": "other" if differs else "published",
        "lists": {split: {"file": str(files[split]), "sha256": digest(*listed[split])} for split in listed},
        "layouts": layouts,
    }
    return Listing(splits, source.names(folders, find), origins, about)


def read_list(file: Path) -> tuple[list[str], Tensor]:
    """Paths (N,) and labels (N,) int64 of a list: lines of "path label", or a .json in COCO's form.

    Raises:
        UsageError: it cannot be read, or a line is something else.
    """
    try:
        text = read_bytes(file).decode("utf-8")
        if file.suffix == ".json":
            content = parse_json(text)
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            pairs = [(names[entry["image_id"]], str(entry["category_id"])) for entry in content["annotations"]]
        else:
            lines = [line.strip().rpartition(" ") for line in text.splitlines() if line.strip()]
            pairs = [(path, label) for path, _, label in lines]
    except (Unreadable, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read ({error!r})", "an undamaged list of images") from None
    for number, (path, label) in enumerate(pairs, 1):
        if path.count("/") < 2 or not re.fullmatch(r"\d{1,6}", label):
            raise UsageError(f"{file}, image {number}: {path} {label}", "a path split/class/image and a label")
    if not pairs:
        raise UsageError(f"{file} is empty", "a list of images")
    paths, labels = zip(*pairs)
    return list(paths), torch.tensor([int(label) for label in labels])


def difference(name: str, labels: dict[str, Tensor]) -> str | None:
    """The first class whose number of images is not the published one, in words; None where all are."""
    for split, published in read_json(CLASS_COUNTS)[name].items():
        if isinstance(published, int):
            published = [published] * num_classes(name)
        counts = torch.bincount(labels[split], minlength=len(published)).tolist()
        published += [0] * (len(counts) - len(published))
        for label, (count, expected) in enumerate(zip(counts, published)):
            if count != expected:
                return f"class {label} has {count} images in the {split} list, published are {expected}"
    return None


def num_classes(name: str) -> int:
    """The number of classes of a published data set."""
    return len(read_json(CLASS_COUNTS)[name]["train"])


def class_folders(listed: dict[str, tuple[list[str], Tensor]]) -> list[str]:
    """The folder of each class (C,), which is the last but one part of its images' paths.

    Raises:
        UsageError: a class has images of two folders, a folder those of two classes, or a class none at all.
    """
    label_of: dict[str, int] = {}
    folder_of: dict[int, str] = {}
    for paths, labels in listed.values():
        for path, label in zip(paths, labels.tolist()):
            folder = path.split("/")[-2]
            if label_of.setdefault(folder, label) != label or folder_of.setdefault(label, folder) != folder:
                raise UsageError(f"the lists give {path} label {label}", "one folder a class, one class a folder")
    absent = next((label for label in range(len(folder_of)) if label not in folder_of), None)
    if absent is not None:
        raise UsageError(f"the lists have no image of class {absent}", f"labels from 0 to {max(folder_of)}")
    return [folder_of[label] for label in range(len(folder_of))]


def place(path: str, layout: str) -> str:
    """Where the image of a listed path lies in a layout, see :class:`Published`."""
    group, folder, file = path.split("/")[-3:]
    return layout.format(group=group, folder=folder, file=file, nested=folder.replace("-", "/"))


def find_layout(root: Path, paths: Sequence[str], layouts: Sequence[str], origin: str) -> str:
    """The layout in which most of some listed images are found.

    Raises:
        UsageError: none of them is, in any.
    """
    tried = paths[:: -(-len(paths) // TRIED)]
    found = {layout: sum(os.path.isfile(root / place(path, layout)) for path in tried) for layout in layouts}
    best = max(layouts, key=found.__getitem__)  # the first of the best
    if not found[best]:
        raise UsageError(
            f"{root}: {tried[0]} is not there, nor are {len(tried) - 1} more that were looked for",
            f"images of {origin}, under --root as one of {', '.join(layouts)}",
        )
    return best


def digest(paths: Sequence[str], labels: Tensor) -> str:
    """The SHA-256 of a list, which is its file's where that has lines of "path label", each with a line feed."""
    lines = (f"{path} {label}\n" for path, label in zip(paths, labels.tolist()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _imagenet_names(folders: list[str], find: Find) -> list[str]:
    """torchvision's names, which are in the order of the folders; of a part of the classes, the folders."""
    from torchvision.models import ResNet50_Weights  # here, since it is slow to import

    names: list[str] = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    name_of = dict(zip(sorted(folders), names)) if len(folders) == len(names) else {}
    return _unique([name_of.get(folder, folder) for folder in folders], folders)


def _places_names(folders: list[str], find: Find) -> list[str]:
    return folders


def _inat_names(folders: list[str], find: Find) -> list[str]:
    """The species of categories.json; train2018.json, the next best, has its names obfuscated."""
    for file in filter(None, map(find, ("categories.json", "train2018.json"))):
        try:
            content: Json = read_json(file)
            entries = content["categories"] if isinstance(content, dict) else content
            name_of = {int(entry["id"]): str(entry["name"]) for entry in entries}
        except (Unreadable, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} cannot be read ({error!r})", "a list of categories with id and name") from None
        return _unique([name_of.get(label, folder) for label, folder in enumerate(folders)], folders)
    return folders


def _unique(names: list[str], folders: list[str]) -> list[str]:
    """One line each; names that occur twice are followed by their folder."""
    names = [" ".join(name.split()) for name in names]
    times = Counter(names)
    return [f"{name} ({folder})" if times[name] > 1 else name for name, folder in zip(names, folders)]


_LIU = (
    "Liu et al. (github.com/zhmiao/OpenLongTailRecognition-OLTR, also in "
    "github.com/facebookresearch/classifier-balancing under data/)"
)
_ILSVRC = "of ILSVRC2012 (image-net.org, after registration)"
_PLACES = (
    "places365standard_easyformat.tar of Places365-Standard (places2.csail.mit.edu), or there train_256_ or "
    "train_large_places365standard.tar with val_256.tar or val_large.tar"
)
_INAT = "github.com/visipedia/inat_comp/tree/master/2018"
_INAT_IMAGES = f"train_val2018.tar.gz of iNaturalist 2018 ({_INAT})"

PUBLISHED: dict[str, Published] = {
    "imagenet_lt": Published(
        lists={split: (f"ImageNet_LT_{split}.txt",) for split in ("train", "val", "test")},
        authors=_LIU,
        archives={
            "train": f"ILSVRC2012_img_train.tar {_ILSVRC}, and the archive of each class inside",
            "val": f"ILSVRC2012_img_val.tar {_ILSVRC}",
        },
        layouts={
            "train": ("train/{folder}/{file}", "ILSVRC2012_img_train/{folder}/{file}"),
            "val": ("val/{folder}/{file}", "val/{file}", "ILSVRC2012_img_val/{file}"),
        },
        fronts=("", "ILSVRC2012/", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/"),
        names=_imagenet_names,
    ),
    "places_lt": Published(
        lists={split: (f"Places_LT_{split}.txt",) for split in ("train", "val", "test")},
        authors=_LIU,
        archives=dict.fromkeys(("train", "val"), _PLACES),
        layouts={
            # The _standard ones are torchvision's.
            "train": (
                "train/{folder}/{file}",
                *(
                    f"{data}/{{folder[0]}}/{{nested}}/{{file}}"
                    for data in ("data_256", "data_256_standard", "data_large", "data_large_standard")
                ),
            ),
            "val": ("val/{folder}/{file}", "val_256/{file}", "val_large/{file}", "val/{file}", "Places365_val/{file}"),
        },
        fronts=("", "places365_standard/"),
        names=_places_names,
    ),
    "inat2018": Published(
        lists={  # the competition's validation images are what is tested on; there is no other split
            "train": ("iNaturalist18_train.txt", "train2018.json"),
            "test": ("iNaturalist18_val.txt", "val2018.json"),
        },
        authors=f"Kang et al. (github.com/facebookresearch/classifier-balancing under data/), or as .json from {_INAT}",
        archives={"train_val2018": _INAT_IMAGES},
        layouts={"train_val2018": ("train_val2018/{group}/{folder}/{file}", "{group}/{folder}/{file}")},
        fronts=("",),
        names=_inat_names,
    ),
}
