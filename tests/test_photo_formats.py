"""Every format and layout at once, on a part of what benchmarks/photo_formats.py takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import photo_formats
from datasets import files


def some(monkeypatch, cifar: str) -> list[str]:
    monkeypatch.setattr(photo_formats, "CLASSES", 3)
    monkeypatch.setattr(photo_formats, "TRAIN", 24)
    monkeypatch.setattr(photo_formats, "TEST", 12)
    return ["--data_dir", cifar, "--out", "found.jsonl"]


def test_training_evaluate_and_predict_agree_image_by_image(workdir: Path, monkeypatch, cifar100_dir: str) -> None:
    photo_formats.main(some(monkeypatch, cifar100_dir))
    found = json.loads(Path("found.jsonl").read_text())
    assert found["layouts"].keys() == {"nested", "linked", "flat"}
    assert all(layout["images"] == 108 for layout in found["layouts"].values())


def test_an_orientation_that_is_left_out_is_found(workdir: Path, monkeypatch, capsys, cifar100_dir: str) -> None:
    monkeypatch.setattr(files, "turned", lambda image, orientation: image)
    with pytest.raises(SystemExit):
        photo_formats.main(some(monkeypatch, cifar100_dir))
    assert "figures differ in nested, linked, flat" in capsys.readouterr().err
