"""Checkpoints: where they lie, what they hold, how they are written and read.

A checkpoint is a dict of plain types and tensors (``torch.load`` with ``weights_only=True`` reads it) that needs
nothing beside it: weights, network, data set, options, class counts and names, metrics with their selection rule,
parent and provenance. See :class:`Checkpoint`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.files import atomic, lock, second_name
from utils.metrics import Report
from utils.system import Provenance

FORMAT = 3  # 1 had no head: it was linear; 1 and 2 had no stem: it was small
FOLDER = Path("checkpoints")
STAGES = ("stage1", "stage2")
SELECT = ("last", "best_test", "best_val")
#: Replaced files that are kept beside a final one.
KEPT = 5
IDENTITY = ("dataset", "imb_type", "imb_ratio", "subset", "subset_seed", "image_size", "network", "stem")
#: Options that say how a run is run, and change nothing that it computes but perhaps its rounding.
HOW_IT_RUNS = (
    *("resume", "save_every", "keep_states", "print_options", "dry_run"),
    *("out", "workers", "threads", "device", "gpu", "parallel"),
)
#: Those, and where its files are: two checkpoints that differ in these options alone are the same result.
INCIDENTAL = (*HOW_IT_RUNS, "cur_stage", "data_dir", "cache_dir", "pretrained_pth")


class Data(TypedDict, total=False):
    """What a checkpoint says of the data it was trained on."""

    name: str
    dataset: str
    imb_type: str
    imb_ratio: float | str
    subset: str
    subset_seed: int
    image_size: int
    network: str
    stem: str
    train_images: str
    read: str
    class_names: list[str]
    class_counts: list[int]
    mean: list[float]
    std: list[float]
    val_indices: list[int]


class Sweep(TypedDict):
    """How many settings a run was chosen from, and on which images."""

    settings: int
    chosen_on: str


class Chosen(TypedDict, total=False):
    """How the stored weights were chosen."""

    epoch: int
    select: str
    flip_tta: bool
    sweep: Sweep


class Metrics(Report, Chosen, total=False):
    """The report on the test set, and how the weights were chosen."""


class Parent(TypedDict, total=False):
    """What a file stores of the one that training began from."""

    path: str
    sha256: str | None
    seed: object
    chosen: Chosen
    parent: Parent | None


@dataclass
class Checkpoint:
    """A finished stage.

    Attributes:
        stage: "stage1" or "stage2"; None for a file of another program.
        network, stem, num_classes, in_channels, head: what to build.
        model: its state dict, on the CPU.
        options: every option of the run that made it ({} for a file of another program).
        data: dataset, imb_type, imb_ratio, subset, subset_seed, class_names (C,), class_counts (C,), mean, std and
            val_indices (positions in the source file of the images the backbone never saw); name, which is the data
            set's, and of data of one's own its folder's too.
        metrics: the report on the test set, with epoch, select and flip_tta.
        parent: None, or what :func:`describe_parent` gives of the file that training began from.
        provenance: see :func:`utils.system.provenance`.
        path, sha256: the file it was read from and the hash of what was read; not stored.
        foreign: what a file of another program holds, in place of everything above; not stored.
    """

    stage: str | None
    network: str
    num_classes: int
    in_channels: int
    model: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    parent: Parent | None = None
    provenance: Provenance = field(default_factory=Provenance)
    head: str = "linear"
    stem: str = "small"
    path: Path | None = None
    sha256: str | None = None
    foreign: Mapping[object, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        with atomic(path) as temporary:
            self.write(temporary)

    def write(self, path: Path) -> None:
        """Writes the file as it goes."""
        content = {name: getattr(self, name) for name in _STORED}
        buffer = io.BytesIO()  # torch would write a path's name into the file, and hide why a disk refuses it
        torch.save({"format": FORMAT, **content}, buffer)
        path.write_bytes(buffer.getbuffer())


_STORED = tuple(f.name for f in dataclasses.fields(Checkpoint) if f.name not in ("path", "sha256", "foreign"))
#: What a file must hold under a field or, after a dot, inside it.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "stage": str,
    "network": str,
    "num_classes": int,
    "in_channels": int,
    "head": str,
    "stem": str,
    "model": dict,
    "options": dict,
    "data": dict,
    "data.dataset": str,
    "data.imb_type": str,
    "data.imb_ratio": (int, float, str),
    "data.subset": str,
    "data.subset_seed": int,
    "data.class_names": list,
    "data.class_counts": list,
    "data.mean": list,
    "data.std": list,
    "data.val_indices": list,
    "metrics": dict,
    "metrics.epoch": int,
    "metrics.select": str,
    "metrics.flip_tta": bool,
    "metrics.top1": float,
    "metrics.per_class": list,
    "parent": (dict, type(None)),
    "provenance": dict,
}


class _Dropped:
    """Stands in for an object that is no weight: takes anything, keeps nothing."""

    def __init__(self, *anything: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


#: Plain data that other programs store beside their weights (accuracies, arguments). None of it is built: where a file
#: names one of these, the stand-in is called in its place.
_PLAIN = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
)
#: Keeps the tensors of whatever a file holds; for the user to run, where the classes in the file can be imported.
_CONVERT = (
    "import sys, torch; t = lambda x: t(x.state_dict()) if hasattr(x, 'state_dict') else "
    "{k: t(v) for k, v in x.items()} if isinstance(x, dict) else x if isinstance(x, torch.Tensor) else None; "
    "torch.save(t(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])"
)


class NoCheckpoint(UsageError):
    """No file at a default path."""


def default_path(data: str, imb_type: str, imb_ratio: float | str, network: str, stage: str) -> Path:
    """Where a finished stage goes and where the next looks: checkpoints/cifar100_exp100_resnet34_stage1.pt.

    ``data`` is the data set's name, see :class:`Checkpoint`; a training set taken as it is has no imbalance type.
    """
    ratio = imb_ratio if isinstance(imb_ratio, str) else f"{imb_type}{imb_ratio}"
    return FOLDER / f"{data}_{ratio}_{network.replace(':', '-')}_{stage}.pt"


def listing() -> str:
    """What else could be read: the files of ``FOLDER``."""
    files = sorted(str(path) for path in FOLDER.glob("*.pt") if path.is_file())
    return f"another file; there are {', '.join(files)}" if files else f"another file; there are none in {FOLDER}/"


def find(
    data: str, imb_type: str, imb_ratio: float | str, network: str, stage: str, *, exact: bool, flags: str = ""
) -> Path:
    """The default path; where it is missing and not ``exact``, the only other network's file of the same run.

    ``flags`` choose the data set on a command line.

    Raises:
        NoCheckpoint: there is none (with those that exist and the command that makes it).
        UsageError: there is more than one.
    """
    wanted = default_path(data, imb_type, imb_ratio, network, stage)
    if wanted.is_file():
        return wanted
    before, after = default_path(data, imb_type, imb_ratio, "*", stage).name.split("*")
    others = sorted(FOLDER.glob(f"{before}*{after}"))
    if not exact and len(others) == 1:
        return others[0]
    if not exact and others:
        names = ", ".join(path.name.removeprefix(before).removesuffix(after) for path in others)
        raise UsageError(f"no {wanted}, and more than one other network's file", f"--network with one of {names}")
    flags += "" if imb_type == "exp" else f" --imb_type {imb_type}"
    flags += f" --network {network}" if exact else ""
    flags += "" if isinstance(imb_ratio, str) else f" --imb_ratio {imb_ratio}"
    raise NoCheckpoint(
        f"no checkpoint {wanted}",
        f"--pretrained_pth with {listing()}; or first: python main_{stage}.py{flags} --cur_stage {stage}",
    )


def read(path: str | Path) -> Checkpoint:
    """The checkpoint in a file; of another program's dict only ``foreign``, path and hash are known.

    Raises:
        UsageError: missing, not a torch file, damaged, holding pickled code, of a newer format, no dict, or with a
            field that is missing or cannot be right.
    """
    path = Path(path)
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise UsageError(f"no checkpoint {path} ({error.strerror})", listing()) from None
    file = io.BytesIO(blob)
    is_zip = zipfile.is_zipfile(file)
    try:
        if is_zip and zipfile.ZipFile(file).testzip() is not None:
            raise ValueError("a checksum of the archive does not match")
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Dropped, name) for name in _PLAIN]):
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a file that is damaged or not its own
        is_pickle = isinstance(error, pickle.UnpicklingError)
        if is_pickle and (is_zip or re.search("Unsupported (global|class)", str(error))):
            source, target = path.resolve(), path.resolve().with_suffix(".tensors.pt")
            raise UsageError(
                f"{path} holds pickled Python objects, which are not run here",
                "tensors alone. If you trust the file, convert it in the folder of the program that wrote it: "
                f'python -c "{_CONVERT}" {shlex.quote(str(source))} {shlex.quote(str(target))}',
            ) from None
        raise UsageError(f"{path} is not a PyTorch checkpoint, or is damaged", listing()) from None
    digest = hashlib.sha256(blob).hexdigest()
    if not isinstance(content, dict):
        raise UsageError(f"{path} is a checkpoint of another program: it holds no dict of weights", listing())
    if not isinstance(content.get("format"), int):
        return Checkpoint(None, "unknown", 0, 0, {}, foreign=content, path=path, sha256=digest)
    if content["format"] in (1, 2):
        content = {"head": "linear", "stem": "small"} | content
    if not set(_STORED) <= set(content):
        raise UsageError(f"{path} lacks {', '.join(sorted(set(_STORED) - set(content)))}", listing())
    for name, kind in _TYPES.items():
        field, _, key = name.partition(".")
        value = content[field].get(key) if key else content[field]
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {name} is {value!r}", listing())
    if not 1 <= content["format"] <= FORMAT:
        raise UsageError(f"{path} has format {content['format']}", f"up to {FORMAT}: update this code")
    if content["stage"] not in STAGES or content["metrics"]["select"] not in SELECT:
        raise UsageError(f"{path}: stage {content['stage']}, select {content['metrics']['select']}", listing())
    return Checkpoint(**{name: content[name] for name in _STORED}, path=path, sha256=digest)


def save_final(checkpoint: Checkpoint, path: Path, content: bytes | None = None) -> str:
    """Puts a finished stage at its final path; a file there of other options or seed is kept beside it as .prev.

    What was .prev becomes .prev2, and so on up to :data:`KEPT`; the oldest goes. So of runs that end at once, up to
    that number after each other, all are in one of the files. The new file is written first, so that a failure leaves
    the old one in its place. ``content`` is the file that the checkpoint was read from, where it is to be copied to the
    bit. Returns the line that says so.

    Raises:
        UsageError: another process holds the path's lock for longer than a minute.
        OSError: the disk refuses something.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path), atomic(path) as temporary:
        if content is None:
            checkpoint.write(temporary)
        else:
            temporary.write_bytes(content)
        if not path.is_file() or same_run(checkpoint, path):
            return f"saved {path}"
        names = [path.with_name(f"{path.name}.prev{number if number > 1 else ''}") for number in range(1, KEPT + 1)]
        if not (names[0].is_file() and path.samefile(names[0])):  # so it is where a run was killed right here
            room = next((place for place, name in enumerate(names) if not name.exists()), KEPT - 1)
            for place in range(room, 0, -1):
                os.replace(names[place - 1], names[place])
            second_name(path, names[0])
        older = f", the one before as {names[1].name}" if names[1].exists() else ""
        return f"saved {path} (it replaces a run of other options or seed, kept as {names[0]}{older})"


def same_run(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether the file at a path, if there is one, is of the same options, seed and data."""
    try:
        old = read(path)
    except UsageError:
        return False
    ours, theirs = (
        (
            {k: v for k, v in file.options.items() if k not in INCIDENTAL},
            (file.parent or {}).get("sha256"),
            [file.data.get(key) for key in ("class_names", "class_counts", "mean")],  # two folders of one name
            file.options.get("data_dir") if file.data.get("name") != file.data.get("dataset") else None,
        )
        for file in (checkpoint, old)
    )
    return ours == theirs


def describe_parent(checkpoint: Checkpoint) -> Parent:
    """What a child file stores of the file it came from: path, sha256, seed, how it was chosen, and its own parent."""
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "seed": checkpoint.options.get("seed"),
        "chosen": cast(Chosen, {k: v for k, v in checkpoint.metrics.items() if k in Chosen.__annotations__}),
        "parent": checkpoint.parent,
    }
