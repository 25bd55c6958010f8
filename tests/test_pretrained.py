"""Stage 2 on a network of timm's that somebody trained: one command, no stage 1, the same preprocessing everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_own import make_folder

import compare
import datasets
import evaluate
import extract
import main_stage1
import main_stage2
import predict
from datasets.files import read_image
from experiment.restore import built
from experiment.views import View
from models.pretrained import pretrained_network
from utils import checkpoints
from utils.arrays import open_array

timm = pytest.importorskip("timm")
NAME = "timm:resnet10t"
FINAL = Path("checkpoints/folder-d_natural_timm-resnet10t_stage2.pt")


@pytest.fixture
def command(weights: Path, workdir) -> list[str]:
    make_folder(Path("d"), side=90)
    return ["--network", NAME, "--pretrained", str(weights), "--dataset", "folder", "--data_dir", "d", "--seed", "0"]


SHORT = ["--finetune_epoch", "2", "--views", "1"]


def test_stage_2_evaluate_and_predict_show_images_alike(command: list[str], capsys) -> None:
    report = main_stage2.main([*command, *SHORT, "--method", "crt"])
    assert "timm states for its own" in capsys.readouterr().out
    again = evaluate.main(["--from", str(FINAL)])
    assert again["top1"] == report["top1"]
    assert "the same figures as in training" in capsys.readouterr().out
    found = predict.main(["d/test", "--from", str(FINAL)])
    hits = [each["top"][0]["name"] == Path(each["path"]).parent.name for each in found]
    assert np.mean(hits) == pytest.approx(report["top1"])


def test_what_the_network_sees_is_what_timm_says(command: list[str], weights: Path) -> None:
    """The stored network's logits of an image, against timm's own preprocessing and network."""
    main_stage2.main([*command, "--method", "ncm"])
    file = checkpoints.read(FINAL)
    _, how, _ = pretrained_network("resnet10t", checkpoints.read(weights).foreign, "x")
    path = sorted(Path("d/test").rglob("*.*"))[0]
    from torchvision.transforms.v2 import functional as T

    image = T.resize(read_image(path), [how.resize], T.InterpolationMode.BICUBIC, antialias=True)
    pixels = T.center_crop(image, [how.size, how.size]).float() / 255
    pixels = (pixels - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]
    model = timm.create_model("resnet10t", num_classes=0)
    model.load_state_dict({k: v for k, v in torch.load(weights).items() if not k.startswith("fc.")})
    network = built(file).eval()
    with torch.inference_mode():
        raw = model.eval()(pixels[None])
        assert torch.allclose(network.raw_features(pixels[None]), raw, atol=1e-5)
        assert torch.allclose(network(pixels[None]), network.fc(raw * network.scale), atol=1e-4)
    found = predict.main([str(path), "--from", str(FINAL), "--top_k", "1"])
    assert found[0]["top"][0]["class"] == int(network(pixels[None]).argmax())


@pytest.mark.parametrize("standardize", ["none", "l2", "zscore"])
def test_the_same_as_features_that_were_extracted(standardize: str, command: list[str]) -> None:
    options = ["--method", "ncm", "balanced-softmax", "--finetune_epoch", "3", "--batch_size", "8"]
    options += ["--standardize", standardize]
    rows = {row["row"]: row for row in compare.main([*command, *options, "--views", "2"])}
    extract.main([*command[:-2], "--views", "2", "--out", "f"])
    given = ["--dataset", "features", "--data_dir", "f", "--seed", "0"]
    other = {row["row"]: row for row in compare.main([*given, *options])}
    for name, row in rows.items():
        assert row["all"] == other[name]["all"], name
        close = 1e-4 if name.startswith("ncm") else 0.03  # epochs are shuffled otherwise
        assert row["LoMa"] == pytest.approx(other[name]["LoMa"], rel=close), name


def test_features_get_the_norm_that_learning_rates_are_for(command: list[str]) -> None:
    main_stage2.main([*command, *SHORT, "--method", "crt"])
    file = checkpoints.read(FINAL)
    assert file.stem == "pretrained" and file.data["shown"]["interpolation"] == "bicubic"
    from experiment.pretrained import shown_as, shown_of

    data = shown_as(datasets.load("folder", "d", imb_ratio="natural"), shown_of(file))
    batches = datasets.Batches(
        data.train.images, data.train.labels, 50, data.spec.mean, data.spec.std, torch.device("cpu")
    )
    with torch.inference_mode():
        rows = torch.cat([built(file).eval().features(images) for images, _ in batches.epoch()])
    assert float(rows.square().sum(dim=1).mean().sqrt()) == pytest.approx(12.0, rel=1e-4)


def test_small_images_are_enlarged_everywhere(weights: Path, workdir) -> None:
    make_folder(Path("d"), side=12)
    command = ["--network", NAME, "--pretrained", str(weights), "--dataset", "folder", "--data_dir", "d", "--seed", "0"]
    report = main_stage2.main([*command, *SHORT, "--method", "crt", "--image_size", "64"])
    assert checkpoints.read(FINAL).data["shown"]["size"] == 64
    assert evaluate.main(["--from", str(FINAL)])["top1"] == report["top1"]
    found = predict.main(["d/test", "--from", str(FINAL)])
    hits = [each["top"][0]["name"] == Path(each["path"]).parent.name for each in found]
    assert np.mean(hits) == pytest.approx(report["top1"])


@pytest.mark.parametrize("side", [90, 12])
def test_its_onnx_gives_the_same(side: int, weights: Path, workdir) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    make_folder(Path("d"), side=side)
    command = ["--network", NAME, "--pretrained", str(weights), "--dataset", "folder", "--data_dir", "d", "--seed", "0"]
    main_stage2.main([*command, "--method", "ncm", "--image_size", "64"])
    predict.main(["d/test", "--from", str(FINAL), "--export", "m.onnx", "--json", "p.json", "--top_k", "1"])
    session = runtime.InferenceSession("m.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["mean"]) == checkpoints.read(FINAL).data["mean"]


def test_it_is_resumed_and_a_compare_leads_to_it(command: list[str], capsys) -> None:
    compare.main([*command, *SHORT, "--method", "crt", "ncm", "--val_split", "0.2", "--tune"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next:"))
    assert "--pretrained" in line and "--network timm:resnet10t" in line
    first = main_stage2.main([*command, *SHORT, "--method", "crt"])
    assert main_stage2.main([*command, *SHORT, "--method", "crt", "--resume", "auto"])["top1"] == first["top1"]


@pytest.mark.parametrize(
    "words, told",
    [
        ("--pretrained WEIGHTS", "--pretrained without --network"),
        ("--network resnet32 --pretrained WEIGHTS", "resnet32"),
        ("--network timm:resnet10t --pretrained nowhere.pth", "nowhere.pth"),
        ("--network timm:resnet10t --pretrained WEIGHTS --from x.pt", "one of the two"),
        ("--network timm:resnet10t --pretrained WEIGHTS --start stage1", "has no stage 1"),
        ("--network timm:resnet10t --pretrained WEIGHTS --features replay", "replay"),
        ("--network timm:resnet10t --pretrained WEIGHTS --select best_val", "nothing is held out"),
        ("--network timm:resnet10t --pretrained WEIGHTS --dataset digits", "1 channel"),
    ],
)
def test_wrong_commands(words: str, told: str, weights: Path, workdir, capsys) -> None:
    make_folder(Path("d"), side=20)
    typed = words.replace("WEIGHTS", str(weights)).split()
    data = [] if "--dataset" in typed else ["--dataset", "folder", "--data_dir", "d"]
    with pytest.raises(SystemExit) as ended:
        main_stage2.main([*typed, *data])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and told in lines[0] + lines[1]


def test_stage_1_does_not_train_on(command: list[str], capsys) -> None:
    main_stage2.main([*command, "--method", "ncm"])
    for more, told in (["--from", str(FINAL)], "frozen"), (["--stem", "pretrained"], "--stem pretrained"):
        with pytest.raises(SystemExit):
            main_stage1.main([*more, "--dataset", "folder", "--data_dir", "d", "--network", NAME])
        assert told in capsys.readouterr().err


def test_the_cache_tells_networks_and_sizes_apart(weights: Path, workdir, capsys) -> None:
    make_folder(Path("d"), side=12)
    command = ["--network", NAME, "--pretrained", str(weights), "--dataset", "folder", "--data_dir", "d", "--seed", "0"]
    for size in ("64", "32"):
        report = main_stage2.main([*command, *SHORT, "--method", "crt", "--image_size", size])
        assert "1 pass over the backbone\n" in capsys.readouterr().out
        assert evaluate.main(["--from", str(FINAL)])["top1"] == report["top1"]


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_predict_shows_images_that_are_not_square_as_training_does(fit: str, command: list[str]) -> None:
    for path in Path("d").rglob("*.png"):
        image = Image.open(path)
        image.resize((image.width + 31, image.height)).save(path)
    main_stage2.main([*command, "--method", "ncm", "--fit", fit])
    folders = [path.parent for path in Path("cache").glob("*/features.npy")]
    [test] = [path for path in folders if json.loads((path / "about.json").read_text())["part"] == "test"]
    cached = open_array(test / "features.npy", f"{test.name}/features.npy")
    file, images = checkpoints.read(FINAL), datasets.load("folder", "d", imb_ratio="natural").test.images
    paths = [images.path(position) for position in range(len(images))]
    view = View(file, predict.Options(), False, paths)
    with torch.inference_mode():
        rows = built(file).eval().raw_features(view.normalised([view.of(path) for path in paths]))
    assert np.abs(rows.numpy() - cached).max() < 1e-5


def test_constants_that_are_typed_win(command: list[str]) -> None:
    main_stage2.main([*command, "--method", "ncm", "--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1"])
    assert checkpoints.read(FINAL).data["mean"] == [0.1, 0.2, 0.3]


def test_an_image_size_that_a_network_does_not_take(command: list[str], capsys) -> None:
    path = "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    with pytest.raises(SystemExit) as ended:
        main_stage2.main(["--network", "timm:vit_tiny_patch16_224", "--pretrained", path, "--image_size", "160"])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and "--image_size 160" in lines[0]


def test_few_held_out_images_are_said(command: list[str], capsys) -> None:
    compare.main([*command, *SHORT, "--method", "crt", "ncm", "--val_split", "0.3"])
    assert "note: 1 to 2 images of a class are held out: one of the smallest moves the class mean by 33 points" in (
        capsys.readouterr().out
    )


def test_post_hoc_on_a_balanced_start_is_said(command: list[str], capsys) -> None:
    compare.main([*command, "--method", "logit-adjustment-posthoc", "joint", "mla"])
    out = capsys.readouterr().out
    assert "balanced twice, by the start and afterwards: logit-adjustment-posthoc, mla\n" in out
