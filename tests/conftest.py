"""Fixtures: a working folder of its own, the real CIFAR-100 where it is, a small file in CIFAR-10's format."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are small, and tests must not fight over cores
torch.backends.cudnn.allow_tf32 = False  # on a GPU, equalities are those of float32


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
