"""Writes the features that a network makes of images, for --dataset features: stage 2 without images or a GPU.

    python extract.py --network timm:vit_small_patch14_dinov2 --dataset folder --data_dir birds/ --out birds_dinov2
    python extract.py --network timm:efficientnet_lite0 --pretrained FILE --views 5 --out cifar100_lite0
    python extract.py --from checkpoints/cifar100_exp100_resnet34_stage1.pt --views 20 --out cifar100_resnet34

The network is one of timm's, with timm's own weights, which are downloaded, or a file's, or a checkpoint's of this
project. A network of timm's is shown images as timm's data config says: size, interpolation, share of the centre, mean
and standard deviation. All training images are taken unless --imb_ratio is typed, so that stage 2 can choose.

Several processes compute a share each, and write the same files as one does:

    torchrun --nproc-per-node=4 extract.py --network timm:NAME --dataset folder --data_dir birds/ --out birds_features
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets import DATASETS, NATURAL, ImageSet, LongTailed, ResizedCrop
from datasets.batches import seeded
from engine import for_evaluation
from experiment.data import EVAL_BATCH, load_data, load_data_of
from experiment.options import (
    DataOptions,
    check_data_flags,
    checkpoint_option,
    file_defaults,
    file_identity,
    recipe_layers,
    refuse_contradictions,
)
from experiment.pretrained import OWN_WEIGHTS, for_images_of, open_pretrained, without_size
from experiment.restore import open_checkpoint, restore
from models import TIMM, Network, PretrainedNetwork
from retraining.features import DTYPES, VIEWS_STREAM, features_of, own_steps
from utils.bar import bar
from utils.command import command
from utils.console import counted, duration, write
from utils.distributed import barrier, in_turn, on_main_process, process_group, rank, world_size
from utils.errors import UsageError
from utils.files import atomic, require_room, require_writable, write_text
from utils.options import Choice, Number, Text, Values, option, parse_typed, resolve
from utils.system import pick_device, provenance
from utils.types import Json

#: What NumPy calls the numbers of a file of bfloat16, as ml_dtypes writes it.
BFLOAT16 = "|V2"


@dataclass(frozen=True)
class Options(DataOptions):
    """extract.py's own options; those of every command are in experiment/options.py."""

    pretrained_pth: str | None = checkpoint_option("a checkpoint of this project, in place of a network of timm's")
    pretrained: str | None = option(
        None,
        Text("timm, or a file"),
        "weights of --network timm:NAME; None, or timm: its own, downloaded",
        "network",
        aliases=("weights",),
        alone=OWN_WEIGHTS,
    )
    views: int = option(
        0, Number(int, 0, 1000), "augmented views of every training image, beside the image as it is", "data"
    )
    view_seed: int = option(0, Number(int, 0, 2**31 - 1), "seed of the views' crops and flips", "data")
    feature_dtype: str = option("float32", Choice(DTYPES), "how features are stored", "machine")
    out: str | None = option(None, Text("a new folder"), "where to write; needed", "files")


class Extractor(NamedTuple):
    """A network in eval mode, the data with the pixels that it is to see, and what is to be known of both."""

    network: Network
    data: LongTailed
    options: Options
    device: torch.device
    about: dict[str, object]


@command
@process_group()
def main(argv: Sequence[str]) -> Json:
    """Runs the command; returns what about.json says."""
    began = time.perf_counter()
    typed = parse_typed(Options, argv, "extract.py", __doc__)
    out = Path(str(typed.get("out", "")))
    if "out" not in typed:
        raise UsageError("--out is missing", "a new folder")
    if on_main_process(lambda: out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"--out {out} is there already", "a new folder")
    work = of_checkpoint(typed) if "pretrained_pth" in typed else of_timm(typed)
    options, data = work.options, work.data
    write(f"{data.describe()}")
    on_main_process(lambda: make_room(out, work))
    splits = {name: part for name, part in (("train", data.train), ("val", data.val), ("test", data.test)) if part}
    for name, part in splits.items():
        write_rows(out / f"{name}_features.npy", part, work)
    for view in range(options.views):
        windows = data.spec.augment.draw(len(data.train), seeded(options.view_seed, VIEWS_STREAM, view))
        write_rows(out / f"train_views_{view}.npy", data.train, work, windows)
    about: Json = {
        **work.about,
        "dataset": options.dataset,
        "imb_ratio": options.imb_ratio,
        "views": options.views,
        "view_seed": options.view_seed,
        "feature_dtype": options.feature_dtype,
        "features": work.network.num_features,
        "images": {name: len(part) for name, part in splits.items()},
        "provenance": provenance("extract.py", argv, work.device, time.perf_counter() - began),
    }
    if rank() == 0:
        for name, part in splits.items():
            np.save(out / f"{name}_labels.npy", part.labels.numpy())
        np.save(out / "class_names.npy", np.array(data.class_names))
        write_text(out / "about.json", json.dumps(about, indent=1) + "\n")
    barrier()
    spent = duration(time.perf_counter() - began)
    write(f"{out}: {counted(work.network.num_features, 'number')} of each image, in {spent}")
    held_out = "" if data.val else " --val_split 0.1"
    write(f"next: python compare.py --dataset features --data_dir {out}{held_out} --tune")
    return about


def images_of(known: Values) -> dict[str, Values]:
    """What a data set's recipe says of its images; how many views it has is for stage 2 alone."""
    layers = recipe_layers(str(known.get("dataset", "cifar100")), known)
    names = ("network", "imb_ratio", "image_size", "jitter", "flip")
    return {label: {name: layer[name] for name in names if name in layer} for label, layer in layers.items()}


def of_checkpoint(typed: Values) -> Extractor:
    """The backbone of a checkpoint of this project, which sees images as in its training."""
    for name in ("pretrained", "network", "image_size"):
        if name in typed:
            raise UsageError(f"--{name} with a checkpoint", "one of the two")
    file = open_checkpoint(typed, "stage1", Options)
    if file.stage is None or DATASETS[file.data["dataset"]].rows:
        raise UsageError(f"--from {file.path}: no checkpoint of images that this project made", "--network timm:NAME")
    stored = file_identity(file)
    refuse_contradictions(typed, stored, str(file.path))
    known = {**file_defaults(file), **stored, **typed}
    options = resolve(Options, known, images_of(known)).options
    device = pick_device(options.device, options.gpu, options.threads)
    data = load_data_of(file, options)
    network = restore(file, data)
    about: dict[str, object] = {"network": file.network, "checkpoint": str(file.path), "sha256": file.sha256}
    write(f"{file.path}: {file.network}")
    return Extractor(for_evaluation(network.to(device)), data, options, device, about)


def of_timm(typed: Values) -> Extractor:
    """A network of timm's with weights that somebody trained, which sees images as timm's data config says."""
    name = str(typed.get("network", ""))
    if not name.startswith(TIMM):
        raise UsageError(f"--network {name or 'is missing'}", "timm:NAME, or --from with a checkpoint")
    if DATASETS[str(typed.get("dataset", "cifar100"))].rows:
        raise UsageError("--dataset features: they are there already", "a data set of images")
    known: Values = {"imb_ratio": NATURAL, **typed}
    given = resolve(Options, known, images_of(known)).options
    opened = open_pretrained(name, given.pretrained or OWN_WEIGHTS, given)
    options = for_images_of(given, opened.shown)
    check_data_flags(given, without_size(typed))
    device = pick_device(options.device, options.gpu, options.threads)
    data = load_data(options, shown=opened.shown)
    write(opened.about)
    about: dict[str, object] = {"network": name, "weights": given.pretrained or OWN_WEIGHTS, **asdict(opened.shown)}
    about["sha256"] = opened.sha256
    network = PretrainedNetwork(opened.network, 1, opened.shown)
    return Extractor(for_evaluation(network.to(device)), data, options, device, about)


def make_room(out: Path, work: Extractor) -> None:
    """Makes the folder; UsageError where there is no room for all that will be in it."""
    require_writable("--out", out)
    data, number = work.data, DTYPES[work.options.feature_dtype][0].itemsize * work.network.num_features
    rows = len(data.train) * (1 + work.options.views) + len(data.test) + (len(data.val) if data.val else 0)
    require_room({out: rows * number}, f"features of {rows:,} images")


def write_rows(path: Path, part: ImageSet, work: Extractor, windows: Sequence[Tensor] = ()) -> None:
    """Writes the features of a split as a .npy file, of images as they are or with ``windows`` cropped.

    Raises:
        UsageError: a feature is not finite, or too large for its type.
    """
    spec, size = work.data.spec, EVAL_BATCH[work.device.type]
    augment = replace(spec.augment, jitter=0.0) if isinstance(spec.augment, ResizedCrop) else spec.augment
    number, width = -(-len(part) // size), work.network.num_features
    steps = own_steps(part, replace(spec, augment=augment), size, work.device, windows)
    shown = bar(steps, len(range(rank(), number, world_size())), path.stem.replace("_", " "))
    pieces = in_turn((features_of(work.network, pixels) for pixels, _ in shown), number, width)
    if rank() > 0:
        list(pieces)  # all of it goes to the first
        return
    kind, name = DTYPES[work.options.feature_dtype]
    name = BFLOAT16 if kind == torch.bfloat16 else name
    with atomic(path) as partial, open(partial, "wb") as file:
        about = {"descr": name, "fortran_order": False, "shape": (len(part), width)}
        np.lib.format.write_array_header_1_0(file, about)
        for piece in pieces:
            found = piece.cpu().to(kind)
            if not bool(found.isfinite().all()):
                raise UsageError(
                    f"{path}: a feature is not finite in {work.options.feature_dtype}", "another type or network"
                )
            file.write(found.contiguous().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    main(sys.argv[1:])
