"""Data of one's own as it really lies about: what is read of it, what is left out, and that both are said."""

from __future__ import annotations

import io
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_own import COLOURS, make_folder, paint, read

import datasets
import evaluate
import main_stage1
import main_stage2
import predict
from datasets import ImageOptions, known_class_names, prepare
from datasets.files import image_size, read_image
from models import build_model
from utils import checkpoints
from utils.errors import UsageError
from utils.plots import Pictured
from utils.readers import sealed

QUICK = ["--network", "resnet8", "--epochs", "1", "--seed", "0", "--workers", "0"]


def train(kind: str, place: str, *more: str) -> checkpoints.Checkpoint:
    main_stage1.main(["--dataset", kind, "--data_dir", place, *QUICK, *more])
    name = f"{kind}-{Path(place).stem if kind != 'folder' else Path(place).name}"
    return checkpoints.read(f"checkpoints/{name}_natural_resnet8_stage1.pt")


# Another model answers


@pytest.mark.parametrize(("first", "second"), [("a/data", "b/data"), ("x/y/pets", "x/z/pets")])
def test_a_file_of_other_data_of_the_same_name_is_refused(first: str, second: str, workdir) -> None:
    make_folder(Path(first))
    make_folder(Path(second))
    for split in ("train", "test"):
        os.rename(f"{second}/{split}/red", f"{second}/{split}/wasp")
    train("folder", first)
    train("folder", second)
    with pytest.raises(SystemExit) as ended:
        predict.main([f"{first}/test/red", "--dataset", "folder", "--data_dir", first, "--network", "resnet8"])
    assert ended.value.code == 2
    found = predict.main([f"{second}/test/blue", "--dataset", "folder", "--data_dir", second, "--network", "resnet8"])
    assert {top["name"] for top in found[0]["top"]} == {"blue", "green", "wasp"}


def test_other_images_of_the_same_classes_are_said(workdir, capsys) -> None:
    make_folder(Path("a/data"))
    make_folder(Path("b/data"), train=(9, 4, 2))
    train("folder", "b/data")
    capsys.readouterr()
    predict.main(["a/data/test/red", "--dataset", "folder", "--data_dir", "a/data", "--network", "resnet8"])
    assert "the images in a/data are not those" in capsys.readouterr().out
    predict.main(["a/data/test/red", "--dataset", "folder", "--data_dir", "b/data", "--network", "resnet8"])
    assert "are not those" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run[12]", "pets [2020]", "a*", "what?"])
def test_a_folder_s_name_is_no_pattern(name: str, workdir) -> None:
    for other in ("run1", "ab", "whatx"):
        make_folder(Path(other))
        train("folder", other)
    make_folder(Path(name), train=(9, 4, 2))
    with pytest.raises(SystemExit):  # others' files do not stand in
        evaluate.main(["--dataset", "folder", "--data_dir", name, "--workers", "0"])
    train("folder", name)
    result = evaluate.main(["--dataset", "folder", "--data_dir", name, "--workers", "0"])
    assert result["class_counts"] == [2, 4, 9]


# The picture is what the user sees


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("how", range(1, 9))
def test_an_image_is_turned_as_exif_says(suffix: str, how: int, tmp_path) -> None:
    upright = Image.fromarray(np.random.default_rng(how).integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((40, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that a viewer's turn takes back
    stored = upright if how == 1 else upright.transpose(Image.Transpose(undo[how]))
    exif = Image.Exif()
    exif[0x0112] = how
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif.tobytes() if suffix != "tif" else exif, quality=100, subsampling=0, lossless=True)
    shown = read_image(path)
    assert shown.shape == (3, 24, 40) and image_size(path) == (24, 40)
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert (shown.int() - wanted.int()).abs().double().mean() < (4 if suffix == "jpg" else 1e-9)


@pytest.mark.parametrize("scale", [1, 16, 257])
def test_the_range_of_16_bit_images_is_the_training_images_own(scale: int, workdir) -> None:
    generator = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 10)):
        for k in range(2):
            folder = Path("d", split, f"c{k}")
            folder.mkdir(parents=True)
            for i in range(number):
                grey = 100 + generator.integers(0, 20, (16, 16))
                grey[4:12, 4:12] += 60 * k
                Image.fromarray((grey * scale).astype(np.uint16)).save(folder / f"{i}.png")
    file = train("folder", "d", "--epochs", "8", "--batch_size", "8")
    assert file.metrics["top1"] == 1
    low, high = file.data["levels"]
    assert (low, high) == (100 * scale, high) and 170 * scale < high <= 179 * scale
    found = predict.main(["d/test", "--dataset", "folder", "--data_dir", "d", "--network", "resnet8"])
    assert all(each["top"][0]["name"] == Path(each["path"]).parent.name for each in found)
    result = evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0"])
    assert result["top1"] == 1
    data = read("folder", "d", levels=(0, 65535))
    assert data.train.images.max() == round(high / 257)
    with pytest.raises(SystemExit):
        evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0", "--range", "0", "5"])


def test_a_16_bit_image_among_others_has_the_full_range(workdir) -> None:
    make_folder(Path("d"))
    grey = np.array(paint("red", 12, 0).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save("d/train/red/z.png")
    data = read("folder", "d")
    assert data.spec.levels is None and torch.equal(data.train.images[-1][0], torch.from_numpy(grey))


def test_images_that_are_gone_are_other_images(workdir, capsys) -> None:
    write_csv(["a", "b"])
    train("csv", "x.csv")
    Path("0_0.png").unlink()
    capsys.readouterr()
    predict.main(["1_0.png", "--dataset", "csv", "--data_dir", "x.csv", "--network", "resnet8"])
    assert "the images in x.csv are not those" in capsys.readouterr().out


# What is not read is counted


def said(capsys) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("found "))


@pytest.mark.parametrize("link", ["a folder", "a file", "a class"])
def test_links_are_followed(link: str, workdir) -> None:
    make_folder(Path("d"))
    shutil.copytree("d/train/red", "store")
    shutil.rmtree("d/test/red")
    if link == "a folder":
        os.symlink(Path("store").resolve(), "d/train/red/more")
    elif link == "a file":
        os.symlink(Path("store/0.png").resolve(), "d/train/red/more.png")
    os.symlink(Path("store").resolve(), "d/test/red")
    data = read("folder", "d")
    assert data.class_counts[2] == 8 + {"a folder": 8, "a file": 1, "a class": 0}[link]
    assert torch.bincount(data.test.labels).tolist() == [3, 3, 8]


def test_a_link_to_where_one_is_ends(workdir, capsys) -> None:
    make_folder(Path("d"))
    os.symlink(Path("d/train").resolve(), "d/train/red/all")
    os.symlink(Path("d/train/red").resolve(), "d/train/red/itself")
    assert read("folder", "d").class_counts == [2, 4, 8]
    assert "2 links to a folder that they lie in (d/train/red/all)" in said(capsys)


@pytest.mark.parametrize("name", [".ipynb_checkpoints/0.png", "._0.png", ".thumbs/a/b/0.jpg"])
def test_hidden_files_and_folders_are_left_out(name: str, workdir, capsys) -> None:
    make_folder(Path("d"))
    for split in ("train", "test"):
        path = Path("d", split, "red", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("d/train/red/0.png", path)
    data = read("folder", "d")
    assert data.class_counts == [2, 4, 8] and len(data.test) == 9
    what = "in hidden folders" if "/" in name else "hidden"
    assert f"left out: 2 {what} (d/train/red/{name.split('/')[0]})" in said(capsys)
    path = Path("new", name)
    path.parent.mkdir(parents=True)
    shutil.copy("d/train/red/0.png", path)
    shutil.copy("d/train/red/0.png", "new/seen.png")
    file = train("folder", "d")
    found = predict.main(["new", "--pretrained_pth", str(file.path)])
    assert [each["path"] for each in found] == ["new/seen.png"]


@pytest.mark.parametrize("suffix", ["jfif", "ppm", "PGM", "bmp", "TIFF", "jp2", "ico", ""])
def test_whatever_pillow_reads_is_an_image(suffix: str, workdir, capsys) -> None:
    make_folder(Path("d"))
    content = io.BytesIO()
    kind = {"jfif": "JPEG", "jp2": "JPEG2000", "": "PNG", "ico": "ICO"}.get(suffix, {"PGM": "PPM"}.get(suffix, suffix))
    paint("red", 16, 50).save(content, kind.upper())
    Path(f"d/train/red/x.{suffix}".rstrip(".")).write_bytes(content.getvalue())
    Path("d/train/red/notes.txt").write_text("no image")
    Path("d/train/red/LICENSE").write_text("no image either")
    assert read("folder", "d").class_counts == [2, 4, 9]
    assert "left out: 2 of other kinds (d/train/red/LICENSE)" in said(capsys)


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_names_of_the_validation_folder(name: str, workdir, capsys) -> None:
    make_folder(Path("d"))
    shutil.copytree("d/test", f"d/{name}")
    data = read("folder", "d")
    assert data.val is not None and len(data.val) == 9
    assert "9 of 9 test images are val images too" in capsys.readouterr().out
    shutil.rmtree("d/test")
    assert read("folder", "d").val is None
    assert "those to validate on are the test set" in capsys.readouterr().out
    shutil.copytree(f"d/{name}", "d/VALID" if name != "valid" else "d/val")
    with pytest.raises(UsageError, match="more than one folder of val images"):
        read("folder", "d")


def test_images_and_folders_beside_the_classes_are_counted(workdir, capsys) -> None:
    make_folder(Path("d"))
    for k in range(4):
        paint("red", 12, k).save(f"d/train/loose{k}.png")
    Path("d/extra").mkdir()
    assert read("folder", "d").class_counts == [2, 4, 8]
    words = said(capsys)
    assert "4 beside the class folders (d/train/loose0.png)" in words and " in folders that are no split (" in words


@pytest.mark.parametrize("is_shared", [False, True])
def test_which_level_is_the_class(is_shared: bool, workdir, capsys) -> None:
    for split in ("train", "test"):
        for group, names in (("animals", ("wolf", "lynx")), ("plants", ("oak", "wolf" if is_shared else "elm"))):
            for k, name in enumerate(names):
                folder = Path("d", split, group, name)
                folder.mkdir(parents=True)
                for i in range(2):
                    paint("red", 12, hash((split, group, k, i)) % 1000).save(folder / f"{i}.png")
    assert read("folder", "d").class_names == ["animals", "plants"]
    assert "--class_level 2" in capsys.readouterr().out
    names = ["animals/wolf", "lynx", "oak", "plants/wolf"] if is_shared else ["elm", "lynx", "oak", "wolf"]
    assert read("folder", "d", class_level=2).class_names == names
    with pytest.raises(UsageError, match="no train images"):
        read("folder", "d", class_level=3)
    train("folder", "d", "--class_level", "2")
    result = evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0"])
    assert result["class_names"] == names


# Train and test share images


@pytest.mark.parametrize("how", ["copies", "links", "spellings"])
def test_shared_images_are_said_and_can_be_dropped(how: str, workdir, capsys) -> None:
    make_folder(Path("d"))
    rows = [f"{path},{path.parent.name},{path.parts[1]}" for path in sorted(Path("d").glob("*/*/*.png"))]
    for path in sorted(Path("d/test/red").iterdir()):
        target = Path("d/train/red", f"x{path.name}")
        if how == "copies":
            shutil.copy(path, target)
        elif how == "links":
            os.symlink(path.resolve(), target)
        else:
            rows.append(f"./d/../{path},red,train")
    Path("d.csv").write_text("\n".join(["path,label,split", *rows]))
    kind, place = ("csv", "d.csv") if how == "spellings" else ("folder", "d")
    colours = list(COLOURS)  # test images are the first of each class: paint(name, side, i) is the same in both splits
    assert read(kind, place).class_counts == [2, 4, 11] and len(colours) == 3
    out = capsys.readouterr().out
    assert "of 9 test images are train images too" in out and "--drop_duplicates takes them out" in out


def test_dropped_images_are_in_no_other_split(workdir, capsys) -> None:
    make_folder(Path("d"), train=(8, 6, 5))
    for name in COLOURS:
        for k in range(3):
            paint(name, 12, 100 + k).save(f"d/test/{name}/{k}.png")
    shutil.copy("d/test/red/0.png", "d/train/red/copy.png")
    file = train("folder", "d", "--drop_duplicates")
    assert file.data["class_counts"] == [5, 6, 8] and "taken out of training" in capsys.readouterr().out
    assert evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0"])["class_counts"] == [5, 6, 8]
    arrays = {f"{split}_images": np.zeros((4, 8, 8), np.uint8) for split in ("train", "test")}
    for k in range(4):
        arrays["train_images"][k] += k
        arrays["test_images"][k] += k + 3
    np.savez("x.npz", train_labels=np.arange(4) % 2, test_labels=np.arange(4) % 2, **arrays)
    assert read("npz", "x.npz").class_counts == [2, 2]
    assert "train_images[3]" in capsys.readouterr().out
    assert read("npz", "x.npz", drop_duplicates=True).class_counts == [2, 1]
    with pytest.raises(UsageError, match="leaves class"):
        np.savez("x.npz", train_labels=np.arange(4), test_labels=np.arange(4), **arrays)
        read("npz", "x.npz", drop_duplicates=True)


# Labels as text


def write_csv(labels: list[str], twice: int = 0) -> None:
    rows = []
    for k, label in enumerate(labels):
        for i, split in enumerate(("train", "train", "test")):
            image = Image.fromarray(np.random.default_rng(3 * k + i).integers(0, 256, (12, 12, 3), dtype=np.uint8))
            image.save(f"{k}_{i}.png")
            rows.append(f"{k}_{i}.png,{label},{split}")
    Path("x.csv").write_text("\n".join(["path,label,split", *rows, *[rows[0]] * twice]))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([f"{k}.0" for k in range(12)], [str(k) for k in range(12)]),
        (["10", "9.", "2.00"], ["2", "9", "10"]),
        (["1.5", "10", "2"], ["2", "10", "1.5"]),
        ([" oak", "elm ", "ash"], ["ash", "elm", "oak"]),
    ],
)
def test_labels_are_numbers_where_all_are(labels: list[str], names: list[str], workdir) -> None:
    write_csv(labels)
    assert read("csv", "x.csv").class_names == names


def test_forms_of_a_name_are_one_class(workdir, capsys) -> None:
    write_csv(["caf\u00e9", "cafe\u0301", "tea"])
    assert read("csv", "x.csv").class_counts == [4, 2]
    write_csv(["Cat", "cat"])
    assert read("csv", "x.csv").class_names == ["Cat", "cat"]
    assert "Cat and cat are two classes" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["", "nan", "NaN", "None", "<NA>", "  "])
def test_a_missing_label_is_refused_with_its_row(label: str, workdir) -> None:
    write_csv(["0", label, "1"])
    with pytest.raises(UsageError, match=r"x\.csv, line 5: 1_0\.png has no label"):
        read("csv", "x.csv")


def test_negative_labels_are_refused(workdir) -> None:
    write_csv(["0", "-1", "1"])
    with pytest.raises(UsageError, match="label -1"):
        read("csv", "x.csv")
    images = np.zeros((2, 8, 8), np.uint8)
    np.savez("x.npz", train_images=images, train_labels=[-1, 0], test_images=images, test_labels=[0, 0])
    with pytest.raises(UsageError, match="train_labels has -1"):
        read("npz", "x.npz")


def test_repeated_rows_count_once(workdir, capsys) -> None:
    write_csv(["a", "b"], twice=5)
    assert read("csv", "x.csv").class_counts == [2, 2]
    assert "left out: 5 repeated rows (x.csv, line 8)" in said(capsys)


# Names, splits that do not fit, damaged files


@pytest.mark.parametrize("names", [("$", "$$", "$$$"), ("<b>", "=1+1", "a|b"), ("\\frac", "{x}", "_^")])
def test_a_name_is_no_markup(names: tuple[str, ...], workdir) -> None:
    make_folder(Path("d"))
    for split in ("train", "test"):
        for old, new in zip(COLOURS, names):
            os.rename(f"d/{split}/{old}", f"d/{split}/{new}")
    file = train("folder", "d")
    [run] = Path("output").glob("*/*")
    assert sorted(file.data["class_names"]) == sorted(names) and (run / "per_class.png").is_file()


def test_names_that_are_not_utf8(workdir) -> None:
    make_folder(Path("d"))
    os.rename(b"d/train/red/0.png", b"d/train/red/\xe9t\xe9.png")
    for split in (b"train", b"test"):
        os.rename(b"d/" + split + b"/blue", b"d/" + split + b"/p\xe9che")
    train("folder", "d")
    [run] = Path("output").glob("*/*")
    assert (run / "per_class.png").is_file()
    assert evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0"])["class_counts"] == [4, 2, 8]
    found = predict.main(["d/train/red", "--dataset", "folder", "--data_dir", "d", "--csv", "x.csv"])
    assert len(found) == 8 and all(each["error"] is None for each in found)


@pytest.mark.parametrize("grey", ["train", "test"])
def test_grey_and_colour_splits_become_colour(grey: str, workdir, capsys) -> None:
    generator = np.random.default_rng(0)
    shapes = {split: (6, 16, 16) if split == grey else (6, 16, 16, 3) for split in ("train", "test")}
    arrays = {f"{split}_images": generator.integers(0, 255, shape).astype(np.uint8) for split, shape in shapes.items()}
    np.savez("x.npz", train_labels=np.arange(6) % 3, test_labels=np.arange(6) % 3, **arrays)
    data = read("npz", "x.npz")
    assert data.train.channels == data.test.channels == 3 and f"note: {grey} images are grey" in capsys.readouterr().out
    part = data.train if grey == "train" else data.test
    pixels = part.images[part.indices.argsort()]
    assert torch.equal(pixels[:, 0], torch.from_numpy(arrays[f"{grey}_images"])) and torch.equal(
        pixels[:, 0], pixels[:, 2]
    )


def test_splits_of_other_sizes_are_scaled_and_said(workdir, capsys) -> None:
    images = np.zeros((4, 16, 16), np.uint8)
    np.savez(
        "x.npz", train_images=images, train_labels=[0, 1, 0, 1], test_images=images[:, :8, :8], test_labels=[0, 1, 0, 1]
    )
    assert read("npz", "x.npz").test.images.shape[2:] == (16, 16)
    assert "images of several sizes (train 16 x 16, test 8 x 8)" in capsys.readouterr().out


@pytest.mark.parametrize("deep", [1, 4])
def test_class_level_is_offered_wherever_images_lie_deeper(deep: int, workdir, capsys) -> None:
    make_folder(Path("d"))
    Path("d/train/red/inside").mkdir()
    images = sorted(Path("d/train/red").glob("*.png"))
    for path in images[:deep]:
        path.rename(path.parent / "inside" / path.name)
    every = len(list(Path("d/train").rglob("*.png")))
    read("folder", "d")
    words = capsys.readouterr().out
    assert f"note: {deep} of {every} training images lie in folders inside the class folders" in words
    assert "--class_level 2" in words


@pytest.mark.parametrize("side", [12, 90])
def test_damaged_files_are_named_at_once_and_can_be_skipped(side: int, workdir, capsys) -> None:
    make_folder(Path("d"), side=side)
    for i in (1, 3, 5):
        Path(f"d/train/red/{i}.png").write_bytes(b"")
    half = Path("d/test/green/1.png")
    half.write_bytes(half.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"4 images cannot be read, the first: image .*d/train/red/1\.png") as refused:
        read("folder", "d")
    listed = Path(str(refused.value.args[0]).rpartition("all are in ")[2]).read_text().splitlines()
    assert len(listed) == 5 and listed[4].startswith("test/green/1.png,")
    data = read("folder", "d", skip_damaged=True)
    assert data.class_counts == [2, 4, 5] and len(data.test) == 8
    capsys.readouterr()
    assert read("folder", "d", skip_damaged=True).class_counts == [2, 4, 5]
    assert "--skip_damaged: 11 train, 8 test images are read, 4 damaged ones are left out" in capsys.readouterr().out
    with pytest.raises(UsageError, match="4 images cannot be read"):
        read("folder", "d")
    if side == 12:
        file = train("folder", "d", "--skip_damaged")
        assert file.options["skip_damaged"] is True
        assert evaluate.main(["--dataset", "folder", "--data_dir", "d", "--workers", "0"])["class_counts"] == [2, 4, 5]
    else:
        made = prepare.main(["folder", "--root", "d", "--cache", "32", "--skip_damaged"])
        data = read("folder", "d", skip_damaged=True, how="cache", image_size=80)
        assert len(made.skipped) == 4 and data.train.images.store.shape == (11, 32, 32, 3)


def test_a_class_of_damaged_files_alone_is_refused(workdir) -> None:
    make_folder(Path("d"))
    for path in Path("d/train/blue").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"has no training image \(blue\)"):
        read("folder", "d", skip_damaged=True)


def test_predict_has_a_row_for_every_file(workdir) -> None:
    make_folder(Path("d"))
    file = train("folder", "d")
    Path("new").mkdir()
    paint("red", 12, 9).save("new/a.png")
    Path("new/b.png").write_bytes(b"")
    predict.main(["new", "--pretrained_pth", str(file.path), "--top_k", "2", "--csv", "o.csv"])
    rows = Path("o.csv").read_text().splitlines()
    assert rows[0].endswith(",error") and [row.split(",")[0] for row in rows[1:]] == ["new/a.png"] * 2 + ["new/b.png"]
    assert "cannot be read" in rows[3]


def test_weights_of_safetensors_are_read(workdir) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    make_folder(Path("d"), side=80)
    torch.manual_seed(0)
    state = resnet18(num_classes=3).state_dict()
    save_file(state, "model.safetensors")
    found = predict.main(["d/test/red", "--pretrained_pth", "model.safetensors"])
    torch.save(state, "model.pth")
    assert found == predict.main(["d/test/red", "--pretrained_pth", "model.pth"])
    blob = Path("model.safetensors").read_bytes()
    Path("model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(SystemExit) as ended:
        predict.main(["d/test/red", "--pretrained_pth", "model.safetensors"])
    assert ended.value.code == 2


# Weights, and what they were trained with


def test_weights_bring_their_constants(workdir, capsys) -> None:
    from torchvision.models import resnet18

    make_folder(Path("d"), side=80)
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=3).state_dict(), "theirs.pth")
    quick = [*QUICK[2:], "--image_size", "72", "--network", "resnet18", "--batch_size", "7"]
    main_stage1.main(["--dataset", "folder", "--data_dir", "d", "--pretrained_pth", "theirs.pth", *quick])
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (theirs.pth's weights)" in " ".join(
        capsys.readouterr().out.split()
    )
    file = checkpoints.read("checkpoints/folder-d_natural_resnet18_stage1.pt")
    assert file.data["mean"] == [0.485, 0.456, 0.406]
    make_folder(Path("e"), side=80, train=(3, 3, 3))
    main_stage1.main(["--dataset", "folder", "--data_dir", "e", "--pretrained_pth", str(file.path), *quick])
    assert checkpoints.read("checkpoints/folder-e_natural_resnet18_stage1.pt").data["mean"] == [0.485, 0.456, 0.406]
    given = ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    main_stage1.main(["--dataset", "folder", "--data_dir", "e", "--pretrained_pth", "theirs.pth", *quick, *given])
    assert checkpoints.read("checkpoints/folder-e_natural_resnet18_stage1.pt").data["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("classes", "mean"), [(8142, "0.466 0.471 0.38"), (1000, "0.485 0.456 0.406")])
def test_predict_normalises_as_the_weights_were_trained(classes: int, mean: str, workdir, capsys) -> None:
    from torchvision.models import resnet18

    torch.save(resnet18(num_classes=classes).state_dict(), "theirs.pth")
    paint("red", 80, 0).save("x.png")
    predict.main(["x.png", "--pretrained_pth", "theirs.pth"])
    assert f"mean {mean}, std" in capsys.readouterr().out


@pytest.mark.parametrize("extra", ["criterion.weight", "module.loss.counts", "optimizer.state.0.exp_avg"])
def test_buffers_beside_the_network_are_left_out_and_named(extra: str, workdir, capsys) -> None:
    from torchvision.models import resnet18

    paint("red", 80, 0).save("x.png")
    state = resnet18(num_classes=5).state_dict()
    torch.save(state, "plain.pth")
    torch.save(state | {extra: torch.ones(5)}, "more.pth")
    found = predict.main(["x.png", "--pretrained_pth", "more.pth"])
    assert f"without {extra}" in capsys.readouterr().out
    assert found == predict.main(["x.png", "--pretrained_pth", "plain.pth"])


@pytest.mark.parametrize("classes", [1000, 365, 8142])
def test_mislas_renumbered_classes_are_refused(classes: int, workdir, capsys) -> None:
    from torchvision.models import resnet18

    state = resnet18(num_classes=classes).state_dict()
    model = {f"module.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    head = {f"module.{name}": value for name, value in state.items() if name.startswith("fc.")}
    torch.save({"state_dict_model": model, "state_dict_classifier": head}, "mislas.pth.tar")
    paint("red", 80, 0).save("x.png")
    with pytest.raises(SystemExit):
        predict.main(["x.png", "--pretrained_pth", "mislas.pth.tar"])
    assert "whose data sets number the" in capsys.readouterr().err


# Found by a reviewer: kinds that a checksum of one part, or a check of types alone, does not see


def test_decoded_pixels_that_are_damaged_are_not_used(workdir) -> None:
    make_folder(Path("d"), side=80)
    prepare.main(["folder", "--root", "d", "--cache", "48"])
    [path] = Path("cache/images").glob("*/train_48.npy")
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    with pytest.raises(UsageError, match="there are no whole decoded pixels"):
        read("folder", "d", how="cache", image_size=72)
    prepare.main(["folder", "--root", "d", "--cache", "48"])  # makes them anew
    assert read("folder", "d", how="cache", image_size=72).train.images.store.shape == (14, 48, 48, 3)


def test_statistics_that_are_damaged_are_made_anew(workdir) -> None:
    make_folder(Path("d"), side=80)
    mean = read("folder", "d").spec.mean
    [path] = Path("cache/images").glob("*/statistics_224.json")
    text = path.read_text()
    digit = text.index(str(mean[0])) + 2
    path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert read("folder", "d").spec.mean == mean
    path.write_text(sealed(["another", [0.5] * 3, [0.5] * 3]))  # of another data set
    assert read("folder", "d").spec.mean == mean


@pytest.mark.parametrize("change", ["names", "home", "split"])
def test_a_manifest_s_head_is_checked_too(change: str, workdir) -> None:
    from datasets.files import Manifest

    make_folder(Path("d"), side=80)
    counts = read("folder", "d").class_counts
    [path] = Path("cache/images").glob("*/manifest.npz")
    made = Manifest.load(path)
    assert made is not None
    if change == "names":
        made.class_names.reverse()
    elif change == "home":
        made.about["home"] = "../elsewhere"
    else:
        del made.splits["test"]
    made.write(path)  # with a right checksum
    data = read("folder", "d")
    assert data.class_names == ["blue", "green", "red"] and data.class_counts == counts and len(data.test) == 9
    assert not Path("../elsewhere").exists()


@pytest.mark.parametrize("name", ["hf-hub:x/y", "local-dir:..", "", "../x"])
def test_a_network_s_name_starts_no_download(name: str, workdir) -> None:
    make_folder(Path("d"))
    file = train("folder", "d")
    content = torch.load(str(file.path), weights_only=True)
    content["network"] = content["data"]["network"] = content["options"]["network"] = f"timm:{name}"
    content["checksum"] = checkpoints.checksum(content)
    torch.save(content, "forged.pt")
    with pytest.raises(SystemExit) as ended:
        predict.main(["d/test/red", "--pretrained_pth", "forged.pt"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["data"].update(imb_ratio=10**400),
        lambda c: [part.update(dataset="zz") for part in (c["data"], c["options"])],
        lambda c: c["model"]["bn1.running_var"].fill_(-1),
        lambda c: c["data"]["class_names"].__setitem__(0, "\ud800"),
        lambda c: c.update(parent={"path": "a\0b", "sha256": None}),
        lambda c: c["model"].update({"fc.weight": torch.full_like(c["model"]["fc.weight"], 3e38)}),
        lambda c: c["data"].update(image_size=4096),
    ],
    ids=["ratio", "data set", "negative variance", "surrogate", "NUL", "logits beyond float32", "side"],
)
def test_a_forged_file_is_refused(change, workdir) -> None:
    make_folder(Path("d"))
    file = train("folder", "d")
    content = torch.load(str(file.path), weights_only=True)
    change(content)
    content["checksum"] = checkpoints.checksum(content)
    torch.save(content, "forged.pt")
    with pytest.raises(SystemExit) as ended:
        predict.main(["d/test/red", "--pretrained_pth", "forged.pt"])
    assert ended.value.code == 2


def test_a_lock_of_another_program_stays(workdir) -> None:
    make_folder(Path("d"))
    file = train("folder", "d")
    for name, content in ((".myapp.lock", "mine"), (".poetry.lock", ""), (".old.csv.lock", "process 1 on x since y")):
        Path(name).write_text(content)
    predict.main(["d/test/red", "--pretrained_pth", str(file.path), "--csv", "o.csv"])
    assert Path(".myapp.lock").exists() and Path(".poetry.lock").exists() and not Path(".old.csv.lock").exists()


def test_a_photo_is_not_replaced_by_a_contact_sheet(workdir) -> None:
    make_folder(Path("d"))
    file = train("folder", "d")
    paint("red", 12, 0).save("photo.png")
    os.symlink("loop", "loop")
    for more in (["--plot", "photo.png"], ["--csv", "loop"]):
        with pytest.raises(SystemExit):
            predict.main(["d/test/red", "--pretrained_pth", str(file.path), *more])
    for _ in range(2):  # an earlier report is replaced
        predict.main(["d/test/red", "--pretrained_pth", str(file.path), "--plot", "o.png", "--json", "o.json"])


def test_labels_of_thousands_of_digits_are_names(workdir) -> None:
    write_csv(["9" * 5000, "1"])
    assert read("csv", "x.csv").class_names == ["1", "9" * 5000]


# No split at hand


@pytest.mark.parametrize("layout", ["class folders", "train alone", "CSV without split", "CSV of train rows"])
def test_a_test_set_is_split_off(layout: str, workdir, capsys) -> None:
    make_folder(Path("d"), train=(20, 5, 1))
    shutil.rmtree("d/test")
    kind, place = "folder", "d"
    if layout == "class folders":
        for name in COLOURS:
            os.rename(f"d/train/{name}", f"d/{name}")
        os.rmdir("d/train")
    elif layout.startswith("CSV"):
        rows = [f"{path},{path.parent.name}" for path in sorted(Path("d/train").glob("*/*.png"))]
        more = (",split", ",train") if layout.endswith("rows") else ("", "")
        Path("x.csv").write_text("\n".join([f"path,label{more[0]}", *(row + more[1] for row in rows)]))
        kind, place = "csv", "x.csv"
    with pytest.raises(UsageError) as refused:
        read(kind, place)
    assert "--test_split 0.2" in str(refused.value) or layout == "CSV without split"
    file = train(kind, place, "--test_split", "0.2")
    assert file.data["class_counts"] == [1, 4, 16] and len(file.data["test_files"]) == 5
    assert "5 of the images are the test set" in capsys.readouterr().out
    again = read(kind, place, test_split=0.2)
    assert again.spec.test_files == tuple(file.data["test_files"])
    assert read(kind, place, test_split=0.2, test_seed=1).spec.test_files != again.spec.test_files
    result = evaluate.main(["--dataset", kind, "--data_dir", place, "--workers", "0"])
    assert result["top1"] == file.metrics["top1"] and result["class_counts"] == [1, 4, 16]


def test_a_test_set_that_is_there_is_not_split(workdir) -> None:
    make_folder(Path("d"))
    with pytest.raises(UsageError, match="d has test images"):
        read("folder", "d", test_split=0.2)


def test_the_contact_sheet_has_every_answer(workdir, monkeypatch) -> None:
    make_folder(Path("d"), train=(20, 15, 9))
    file = train("folder", "d", "--epochs", "6", "--batch_size", "8")
    Path("new/red").mkdir(parents=True)
    Path("new/odd").mkdir()
    for k in range(60):
        paint("red", 12, 200 + k).save(f"new/red/{k}.png")
    paint("blue", 12, 300).save("new/red/wrong.png")
    paint("green", 12, 301).save("new/odd/x.png")
    sheets: list[list[predict.Pictured]] = []
    monkeypatch.setattr(predict, "contact_sheet", lambda images, path: (sheets.append(images), path.write_bytes(b"")))
    found = predict.main(["new", "--pretrained_pth", str(file.path), "--plot", "o.png"])
    answers = {Path(each["path"]).name: each["top"][0]["name"] for each in found}
    assert answers["wrong.png"] == "blue" and answers["x.png"] == "green"
    seen = {each.words.split("\n")[1]: each for each in sheets[0]}
    assert len(sheets[0]) == predict.SHOWN_OF_CLASS + 2
    assert seen["wrong.png"].is_right is False and seen["wrong.png"].words.endswith("is red")
    assert seen["x.png"].is_right is None and seen["0.png"].is_right is True


# What of it networks see


def wide_folder(place: Path, height: int, width: int) -> None:
    """Three classes told apart by a stripe at the left end alone, which a square in the centre does not show."""
    for split, number in (("train", 6), ("test", 3)):
        for name, colour in COLOURS.items():
            folder = place / split / name
            folder.mkdir(parents=True)
            for k in range(number):
                pixels = np.full((height, width, 3), 90 + k, dtype=np.uint8)
                pixels[:, : width // 8] = colour
                Image.fromarray(pixels).save(folder / f"{k}.png")


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("height", "width"), [(16, 64), (100, 300)])
def test_what_is_shown_of_a_wide_image_is_chosen_and_kept(fit: str, height: int, width: int, workdir, capsys) -> None:
    wide_folder(Path("wide"), height, width)
    size = ["--image_size", "80"] if height > 64 else []
    file = train("folder", "wide", "--fit", fit, "--no_flip", *size)
    said = capsys.readouterr().out
    assert ("100 % of the training images are more than 1.5 times as long" in said) == (fit == "crop")
    assert file.data["fit"] == fit
    report = evaluate.main(["--from", str(file.path), "--workers", "0"])
    assert report["top1"] == file.metrics["top1"]
    other = {"crop": "pad", "squash": "crop", "pad": "squash"}[fit]
    with pytest.raises(SystemExit):
        evaluate.main(["--from", str(file.path), "--fit", other])
    found = predict.main(["wide/test", "--from", str(file.path), "--top_k", "3"])
    right = [each["top"][0]["name"] == Path(each["path"]).parent.name for each in found]
    assert sum(right) / len(right) == pytest.approx(report["top1"])
    pictures = {tuple(sorted((t["class"], round(t["probability"], 5)) for t in each["top"])) for each in found[::3]}
    assert len(pictures) == (1 if fit == "crop" else 3)  # the stripe is seen, or is not


def test_squares_are_not_spoken_of(workdir, capsys) -> None:
    make_folder(Path("pets"))
    train("folder", "pets")
    assert "times as long" not in capsys.readouterr().out


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_contact_sheet_shows_what_a_network_sees(fit: str, workdir, monkeypatch, capsys) -> None:
    wide_folder(Path("wide"), 16, 64)
    drawn: list[Pictured] = []
    monkeypatch.setattr(
        prepare,
        "contact_sheet",
        lambda pictures, path, title: (drawn.extend(pictures), path.write_bytes(title.encode())),
    )
    prepare.main(["folder", "--root", "wide", "--show", "sheet.png", "--fit", fit])
    said = capsys.readouterr().out
    assert "sheet.png: 6 images as a network sees them, 16 pixels" in said and said.count("found wide") == 1
    assert Path("sheet.png").read_text() == f"wide: 16 x 16 pixels, --fit {fit}; training images as augmented"
    names = [each.words for each in drawn]
    assert sorted(names) == sorted(f"{part}\n{name}" for part in ("train", "test") for name in COLOURS)
    for each in drawn:
        part, name = each.words.split("\n")
        has_stripe = bool((each.image.permute(1, 2, 0) == torch.tensor(COLOURS[name])).all(dim=2).any())
        assert has_stripe == (fit == "pad") or part == "train", each.words
        assert bool((each.image == 0).all(dim=0).any()) == (fit == "pad") or part == "train"


def test_a_contact_sheet_is_no_image_of_the_data(workdir) -> None:
    make_folder(Path("pets"))
    some = next(Path("pets/train/red").iterdir())
    before = some.read_bytes()
    with pytest.raises(SystemExit):
        prepare.main(["folder", "--root", "pets", "--show", str(some)])
    assert some.read_bytes() == before


# What the log has, and what comes next


def test_the_log_begins_with_what_was_read_and_the_next_command_needs_no_more(workdir, capsys) -> None:
    make_folder(Path("my pets"))
    Path("my pets/train/notes.txt").write_text("")
    shutil.rmtree("my pets/test")
    flags = ["--dataset", "folder", "--data_dir", "my pets", "--test_split", "0.4", "--network", "resnet20"]
    main_stage1.main([*flags, "--epochs", "1", "--batch_size", "4", "--seed", "0", "--workers", "0"])
    [log] = Path("output").rglob("log.txt")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("found my pets: ") and "1 of other kinds (my pets/train/notes.txt)" in lines[0]
    assert lines[1].startswith("--test_split 0.4: ") and any(line.startswith("command  ") for line in lines)
    *script, _, _ = words = shlex.split(lines[-1].removeprefix("next: "))
    assert script[0] == "python" and script[1].endswith("main_stage2.py")
    words = words[2:]
    assert words == ["--from", "checkpoints/folder-my pets_natural_resnet20_stage1.pt"]
    main_stage2.main([*words, "--finetune_epoch", "1", "--views", "1", "--seed", "0"])
    last = capsys.readouterr().out.splitlines()[-1]
    before = evaluate.main(["--from", "checkpoints/folder-my pets_natural_resnet20_stage2.pt"])
    assert evaluate.main(shlex.split(last)[3:])["top1"] == before["top1"]


# Which file answers


def test_predict_asks_where_several_files_could_be_meant(workdir, capsys) -> None:
    make_folder(Path("pets"))
    image = "pets/test/red"
    with pytest.raises(SystemExit):
        predict.main([image])
    assert "there is no checkpoint" in capsys.readouterr().err
    train("folder", "pets")
    found = predict.main([image])  # the only one there is
    assert {top["name"] for top in found[0]["top"]} == set(COLOURS)
    make_folder(Path("cats"))
    train("folder", "cats")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        predict.main([image])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "folder-cats" in said and "folder-pets" in said and "--from" in said
    (run,) = Path("output").glob("folder-pets*/*")
    for name in (str(run), str(run / "checkpoint.pt")):
        assert predict.main([image, "--from", name])[0]["top"] == found[0]["top"]


def test_a_run_folder_says_what_it_is_of(workdir) -> None:
    make_folder(Path("pets"))
    file = train("folder", "pets")
    (run,) = Path("output").glob("*/*")
    file.path.unlink()
    assert evaluate.main(["--from", str(run), "--workers", "0"])["top1"] == file.metrics["top1"]
    main_stage2.main(["--from", str(run), "--finetune_epoch", "1", "--views", "1"])
    with pytest.raises(SystemExit):
        evaluate.main(["--from", "output"])


@pytest.mark.parametrize(("dataset", "classes", "name"), [("cifar10", 10, "airplane"), ("cifar100", 100, "apple")])
def test_another_program_s_file_has_the_names_of_the_data_set(dataset, classes, name, workdir, cifar100_dir) -> None:
    model = build_model("resnet32", classes, 3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.eye(classes)[0]
    torch.save(model.state_dict(), "theirs.pth")
    Image.new("RGB", (32, 32)).save("a.png")
    found = predict.main(["a.png", "--from", "theirs.pth", "--dataset", dataset, "--data_dir", "nowhere"])
    assert found[0]["top"][0]["name"] == name and not Path("nowhere").exists()
    if dataset == "cifar100":
        source = datasets.load(dataset, cifar100_dir, imb_ratio="natural")
        assert source.class_names == known_class_names(dataset, "nowhere", ImageOptions())
    with pytest.raises(SystemExit):
        predict.main(["a.png", "--from", "theirs.pth", "--dataset", "digits"])


# What a reviewer found


def quick(data_dir: str, *more: str) -> None:
    flags = ["--network", "resnet8", "--epochs", "1", "--seed", "0", "--workers", "0", "--batch_size", "7"]
    main_stage1.main(["--dataset", "folder", "--data_dir", data_dir, *flags, *more])


def rename_classes(folder: str, names: dict[str, str]) -> None:
    for split in ("train", "test"):
        for old, new in names.items():
            Path(folder, split, old).rename(Path(folder, split, new))


@pytest.mark.parametrize("is_named", [False, True])
def test_stage_2s_file_of_other_data_does_not_answer(is_named: bool, workdir, capsys) -> None:
    """Another folder of the same name has been trained since."""
    for parent in ("a", "c"):
        make_folder(Path(parent, "data"))
    rename_classes("c/data", {"red": "x"})
    quick("a/data")
    main_stage2.main(["--dataset", "folder", "--data_dir", "a/data", "--finetune_epoch", "1", "--views", "1"])
    quick("c/data")
    capsys.readouterr()
    flags = ["--dataset", "folder", "--data_dir", "c/data"] if is_named else []
    with pytest.raises(SystemExit) as ended:
        predict.main(["c/data/test/x", *flags])
    said = capsys.readouterr().err
    stage1 = "checkpoints/folder-data_natural_resnet8_stage1.pt"
    assert ended.value.code == 2 and f"--from {stage1}" in said
    assert len(predict.main(["c/data/test/x", "--from", stage1])) == 3


def test_images_of_another_folder_of_the_same_classes_get_their_own_file(workdir, capsys) -> None:
    for parent in ("a", "b"):
        make_folder(Path(parent, "data"))
    next(Path("b/data/train/red").iterdir()).unlink()
    quick("a/data")
    quick("b/data")
    capsys.readouterr()
    for command in (
        lambda: predict.main(["a/data/test/red", "--dataset", "folder", "--data_dir", "a/data"]),
        lambda: evaluate.main(["--dataset", "folder", "--data_dir", "a/data"]),
    ):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        assert "--from checkpoints/folder-data_natural_resnet8_stage1.pt.prev" in capsys.readouterr().err


def test_a_drawn_test_set_is_that_of_its_names(workdir, capsys) -> None:
    make_folder(Path("pets"))
    shutil.rmtree("pets/test")
    quick("pets", "--test_split", "0.4")
    path = Path("checkpoints/folder-pets_natural_resnet8_stage1.pt")
    tested = checkpoints.read(path).data["test_files"]
    trained = sorted({str(p.relative_to("pets")) for p in Path("pets/train").rglob("*.png")} - set(tested))
    first = next(name for name in trained if name.startswith("train/blue/"))
    Path("pets", first).rename(Path("pets/train/blue/zz.png"))  # so that another draw would be another set
    capsys.readouterr()
    evaluate.main(["--from", str(path), "--mean", *map(str, checkpoints.read(path).data["mean"])])
    assert f"{len(tested)} of the images are the test set, as the checkpoint names them" in capsys.readouterr().out
    data = read("folder", "pets", test_split=0.4, test_files=tuple(tested))
    assert data.spec.test_files == tuple(tested)
    Path("pets", tested[0]).unlink()
    with pytest.raises(SystemExit):
        evaluate.main(["--from", str(path)])
    assert f"lacks 1 of the test images that the checkpoint names, the first: {tested[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["rgb16", "la16", "mixed"])
def test_lower_bits_that_are_lost_are_said(kind: str, workdir, capsys) -> None:
    make_folder(Path("d"))
    spared = [next(Path("d/train/red").iterdir())] if kind == "mixed" else []
    for path in set(Path("d").rglob("*.png")).difference(spared):
        grey = np.full((12, 12), 700, np.uint16)
        if kind == "mixed":
            Image.fromarray(grey).save(path)
        else:
            write_png16(path, np.repeat(grey[..., None], 3 if kind == "rgb16" else 2, axis=2))
    read("folder", "d")
    words = capsys.readouterr().out
    assert "have 16 bits a channel (" in words and "--range" in words


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, (H, W, 2) with alpha or (H, W, 3) in colours, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("most", [4095, 65535])
def test_a_deep_pgm_keeps_its_range(most: int, workdir, capsys) -> None:
    make_folder(Path("d"))
    values = np.linspace(0, most, 144).astype(">u2").reshape(12, 12)
    for path in sorted(Path("d").rglob("*.png")):
        path.unlink()
        path.with_suffix(".pgm").write_bytes(f"P5 12 12 {most}\n".encode() + values.tobytes())
    data = read("folder", "d")
    assert "16-bit grey images: 0 becomes black and 65535 white" in capsys.readouterr().out
    expected = np.round(np.linspace(0, 1, 144) * 255)
    assert np.abs(data.train.images[0, 0].numpy().flatten() - expected).max() <= 1


def test_where_all_are_damaged_a_reason_is_said(workdir) -> None:
    make_folder(Path("d"))
    for path in Path("d/train").rglob("*.png"):
        path.write_bytes(b"\x89PNG nothing")
    with pytest.raises(UsageError, match=r"14 images cannot be read, the first: image .*damaged.csv") as refused:
        read("folder", "d", skip_damaged=True)
    assert len(Path(str(refused.value.args[0]).rpartition("all are in ")[2]).read_text().splitlines()) == 15


def test_levels_are_offered_without_split_folders_too(workdir, capsys) -> None:
    make_folder(Path("d"))
    for name in ("red", "blue"):
        Path("bare", "group", name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path("d/train", name), Path("bare", "group", name))
    shutil.copytree("d/train/green", "bare/other")
    read("folder", "bare", test_split=0.4)
    assert "--class_level 2 takes those inside them" in capsys.readouterr().out


def test_splits_inside_of_classes_are_no_class(workdir) -> None:
    make_folder(Path("d"))
    for split in ("train", "test"):
        for name in ("red", "blue"):
            shutil.copytree(Path("d", split, name), Path("inside", name, split))
    with pytest.raises(UsageError, match="splits lie inside the class folders"):
        read("folder", "inside", test_split=0.4)


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_an_npz_says_what_was_found(name: str, workdir, capsys) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    images[:] = np.arange(4)[:, None, None]
    parts = {f"{split}_{part}": value for split in ("train", "test", name) for part, value in
             (("images", images), ("labels", labels))}  # fmt: skip
    np.savez("x.npz", extra=labels, **parts)
    data = read("npz", "x.npz")
    assert data.val is not None and len(data.val) == 4
    assert "found x.npz: 4 train, 4 val, 4 test images; left out: 1 array (extra)" in capsys.readouterr().out


def test_line_ends_of_old_macs(workdir) -> None:
    make_folder(Path("d"))
    rows = [f"{path},{path.parent.name},{path.parts[1]}" for path in sorted(Path("d").rglob("*.png"))]
    Path("x.csv").write_bytes("\r".join(["path,label,split", *rows]).encode())
    assert read("csv", "x.csv").class_counts == read("folder", "d").class_counts


def test_a_turn_behind_long_segments_is_seen(workdir) -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    content = file.getvalue()
    segment = b"\xff\xed" + (60_002).to_bytes(2, "big") + bytes(60_000)
    Path("x.jpg").write_bytes(content[:2] + segment * 2 + content[2:])
    assert read_image("x.jpg").shape == (3, 30, 20)


def test_folders_that_are_left_out_count_with_their_files(workdir, capsys) -> None:
    make_folder(Path("d"))
    for name, split in ((".red", "train"), ("eval", "")):
        shutil.copytree("d/train/red", Path("d", split, name))
    read("folder", "d")
    words = said(capsys)
    number = len(list(Path("d/train/red").iterdir()))
    assert f"{number} in hidden folders (d/train/.red)" in words and f"{number} in folders that are no split" in words
    shutil.rmtree("d/test")
    with pytest.raises(UsageError, match=rf"no test images; left out: .*{number} in folders that are no split"):
        read("folder", "d")


@pytest.mark.parametrize("label", ["NaT", "#N/A", "-NaN"])
def test_more_labels_that_are_none(label: str, workdir) -> None:
    make_folder(Path("d"))
    rows = [f"{path},{path.parent.name},{path.parts[1]}" for path in sorted(Path("d").rglob("*.png"))]
    Path("x.csv").write_text("\n".join(["path,label,split", *rows, rows[0].replace(",blue,", f",{label},")]))
    with pytest.raises(UsageError, match="has no label"):
        read("csv", "x.csv")


def test_names_that_look_alike_are_one(workdir) -> None:
    make_folder(Path("d"))
    forms = ["big cat", "big\u00a0cat", "big  cat", "\u200bbig cat "]
    rows = [
        f"{path},{forms[place % 4] if path.parent.name == 'red' else 'other'},{path.parts[1]}"
        for place, path in enumerate(sorted(Path("d").rglob("*.png")))
    ]
    Path("x.csv").write_text("\n".join(["path,label,split", *rows]))
    assert read("csv", "x.csv").class_names == ["big cat", "other"]


def test_one_image_of_two_classes_is_said(workdir, capsys) -> None:
    make_folder(Path("d"))
    shutil.copy("d/train/red/0.png", "d/train/blue/other.png")
    read("folder", "d")
    words = capsys.readouterr().out
    assert (
        "1 training image with the content of one of another class" in words and "train/blue/other.png of blue" in words
    )


def test_numbers_that_are_read_as_others_are_said(workdir, capsys) -> None:
    make_folder(Path("d"))
    numbers = {"red": "0.0", "green": "1.0", "blue": "2.0"}
    rows = [f"{path},{numbers[path.parent.name]},{path.parts[1]}" for path in sorted(Path("d").rglob("*.png"))]
    Path("x.csv").write_text("\n".join(["path,label,split", *rows]))
    assert read("csv", "x.csv").class_names == ["0", "1", "2"]
    assert "labels are whole numbers: 0.0 is read as 0" in capsys.readouterr().out
