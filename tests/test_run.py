"""A run folder on a good disk and on one that comes and goes."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.plots import Pictured, contact_sheet, learning_curves, per_class_accuracy
from utils.run import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def record(epoch: int) -> dict:
    return {"epoch": epoch, "lr": 0.1, "train_loss": 1.5 / epoch, "train_top1": None, "seconds": 1.0}


def test_tensorboard_reads_the_scalars(folder: Path) -> None:
    with Run(folder) as run:
        for epoch in (1, 2, 3):
            run.log(record(epoch))
    found = EventAccumulator(str(folder)).Reload()
    assert sorted(found.Tags()["scalars"]) == ["lr", "seconds", "train/loss"]
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(epoch, pytest.approx(1.5 / epoch)) for epoch in (1, 2, 3)]


def test_a_disk_that_is_full_for_a_while_costs_what_is_written_meanwhile(folder: Path, monkeypatch, capsys) -> None:
    class Disk(io.FileIO):
        room: int | None = None

        def write(self, content) -> int:
            if Disk.room is not None and len(content) > Disk.room:
                if Disk.room == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                content, Disk.room = content[: Disk.room], 0  # what still fits, as a disk does
            return super().write(content)

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Disk(path, mode))
    with Run(folder) as run:
        for epoch in range(1, 7):
            Disk.room = 30 if epoch in (2, 3) else None
            run.log(record(epoch) | {"test_top1": 0.5})
    monkeypatch.undo()
    records = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == [1, 4, 5, 6]
    assert [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("lr")] == [1, 4, 5, 6]
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", "1", "4", "5", "6"]
    out, err = capsys.readouterr()
    assert out.count("note: No space left on device") == 1 and out.count("MB free on the disk of") == 1 and not err
    assert [line.split()[0] for line in out.splitlines() if "note" not in line] == ["epoch", *"123456"]


def test_a_side_output_that_fails_is_one_line(folder: Path, capsys) -> None:
    with Run(folder) as run:
        with run.side_output("a.csv") as path:
            path.write_text("half")
            raise ValueError("a name\nthat does not suit")
        with run.side_output("b.csv") as path:
            path.write_text("whole")
    assert capsys.readouterr().out == "note: no a.csv: a name that does not suit\n"
    assert sorted(p.name for p in folder.iterdir() if "tfevents" not in p.name) == ["b.csv", "log.txt"]
    with pytest.raises(KeyboardInterrupt), Run(folder) as run, run.side_output("a.csv"):
        raise KeyboardInterrupt


def test_names_that_look_like_formulas_are_drawn_as_they_stand(tmp_path: Path, monkeypatch) -> None:
    names = ["$", "$$", "$$$", "$x^$", r"\$ and $", "100 $ or 200 $"]
    drawn: list[str] = []
    seen = Text._preprocess_math
    monkeypatch.setattr(Text, "_preprocess_math", lambda self, s: (drawn.append(seen(self, s)), drawn[-1])[1])
    rows = [{"name": n, "group": "many", "accuracy": 0.5, "train_images": 9 - i} for i, n in enumerate(names)]
    report = {"groups": {group: {"accuracy": 0.5} for group in ("many", "medium", "few")}}
    per_class_accuracy(report, rows, "a $title$ ^ $_$", tmp_path / "classes")
    learning_curves([record(n) | {"train_top1": 0.5} for n in (1, 2)], "another $title_$^$", tmp_path / "curves")
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    contact_sheet([Pictured(image, f"{name}\n50 %") for name in names], tmp_path / "sheet")
    shown = {text for text, is_math in drawn if not is_math}
    assert {*names, "50 %", "a $title$ ^ $_$", "another $title_$^$"} <= shown
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("classes", "curves", "sheet"))
