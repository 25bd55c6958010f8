"""Data of one's own and photos through the commands: what is read, what is refused by name, and the whole chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets
from conftest import make_imagenet_lt, make_places_lt
from PIL import Image

import compare
import datasets
import evaluate
import main_stage1
import main_stage2
import predict
from datasets import Augment, ImageOptions, ResizedCrop, own, prepare
from datasets.photos import Photos
from models import build_model
from utils import checkpoints
from utils.errors import UsageError
from utils.readers import sealed

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def paint(name: str, side: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 26, (side, side, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, side: int = 12, train=(8, 4, 2), test: str = "test", suffix: str = "png") -> Path:
    for split, counts in (("train", train), (test, (3, 3, 3))):
        for name, count in zip(COLOURS, counts):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                paint(name, side, i).save(root / split / name / f"{i}.{suffix}")
    return root


def read(kind: str, place: Path | str, **shown) -> datasets.LongTailed:
    return datasets.load(kind, str(place), imb_ratio="natural", image_options=ImageOptions(**shown))


def test_a_folder_of_small_images_is_held_in_memory(workdir, monkeypatch) -> None:
    make_folder(workdir / "d")
    data = read("folder", "d")
    assert data.class_names == ["blue", "green", "red"] and data.class_counts == [2, 4, 8]
    assert data.train.images.shape == (14, 3, 12, 12) and data.spec.augment == Augment(2, True) and data.val is None
    pixels = data.train.images.double() / 255
    assert data.spec.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert data.spec.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-4)
    assert torch.equal(data.train.images[0], torch.from_numpy(np.array(paint("blue", 12, 0))).permute(2, 0, 1))
    monkeypatch.setattr(own, "check_all", None)  # the second time all files are known
    assert torch.equal(read("folder", "d").train.images, data.train.images)
    assert read("folder", "d", image_size=16).train.images.shape[2:] == (16, 16)
    assert read("folder", "d", mean=(0.5, 0.5, 0.5)).spec.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="--mean and --std of 1 and 3 numbers"):
        read("folder", "d", mean=(0.5,))


def test_a_folder_of_photos_is_decoded_when_it_is_wanted(workdir) -> None:
    make_folder(workdir / "d", side=90, test="val", suffix="jpg")
    data = read("folder", "d")
    assert isinstance(data.train.images, Photos) and data.train.side == 224 and len(data.test) == 9
    [kept] = workdir.glob("cache/images/*/statistics_224.json")
    again = read("folder", "d")  # where it is kept
    assert (again.spec.mean, again.spec.std) == (data.spec.mean, data.spec.std)
    kept.write_text(sealed([kept.parent.name, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    assert read("folder", "d").spec.mean == (0.1, 0.2, 0.3)
    assert data.spec.augment == ResizedCrop() and data.val is None  # val is the test set where there is no other
    make_folder(workdir / "e", side=90, suffix="jpg")
    (workdir / "d" / "val").rename(workdir / "e" / "val")
    data = read("folder", "e", image_size=80)
    assert data.val is not None and len(data.val) == 9 and data.train.side == 80
    assert data.val.images.paths[0].startswith("val/") and data.test.images.paths[0].startswith("test/")
    with pytest.raises(UsageError, match=r"--val_split 0\.1: folder has held-out images of its own"):
        datasets.load("folder", "e", imb_ratio="natural", val_fraction=0.1)
    with pytest.raises(UsageError, match="prepare folder --root e --cache 256"):
        read("folder", "e", how="cache")


def test_changed_files_are_checked_again(workdir) -> None:
    make_folder(workdir / "d", side=90)
    before = read("folder", "d").train.fingerprint()
    assert read("folder", "d").train.fingerprint() == before
    path = workdir / "d/train/red/0.png"
    path.write_bytes(path.read_bytes())  # of the same size, so that only the time tells
    assert read("folder", "d").train.fingerprint() != before
    (workdir / "d/train/red/0.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(UsageError, match=r"red/0\.png cannot be read"):
        read("folder", "d")


def test_a_folder_made_long_tailed(workdir) -> None:
    make_folder(workdir / "d", train=(9, 8, 8))
    data = datasets.load("folder", "d", imb_ratio=4)
    assert data.class_counts == [8, 4, 2]


def csv_of(root: Path, labels: dict[str, str]) -> pd.DataFrame:
    rows = [
        {"path": str(path.relative_to(root)), "label": labels[path.parent.name], "split": path.parts[-3]}
        for path in sorted(root.rglob("*.png"))
    ]
    return pd.DataFrame(rows)


def test_a_csv_of_names_or_numbers(workdir) -> None:
    root = make_folder(workdir / "d")
    csv_of(root, {"red": "10", "green": "9", "blue": "2"}).to_csv(root / "all.csv", index=False)
    data = read("csv", "d/all.csv")
    assert data.class_names == ["2", "9", "10"] and data.class_counts == [2, 4, 8]
    table = csv_of(root, {name: name for name in COLOURS})
    for split, part in table.groupby("split"):
        part.drop(columns="split").to_csv(root / f"{split}.csv", index=False)
    again = read("csv", "d")
    assert again.class_names == ["blue", "green", "red"] and torch.equal(again.train.labels, data.train.labels)


def arrays(side: int = 12, channels: tuple = (), dtype=np.uint8, **more) -> dict:
    generator = np.random.default_rng(0)
    content = {}
    for split, counts in (("train", (6, 3, 2)), ("test", (2, 2, 2))):
        n = sum(counts)
        content[f"{split}_images"] = generator.integers(0, 256, (n, side, side, *channels)).astype(dtype)
        content[f"{split}_labels"] = np.repeat([0, 1, 2], counts)[:, None]
    return content | more


def test_an_npz_as_medmnist_has_it(workdir) -> None:
    np.savez("grey.npz", **arrays())
    grey = read("npz", "grey.npz")
    assert grey.channels == 1 and grey.train.images.shape == (11, 1, 12, 12) and grey.class_counts == [6, 3, 2]
    assert len(grey.spec.mean) == 1
    content = arrays(72, (3,))
    np.savez("photos.npz", **content)
    photos = read("npz", "photos.npz")
    assert isinstance(photos.train.images, Photos) and photos.train.side == 72
    box = [0, 0, 72, 72]
    assert torch.equal(photos.train.images.show(4, box), torch.from_numpy(content["train_images"][4]).permute(2, 0, 1))
    wide = {key: value[:, :, 4:] if key.endswith("images") else value for key, value in arrays().items()}
    np.savez("wide.npz", **wide)
    assert read("npz", "wide.npz").train.images.shape[2:] == (8, 8)  # a square, as predict.py shows it
    assert read("npz", "photos.npz", image_size=24).train.images.shape[2:] == (24, 24)


def write_csv(root: Path, train: str, test: str = "c.png,x\n") -> None:
    for split, lines in (("train", train), ("test", test)):
        (_made(root) / f"{split}.csv").write_text(f"path,label\n{lines}")


def spoil(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        change(make_folder(root))

    return run


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": ("folder", lambda root: None, "no folder d/train"),
    "an empty class": ("folder", spoil(lambda d: (d / "train/grey").mkdir()), "d/train/grey has no image"),
    "an unseen class": (
        "folder",
        spoil(lambda d: (d / "train/red").rename(d / "train/reddish")),
        "class red has test images but no training images",
    ),
    "no test": ("folder", spoil(lambda d: (d / "test").rename(d / "tests")), "has no test images"),
    "one class": (
        "folder",
        lambda d: [paint("red", 9, 0).save(_made(d / split / "red") / "0.png") for split in ("train", "test")],
        "all training images are of class red",
    ),
    "cut": (
        "folder",
        spoil(lambda d: (d / "test/blue/1.png").write_bytes((d / "test/blue/1.png").read_bytes()[:60])),
        r"blue/1\.png cannot be read",
    ),
    "float": (
        "folder",
        spoil(lambda d: Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(d / "train/red/x.tif")),
        r"red/x\.tif cannot be read \(pixels of 32 bits",
    ),
    "two lines": (
        "folder",
        spoil(lambda d: (d / "train/red/0.png").rename(d / "train/red/a\nb.png")),
        "a name of two lines",
    ),
    "no csv": ("csv", lambda d: d.mkdir(), r"there is no d/train\.csv"),
    "two labels": ("csv", lambda d: write_csv(d, "a.png,x\nb.png,y\na.png,y\n"), "in train as x and in train as y"),
    "no column": (
        "csv",
        lambda d: (_made(d) / "train.csv").write_text("file,label\na,b\n"),
        "has no column path, only",
    ),
    "no split": (
        "csv",
        lambda d: (_made(d) / "train.csv").write_text("path,label\na,\n"),
        r"train\.csv, line 2: a has no label",
    ),
    "gone": (
        "csv",
        lambda d: write_csv(d, "a.png,x\nb.png, y\n"),
        r"image d/a\.png: No such file",
    ),
    "no npz": ("npz", lambda d: d.mkdir(), r"0 files \.npz"),
    "no labels": ("npz", lambda d: np.savez(_made(d) / "x.npz", train_images=arrays()["train_images"]), "train_labels"),
    "float pixels": ("npz", lambda d: np.savez(_made(d) / "x.npz", **arrays(dtype=np.float32)), "float32"),
    "objects": (
        "npz",
        lambda d: np.savez(_made(d) / "x.npz", **arrays(train_labels=np.array([None] * 11, dtype=object))),
        "train_labels is no array of numbers",
    ),
    "no images": (
        "npz",
        lambda d: np.savez(_made(d) / "x.npz", **arrays(train_images=np.zeros((0, 9, 9), dtype=np.uint8))),
        "train_images is empty",
    ),
    "many labels": (
        "npz",
        lambda d: np.savez(_made(d) / "x.npz", **arrays(train_labels=np.zeros((11, 14), dtype=np.uint8))),
        r"train_labels is uint8 \(11, 14\)",
    ),
}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_on_is_refused_by_name(case: str, workdir) -> None:
    kind, make, words = WRONG[case]
    make(Path("d"))
    with pytest.raises(UsageError, match=words):
        read(kind, "d")


@pytest.mark.parametrize("kind", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_odd_images_among_others_are_trained_on(kind: str, workdir) -> None:
    make_folder(workdir / "d")
    image = paint("red", 12, 0)
    odd = (
        image.convert(kind) if kind != "I;16" else Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    )
    odd.save("d/train/red/odd" + (".jpg" if kind == "CMYK" else ".png"))
    assert read("folder", "d").class_counts == [2, 4, 9]


QUICK = ["--seed", "0", "--workers", "0"]


def chain(data: list[str], network: str, *more: str) -> tuple[dict, dict, list]:
    """Stage 1, stage 2, evaluation of both, prediction of a test image; the two evaluations and the prediction."""
    main_stage1.main([*data, *QUICK, "--network", network, "--epochs", "2", "--batch_size", "8", *more])
    main_stage2.main([*data, *QUICK, "--finetune_epoch", "2", "--views", "1", "--batch_size", "8"])
    one = evaluate.main([*data, "--cur_stage", "stage1", "--workers", "0"])
    two = evaluate.main([*data, "--workers", "0"])
    return (
        one,
        two,
        predict.main(["shown", *data, "--top_k", "2", "--json", "p.json", "--csv", "p.csv", "--plot", "p.png"]),
    )


def test_the_chain_on_a_folder_of_real_images(workdir, cifar100_dir, capsys) -> None:
    """Twenty classes of CIFAR-100 as PNG files, 40 down to 2 images; learned far beyond chance."""
    source = torchvision.datasets.CIFAR100(cifar100_dir, train=True)
    for name, number in source.class_to_idx.items():
        if number < 20:
            for split, chosen in (("train", range(40 - 2 * number)), ("test", range(100, 110))):
                folder = _made(Path("pictures", split, name))
                for i in np.flatnonzero(np.array(source.targets) == number)[list(chosen)]:
                    Image.fromarray(source.data[i]).save(folder / f"{i}.png")
    _made(Path("shown")).joinpath("a.png").write_bytes(min(Path("pictures/test/apple").iterdir()).read_bytes())
    Path("shown/b.png").write_bytes(b"no image")
    one, two, predicted = chain(["--dataset", "folder", "--data_dir", "pictures"], "resnet8")
    out = capsys.readouterr().out
    assert out.count("the same figures as in training") == 2 and "folder: 420 training images" in out
    assert one["class_counts"] == list(range(40, 0, -2)) and one["imb_ratio"] == "natural"
    assert two["top1"] > 0.07 and two["stage"] == "stage2"  # chance is 0.05
    assert Path("checkpoints/folder-pictures_natural_resnet8_stage2.pt").is_file()

    good, bad = predicted
    assert [top["name"] in one["class_names"] for top in good["top"]] == [True, True] and good["error"] is None
    assert good["top"][0]["probability"] >= good["top"][1]["probability"] > 0
    assert bad["top"] == [] and "shown/b.png cannot be read" in bad["error"] and bad["error"] in out
    assert json.loads(Path("p.json").read_text()) == predicted and len(pd.read_csv("p.csv")) == 3
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    # The prediction is the test set's: the same image, the same probabilities.
    file = checkpoints.read("checkpoints/folder-pictures_natural_resnet8_stage2.pt")
    data = read("folder", "pictures")
    model = predict.built(file).eval()
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.spec.mean, data.spec.std))
    with torch.no_grad():
        p = model((data.test.images[:1] / 255 - mean) / std).softmax(dim=1)[0]
    assert good["top"][0]["probability"] == pytest.approx(float(p.max()), rel=1e-4)


def test_the_chain_on_an_imagenet_lt_of_four_classes(workdir, capsys) -> None:
    """Decoding on the fly, and from the cache; the published validation list chooses the epoch and the temperature."""
    make_imagenet_lt(workdir / "photos")
    prepare.main(["imagenet_lt", "--root", "photos", "--any_counts", "--cache", "64", "--workers", "1"])
    Path("shown").symlink_to(next(Path("photos/val").iterdir()), target_is_directory=True)
    data = ["--dataset", "imagenet_lt"]
    one, _, predicted = chain(data, "resnet10", "--image_size", "48", "--select", "best_val")
    out = capsys.readouterr().out
    assert out.count("the same figures as in training") == 2
    assert "label_smooth 0.66225 (label_smooth auto: extrapolated" in " ".join(out.split())
    assert one["class_counts"] == [16, 8, 5, 4] and one["temperature"] > 0
    file = checkpoints.read("checkpoints/imagenet_lt_natural_resnet10_stage2.pt")
    assert file.stem == "imagenet" and file.data["image_size"] == 48 and file.metrics["temperature"] > 0
    assert file.options["input"] == "files" and file.parent["chosen"]["select"] == "best_val"
    assert "temperature" in predict.main(["shown", *data, "--top_k", "1"])[0] or len(predicted) == 3

    main_stage1.main(
        [*data, *QUICK, "--network", "resnet10", "--image_size", "48", "--input", "cache", "--epochs", "1"]
    )
    assert checkpoints.read("checkpoints/imagenet_lt_natural_resnet10_stage1.pt").options["input"] == "cache"
    report = evaluate.main([*data, "--cur_stage", "stage1"])  # read as it was trained
    assert "the same figures as in training" in capsys.readouterr().out and report["top1"] >= 0
    rows = compare.main([*data, "--method", "joint", "ncm", "tau-norm", "--tune", "--workers", "0"])
    assert {row["method"] for row in rows} == {"joint", "ncm", "tau-norm"}


def test_what_was_typed_for_stage_1_holds_for_what_follows(workdir, capsys) -> None:
    """How images are read, normalised and varied is in the file; and the cache of the largest side is taken."""
    make_folder(workdir / "d", side=90)
    for side in ("32", "64"):
        prepare.main(["folder", "--root", "d", "--cache", side, "--workers", "1"])
    data = ["--dataset", "folder", "--data_dir", "d"]
    typed = ["--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.5", "0.5", "--jitter", "0", "--no-flip"]
    size = ["--network", "resnet10", "--image_size", "80"]
    main_stage1.main([*data, *QUICK, *size, *typed, "--input", "cache", "--epochs", "1", "--batch_size", "7"])
    main_stage2.main([*data, *QUICK, "--views", "1", "--finetune_epoch", "1"])
    assert evaluate.main([*data, "--workers", "0"])["input"] == "cache"
    two = checkpoints.read("checkpoints/folder-d_natural_resnet10_stage2.pt")
    assert two.data["mean"] == [0.1, 0.2, 0.3] and two.data["read"] == "cache of 64 pixels"
    assert (two.options["jitter"], two.options["flip"], two.options["input"]) == (0.0, False, "cache")
    with pytest.raises(SystemExit):
        main_stage1.main([*data, "--image_size", "32", "--jitter", "0.1"])
    assert "--jitter 0.1: small images" in capsys.readouterr().err


def test_another_folder_of_the_same_name_is_another_run(workdir, capsys) -> None:
    for parent in ("x", "y"):
        make_folder(workdir / parent / "d")
        quick = ["--epochs", "1", "--network", "resnet8", "--batch_size", "7"]
        main_stage1.main(["--dataset", "folder", "--data_dir", f"{parent}/d", *QUICK, *quick])
    assert "checkpoints/folder-d_natural_resnet8_stage1.pt.prev" in capsys.readouterr().out
    again = ["--dataset", "folder", "--data_dir", "y/d", *QUICK, *quick]
    main_stage1.main(again)
    assert ".prev" not in capsys.readouterr().out
    (workdir / "y/d/train/red/0.png").unlink()  # and so is another content of the same folder
    main_stage1.main(again)
    assert "stage1.pt.prev" in capsys.readouterr().out


def test_probabilities_are_those_of_the_temperature_and_of_both_mirror_images(workdir) -> None:
    make_folder(workdir / "d", train=(9, 8, 8))
    (workdir / "d" / "val").symlink_to("test")
    left = np.array(Image.open("d/test/blue/0.png"))
    left[:, 6:] = 0  # its mirror image is another
    Image.fromarray(left).save("d/test/blue/0.png")
    data = ["--dataset", "folder", "--data_dir", "d"]
    quick = ["--epochs", "2", "--network", "resnet8", "--batch_size", "5", "--lr", "0.01"]
    main_stage1.main([*data, *QUICK, *quick, "--flip_tta"])
    file, sets = checkpoints.read("checkpoints/folder-d_natural_resnet8_stage1.pt"), read("folder", "d")
    model, temperature = predict.built(file).eval(), file.metrics["temperature"]
    mean, std = (torch.tensor(part)[:, None, None] for part in (sets.spec.mean, sets.spec.std))
    image = ((sets.test.images[:1] / 255) - mean) / std
    with torch.no_grad():
        sides = model(image), model(image.flip(3))
        z = (sides[0] + sides[1]) / 2
    assert (sides[0] - sides[1]).abs().max() > 1e-3
    [found] = predict.main(["d/test/blue/0.png", *data, "--top_k", "3"])
    probabilities = [top["probability"] for top in sorted(found["top"], key=lambda top: top["class"])]
    assert probabilities == pytest.approx((z / temperature).softmax(dim=1)[0].tolist(), rel=1e-5)
    assert temperature != pytest.approx(1, rel=0.01)
    [found] = predict.main(["d/test/blue/0.png", *data, "--top_k", "3", "--temperature", "0.1"])
    probabilities = [top["probability"] for top in sorted(found["top"], key=lambda top: top["class"])]
    assert probabilities == pytest.approx((z / 0.1).softmax(dim=1)[0].tolist(), rel=1e-4)  # sharp enough to tell


def test_other_images_and_untested_classes_are_told(workdir, capsys) -> None:
    make_folder(workdir / "d")
    for path in (workdir / "d/test/blue").iterdir():
        path.unlink()
    (workdir / "d/test/blue").rmdir()
    data = ["--dataset", "folder", "--data_dir", "d"]
    main_stage1.main([*data, *QUICK, "--epochs", "1", "--network", "resnet8", "--batch_size", "7"])
    assert "note: no test images of 1 class, which count in no accuracy: blue" in capsys.readouterr().out
    evaluate.main(data)
    assert "note: the training images" not in capsys.readouterr().out
    mean = read("folder", "d").spec.mean
    pixels = np.array(Image.open("d/train/red/0.png"))
    Image.fromarray(pixels[::-1]).save("d/train/red/0.png")  # upside down: neither mean nor std tell
    assert read("folder", "d").spec.mean == mean
    evaluate.main(data)
    assert "note: the training images are not those that checkpoints/folder-d" in capsys.readouterr().out
    (workdir / "d/train/red").rename(workdir / "d/train/rouge")
    (workdir / "d/test/red").rename(workdir / "d/test/rouge")
    with pytest.raises(SystemExit):
        evaluate.main(data)
    assert "other class_names: red where the data has rouge" in capsys.readouterr().err


def test_a_damaged_cache_or_manifest_is_told(workdir, capsys) -> None:
    make_imagenet_lt(workdir / "photos")
    prepare.main(["imagenet_lt", "--root", "photos", "--any_counts", "--cache", "16", "--workers", "1"])
    assert datasets.load(
        "imagenet_lt", "data/", imb_ratio="natural", image_options=ImageOptions(how="cache")
    ).train.is_photos
    cached = workdir / "data/imagenet_lt/val_16.npy"
    cached.write_bytes(cached.read_bytes()[:500])
    with pytest.raises(UsageError, match="no whole decoded pixels"):
        datasets.load("imagenet_lt", "data/", imb_ratio="natural", image_options=ImageOptions(how="cache"))
    (workdir / "data/imagenet_lt/manifest.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match="is damaged"):
        datasets.load("imagenet_lt", "data/", imb_ratio="natural")


def test_a_foreign_file_for_photos_is_shown_them_as_imagenet(workdir, capsys) -> None:
    torch.save(build_model("resnet10", 1000, stem="imagenet").state_dict(), "theirs.pt")
    paint("red", 90, 0).save("a.png")
    [found] = predict.main(["a.png", "--pretrained_pth", "theirs.pt"])
    assert "input: 224 x 224 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in capsys.readouterr().out
    assert not any(top["name"].isdecimal() for top in found["top"])
    for flags, words in ((["--plot", "x.txt"], "--plot x.txt"), (["--pretrained_pth", "no.pt"], "no.pt")):
        with pytest.raises(SystemExit):
            predict.main(["a.png", "--pretrained_pth", "theirs.pt", *flags])
        assert words in capsys.readouterr().err
    Path("b.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        predict.main(["b.png", "--pretrained_pth", "theirs.pt", "--csv", "x.csv"])
    assert "none of 1 images could be read" in capsys.readouterr().err and Path("x.csv").is_file()


def test_a_file_of_another_program_can_be_tuned_on_val_images_of_the_data(workdir, capsys) -> None:
    make_folder(workdir / "d")
    (workdir / "d" / "val").symlink_to("test")
    torch.save(build_model("resnet8", 3).state_dict(), "theirs.pt")
    data = ["--dataset", "folder", "--data_dir", "d", "--pretrained_pth", "theirs.pt"]
    main_stage2.main([*data, *QUICK, "--method", "tau-norm", "--tau", "val"])
    compare.main([*data, *QUICK, "--method", "joint", "tau-norm", "--tune"])
    assert "options chosen on held-out images" in capsys.readouterr().out


def test_weights_of_timms_are_known_by_the_network_that_is_typed(workdir, capsys) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    make_folder(workdir / "d", side=90)
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=3, img_size=160).eval()
    torch.save({"state_dict": theirs.state_dict()}, "theirs.pt")
    data = ["--dataset", "folder", "--data_dir", "d", "--network", "timm:test_vit", "--image_size", "160"]
    evaluate.main([*data, "--pretrained_pth", "theirs.pt", "--workers", "0"])
    assert "theirs.pt: weights named as in timm's test_vit" in capsys.readouterr().out
    main_stage2.main([*data, *QUICK, "--pretrained_pth", "theirs.pt", "--finetune_epoch", "1", "--views", "1"])
    assert evaluate.main([*data, "--workers", "0"])["network"] == "timm:test_vit"  # by the default path
    images = torch.randn(2, 3, 160, 160)
    file = evaluate.open_latest({"pretrained_pth": "theirs.pt", "network": "timm:test_vit"}, evaluate.Options)
    with torch.no_grad():
        assert torch.allclose(predict.built(file).eval()(images), theirs(images), atol=1e-5)
    with pytest.raises(UsageError, match=r"theirs\.pt holds no fc\.weight, which test_resnet has"):
        evaluate.open_latest({"pretrained_pth": "theirs.pt", "network": "timm:test_resnet"}, evaluate.Options)


def test_recipes_are_the_published_ones() -> None:
    specs = datasets.DATASETS
    jitters = {name: specs[name].augment.jitter for name in prepare.PUBLISHED}
    assert jitters == {"imagenet_lt": 0.4, "places_lt": 0.4, "inat2018": 0}
    assert (specs["inat2018"].mean, specs["inat2018"].std) == ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
    assert specs["imagenet_lt"].mean == specs["places_lt"].mean == (0.485, 0.456, 0.406)
    places = specs["places_lt"].recipes["decoupling"]
    assert (places["pretrained_pth"], places["train_scope"]) == ("imagenet", "last_block")
    assert specs["imagenet_lt"].recipes["weight-balancing"]["jitter"] == 0  # flip and crop alone
    epochs = [specs[name].recipes["decoupling"]["finetune_epoch"] for name in prepare.PUBLISHED]
    assert dict(zip(prepare.PUBLISHED, epochs)) == {"imagenet_lt": 10, "places_lt": 10, "inat2018": 30}
    typed = {"dataset": "imagenet_lt", "protocol": "published"}
    assert main_stage1.fill_options(main_stage1.Options, typed, "stage1").options.select == "best_val"
    typed["dataset"] = "inat2018"  # which has no images to choose on
    assert main_stage1.fill_options(main_stage1.Options, typed, "stage1").options.select == "best_test"


def test_places_begin_with_imagenet_weights_and_train_the_last_block(workdir, monkeypatch, capsys) -> None:
    make_places_lt(workdir / "photos")
    prepare.main(["places_lt", "--root", "photos", "--any_counts", "--workers", "1"])
    torch.manual_seed(3)
    weights = build_model("resnet10", 1000, stem="imagenet").state_dict()
    monkeypatch.setattr("experiment.restore.imagenet_weights", lambda network: weights)
    data = ["--dataset", "places_lt", "--network", "resnet10", "--image_size", "32", "--batch_size", "8", *QUICK]
    main_stage1.main([*data, "--epochs", "1"])
    assert "torchvision/resnet10-IMAGENET1K_V1, of 1,000 classes: the classifier begins anew" in capsys.readouterr().out
    one = checkpoints.read("checkpoints/places_lt_natural_resnet10_stage1.pt")
    assert one.parent["path"].endswith("IMAGENET1K_V1") and one.options["train_scope"] == "last_block"
    moved = {name for name, value in one.model.items() if not torch.equal(value, weights[name])}
    assert moved and all(name.startswith(("layer4.0.", "fc.")) for name in moved)
    main_stage2.main(["--dataset", "places_lt", *QUICK, "--method", "tau-norm"])
    two = checkpoints.read("checkpoints/places_lt_natural_resnet10_stage2.pt")
    assert two.options["pretrained_pth"] is None and two.options["feature_dtype"] == "float16"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset imagenet_lt", "imagenet_lt has not been prepared first: python -m datasets.prepare imagenet_lt"),
        ("--dataset imagenet_lt --imb_ratio 10", "--imb_ratio 10 natural"),
        ("--dataset imagenet_lt --recipe mine", "--recipe mine decoupling, weight-balancing"),
        ("--dataset imagenet_lt --mean 0.5 0.5 0.5", "--mean folder, csv, npz"),
        ("--dataset cifar100 --image_size 64", "--image_size 64 imagenet_lt, places_lt"),
        ("--dataset digits --input cache", "--input cache digits"),
        ("--dataset folder --data_dir d --imb_type step", "--imb_type --imb_ratio R"),
        ("--dataset folder --data_dir d --input nvjpeg", "--input nvjpeg"),
        ("--dataset folder --data_dir d --image_size 7", "--image_size 7 [8, 1024]"),
        ("--dataset folder --data_dir d --network resnet20 --stem imagenet", "--stem imagenet auto, small"),
        ("--dataset folder --data_dir d --train_scope last_block", "--train_scope last_block --pretrained_pth"),
        ("--dataset folder --data_dir d --select best_val", "--select best_val --val_split"),
        ("--dataset digits --network timm:", "--network timm: timm:NAME"),
        ("--dataset digits --pretrained_pth imagenet --network resnet8", "imagenet resnet8 resnet18"),
    ],
)
def test_options_that_do_not_go_together(flags: str, words: str, workdir, capsys) -> None:
    make_folder(workdir / "d")
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*flags.split(), "--epochs", "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in error for word in words.split()), error


def test_predicting_what_is_not_there(workdir, capsys) -> None:
    main_stage1.main(["--dataset", "digits", "--epochs", "1", "--seed", "0"])
    capsys.readouterr()
    _made(Path("empty"))
    for arguments, words in (
        (["--dataset", "digits"], "IMAGE_OR_FOLDER"),
        (["nowhere"], "no such"),
        (["empty"], "no image"),
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main([*arguments, "--dataset", "digits"])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    paint("red", 20, 0).save("a.png")
    [found] = predict.main(["a.png", "--dataset", "digits", "--temperature", "1000"])
    assert [round(top["probability"], 1) for top in found["top"]] == [0.1] * 5  # of a temperature that evens all out
    assert "temperature 1e+03" in capsys.readouterr().out
