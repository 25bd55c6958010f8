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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from datasets import known_class_names
from datasets.own import normal
from engine import for_evaluation
from experiment import export
from experiment.export import Deployed
from experiment.options import (
    LAYOUT,
    DataOptions,
    checkpoint_option,
    file_identity,
    image_options_of,
    refuse_contradictions,
)
from experiment.priors import priors_of, source_prior_option, test_prior_option
from experiment.restore import built, files_read, only_file, open_latest, require_same_data
from experiment.views import Prediction, RowView, View, images_in
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
from utils.system import pick_device
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


class Request(NamedTuple):
    """What is to be predicted, by which checkpoint.

    Attributes:
        options: of the command.
        typed: those that were typed.
        place: IMAGE_OR_FOLDER, None where there is none.
        paths: the images there, or the file of rows.
        file: the checkpoint.
    """

    options: Options
    typed: Values
    place: str | None
    paths: list[Path]
    file: Checkpoint


@command
def main(argv: Sequence[str]) -> list[Predicted]:
    """Runs the command; returns what --json writes."""
    require_single("predict.py")
    request = requested(argv)
    options, file, is_known = request.options, request.file, "dataset" in request.typed
    device = pick_device(options.device, options.gpu, options.threads)
    model, names = for_evaluation(built(file).to(device)), class_names(file, options, is_known)
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
        view = RowView(file, request.paths)
        predicted = partial(view.predictions, forward, options.batch_size)
    else:
        view = View(file, options, is_known, request.paths)
        predicted = partial(view.predictions, forward, options.batch_size, options.workers)
    prior = None
    if priors is not None:
        test = priors.test(lambda: probabilities_of(predicted, len(view)))
        shift = log_ratio(test, priors.source).to(device)
        write(priors.describe(test, names))
        prior = priors.report(test)
    if options.export is not None:
        deployed = Deployed(built(file), view.mean, view.std, temperature, flip, shift.cpu())
        write_onnx(options.export, deployed, file, view, names, prior)
    if request.place is None:
        return []
    found, sheet = tops(bar(predicted(), len(view), "predicting"), names, options)
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


def requested(argv: Sequence[str]) -> Request:
    """What a command line asks for, of which it says what was found; UsageError where that cannot be."""
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
    return Request(options, typed, place, paths, file)


def tops(
    predicted: Iterable[Prediction], names: Sequence[str], options: Options
) -> tuple[list[Predicted], dict[str, list[Pictured]]]:
    """The likeliest classes of every image, and of --plot's sheet the images of each answer."""
    found: list[Predicted] = []
    sheet: dict[str, list[Pictured]] = {}
    for path, image, row in predicted:
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
    return found, sheet


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
