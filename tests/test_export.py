"""--export: the ONNX file gives PyTorch's results for every kind of network and head, and says how it is used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_own import make_folder

import main_stage1
import main_stage2
import predict
from experiment import export
from experiment.export import CLOSE, PACKAGES, Deployed, difference, graph
from models import HEADS, build_model
from utils import checkpoints
from utils.errors import UsageError
from utils.files import sha256

STAGE1, STAGE2 = (f"checkpoints/digits_exp100_resnet8_{stage}.pt" for stage in ("stage1", "stage2"))


@pytest.fixture
def onnx():
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="onnx, onnxscript and onnxruntime are optional")
    return pytest.importorskip("onnx", reason="onnx, onnxscript and onnxruntime are optional")


def test_the_program_in_the_docs_gives_the_same_answer(onnx, workdir, capsys) -> None:
    make_folder(Path("d"), side=90)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 150, 3), dtype=np.uint8)).save("photo.jpg")
    main_stage1.main([*"--dataset folder --data_dir d --network resnet10 --epochs 1 --seed 0 --image_size 64".split()])
    found = predict.main(["photo.jpg", "--export", "model.onnx"])
    capsys.readouterr()
    [program] = re.findall("```python\n(.*?)```", (ROOT / "docs/files.md").read_text(), re.DOTALL)
    exec(program, {})
    top = found[0]["top"][0]
    assert capsys.readouterr().out == f"{top['name']} {100 * top['probability']:.2f} %\n"


def run(blob: bytes, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    return session.run(["logits", "probabilities"], {"images": images.numpy()})


def trained_like(network: str, head: str, stem: str | None, channels: int = 3) -> torch.nn.Module:
    """A network whose statistics and head are none of their first values."""
    torch.manual_seed(0)
    model = build_model(network, 7, channels, head, stem)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("fc.") and value.is_floating_point() and value.dim():
            torch.nn.init.normal_(value.data, std=0.3)
        elif "running_" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


NETWORKS = [
    ("resnet8", "small"), ("resnet20", "small"), ("resnet18", "small"), ("resnet50", "small"),
    ("resnet10", "imagenet"), ("resnext50_32x4d", "imagenet"), ("timm:resnet10t", None),
]  # fmt: skip


@pytest.mark.parametrize("network, stem", NETWORKS)
def test_every_family_of_networks(onnx, network: str, stem: str | None) -> None:
    if network.startswith("timm:"):
        pytest.importorskip("timm")
    deployed = Deployed(trained_like(network, "linear", stem), [0.5] * 3, [0.2] * 3, 1.5, False, torch.zeros(7)).eval()
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    blob = graph("x.onnx", deployed, images[:2], {})
    assert difference(blob, deployed, images) < CLOSE


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_and_all_that_follows_it(onnx, head: str, unit: bool) -> None:
    """Batches of 1 and 7; normalisation, flip averaging, temperature and prior longhand."""
    model = trained_like("resnet8", head, "small", 1).eval()
    if head == "prototypes":
        model.fc.unit.fill_(unit)
    shift = torch.tensor([0.0, 1, -1, 2, -torch.inf, 0, 0.5]) if unit else torch.zeros(7)
    images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    blob = graph("x.onnx", Deployed(model, [0.3], [0.4], 2.0, unit, shift).eval(), images[:2], {})
    with torch.no_grad():
        z = model((images - 0.3) / 0.4)
        z = (z + model((images.flip(3) - 0.3) / 0.4)) / 2 if unit else z
    expected = (z / 2 + shift).softmax(dim=1)
    for batch in (slice(0, 1), slice(None)):
        logits, probabilities = run(blob, images[batch])
        assert np.allclose(probabilities, expected[batch], atol=CLOSE)
        assert np.allclose(logits, z[batch] / 2 + shift, atol=CLOSE, rtol=CLOSE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_stage1.main(["--dataset", "digits", "--epochs", "1", "--seed", "0", "--val_split", "0.2"])
        main_stage2.main(["--dataset", "digits", "--method", "ncm", "--seed", "0"])
        Path("notes.onnx").write_text("mine")
        Path("theirs.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
        Path("images").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
        for place, image in enumerate(pixels):
            Image.fromarray(image).save(f"images/{place}.png")
        Path("images/a.png").write_bytes(b"none")
    return folder


def test_the_file_says_how_it_is_used(onnx, finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    found = predict.main(["images", "--export", "m.onnx", "--from", STAGE2, "--top_k", "10", "--test_prior", "train"])
    out = capsys.readouterr().out
    assert "on 7 random and 7 real inputs" in out and "ONNX differs by" in out
    model, file = onnx.load("m.onnx"), checkpoints.read(STAGE2)
    onnx.checker.check_model(model)
    said = {each.key: each.value for each in model.metadata_props}
    assert json.loads(said["class_names"]) == list("0123456789") and said["checkpoint_sha256"] == sha256(STAGE2)
    assert (said["side"], said["channels"], said["fit"], said["flip_averaging"]) == ("8", "1", "crop", "off")
    assert json.loads(said["mean"]) == file.data["mean"] and json.loads(said["std"]) == file.data["std"]
    assert float(said["temperature"]) == file.metrics["temperature"] and said["version"]
    assert json.loads(said["prior"])["test"] == "train"
    good = [each for each in found if not each["error"]]
    pixels = [np.asarray(Image.open(each["path"])) for each in good]
    images = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
    _, probabilities = run(Path("m.onnx").read_bytes(), images)
    for row, each in zip(probabilities, good):
        assert [row[top["class"]] for top in each["top"]] == pytest.approx(
            [top["probability"] for top in each["top"]], abs=CLOSE
        )


def test_without_images_and_again(onnx, finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    assert predict.main(["--export", "again.onnx", "--from", STAGE1]) == []
    first = Path("again.onnx").read_bytes()
    assert predict.main(["--export", "again.onnx", "--from", STAGE1, "--temperature", "3"]) == []  # an earlier export
    assert Path("again.onnx").read_bytes() != first and "0 real inputs" in capsys.readouterr().out
    assert not [path for path in Path().iterdir() if path.name.endswith((".tmp", ".data"))]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--export m.pt", "--export m.pt an .onnx"),
        ("--export notes.onnx", "notes.onnx would replace a file of another kind"),
        ("--export theirs.onnx", "theirs.onnx would replace a file of another kind"),
        ("--export nowhere/m.onnx", "there is no folder nowhere"),
        ("--export m.onnx --csv m.csv", "IMAGE_OR_FOLDER missing"),
        ("--export m.onnx --test_prior em", "IMAGE_OR_FOLDER missing"),
        ("--export images", "--export images an .onnx"),
    ],
)
def test_what_is_refused(onnx, finished, monkeypatch, capsys, arguments: str, words: str) -> None:
    monkeypatch.chdir(finished)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        predict.main([*arguments.split(), "--from", STAGE1])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 2 and all(word in error for word in words.split()), error
    assert sorted(Path().rglob("*")) == before


def test_a_difference_leaves_no_file(onnx, finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(export, "difference", lambda *_: 0.01)
    with pytest.raises(SystemExit) as stop:
        predict.main(["--export", "other.onnx", "--from", STAGE1])
    assert stop.value.code == 2 and "differs by 0.01" in capsys.readouterr().err and not Path("other.onnx").exists()


def test_a_network_that_is_too_large(monkeypatch) -> None:
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    deployed = Deployed(build_model("resnet8", 3), [0.0] * 3, [1.0] * 3, 1.0, False, torch.zeros(3))
    with pytest.raises(UsageError, match="MB of weights"):
        export.export("x.onnx", deployed, 8, torch.empty(0), {})


def test_packages_that_are_not_installed(finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        predict.main(["--export", "m2.onnx", "--from", STAGE1])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 2 and f"pip install {' '.join(PACKAGES)}" in error[1]


def test_nothing_else_needs_the_packages() -> None:
    code = "import predict, sys; sys.exit(any(name.startswith('onnx') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_folder_of_photos(onnx, workdir, capsys) -> None:
    make_folder(workdir / "d")
    data = ["--dataset", "folder", "--data_dir", "d"]
    main_stage1.main(
        [*data, "--network", "resnet8", "--epochs", "1", "--batch_size", "4", "--fit", "pad", "--seed", "0"]
    )
    predict.main(["d/test", *data, "--network", "resnet8", "--export", "m.onnx", "--flip_tta"])
    said = {each.key: each.value for each in onnx.load("m.onnx").metadata_props}
    assert said["fit"] == "pad" and said["resize"] == "all of the image" and said["flip_averaging"] == "in the graph"
    assert "ONNX differs by" in capsys.readouterr().out
