"""The check of published sets of photos: layouts, lists, counts, every file, and the pixels decoded ahead."""

from __future__ import annotations

import errno
import json
import lzma
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, make_imagenet_lt, make_inat2018, make_places_lt
from torchvision.transforms.v2.functional import resize

from datasets import prepare, published, scan
from datasets.files import Manifest, read_content, read_image
from datasets.listed import read_listed
from datasets.published import CLASS_COUNTS, PUBLISHED, class_folders, difference, digest, read_list
from datasets.spec import ImageOptions
from utils.errors import UsageError
from utils.metrics import GROUPS, group_of

COUNTS = json.loads(CLASS_COUNTS.read_text())
needs_lists = pytest.mark.skipif(not (SHARED / "lists").is_dir(), reason="the published lists are not here")


def run(name: str, root: Path, *flags: str) -> Manifest:
    return prepare.main([name, "--root", str(root), "--any_counts", "--workers", "2", *flags])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        prepare.main(list(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 2, error
    return error


def flat(path: str) -> str:
    """val/class/x -> val/x."""
    return re.sub(r"^val/[^/]+/", "val/", path)


def deep(size: str) -> Callable[[str], str]:
    """Places365's first form: data_256/a/apartment_building/outdoor/x for a train path, val_256/x for a val path."""

    def lay(path: str) -> str:
        part, name, file = path.split("/")
        return f"val_{size}/{file}" if part == "val" else f"data_{size}/{name[0]}/{name.replace('-', '/')}/{file}"

    return lay


LAYOUTS = {
    "imagenet": (make_imagenet_lt, str),
    "imagenet flat val": (make_imagenet_lt, flat),
    "imagenet kaggle": (make_imagenet_lt, lambda path: "ILSVRC/Data/CLS-LOC/" + path),
    "imagenet nested, flat val": (make_imagenet_lt, lambda path: "ILSVRC2012/" + flat(path)),
    "places easy": (make_places_lt, str),
    "places easy, nested": (make_places_lt, lambda path: "places365_standard/" + path),
    "places 256": (make_places_lt, deep("256")),
    "places large": (make_places_lt, deep("large")),
    "inat": (make_inat2018, str),
    "inat at root": (make_inat2018, lambda path: path.removeprefix("train_val2018/")),
}
NAMES = {make_imagenet_lt: "imagenet_lt", make_places_lt: "places_lt", make_inat2018: "inat2018"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(layout: str, workdir: Path) -> None:
    make, lay = LAYOUTS[layout]
    name = NAMES[make]
    root = make(workdir / "photos", lay=lay)
    made = run(name, root)
    manifest = Manifest.load(f"data/{name}/manifest.npz")
    assert manifest is not None and manifest.root == str(root) and manifest.about == made.about
    assert set(manifest.splits) == {"train", "test"} | ({"val"} if name != "inat2018" else set())
    for split, files in manifest.splits.items():
        paths, labels = read_list(root / PUBLISHED[name].lists[split][0])
        assert files.paths == [lay(path) for path in paths] and torch.equal(files.labels, labels)
        assert files.sizes.dtype == torch.int32
        assert files.sizes.tolist() == [list(read_image(root / path).shape[1:]) for path in files.paths]
    assert manifest.about["counts"] == "other" and manifest.about["provenance"]["versions"]["torch"]
    assert len(set(manifest.class_names)) == 4


def test_lists_beside_the_manifest_come_first(workdir: Path) -> None:
    root = make_places_lt(workdir / "photos")
    short = (root / "Places_LT_train.txt").read_text().splitlines()
    Path("data/places_lt").mkdir(parents=True)
    Path("data/places_lt/Places_LT_train.txt").write_text("\r\n".join([*short[:1], "", *short[2:]]))
    made = run("places_lt", root)
    assert len(made.splits["train"].paths) == len(short) - 1
    assert made.class_names == ["airfield", "apartment_building-outdoor", "bakery-shop", "zen_garden"]


def test_inat_from_the_competitions_files(workdir: Path) -> None:
    text = run("inat2018", make_inat2018(workdir / "text"), "--data_dir", "a")
    root = make_inat2018(workdir / "json", in_json=True)
    made = run("inat2018", root, "--data_dir", "b")
    for split, files in made.splits.items():
        assert files.paths == text.splits[split].paths and torch.equal(files.labels, text.splits[split].labels)
        assert made.about["lists"][split]["sha256"] == text.about["lists"][split]["sha256"]
    assert text.class_names == ["0", "1", "2", "3"]
    assert made.class_names == [f"obfuscated{c}" for c in range(4)]
    categories = [{"id": c, "name": name} for c, name in enumerate(("Larus", "Bufo\nbufo", "Pica", "Larus"))]
    (root / "categories.json").write_text(json.dumps(categories))
    assert run("inat2018", root, "--data_dir", "c").class_names == ["Larus (0)", "Bufo bufo", "Pica", "Larus (3)"]


def test_counts_are_held_to_the_published(workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_imagenet_lt(workdir / "photos")
    error = refused(capsys, "imagenet_lt", "--root", str(root))
    assert "class 0 has 16 images in the train list, published are 50" in error and "--any_counts" in error
    assert not Path("data/imagenet_lt/manifest.npz").exists()

    published_here = workdir / "counts.json"
    published_here.write_text(json.dumps({"imagenet_lt": {"train": [16, 8, 5, 4], "val": 2, "test": 3}}))
    monkeypatch.setattr(published, "CLASS_COUNTS", published_here)
    assert prepare.main(["imagenet_lt", "--root", str(root)]).about["counts"] == "published"
    published_here.write_text(json.dumps({"imagenet_lt": {"train": [16, 8, 5, 4], "val": 2, "test": 4}}))
    assert "class 0 has 3 images in the test list, published are 4" in refused(
        capsys, "imagenet_lt", "--root", str(root)
    )


def test_a_class_more_than_published_is_a_difference() -> None:
    labels = {split: torch.arange(366).repeat_interleave(n) for split, n in (("val", 20), ("test", 100))}
    labels["train"] = torch.arange(365).repeat_interleave(torch.tensor(COUNTS["places_lt"]["train"]))
    assert difference("places_lt", labels) == "class 365 has 20 images in the val list, published are 0"


def test_missing_and_damaged_images_are_named(workdir: Path, capsys) -> None:
    root = make_imagenet_lt(workdir / "photos")
    listed = [line.split()[0] for line in (root / "ImageNet_LT_train.txt").read_text().splitlines()]
    whole = {path: (root / path).read_bytes() for path in listed[-3:]}

    (root / listed[-1]).write_bytes(whole[listed[-1]][:-300])
    (root / listed[-2]).write_bytes(whole[listed[-2]][:200])
    command = ("imagenet_lt", "--root", str(root), "--any_counts", "--workers", "2")
    for flags in ((), ("--cache", "16")):
        error = refused(capsys, *command, *flags)
        assert f"{listed[-2]} cannot be read" in error and "ILSVRC2012_img_train.tar" in error
        assert [path.name for path in Path("data/imagenet_lt").iterdir()] == ["damaged.csv"]
        named = Path("data/imagenet_lt/damaged.csv").read_text()
        assert all(f"\n{path}," in named for path in listed[-2:]) and len(named.splitlines()) == 3

    (root / listed[-2]).write_bytes(whole[listed[-2]])
    assert f"{listed[-1]} cannot be read" in refused(capsys, *command)

    for path in listed[-3:-1]:
        (root / path).unlink()
    error = refused(capsys, *command)
    assert "2 of 33 images are missing" in error and listed[-3] in error and "ILSVRC2012_img_train.tar" in error

    shutil.rmtree(root / "val")
    for path, content in whole.items():
        (root / path).write_bytes(content)
    error = refused(capsys, *command)
    assert "is not there" in error and "ILSVRC2012_img_val.tar" in error and "val/{file}" in error


def test_mistakes_in_lists_are_named(workdir: Path, capsys) -> None:
    root = make_places_lt(workdir / "photos")
    list_file = root / "Places_LT_train.txt"
    text = list_file.read_text()
    command = ("places_lt", "--root", str(root), "--any_counts")
    first = text.splitlines()[0]
    for wrong, expected in {
        "": "is empty",
        text + "train/airfield/x.jpg\n": "train/airfield/x.jpg",
        text + "airfield/x.jpg 0\n": "airfield/x.jpg",
        text + "train/airfield/x.jpg -1\n": "-1",
        text + "train/airfield/00000000.jpg 3\n": "label 3",
        text + "train/beach/00000000.jpg 3\n": "label 3",
        text + "train/airfield/00000000.jpg 4\n": "label 4",
        text + "train/beach/00000000.jpg 5\n": "no image of class 4",
        first + "\n": "class 1 of places_lt has no training image",
        text.replace("train/", "Places/train/"): "begin with train or val",
    }.items():
        list_file.write_text(wrong)
        assert expected in refused(capsys, *command)
    list_file.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refused(capsys, *command)
    list_file.unlink()
    error = refused(capsys, *command)
    assert "Places_LT_train.txt: neither in data/places_lt nor in" in error and "Liu et al." in error
    broken = make_inat2018(workdir / "inat", in_json=True)
    (broken / "val2018.json").write_text('{"images": []}')
    assert "val2018.json cannot be read" in refused(capsys, "inat2018", "--root", str(broken), "--any_counts")


def test_what_is_missing_from_the_command_is_named(workdir: Path, capsys) -> None:
    for argv in ((), ("--root", "x"), ("imagenet", "--root", "x")):
        assert "imagenet_lt, places_lt, inat2018" in refused(capsys, *argv)
    for name, words in {
        "imagenet_lt": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "image-net.org", "ImageNet_LT_test.txt"),
        "places_lt": ("Places365-Standard", "easyformat", "places2.csail.mit.edu", "Places_LT_val.txt"),
        "inat2018": ("train_val2018.tar.gz", "train2018.json", "visipedia/inat_comp", "iNaturalist18_train.txt"),
    }.items():
        for flags in ((), ("--root", "nowhere")):
            error = refused(capsys, name, *flags)
            assert "--root" in error and all(word in error for word in words)
    assert "--cache 8" in refused(capsys, "places_lt", "--root", ".", "--cache", "8")
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--help"])
    assert ended.value.code == 0 and "DATASET" in capsys.readouterr().out


def test_a_second_run_ends_at_once(workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_places_lt(workdir / "photos")
    run("places_lt", root, "--cache", "16")
    made = Path("data/places_lt/manifest.npz").read_bytes()
    reads: list[Path] = []
    monkeypatch.setattr(scan, "read_content", lambda path: (reads.append(path), read_content(path))[1])
    for flags in ((), ("--cache", "16")):
        run("places_lt", root, *flags)
        assert "prepared already" in capsys.readouterr().out
    assert not reads and Path("data/places_lt/manifest.npz").read_bytes() == made

    images = sum(len(files.paths) for files in run("places_lt", root, "--verify").splits.values())
    assert len(reads) == images
    reads.clear()
    run("places_lt", root, "--cache", "24")  # once more, for the other side
    assert len(reads) == images and len(list(Path("data/places_lt").glob("*.npy"))) == 6

    first = root / "train/airfield/00000000.jpg"
    shutil.copy(root / "train/airfield/00000001.jpg", first)
    assert "another size than before" in refused(capsys, "places_lt", "--root", str(root), "--any_counts", "--verify")


def test_pixels_of_other_files_are_removed(workdir: Path) -> None:
    root = make_places_lt(workdir / "two")
    run("places_lt", make_places_lt(workdir / "one"), "--cache", "16")
    run("places_lt", root)
    assert [path.name for path in Path("data/places_lt").iterdir()] == ["manifest.npz"]
    run("places_lt", root, "--cache", "16")
    list_file = root / "Places_LT_train.txt"
    lines = list_file.read_text().splitlines()
    list_file.write_text("\n".join(lines[1:]))
    assert len(run("places_lt", root).splits["train"].paths) == len(lines) - 1
    assert [path.name for path in Path("data/places_lt").iterdir()] == ["manifest.npz"]


def changed(workdir: Path) -> Path:
    """A data set that was prepared with pixels; then the first two lines of its list change places."""
    root = make_places_lt(workdir / "photos")
    run("places_lt", root, "--cache", "16")
    list_file = root / "Places_LT_train.txt"
    first, second, *others = list_file.read_text().splitlines()
    list_file.write_text("\n".join([second, first, *others]))
    return root


def test_a_damaged_image_costs_nothing_that_was_good(workdir: Path, capsys) -> None:
    root = changed(workdir)
    before = {path.name: path.read_bytes() for path in Path("data/places_lt").iterdir()}
    (root / "val/zen_garden/Places365_val_00000011.jpg").write_bytes(b"damaged")
    error = refused(capsys, "places_lt", "--root", str(root), "--any_counts", "--cache", "16")
    assert "Places365_val_00000011.jpg" in error
    assert "Places365_val_00000011.jpg" in Path("data/places_lt/damaged.csv").read_text()
    Path("data/places_lt/damaged.csv").unlink()
    assert {path.name: path.read_bytes() for path in Path("data/places_lt").iterdir()} == before


def test_pixels_of_another_list_do_not_count_though_they_have_its_shape(workdir: Path, monkeypatch) -> None:
    root = changed(workdir)
    replace, shown = os.replace, ImageOptions(image_size=16, how="cache")

    def broken(source: Path, target: Path) -> None:
        if target.name == "manifest.npz":  # when all pixels have been renamed
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", broken)
        run("places_lt", root, "--cache", "16")
    assert len(list(Path("data/places_lt").iterdir())) == 4
    with pytest.raises(UsageError, match="no whole decoded pixels"):
        read_listed("places_lt", "data/", shown)
    made = run("places_lt", root, "--cache", "16")
    first = read_listed("places_lt", "data/", shown).train.images.store[0]
    image = resize(read_image(root / made.splits["train"].paths[0]), [16, 16], antialias=True)
    assert torch.equal(torch.tensor(np.array(first)), image.permute(1, 2, 0))


def test_a_damaged_manifest_is_made_again(workdir: Path) -> None:
    root = make_places_lt(workdir / "photos")
    run("places_lt", root)
    target = Path("data/places_lt/manifest.npz")
    target.write_bytes(target.read_bytes()[:-100])
    assert Manifest.load(target) is None
    run("places_lt", root)
    assert Manifest.load(target) is not None


def test_the_cache_holds_every_image_squashed(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_imagenet_lt(workdir / "photos")
    reads: list[Path] = []
    monkeypatch.setattr(scan, "read_content", lambda path: (reads.append(path), read_content(path))[1])
    monkeypatch.setattr(scan, "TURN", 5)
    made = run("imagenet_lt", root, "--cache", "20")
    assert len(reads) == sum(len(files.paths) for files in made.splits.values())  # one pass
    for split, files in made.splits.items():
        pixels = np.load(f"data/imagenet_lt/{split}_20.npy", mmap_mode="r")
        assert pixels.shape == (len(files.paths), 20, 20, 3) and pixels.dtype == np.uint8
        for row, path, size in zip(pixels, files.paths, files.sizes.tolist()):
            image = read_image(root / path)
            assert torch.equal(torch.tensor(row), resize(image, [20, 20], antialias=True).permute(1, 2, 0))
            assert size == list(image.shape[1:])

    target = Path("data/imagenet_lt/val_20.npy")
    whole = target.read_bytes()
    target.write_bytes(whole[:-1])
    reads.clear()
    run("imagenet_lt", root, "--cache", "20")
    assert target.read_bytes() == whole and len(reads) == len(made.splits["val"].paths)


def test_a_disk_without_room(workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_places_lt(workdir / "photos")
    usage = shutil.disk_usage(root)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        error = refused(capsys, "places_lt", "--root", str(root), "--any_counts", "--cache", "64")
        assert "--cache 64 needs 0.00 GB" in error and "more room" in error

    def full(sizes: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scan, "_gather", full)
    with pytest.raises(SystemExit) as ended:
        run("places_lt", root, "--cache", "64")
    assert ended.value.code == 1 and "No space left" in capsys.readouterr().err
    assert [path.name for path in Path("data/places_lt").iterdir()] == []


def test_the_command_line(workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_places_lt(workdir / "photos")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "places_lt", "--root", "photos", "--any_counts"])
    runpy.run_path(str(ROOT / "datasets" / "prepare.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert "not the published" in shown.out and not shown.err
    assert Manifest.load("data/places_lt/manifest.npz").root == str(root)


@pytest.mark.parametrize(
    "name, images, groups",
    [
        ("imagenet_lt", 115_846, (385, 479, 136)),
        ("places_lt", 62_500, (131, 163, 71)),
        ("inat2018", 437_513, (842, 4076, 3224)),
    ],
)
def test_the_published_counts(name: str, images: int, groups: tuple[int, ...]) -> None:
    counts = COUNTS[name]["train"]
    assert sum(counts) == images
    assert tuple(sum(group_of(n) == group for n in counts) for group in GROUPS) == groups
    assert len(counts) == sum(groups) == published.num_classes(name)
    assert set(COUNTS[name]) == set(PUBLISHED[name].lists)


@needs_lists
def test_the_published_lists_are_accepted(tmp_path: Path) -> None:
    found = {}
    for packed in (SHARED / "lists").glob("*.txt.xz"):
        file = tmp_path / packed.stem
        file.write_bytes(lzma.decompress(packed.read_bytes()))
        found[packed.stem] = read_list(file)
        assert digest(*found[packed.stem]) == published.hashlib.sha256(file.read_bytes()).hexdigest()
    places = {split: found[f"Places_LT_{split}.txt"] for split in ("train", "val", "test")}
    assert difference("places_lt", {split: labels for split, (_, labels) in places.items()}) is None
    assert len(class_folders(places)) == 365
    for name, split, file in [
        ("imagenet_lt", "val", "ImageNet_LT_val.txt"),
        ("imagenet_lt", "test", "ImageNet_LT_test.txt"),
        ("inat2018", "test", "iNaturalist18_val.txt"),
    ]:
        counts = torch.bincount(found[file][1])
        assert len(counts) == published.num_classes(name) and set(counts.tolist()) == {COUNTS[name][split]}

    imagenet = class_folders({split: found[f"ImageNet_LT_{split}.txt"] for split in ("val", "test")})
    names = PUBLISHED["imagenet_lt"].names(imagenet, lambda _: None)
    assert (imagenet[0], names[0], imagenet[134], names[134]) == ("n01440764", "tench", "n02012849", "crane bird")
    assert len(set(names)) == 1000


def test_names_of_imagenets_classes_follow_their_folders() -> None:
    folders = [f"n{number:08d}" for number in range(1000)]
    names = PUBLISHED["imagenet_lt"].names(folders, lambda _: None)
    assert names[:3] == ["tench", "goldfish", "great white shark"] and len(set(names)) == 1000
    backwards = PUBLISHED["imagenet_lt"].names(folders[::-1], lambda _: None)
    assert backwards[::-1] == names  # in whatever order the labels have them
