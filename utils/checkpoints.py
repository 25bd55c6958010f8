"""Checkpoints: where they lie, what they hold, how they are written and read.

A checkpoint is a dict of plain types and tensors (``torch.load`` with ``weights_only=True`` reads it) that needs
nothing beside it: weights, network, data set, options, class counts and names, metrics with their selection rule,
parent and provenance. See :class:`Checkpoint`.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files import atomic, sha256
from utils.options import UsageError

FORMAT = 1
FOLDER = Path("checkpoints")
STAGES = ("stage1", "stage2")
#: Options that do not change what a run computes: two files that differ in these alone are the same result.
INCIDENTAL = ("out", "data_dir", "device", "gpu", "workers", "cur_stage", "pretrained_pth")


@dataclass
class Checkpoint:
    """A finished stage.

    Attributes:
        stage: "stage1" or "stage2"; None for a bare state dict.
        network, num_classes, in_channels: what to build.
        model: its state dict, on the CPU.
        options: every option of the run that made it ({} for a bare state dict).
        data: dataset, imb_type, imb_ratio, subset, subset_seed, class_names (C,), class_counts (C,), mean, std and
            val_indices (positions in the source file of the images the backbone never saw).
        metrics: the report on the test set, with epoch, select and flip_tta.
        parent: None, or path, sha256 and seed of the stage-1 file.
        provenance: see :func:`utils.system.provenance`.
        path: the file it was read from; not stored.
    """

    stage: str | None
    network: str
    num_classes: int
    in_channels: int
    model: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        content = {name: getattr(self, name) for name in _STORED}
        with atomic(path) as temporary, open(temporary, "wb") as file:  # torch writes a path's name into the file
            torch.save({"format": FORMAT, **content}, file)


_STORED = tuple(f.name for f in dataclasses.fields(Checkpoint) if f.name != "path")


class NoCheckpoint(UsageError):
    """No file at a default path."""


def default_path(dataset: str, imb_type: str, imb_ratio: float, network: str, stage: str) -> Path:
    """Where a finished stage goes and where the next looks: checkpoints/cifar100_exp100_resnet34_stage1.pt."""
    return FOLDER / f"{dataset}_{imb_type}{imb_ratio:g}_{network}_{stage}.pt"


def _listing(folder: Path = FOLDER) -> str:
    files = sorted(str(path) for path in folder.glob("*.pt"))
    return f"there are {', '.join(files)}" if files else f"there are none in {folder}/"


def find(dataset: str, imb_type: str, imb_ratio: float, network: str, stage: str, *, exact: bool) -> Path:
    """The default path; where it is missing and not ``exact``, the only other network's file of the same run.

    Raises:
        NoCheckpoint: there is none (with those that exist and the command that makes it).
        UsageError: there is more than one.
    """
    wanted = default_path(dataset, imb_type, imb_ratio, network, stage)
    if wanted.is_file():
        return wanted
    others = sorted(FOLDER.glob(default_path(dataset, imb_type, imb_ratio, "*", stage).name))
    if not exact and len(others) == 1:
        return others[0]
    if not exact and others:
        names = ", ".join(path.name.split("_")[-2] for path in others)
        raise UsageError(f"no {wanted}, and more than one other network's file", f"--network with one of {names}")
    flags = "" if dataset == "cifar100" else f" --dataset {dataset}"
    flags += "" if imb_type == "exp" else f" --imb_type {imb_type}"
    flags += f" --network {network}" if exact else ""
    raise NoCheckpoint(
        f"no checkpoint {wanted}",
        f"--pretrained_pth with a file ({_listing()}), or first: "
        f"python main_{stage}.py{flags} --imb_ratio {imb_ratio:g} --cur_stage {stage}",
    )


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file: this project's dict, or a bare state dict {name: tensor}.

    Raises:
        UsageError: missing, not a torch file, holding pickled code, of a newer format, or neither of the two kinds.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}", f"a file ({_listing()})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UsageError(
                f"{path} holds pickled Python objects, which are not run here",
                "a state dict: in the code that wrote the file, torch.save(model.state_dict(), ...)",
            ) from None
        raise UsageError(f"{path} is not a PyTorch checkpoint", _listing()) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise UsageError(f"{path} is not a PyTorch checkpoint, or is damaged", _listing()) from None
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return dict(content)
    if not isinstance(content, dict) or not {"format", *_STORED} <= set(content):
        raise UsageError(f"{path} is a checkpoint of another program", f"a bare state dict or this one's; {_listing()}")
    if content["format"] > FORMAT:
        raise UsageError(f"{path} has format {content['format']}", f"up to {FORMAT}: update this code")
    return content


def from_content(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """A :class:`Checkpoint` of what :func:`read` returned for one of this project's files."""
    return Checkpoint(**{name: content[name] for name in _STORED}, path=path)


def publish(checkpoint: Checkpoint, path: Path) -> str:
    """Puts a finished stage at its final path; a file there of other options or seed is kept beside it as .prev.

    Returns the line that says so.
    """
    told = f"saved {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not _same_run(checkpoint, path):
        previous = path.with_name(f"{path.name}.prev")
        os.replace(path, previous)
        told += f" (it replaces a run of other options or seed, kept as {previous})"
    checkpoint.save(path)
    return told


def _same_run(checkpoint: Checkpoint, path: Path) -> bool:
    try:
        old = read(path)
    except UsageError:
        return False
    ours, theirs = (
        {k: v for k, v in options.items() if k not in INCIDENTAL}
        for options in (checkpoint.options, old.get("options", {}))
    )
    parents = [(parent or {}).get("sha256") for parent in (checkpoint.parent, old.get("parent"))]
    return ours == theirs and parents[0] == parents[1]


def describe_parent(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a child file stores of the file it came from: path, sha256, seed."""
    assert checkpoint.path is not None
    return {
        "path": str(checkpoint.path),
        "sha256": sha256(checkpoint.path),
        "seed": checkpoint.options.get("seed"),
    }
