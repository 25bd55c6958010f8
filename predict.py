"""Predicts the classes of images or of rows of features: top-k names and probabilities, as text, CSV, JSON or a figure.

    python predict.py IMAGE_OR_FOLDER --from FILE_OR_RUN
    python predict.py photos/ --from FILE_OR_RUN --top_k 3 --csv top3.csv --json top3.json --plot sheet.png
    python predict.py --export model.onnx --from FILE_OR_RUN

The file says how images are scaled and normalised and what its classes are called. Where it has held-out images, its
probabilities are those of temperature scaling (Guo et al., ICML 2017): softmax(z / T), with T fitted on them.
--test_prior re-weights them for images whose classes have other shares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from datasets import DATASETS, known_class_names
from datasets.features import as_floats
from datasets.files import FULL_RANGE, read_image
from datasets.found import LeftOut, images_below
from datasets.geometry import centre, resized, square
from datasets.own import SMALL_SIDE, normal
from engine import for_evaluation
from experiment import export
from experiment.export import Deployed
from experiment.options import (
    LAYOUT,
    DataOptions,
    checkpoint_option,
    constants_of,
    file_identity,
    image_options_of,
    refuse_contradictions,
)
from experiment.pretrained import shown_of
from experiment.priors import priors_of, source_prior_option, test_prior_option
from experiment.restore import built, files_read, only_file, open_latest, require_same_data
from utils.bar import bar
from utils.checkpoints import Checkpoint
from utils.command import command
from utils.console import counted, write
from utils.distributed import require_single
from utils.errors import UsageError
from utils.files import Target, atomic, require_targets, write_text
from utils.metrics import csv_text
from utils.options import Choice, Flag, Number, Text, Values, option, parse_typed, resolve, shown
from utils.plots import Pictured, contact_sheet
from utils.priors import log_ratio
from utils.readers import Unreadable, map_array, read_arrays
from utils.system import available_cpus, pick_device
from utils.types import Json

#: Options that choose a checkpoint.
CHOOSING = {"pretrained_pth", "cur_stage", "dataset", "data_dir", "imb_ratio", "imb_type", "network"}
#: Images that could not be read of which it is said, where reports are written.
SAID = 20
#: Images on a contact sheet, at most, and of them those with the same answer.
SHOWN, SHOWN_OF_CLASS = 48, 12


#: One of the likeliest classes of an image.
Top = TypedDict("Top", {"class": int, "name": str, "probability": float})


class Predicted(TypedDict):
    """What --json holds of one image: the likeliest classes, or why there are none."""

    path: str
    error: str | None
    top: list[Top]


@dataclass(frozen=True)
class Options(DataOptions):
    """predict.py's own options; those of every command, which choose the file, are in experiment/options.py."""

    pretrained_pth: str | None = checkpoint_option()
    cur_stage: str | None = option(
        None, Choice(("stage1", "stage2")), "which stage's file; without it, the latest", "files"
    )
    top_k: int = option(5, Number(int, 1, 1000), "classes to name for each image", "evaluation")
    temperature: float | None = option(
        None,
        Number(float, 1e-3, 1000),
        "divides the logits; if not given, the file's, or 1 where it has none",
        "evaluation",
    )
    flip_tta: bool | None = option(
        None, Flag(), "average the logits of an image and its mirror; None: as stored", "evaluation"
    )
    test_prior: str | None = test_prior_option()
    source_prior: str | None = source_prior_option()
    batch_size: int = option(64, Number(int, 1, 10_000), "images per step", "machine")
    csv: str | None = option(None, Text("a file to write"), "write a row for each image and rank", "files")
    json: str | None = option(None, Text("a file to write"), "write the same as JSON", "files")
    plot: str | None = option(
        None, Text("a file to write"), f"draw up to {SHOWN} images with their predictions, a PNG", "files"
    )
    export: str | None = option(
        None,
        Text("a file to write"),
        "write network, normalisation, temperature and prior as ONNX; IMAGE_OR_FOLDER may be left out",
        "files",
    )


@command
def main(argv: Sequence[str]) -> list[Predicted]:
    """Runs the command; returns what --json writes."""
    require_single("predict.py")
    place, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    typed = parse_typed(Options, flags, "predict.py IMAGE_OR_FOLDER", __doc__)
    options = resolve(Options, typed, {}).options
    is_of_images = not options.export or options.csv or options.json or options.plot or options.test_prior == "em"
    if place is None and is_of_images:
        raise UsageError("predict.py: IMAGE_OR_FOLDER, which comes first, is missing", "an image, or a folder of some")
    if options.plot and Path(options.plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {options.plot}", "the path of a .png")
    exports = [] if options.export is None else [export.target(options.export)]
    is_rows = place is not None and Path(place).suffix in (".npy", ".npz")
    paths = [] if place is None else [Path(place)] if is_rows else images_in(Path(place))
    if not typed.keys() & CHOOSING:
        typed = {**typed, "pretrained_pth": str(only_file())}
    file = open_latest(typed, Options)
    number = counted(file.num_classes, "class", "classes")
    write(f"{file.path}: {file.stage or 'of another program'}, {file.network}, {number}")
    refuse_unused(typed, file)
    if place is not None and is_rows != (file.network == "features"):
        wanted = "images"
        if file.network == "features":
            wanted = "a .npy or .npz of features; of images a file of main_stage2.py --network timm:NAME --pretrained"
        raise UsageError(f"predict.py {place}: {file.path} is of the network {file.network}", wanted)
    if is_rows and options.plot:
        raise UsageError(f"--plot {options.plot}: there are no images", "--csv, --json")
    if "data_dir" in typed and "pretrained_pth" not in typed:
        require_same_data(file, str(typed["data_dir"]))
    reports: dict[str, tuple[bytes | tuple[bytes, ...], bytes]] = {
        "json": ((b'[\n {\n  "path": ', b'{\n "images": ['), b'"error": '),
        "csv": (b"path,rank,class,name,probability", b""),
        "plot": (b"\x89PNG", b"Matplotlib"),
    }
    asked = [(f"--{name}", getattr(options, name), marks) for name, marks in reports.items()]
    targets = [Target(flag, path, *marks) for flag, path, marks in asked if path is not None] + exports
    read = [*files_read(file, options), *([Path(options.test_prior)] if options.test_prior else [])]
    require_targets(targets, [*paths, *read])
    device = pick_device(options.device, options.gpu, options.threads)
    model, names = for_evaluation(built(file).to(device)), class_names(file, options, "dataset" in typed)
    if options.temperature is None and not file.metrics.get("temperature"):
        write(f"{file.path} has no temperature, for which images are held out: probabilities are as trained")
    temperature = options.temperature or file.metrics.get("temperature") or 1.0
    flip = file.metrics.get("flip_tta", False) if options.flip_tta is None else options.flip_tta
    priors = priors_of(options.test_prior, options.source_prior, file, names, file.data.get("class_counts"))
    shift = torch.zeros(file.num_classes, device=device)

    def forward(inputs: Tensor) -> Tensor:
        return probabilities(model, inputs.to(device), temperature, flip, shift)

    view: View | RowView
    if file.network == "features":
        view = RowView(file, paths)
        predicted = partial(view.predictions, forward, options.batch_size)
    else:
        view = View(file, options, "dataset" in typed, paths)
        predicted = partial(view.predictions, forward, options.batch_size, options.workers)
    images = len(view)
    prior = None
    if priors is not None:
        test = priors.test(lambda: probabilities_of(predicted, images))
        shift = log_ratio(test, priors.source).to(device)
        write(priors.describe(test, names))
        prior = priors.report(test)
    if options.export is not None:
        deployed = Deployed(built(file), view.mean, view.std, temperature, flip, shift.cpu())
        write_onnx(options.export, deployed, file, view, names, prior)
    if place is None:
        return []
    found: list[Predicted] = []
    sheet: dict[str, list[Pictured]] = {}
    for path, image, row in bar(predicted(), images, "predicting"):
        if isinstance(image, UsageError):
            found.append({"path": str(path), "error": image.args[0], "top": []})
            continue
        values, classes = row.topk(min(options.top_k, len(row)))
        top: list[Top] = [
            {"class": number, "name": names[number], "probability": value}
            for number, value in zip(classes.tolist(), values.tolist())
        ]
        found.append({"path": str(path), "error": None, "top": top})
        if options.plot and (top[0]["name"] in sheet or len(sheet) < SHOWN):
            of_class = sheet.setdefault(top[0]["name"], [])
            if len(of_class) < SHOWN_OF_CLASS:
                of_class.append(pictured(path, image, top[0], names))

    failed = [each for each in found if each["error"]]
    is_written = bool(options.csv or options.json)
    for each in failed[:SAID] if is_written else found:
        words = ", ".join(f"{top['name']} {100 * top['probability']:.2f} %" for top in each["top"])
        write((each["error"] or f"{each['path']}: {words}").replace("\n", "\\n"))
    write(f"{file.path}: temperature {temperature:.3g}, flip averaging {'on' if flip else 'off'}")
    if is_written:
        places = ", ".join(path for path in (options.csv, options.json) if path)
        write(f"{counted(len(found) - len(failed), 'image')} predicted, {len(failed)} not read: {places}")
    write_reports(found, sheet, options, prior)
    if len(failed) == len(found):
        raise UsageError(f"none of {len(found)} images could be read", "undamaged images")
    return found


def pictured(path: Path, image: Tensor, top: Top, names: Sequence[str]) -> Pictured:
    """An image of the contact sheet; right or wrong where its folder is called as a class."""
    truth = normal(path.parent.name)
    is_right = top["name"] == truth if truth in names else None
    words = f"{top['name']} {100 * top['probability']:.0f} %\n{path.name}"
    return Pictured(image, words if is_right is not False else f"{words}\nis {truth}", is_right)


def refuse_unused(typed: Values, file: Checkpoint) -> None:
    """Raises UsageError where a flag contradicts the file, or has no effect on predictions."""
    stored = file_identity(file) | {"num_class": file.num_classes} | ({"cur_stage": file.stage} if file.stage else {})
    if file.data:
        stored |= {"mean": tuple(file.data["mean"]), "std": tuple(file.data["std"])}
        stored |= {name: file.options[name] for name in LAYOUT if name in file.options}
    refuse_contradictions(typed, stored, str(file.path))
    for name in ("recipe", "jitter", "flip", "input"):
        if name in typed:
            raise UsageError(f"--{name} {shown(typed[name])}: predict.py trains nothing", "without it")


Prediction = tuple[Path, Tensor | UsageError, Tensor]


class View:
    """How the network of a checkpoint is shown images: their size, their channels, their normalisation."""

    def __init__(self, file: Checkpoint, options: Options, is_typed: bool, paths: Sequence[Path]) -> None:
        self.paths = paths
        spec = DATASETS[file.data.get("dataset", options.dataset)]
        own = constants_of(file) if file.data or not is_typed or spec.own else {}
        usual = 224 if file.stem == "imagenet" else 8 if spec.name == "digits" else 32
        self.side, self.channels = options.image_size or file.data.get("image_size") or usual, file.in_channels
        mean, std = options.mean or own.get("mean", spec.mean), options.std or own.get("std", spec.std)
        if len(mean) != self.channels or len(std) != self.channels:
            raise UsageError(
                f"{file.path} does not say how pixels are normalised", "--dataset NAME, or --mean and --std"
            )
        self.mean, self.std = list(mean), list(std)
        low, high = file.data.get("levels") or options.range or FULL_RANGE
        self.levels = low, high
        self.is_photo = self.side > SMALL_SIDE or (spec.photos and not spec.own)
        self.fit = file.data.get("fit") or options.fit
        how = shown_of(file)
        self.resize, self.mode = (how.resize, how.interpolation) if how else (resized(self.side), "bilinear")
        fit = "" if self.fit == "crop" else f" ({self.fit})"
        write(f"input: {self.side} x {self.side} pixels{fit}, mean {shown(self.mean)}, std {shown(self.std)}")

    def __len__(self) -> int:
        return len(self.paths)

    def of(self, path: Path) -> Tensor | UsageError:
        """The pixels (c, side, side) uint8 of a file, or why there are none."""
        try:
            image = read_image(path, self.levels)
        except UsageError as error:
            return error
        from torchvision.transforms.v2 import functional as F  # here, since it is slow to import

        if self.channels != 3:  # the weights of the three do not add up to 1: grey would become darker
            image = image[:1] if bool((image == image[:1]).all()) else F.rgb_to_grayscale(image)
        if self.is_photo:
            return centre(image, self.side, self.fit, self.resize, self.mode)
        return square(image, self.side, self.fit)

    def normalised(self, images: Sequence[Tensor]) -> Tensor:
        """What the network takes: (B, c, side, side) float."""
        from torchvision.transforms.v2 import functional as F

        pixels: Tensor = F.normalize(torch.stack(list(images)).float() / 255, self.mean, self.std)
        return pixels.contiguous(memory_format=torch.channels_last)

    def predictions(self, forward: Callable[[Tensor], Tensor], batch_size: int, workers: int) -> Iterator[Prediction]:
        """(path, its pixels or why there are none, what ``forward`` makes of them) of every image, in order."""
        with ThreadPoolExecutor(max(1, min(workers, available_cpus()))) as pool:
            for start in range(0, len(self.paths), batch_size):
                chunk = self.paths[start : start + batch_size]
                images = list(pool.map(self.of, chunk))
                good = [image for image in images if isinstance(image, Tensor)]
                rows = iter(forward(self.normalised(good)) if good else ())
                for path, image in zip(chunk, images):
                    yield path, image, next(rows) if isinstance(image, Tensor) else torch.empty(0)

    def some(self, number: int) -> Tensor:
        """At most so many of the images, (n, c, side, side) in [0, 1]."""
        found = [image for image in map(self.of, self.paths[:number]) if isinstance(image, Tensor)]
        return torch.stack(found).float() / 255 if found else torch.empty(0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.side, self.side

    def metadata(self) -> dict[str, str]:
        """What a program must know to show a network its images."""
        shorter = str(self.resize if self.is_photo else self.side)
        return {
            "input": "RGB" if self.channels == 3 else "grey levels",
            "range": "0 to 1; mean and std are applied in the graph",
            "side": str(self.side),
            "shorter_side": shorter,
            "channels": str(self.channels),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "fit": self.fit,
            "resize": f"shorter side to {shorter}, antialiased, centre cut out"
            if self.fit == "crop"
            else "all of the image",
            "interpolation": self.mode,
            "levels_of_16_bit": json.dumps(self.levels),
        }


class RowView:
    """The rows (N, D) of features of a .npy, or of an .npz as ``features`` or ``test_features``; there may be none."""

    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def __init__(self, file: Checkpoint, paths: Sequence[Path]) -> None:
        self.shape = (file.in_channels,)
        self.place = paths[0] if paths else Path()
        self.rows = rows_of(self.place, file) if paths else torch.empty(0, file.in_channels)

    def __len__(self) -> int:
        return len(self.rows)

    def predictions(self, forward: Callable[[Tensor], Tensor], batch_size: int) -> Iterator[Prediction]:
        """(a row's name, no pixels or why it is none, what ``forward`` makes of it) of every row, in order."""
        for start in range(0, len(self.rows), batch_size):
            chunk = self.rows[start : start + batch_size].float()
            is_good = chunk.isfinite().all(dim=1)
            made = iter(forward(chunk[is_good]) if bool(is_good.any()) else ())
            for number, good in enumerate(is_good.tolist(), start=start):
                name = Path(f"{self.place}[{number}]")
                problem = UsageError(f"{name}: not finite", "finite numbers")
                yield name, chunk[:0] if good else problem, next(made) if good else torch.empty(0)

    def some(self, number: int) -> Tensor:
        """At most so many of the rows, (n, D)."""
        found = self.rows[:number].float()
        return found[found.isfinite().all(dim=1)]

    def metadata(self) -> dict[str, str]:
        """What a program must know to give a network its rows."""
        return {"features": str(self.shape[0])}


def rows_of(place: Path, file: Checkpoint) -> Tensor:
    """The rows (N, D) of a file; UsageError where there are none, or of another width than a checkpoint's."""
    names = ("features", "test_features")
    try:
        if place.suffix == ".npz":
            found = read_arrays(place, names, others="V")
            array = next((found[name] for name in names if name in found), None)
        else:
            array = map_array(place, others="V")
    except Unreadable as error:
        raise UsageError(f"predict.py {place}: {error}", "a .npy or .npz of features") from None
    if array is None:
        raise UsageError(f"predict.py {place}: there are no {' or '.join(names)} in it", "rows of features")
    rows = as_floats(array, str(place))
    if rows.shape[1] != file.in_channels:
        raise UsageError(f"predict.py {place}: rows of {rows.shape[1]:,} numbers", f"{file.in_channels:,}")
    write(f"found {place}: {counted(len(rows), 'row')} of {rows.shape[1]:,}")
    return rows


def probabilities_of(predicted: Callable[[], Iterator[Prediction]], images: int) -> Tensor:
    """The probabilities (N, C) of all images that can be read, to estimate a prior from before any is reported."""
    rows = [row for _, image, row in bar(predicted(), images, "estimating") if isinstance(image, Tensor)]
    if not rows:
        raise UsageError(f"none of {images} images could be read", "undamaged images")
    return torch.stack(rows)


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, temperature: float, flip: bool, shift: Tensor) -> Tensor:
    """softmax(z / T + shift) of images (B, c, H, W), of the mean logits of image and mirror with ``flip``: (B, C).

    ``shift`` (C,) re-weights classes, see :mod:`utils.priors`; 0 leaves them as they are.
    """
    logits = model(images)
    if flip:
        logits = (logits + model(images.flip(dims=(3,)))) / 2
    rows: Tensor = (logits / temperature + shift).softmax(dim=1).cpu()
    if not bool(rows.isfinite().all()):
        raise UsageError("the network's logits are not finite", "a checkpoint of weights that are fit for these images")
    return rows


def images_in(place: Path) -> list[Path]:
    """The image itself, or all images of a folder and those inside it, in the order of their paths."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UsageError(f"predict.py {place}: there is no such file or folder", "an image, or a folder of some")
    left_out = LeftOut()
    paths = [place / name for name in images_below(place, left_out)]
    words = left_out.describe() or "nothing"
    if not paths:
        raise UsageError(f"predict.py {place}: there is no image in it; left out: {words}", "images that Pillow reads")
    write(f"found {place}: {counted(len(paths), 'image')}; left out: {words}")
    return paths


def class_names(file: Checkpoint, options: Options, is_typed: bool) -> list[str]:
    """What the checkpoint calls its classes.

    Of other programs' files those of --dataset where that ``is_typed``, else ImageNet's for 1000, else numbers.
    """
    if file.data:
        return [str(name) for name in file.data["class_names"]]
    if is_typed:
        names = known_class_names(options.dataset, options.data_dir, image_options_of(options))
        if names and len(names) != file.num_classes:
            words = f"--dataset {options.dataset} has {len(names)}"
            raise UsageError(f"{file.path} has {counted(file.num_classes, 'class', 'classes')}", words)
        if names:
            return names
        write(f"note: {options.dataset} is not prepared in {options.data_dir}: classes have numbers")
    if file.num_classes == 1000:
        from torchvision.models import ResNet50_Weights  # here, since it is slow to import

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return [str(number) for number in range(file.num_classes)]


def write_onnx(
    path: str,
    deployed: Deployed,
    file: Checkpoint,
    view: View | RowView,
    names: Sequence[str],
    prior: Json | None,
) -> None:
    """Writes --export's file, with all that a program must know to use it; says how far it is from PyTorch."""
    real = view.some(export.COMPARED)
    metadata = {
        "class_names": json.dumps(names),
        **view.metadata(),
        "temperature": repr(deployed.temperature),
        "flip_averaging": "in the graph" if deployed.flip else "off",
        "prior": json.dumps(prior),
        "checkpoint_sha256": str(file.sha256),
        "version": export.version(),
    }
    largest = export.export(path, deployed, view.shape, real, metadata)
    words = (
        f"{path}: temperature {deployed.temperature:.3g}, flip averaging {metadata['flip_averaging']}; ONNX differs by "
    )
    write(f"{words}{largest:.1e} at most from PyTorch, on {export.COMPARED} random and {len(real)} real inputs")


def write_reports(
    found: Sequence[Predicted], sheet: Mapping[str, Sequence[Pictured]], options: Options, prior: Json | None
) -> None:
    """Writes what was asked for; the JSON is the list of images or, with a test prior, an object of both."""
    if options.json is not None:
        content = found if prior is None else {"images": found, "prior": prior}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.csv is not None:
        rows = [
            {"path": each["path"], "rank": rank, **top, "error": each["error"]}
            for each in found
            for rank, top in (enumerate(each["top"], start=1) if each["top"] else [(None, {})])
        ]
        write_text(options.csv, csv_text(rows, ["path", "rank", "class", "name", "probability", "error"]))
    if options.plot is not None:
        with atomic(options.plot) as path:
            turns = chain.from_iterable(zip_longest(*sheet.values()))  # one of every answer, then the next ones
            contact_sheet([each for each in turns if each is not None][:SHOWN], path)


if __name__ == "__main__":
    main(sys.argv[1:])
