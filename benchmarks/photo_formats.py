"""5,000 real photos in every format and layout that people have: training, evaluate.py and predict.py must agree.

    python -m benchmarks.photo_formats --data_dir data --out benchmarks/results/photo_formats.jsonl

writes ten classes of CIFAR-100 (400 training and 100 test images each) as files whose pixels are known: PNG, JPEG that
EXIF turns, lossless WebP, 16-bit grey, palette and CMYK, in turn. They are laid out as class folders with folders in
them, as links to folders and files elsewhere, and as a flat folder with a CSV. In each layout a network is trained, and
image by image compared: the pixels that it is shown with those that were written; its answers in the evaluation with
those of predict.py; the three accuracies.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

import evaluate
import main_stage1
import predict
from benchmarks import append_line
from datasets import NATURAL, LongTailed, load
from engine import predict as logits_of
from experiment.data import eval_batches, load_data
from experiment.options import file_defaults, file_identity
from experiment.restore import open_checkpoint, restore
from utils.command import command
from utils.errors import UsageError
from utils.metrics import predicted_classes
from utils.options import resolve
from utils.system import provenance

Pixels = npt.NDArray[np.uint8]
CLASSES, TRAIN, TEST = 10, 400, 100


def _png(image: Image.Image, path: Path, number: int) -> None:
    image.save(path)


def _turned_jpeg(image: Image.Image, path: Path, number: int) -> None:
    """Pixels stored so that its EXIF orientation, one of eight, turns them upright."""
    orientation = number % 8 + 1
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image
    stored.save(path, quality=95, exif=exif)


def _webp(image: Image.Image, path: Path, number: int) -> None:
    image.save(path, lossless=True)


def _deep_grey(image: Image.Image, path: Path, number: int) -> None:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path)


def _palette(image: Image.Image, path: Path, number: int) -> None:
    image.quantize(64).save(path)


def _cmyk(image: Image.Image, path: Path, number: int) -> None:
    image.convert("CMYK").save(path)


FORMATS: tuple[tuple[str, Callable[[Image.Image, Path, int], None]], ...] = (
    (".png", _png),
    (".jpg", _turned_jpeg),
    (".webp", _webp),
    (".png", _deep_grey),
    (".png", _palette),
    (".tif", _cmyk),
)


def seen_by_a_viewer(path: Path) -> Pixels:
    """The pixels (H, W, 3) that Pillow shows: turned upright, as colours."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)[..., None], 3, 2)
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def write_files(data: LongTailed, folder: Path) -> list[tuple[str, str, Path]]:
    """The files, and of each its split and class."""
    files: list[tuple[str, str, Path]] = []
    for split, part, number in (("train", data.train, TRAIN), ("test", data.test, TEST)):
        assert isinstance(part.images, torch.Tensor)
        for label in range(CLASSES):
            for k in torch.nonzero(part.labels == label).flatten()[:number].tolist():
                suffix, write = FORMATS[len(files) % len(FORMATS)]
                path = folder / f"{split}_{data.class_names[label]}_{k}{suffix}"
                write(Image.fromarray(part.images[k].permute(1, 2, 0).numpy()), path, len(files))
                files.append((split, data.class_names[label], path))
    return files


def nested(files: Sequence[tuple[str, str, Path]], place: Path) -> list[str]:
    """Class folders with folders in them."""
    for number, (split, name, path) in enumerate(files):
        target = place / split / name / f"camera {number % 3}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return ["--dataset", "folder", "--data_dir", str(place)]


def linked(files: Sequence[tuple[str, str, Path]], place: Path) -> list[str]:
    """The first class is a link to a folder elsewhere, the images of others links to files."""
    first = files[0][1]
    for split, name, path in files:
        target = (place / "elsewhere" / split if name == first else place / "data" / split / name) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    for split in ("train", "test"):
        (place / "data" / split / first).symlink_to(place / "elsewhere" / split)
    return ["--dataset", "folder", "--data_dir", str(place / "data")]


def flat(files: Sequence[tuple[str, str, Path]], place: Path) -> list[str]:
    """One folder and a CSV."""
    (place / "photos").mkdir(parents=True)
    with (place / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for split, name, path in files:
            shutil.copy(path, place / "photos" / path.name)
            rows.writerow([f"photos/{path.name}", name, split])
    return ["--dataset", "csv", "--data_dir", str(place / "labels.csv")]


LAYOUTS = {layout.__name__: layout for layout in (nested, linked, flat)}


def compared(flags: Sequence[str], out: Path) -> dict[str, object]:
    """What a layout gives; numbers of images, of which none may differ."""
    run = [*flags, "--network", "resnet8", "--epochs", "3", "--seed", "0", "--out", str(out)]
    trained = main_stage1.main(run)
    (folder,) = out.glob("*/*")
    evaluated = evaluate.main(["--from", str(folder)])
    file = open_checkpoint({"pretrained_pth": str(folder)}, "stage1", evaluate.Options)
    options = resolve(evaluate.Options, {}, {"file": file_identity(file), "run": file_defaults(file)}).options
    data = load_data(options)
    logits, labels = logits_of(restore(file, data), eval_batches(data, data.test, torch.device("cpu")))
    answers = predicted_classes(logits)
    assert answers is not None
    place, names = Path(options.data_dir), data.class_names
    root = place.parent if place.is_file() else place
    listed = _paths(options.dataset, options.data_dir)
    shown = [
        int((np.abs(seen_by_a_viewer(root / path).astype(int) - image.permute(1, 2, 0).numpy().astype(int)) > 0).any())
        for part, paths in ((data.train, listed["train"]), (data.test, listed["test"]))
        for path, image in zip(paths, _pixels(part.images))
    ]
    said = predict.main(
        [str(root / ("photos" if place.is_file() else "test")), "--from", str(folder), "--json", "p.json"]
    )
    of_path = {os.path.normpath(each["path"]): each["top"][0]["name"] for each in said}
    by_predict = [of_path[os.path.normpath(root / path)] for path in listed["test"]]
    differ = sum(names[answer] != name for answer, name in zip(answers.tolist(), by_predict))
    right = sum(names[label] == name for label, name in zip(labels.tolist(), by_predict)) / len(by_predict)
    return {
        "images": len(shown),
        "other_pixels": sum(shown),
        "other_answers": differ,
        "top1": {"training": trained["top1"], "evaluate": evaluated["top1"], "predict": right},
    }


def _paths(kind: str, data_dir: str) -> dict[str, list[str]]:
    from datasets.own import list_images
    from datasets.spec import DEFAULT_IMAGE_OPTIONS

    return {split: paths for split, (paths, _) in list_images(kind, data_dir, DEFAULT_IMAGE_OPTIONS).splits.items()}


def _pixels(images: object) -> torch.Tensor:
    assert isinstance(images, torch.Tensor)
    return images


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photo_formats", description=__doc__)
    parser.add_argument("--data_dir", default="data", help="where CIFAR-100 lies")
    parser.add_argument("--out", help="a file of JSON lines to append to")
    arguments = parser.parse_args(argv)
    data = load("cifar100", arguments.data_dir, imb_ratio=NATURAL)
    target = Path(arguments.out).resolve() if arguments.out else None
    found: dict[str, object] = {}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        files = write_files(data, folder / "files")
        try:
            for layout, lay_out in LAYOUTS.items():
                (folder / layout).mkdir()
                os.chdir(folder / layout)
                found[layout] = compared(lay_out(files, Path("set").absolute()), Path("output"))
        finally:
            os.chdir(home)
    for layout, result in found.items():
        print(layout, result)
    line = {"formats": [write.__name__.strip("_") for _, write in FORMATS], "layouts": found}
    line["provenance"] = provenance(
        "-m benchmarks.photo_formats", argv, torch.device("cpu"), time.perf_counter() - began
    )
    if target:
        append_line(target, line)
    bad = [layout for layout, result in found.items() if not _agrees(result)]
    if bad:
        raise UsageError(f"figures differ in {', '.join(bad)}", "the same for all")


def _agrees(result: object) -> bool:
    assert isinstance(result, dict)
    return not result["other_pixels"] and not result["other_answers"] and len(set(result["top1"].values())) == 1


if __name__ == "__main__":
    main(sys.argv[1:])
