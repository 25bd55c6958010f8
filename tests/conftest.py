"""Fixtures: a working folder of its own, the real CIFAR-100 where it is, small files in the formats of the others."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("LT_SHARED", ROOT.parent / "shared" / "data"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where it was ignored at the start
torch.set_num_threads(1)  # the networks here are small, and tests must not fight over cores
torch.backends.cudnn.allow_tf32 = False  # on a GPU, equalities are those of float32


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Networks and images made in here are float64; ``@in_float64()`` is for a whole test.

    Kernels round differently from CPU to CPU. In float32 a ReLU near 0 makes 1e-4 of that within a few steps; in
    float64 even so it stays far below what any wrong equation does.
    """
    from datasets import Batches

    normalise = Batches._normalise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "_normalise", lambda self, images: normalise(self, images.double()))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder, so that checkpoints/ and output/ are the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cifar100_dir() -> str:
    """The folder that holds the real cifar-100-python: $CIFAR100_DIR or data/."""
    for folder in (os.environ.get("CIFAR100_DIR"), ROOT / "data"):
        if folder and Path(folder, "cifar-100-python", "train").is_file():
            return str(folder)
    pytest.skip("the real CIFAR-100 is neither in $CIFAR100_DIR nor in data/")


@pytest.fixture
def small_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with 20 training and 5 test images per class in CIFAR-10's own format."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    reader = torchvision.datasets.CIFAR10
    for name, count in [*((name, 40) for name, _ in reader.train_list), (reader.test_list[0][0], 50)]:
        content = {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({"label_names": [f"name{i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # not the real files
    return str(tmp_path / "data")


#: A listed path -> where its image is put, under the root.
Lay = Callable[[str], str]
#: List file -> (listed path, label) of its images.
Lists = dict[str, list[tuple[str, int]]]
PHOTOS = sorted(SHARED.glob("imagenet_sample/*.JPEG"))  # one of each class; patterns stand in where there are none


@cache
def scene(label: int) -> Image.Image:
    """What photos of a class show: a real photo, else random colours that only this class has."""
    if PHOTOS:
        return Image.open(PHOTOS[label % len(PHOTOS)]).convert("RGB")
    colours = np.random.default_rng(label).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((320, 240))


def write_photos(root: Path, lists: Lists, lay: Lay = str) -> Path:
    """Writes list files and a small photo for each entry, a random part of its class's scene; returns the root."""
    for name, entries in lists.items():
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(f"{path} {label}\n" for path, label in entries))
        for i, (path, label) in enumerate(entries):
            generator = np.random.default_rng([label, i])
            width, height, left, top = generator.uniform(0.5, 1, 4)
            full, file = scene(label).size, root / lay(path)
            left, top = left * (1 - width) * full[0], top * (1 - height) * full[1]
            box = (left, top, left + width * full[0], top + height * full[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            scene(label).resize((round(80 * width), round(60 * height)), box=box).save(file, "JPEG")
    return root


def make_imagenet_lt(root: Path, classes: int = 4, lay: Lay = str) -> Path:
    """A folder with photos and lists as ImageNet-LT has them: 16 // (c + 1) to train, 2 for val, 3 to test."""
    wnids = [PHOTOS[c].name.split("_")[0] if PHOTOS else f"n{c:08d}" for c in range(classes)]
    lists: Lists = {f"ImageNet_LT_{split}.txt": [] for split in ("train", "val", "test")}
    train, val, test = lists.values()
    for c, wnid in enumerate(wnids):
        train += [(f"train/{wnid}/{wnid}_{i}.JPEG", c) for i in range(16 // (c + 1))]
        val += [(f"train/{wnid}/{wnid}_{i}.JPEG", c) for i in (100, 101)]
        test += [(f"val/{wnid}/ILSVRC2012_val_{3 * c + i:08d}.JPEG", c) for i in range(3)]
    return write_photos(root, lists, lay)


def make_places_lt(root: Path, lay: Lay = str) -> Path:
    """The same for Places-LT, four classes."""
    lists: Lists = {f"Places_LT_{split}.txt": [] for split in ("train", "val", "test")}
    train, val, test = lists.values()
    for c, name in enumerate(("airfield", "apartment_building-outdoor", "bakery-shop", "zen_garden")):
        train += [(f"train/{name}/{i:08d}.jpg", c) for i in range(8 // (c + 1))]
        val += [(f"train/{name}/{i:08d}.jpg", c) for i in (100, 101)]
        test += [(f"val/{name}/Places365_val_{3 * c + i:08d}.jpg", c) for i in range(3)]
    return write_photos(root, lists, lay)


def make_inat2018(root: Path, lay: Lay = str, in_json: bool = False) -> Path:
    """The same for iNaturalist 2018, four classes; ``in_json`` has the lists as the competition's files."""
    lists: Lists = {"iNaturalist18_train.txt": [], "iNaturalist18_val.txt": []}
    train, test = lists.values()
    for c, group in enumerate(("Plantae", "Insecta", "Plantae", "Aves")):
        train += [(f"train_val2018/{group}/{c}/train{i}.jpg", c) for i in range(8 // (c + 1))]
        test += [(f"train_val2018/{group}/{c}/val{i}.jpg", c) for i in range(3)]
    write_photos(root, lists, lay)
    for (name, entries), file in zip(lists.items(), ("train2018.json", "val2018.json")):
        if in_json:
            (root / name).unlink()
            content = {
                "images": [{"id": 1000 + i, "file_name": path} for i, (path, _) in enumerate(entries)],
                "annotations": [{"image_id": 1000 + i, "category_id": c} for i, (_, c) in enumerate(entries)],
                "categories": [{"id": c, "name": f"obfuscated{c}"} for c in range(4)],
            }
            (root / file).write_text(json.dumps(content))
    return root


@pytest.fixture
def shell(workdir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one of the scripts as a user does; returns the finished process."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    return run


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test's equality must hold on."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A file of weights that are not the initial ones, as timm saves them."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", num_classes=7)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    path = tmp_path_factory.mktemp("weights") / "resnet10t.pth"
    torch.save(model.state_dict(), path)
    return path
