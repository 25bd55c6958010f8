"""extract.py writes what stage 2 would compute, however many processes there are, and stage 2 goes on from it."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_own import make_folder

import compare
import datasets
import evaluate
import extract
import main_stage1
import predict
from datasets.files import read_image
from experiment.export import PACKAGES
from experiment.restore import restore
from models.pretrained import from_efficientnet_pytorch, load_body, pretrained_network
from retraining.features import Views, unseen
from utils import checkpoints
from utils.errors import UsageError
from utils.system import ROOT

timm = pytest.importorskip("timm")
NAME = "timm:resnet10t"
DIGITS = ["--dataset", "digits", "--imb_ratio", "10", "--seed", "0"]


def stage1(*more: str) -> Path:
    main_stage1.main([*DIGITS, "--epochs", "1", *more])
    return Path("checkpoints/digits_exp10_resnet8_stage1.pt")


def test_a_checkpoints_features_are_those_of_stage_2(workdir) -> None:
    path = stage1()
    extract.main(["--from", str(path), "--views", "2", "--view_seed", "4", "--out", "f"])
    file = checkpoints.read(path)
    data = datasets.load("digits", "", imb_ratio=10)
    source = Views(
        restore(file, data), data, torch.device("cpu"), "cache", "x", False, unseen, 50, num_views=2, view_seed=4
    )
    for part in ("train", "test"):
        assert np.array_equal(np.load(f"f/{part}_features.npy"), source.evaluated(part)[0].numpy())
    for view in range(2):
        assert np.array_equal(np.load(f"f/train_views_{view}.npy"), source.numbered(view).numpy())
    assert np.load("f/train_labels.npy").tolist() == data.train.labels.tolist()
    about = json.loads(Path("f/about.json").read_text())
    assert about["sha256"] == file.sha256 and about["images"] == {"train": len(data.train), "test": 500}


def test_the_chain_from_images_to_predictions(workdir) -> None:
    path = stage1()
    extract.main(["--from", str(path), "--out", "f", "--feature_dtype", "bfloat16"])
    rows = compare.main(
        ["--dataset", "features", "--data_dir", "f", "--val_split", "0.1", "--method", "ncm", "tau-norm", "--tune"]
    )
    assert {row["method"] for row in rows} == {"ncm", "tau-norm"} and max(float(row["all"]) for row in rows) > 0.3
    from main_stage2 import main as stage2

    report = stage2(["--dataset", "features", "--data_dir", "f", "--method", "crt", "--seed", "0"])
    final = "checkpoints/features-f_natural_features_stage2.pt"
    assert evaluate.main(["--from", final])["top1"] == report["top1"]
    found = predict.main(["f/test_features.npy", "--from", final])
    hits = [each["top"][0]["class"] == label for each, label in zip(found, np.load("f/test_labels.npy"))]
    assert np.mean(hits) == pytest.approx(report["top1"])
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        pytest.skip("without onnx, onnxscript and onnxruntime there is no --export")
    import onnxruntime

    again = predict.main(["f/test_features.npy", "--from", final, "--export", "head.onnx"])
    assert again == found
    rows = np.load("f/test_features.npy").view("V2")
    rows = torch.from_numpy(rows.view("<i2")).view(torch.bfloat16).float().numpy()
    _, chances = onnxruntime.InferenceSession("head.onnx").run(None, {"features": rows})
    assert chances.argmax(axis=1).tolist() == [each["top"][0]["class"] for each in found]
    predict.main(["--from", final, "--export", "again.onnx"])  # without rows to compare on


def test_photos_are_shown_as_timm_says(weights, workdir) -> None:
    """Resized by the shorter side, the centre, the config's interpolation and constants."""
    make_folder(Path("d"), side=90)
    extract.main(["--network", NAME, "--weights", str(weights), "--dataset", "folder", "--data_dir", "d", "--out", "f"])
    network, how, _ = pretrained_network("resnet10t", checkpoints.read(weights).foreign, "x")
    assert how.resize == math.floor(how.size / 0.875) and how.interpolation == "bicubic"
    data = datasets.load("folder", "d", imb_ratio="natural")
    from torchvision.transforms.v2 import functional as T

    expected = []
    for position in range(len(data.test)):
        image = read_image(data.test.images.path(position))
        image = T.resize(image, [how.resize], T.InterpolationMode.BICUBIC, antialias=True)
        pixels = T.center_crop(image, [how.size, how.size]).float() / 255
        expected.append((pixels - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None])
    with torch.inference_mode():
        features = network.eval().features(torch.stack(expected))
    assert np.abs(np.load("f/test_features.npy") - features.numpy()).max() < 1e-4
    assert np.load("f/class_names.npy").tolist() == data.class_names


def test_small_images_are_enlarged(weights, workdir) -> None:
    make_folder(Path("d"), side=12)
    command = ["--network", NAME, "--weights", str(weights), "--dataset", "folder", "--data_dir", "d"]
    about = extract.main([*command, "--image_size", "64", "--views", "1", "--out", "f"])
    assert about["size"] == 64 and about["features"] == 512
    views = np.load("f/train_views_0.npy")
    plain = np.load("f/train_features.npy")
    assert views.shape == plain.shape and not np.array_equal(views, plain)


@pytest.mark.parametrize("processes", [2, 3])
def test_files_do_not_depend_on_the_number_of_processes(processes: int, workdir) -> None:
    path = stage1()
    command = ["--from", str(path), "--views", "1", "--threads", "1"]
    extract.main([*command, "--out", "one"])
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    subprocess.run([*launcher, str(ROOT / "extract.py"), *command, "--out", "many"], check=True, capture_output=True)
    for file in sorted(Path("one").glob("*.npy")):
        assert file.read_bytes() == Path("many", file.name).read_bytes(), file.name


def test_names_of_efficientnet_pytorch() -> None:
    """A network's own weights under the other program's names, and back."""
    network, _, _ = pretrained_network("tf_efficientnet_lite0", fresh := timm_state("tf_efficientnet_lite0"), "x")
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    expanded = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    expanded |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    blocks = list(dict.fromkeys(".".join(key.split(".")[:3]) for key in fresh if key.startswith("blocks.")))
    theirs = {}
    for key, value in fresh.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            number = blocks.index(".".join(parts[:3]))
            table = expanded if f"{blocks[number]}.conv_pwl.weight" in fresh else plain
            theirs[f"_blocks.{number}.{table[parts[3]]}.{'.'.join(parts[4:])}"] = value
        else:
            theirs[f"{outside[parts[0]]}.{'.'.join(parts[1:])}"] = value
    assert not theirs.keys() & fresh.keys()
    again = from_efficientnet_pytorch(theirs, list(network.body.state_dict()))
    assert again.keys() == fresh.keys() and all(torch.equal(again[key], value) for key, value in fresh.items())


def timm_state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).state_dict()


def test_weights_of_another_network_are_refused() -> None:
    network, _, _ = pretrained_network("resnet10t", timm_state("resnet10t"), "x")
    with pytest.raises(UsageError, match="a file"):
        load_body(network, timm_state("resnet18"), "resnet10t", "a file")
    broken = timm_state("resnet10t")
    broken["conv1.0.weight"][0] = torch.nan
    with pytest.raises(UsageError, match="not finite"):
        load_body(network, broken, "resnet10t", "a file")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--network resnet20 --out f", "--network resnet20"),
        ("--out f", "timm:NAME"),
        ("--network timm:resnet10t", "--out is missing"),
        ("--network timm:nonsense --out f", "nonsense"),
        ("--network timm:resnet10t --weights WEIGHTS --dataset digits --out f", "1 channel\n"),
        ("--network timm:resnet10t --weights nowhere.pth --out f", "nowhere.pth"),
        ("--network timm:resnet10t --weights WEIGHTS --out d", "is there already"),
        ("--network timm:resnet10t --weights WEIGHTS --out f --input cache", "which reads files"),
        ("--network timm:resnet10t --out f --dataset features", "features"),
    ],
)
def test_what_cannot_be_is_said_in_two_lines(flags: str, words: str, weights, workdir, capsys) -> None:
    make_folder(Path("d"))
    with pytest.raises(SystemExit) as ended:
        extract.main(flags.replace("WEIGHTS", str(weights)).split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and len(said.splitlines()) == 2
