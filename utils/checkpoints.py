"""Checkpoints: where they lie, what they hold, how they are written and read.

A checkpoint is a dict of plain types and tensors (``torch.load`` with ``weights_only=True`` reads it) that needs
nothing beside it: weights, network, data set, options, class counts and names, metrics with their selection rule,
parent and provenance. See :class:`Checkpoint`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.files import atomic, lock, second_name
from utils.metrics import FIGURES, Figure, Report
from utils.readers import MOST_NUMBERS, HoldsCode, Unreadable, parse_tensors, read_bytes
from utils.system import Provenance, free_memory

FORMAT = 4  # 1 had no head: it was linear; 1 and 2 had no stem: it was small; 1 to 3 had no checksum
FOLDER = Path("checkpoints")
STAGES = ("stage1", "stage2")
SELECT = ("last", "best_test", "best_val")
#: What a sweep's setting is chosen on, see :class:`Sweep`.
HELD_OUT, TEST_SET = "held-out images", "the TEST set"
#: Replaced files that are kept beside a final one.
KEPT = 5
IDENTITY = ("dataset", "imb_type", "imb_ratio", "subset", "subset_seed", "image_size", "network", "stem")
#: Options that say how a run is run, and change nothing that it computes but perhaps its rounding.
HOW_IT_RUNS = (
    *("resume", "save_every", "keep_states", "print_options", "dry_run", "check_cache"),
    *("out", "workers", "threads", "device", "gpu", "parallel"),
)
#: Those, and where its files are: two checkpoints that differ in these options alone are the same result.
INCIDENTAL = (*HOW_IT_RUNS, "cur_stage", "data_dir", "cache_dir", "pretrained_pth")


class Shown(TypedDict):
    """How images are shown to a pretrained network, see :class:`models.given.Preprocessing`."""

    size: int
    resize: int
    interpolation: str


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
    levels: list[int]
    fit: str
    shown: Shown
    listing: str
    test_files: list[str]
    val_indices: list[int]


class Sweep(TypedDict):
    """How many settings a run was chosen from, and on which images."""

    settings: int
    chosen_on: str


class Chosen(TypedDict, total=False):
    """How the stored weights were chosen; ``select_by`` of held-out images, where there were any."""

    epoch: int
    select: str
    select_by: Figure
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
        content["checksum"] = checksum(content)
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
#: The most classes, channels or features, and pixels a side that a file may be of.
_MOST_CLASSES, _MOST_CHANNELS, _MOST_SIDE = 1_000_000, 2**20, 1024
#: The most files after each other that a file may come from.
_MOST_PARENTS = 100


def contradictions(content: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be right in the fields of a file, the first of which is told."""
    for name, kind in _TYPES.items():
        field, _, key = name.partition(".")
        value = content[field].get(key) if key else content[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            yield f"{name} is {short(value)}"
    data, metrics, classes = content["data"], content["metrics"], content["num_classes"]
    if content["stage"] not in STAGES or metrics["select"] not in SELECT:
        yield f"stage {short(content['stage'])}, select {short(metrics['select'])}"
    if not (1 <= classes <= _MOST_CLASSES and 1 <= content["in_channels"] <= _MOST_CHANNELS):
        yield f"num_classes {classes}, in_channels {content['in_channels']}"
    names, counts = data["class_names"], data["class_counts"]
    if len(names) != classes or not all(isinstance(name, str) and _is_text(name) for name in names):
        yield f"{len(names)} class_names, num_classes {classes}"
    if len(counts) != classes or not all(type(count) is int and 0 <= count < 2**48 for count in counts):
        yield f"class_counts {short(counts)}, num_classes {classes}"
    for name, low in (("mean", -math.inf), ("std", 0.0)):
        values = data[name]
        channels = 0 if content["network"] == "features" else content["in_channels"]
        if len(values) != channels or not all(_is_number(value) and value > low for value in values):
            yield f"data.{name} {short(values)}, in_channels {content['in_channels']}"
    ratio = data["imb_ratio"]
    if not (ratio == "natural" or (_is_number(ratio) and ratio >= 1)):
        yield f"data.imb_ratio {short(ratio)}"
    if not all(type(position) is int and 0 <= position < 2**48 for position in data["val_indices"]):
        yield "data.val_indices are no positions"
    side = data.get("image_size", 32)
    if type(side) is not int or not 1 <= side <= _MOST_SIDE:
        yield f"data.image_size {short(side)}"
    levels = data.get("levels", [0, 1])
    is_pair = isinstance(levels, list) and len(levels) == 2 and all(type(value) is int for value in levels)
    if not (is_pair and 0 <= levels[0] <= levels[1] <= 65535):
        yield f"data.levels {short(levels)}"
    if not isinstance(data.get("fit", ""), str):
        yield f"data.fit {short(data['fit'])}"
    is_pretrained = content["stem"] == "pretrained"
    if ("shown" in data) != is_pretrained or (is_pretrained and not _is_shown(data["shown"])):
        yield f"data.shown {short(data.get('shown'))}, stem {short(content['stem'])}"
    if not (_is_number(metrics["top1"]) and 0 <= metrics["top1"] <= 1):
        yield f"metrics.top1 {short(metrics['top1'])}"
    if len(metrics["per_class"]) != classes or not all(
        value is None or (_is_number(value) and 0 <= value <= 1) for value in metrics["per_class"]
    ):
        yield f"metrics.per_class {short(metrics['per_class'])}, num_classes {classes}"
    for name in ("network", "stem", "data.dataset", "data.imb_type", "data.name"):  # parts of a file's name
        value = data.get(name[5:], "x") if name.startswith("data.") else content[name]
        if not (isinstance(value, str) and re.fullmatch(r"[^/\x00-\x1f]{1,200}", value)):
            yield f"{name} {short(value)}"
    if not _is_choice(metrics):
        yield f"metrics of epoch {short(metrics['epoch'])}, sweep {short(metrics.get('sweep'))}"
    temperature = metrics.get("temperature")
    if temperature is not None and not (_is_number(temperature) and 1e-6 < temperature < 1e6):
        yield f"metrics.temperature {short(temperature)}"
    for name in ("network", "stem"):
        if name in data and data[name] != content[name]:
            yield f"data.{name} {short(data[name])} beside {name} {short(content[name])}"
    for name in ("dataset", "imb_type", "imb_ratio", "subset", "subset_seed", "network"):
        stated = content["network"] if name == "network" else data[name]
        if content["options"].get(name, stated) != stated:
            yield f"options.{name} {short(content['options'][name])} where its data say {short(stated)}"
    parent, depth = content["parent"], 0
    while isinstance(parent, dict) and depth < _MOST_PARENTS:
        path = parent.get("path")
        is_path = isinstance(path, str) and _is_text(path) and "\0" not in path
        if not is_path or not isinstance(parent.get("sha256"), str | None):
            yield f"parent {short(parent)}"
        if parent.get("chosen") and not _is_choice(parent["chosen"]):
            yield f"parent's chosen {short(parent['chosen'])}"
        parent, depth = parent.get("parent"), depth + 1
    if parent is not None:
        yield f"more than {_MOST_PARENTS} parents, or a circle of them" if depth else f"parent {short(parent)}"


def _is_text(text: str) -> bool:
    """Whether a text can be written: names of files may have bytes that are no UTF-8, as surrogates."""
    try:
        return len(text.encode(errors="surrogateescape")) < 10_000
    except UnicodeEncodeError:
        return False


def _is_shown(shown: object) -> bool:
    """Whether this says how images are shown, see :class:`Shown`."""
    if not isinstance(shown, dict) or not isinstance(shown.get("interpolation"), str):
        return False
    sizes = [shown.get("size"), shown.get("resize")]
    return all(type(size) is int and 1 <= size <= 2 * _MOST_SIDE for size in sizes)


def _is_choice(chosen: object) -> bool:
    """Whether this says how weights were chosen, see :class:`Chosen`."""
    if not isinstance(chosen, dict) or type(chosen.get("epoch")) is not int or chosen.get("select") not in SELECT:
        return False
    if chosen.get("select_by", "class_mean") not in [*FIGURES]:
        return False
    sweep = chosen.get("sweep", {"settings": 1, "chosen_on": ""})
    is_sweep = (
        isinstance(sweep, dict) and type(sweep.get("settings")) is int and isinstance(sweep.get("chosen_on"), str)
    )
    return is_sweep and isinstance(chosen.get("flip_tta"), bool) and 0 <= chosen["epoch"] < 2**48


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e308 < value < 1e308


def short(value: object) -> str:
    """A value of a file in a few words."""
    text = reprlib.repr(value)
    return text if len(text) < 100 else f"{text[:97]}..."


def require_weights(model: Mapping[str, object], source: str) -> None:
    """Checks that weights are plain finite tensors.

    Raises:
        UsageError: the first that is not.
    """
    for name, value in model.items():
        problem = None
        if not isinstance(value, Tensor):
            problem = "no tensor"
        elif value.is_quantized or value.layout != torch.strided or value.device.type != "cpu":
            problem = "no plain tensor, but a sparse, quantised or empty one"
        elif value.is_complex() or (value.is_floating_point() and value.element_size() < 2):
            problem = f"of {str(value.dtype).removeprefix('torch.')}"
        elif not bool(value.isfinite().all()):
            problem = "not finite"
        elif name.endswith("running_var") and bool((value < 0).any()):
            problem = "negative"
        if problem:
            raise UsageError(f"{source}: {short(name)} is {problem}", "a file of finite weights in floating point")


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
    before, after = default_path(data, imb_type, imb_ratio, "\0", stage).name.split("\0")
    files = FOLDER.iterdir() if FOLDER.is_dir() else ()
    others = sorted(path for path in files if path.name.startswith(before) and path.name.endswith(after))
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
        blob = read_bytes(path, min(MOST_NUMBERS, free_memory(torch.device("cpu")) // 2))
    except Unreadable as error:
        raise UsageError(f"no checkpoint {path} ({error})", listing()) from None
    try:
        found = parse_tensors(blob)
    except HoldsCode:
        source, target = path.resolve(), path.resolve().with_suffix(".tensors.pt")
        raise UsageError(
            f"{path} holds pickled Python objects, which are not run here",
            "tensors alone. If you trust the file, convert it in the folder of the program that wrote it: "
            f'python -c "{_CONVERT}" {shlex.quote(str(source))} {shlex.quote(str(target))}',
        ) from None
    except Unreadable:
        raise UsageError(f"{path} is not a PyTorch checkpoint, or is damaged", earlier(path) or listing()) from None
    digest = hashlib.sha256(blob).hexdigest()
    if not isinstance(found, dict):
        raise UsageError(f"{path} is a checkpoint of another program: it holds no dict of weights", listing())
    content: dict[str, Any] = found
    if type(content.get("format")) is not int and not {"format", "stage", "num_classes"} <= content.keys():
        return Checkpoint(None, "unknown", 0, 0, {}, foreign=found, path=path, sha256=digest)
    if type(content["format"]) is not int:
        raise UsageError(f"{path} is of format {short(content['format'])}", f"1 to {FORMAT}")
    if content["format"] in (1, 2):
        content = {"head": "linear", "stem": "small"} | content
    if not 1 <= content["format"] <= FORMAT:
        raise UsageError(f"{path} has format {content['format']}", f"up to {FORMAT}: update this code")
    if not set(_STORED) <= set(content):
        raise UsageError(f"{path} lacks {', '.join(sorted(set(_STORED) - set(content)))}", listing())
    problem = not_plain(content)
    if problem:
        raise UsageError(f"{path}: {problem} holds what is no plain value", earlier(path) or listing())
    if content["format"] > 3 and content.get("checksum") != checksum(content):
        raise UsageError(f"{path} is damaged: its checksum does not match", earlier(path) or listing())
    for problem in contradictions(content):
        raise UsageError(f"{path}: {problem}", earlier(path) or listing())
    return Checkpoint(**{name: content[name] for name in _STORED}, path=path, sha256=digest)


def earlier(path: Path) -> str:
    """What to say of a damaged file: the newest whole one that it has replaced; "" where there is none."""
    for name in previous(path):
        if name.is_file():
            with suppress(UsageError):
                read(name)
                return f"an undamaged file; {name}, the one before it, is whole"
    return ""


def previous(path: Path) -> list[Path]:
    """Where the files that were replaced at a final path lie, the latest first."""
    return [path.with_name(f"{path.name}.prev{number if number > 1 else ''}") for number in range(1, KEPT + 1)]


def sibling(path: Path) -> Path:
    """Where stage 1's file lies that a stage-2 file at a default path follows."""
    return path.with_name(path.name.replace("_stage2.pt", "_stage1.pt"))


def checksum(content: Mapping[str, object]) -> str:
    """The SHA-256 of what a checkpoint holds: every weight's name, type, shape and bytes, and the rest as JSON."""
    digest = hashlib.sha256()
    model = cast(Mapping[str, Tensor], content["model"])
    with suppress(AttributeError, RuntimeError, TypeError):  # no tensors: other checks say so
        add_weights(digest, model)
    rest = {name: content[name] for name in _STORED if name != "model"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def add_weights(digest: hashlib._Hash, model: Mapping[str, Tensor]) -> None:
    """Adds every weight's name, type, shape and bytes to a hash."""
    for name, value in model.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode(errors="surrogateescape"))
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data if value.numel() else b"")


def not_plain(content: Mapping[str, object]) -> str:
    """The first field, beside the weights, that is not made of plain values as JSON has them; "" where all are."""
    for name in _STORED:
        try:
            if name != "model":
                json.dumps(content[name], sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            return name
    return ""


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
        names = previous(path)
        if not (names[0].is_file() and path.samefile(names[0])):  # so it is where a run was killed right here
            room = next((place for place, name in enumerate(names) if not name.exists()), KEPT - 1)
            for place in range(room, 0, -1):
                os.replace(names[place - 1], names[place])
            second_name(path, names[0])
        older = f", the one before as {names[1].name}" if names[1].exists() else ""
        return f"saved {path} (another run's file, with other options or seed, is kept as {names[0]}{older})"


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
