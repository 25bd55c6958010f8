"""Disks that are full, broken or not to be written to: what is left of a run's results, of the old ones, of litter."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_places_lt

import main_stage1
import main_stage2
import retraining.train
from benchmarks.faults import KINDS, Fault, Prepare, Stage, attempt, every, litter, stored, trial
from datasets import prepare
from utils.checkpoints import read

FLAGS = "--dataset digits --seed 0 --threads 1".split()
STAGE1 = Stage("main_stage1", (*FLAGS, "--epochs", "1", "--wd", "0"), "checkpoints/digits_exp100_resnet8_stage1.pt")
STAGE2 = Stage(
    "main_stage2",
    (*FLAGS, "--finetune_epoch", "1", "--views", "1", "--label_smooth", "0.5"),
    "checkpoints/digits_exp100_resnet8_stage2.pt",
)
PREPARE = Prepare(("places_lt", "--root", "photos", "--any_counts", "--cache", "16"), "data/places_lt")
COMMANDS = {"stage1": STAGE1, "stage2": STAGE2, "prepare": PREPARE}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each command a folder with the older result that it replaces."""
    made = {name: tmp_path_factory.mktemp(name) / "base" for name in COMMANDS}
    made["stage1"].mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made["stage1"])
        main_stage1.main([*FLAGS, "--epochs", "1"])
        shutil.copytree(made["stage1"], made["stage2"])
        patch.chdir(made["stage2"])
        main_stage2.main([*FLAGS, "--finetune_epoch", "1", "--views", "0"])
        made["prepare"].mkdir()
        patch.chdir(made["prepare"])
        lists = make_places_lt(made["prepare"] / "photos") / "Places_LT_train.txt"
        prepare.main(PREPARE.argv)
        lines = lists.read_text().splitlines()
        lists.write_text("\n".join([lines[1], lines[0], *lines[2:]]))  # of the same number, so that shapes do not tell
    for base in made.values():
        shutil.rmtree(base / "output", ignore_errors=True)
    return made


@pytest.fixture(scope="module")
def faults(bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Fault]]:
    """All faults that each command may meet."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: every(command, bases[name], folder / name) for name, command in COMMANDS.items()}


@pytest.mark.parametrize(
    "name, kind",
    [*(("stage1", kind) for kind in KINDS), ("stage2", "full"), ("prepare", "broken"), ("prepare", "read-only")],
)
def test_results_stand_whichever_operation_fails(name: str, kind: str, bases, faults, tmp_path: Path) -> None:
    """One of them, chosen by a seed; all of them take an hour."""
    found = [fault for fault in faults[name] if fault.kind == kind]
    assert len(found) > 20
    trial(COMMANDS[name], random.Random(f"{name} {kind} 0").choice(found), bases[name], tmp_path / "run")


def test_without_room_for_the_run_folder_the_weights_are_published(bases, tmp_path: Path) -> None:
    """Whatever fails once training has begun, in the one place or the other."""
    run = tmp_path / "run"
    shutil.copytree(bases["stage1"], run)
    before = stored(run)
    ended = attempt(STAGE1.module, STAGE1.argv, Fault("full", 16, "output"), run)
    assert ended.status == 0 and stored(run)[STAGE1.final].sha256 != before[STAGE1.final].sha256, ended.said
    assert set(stored(run)) == {STAGE1.final, f"{STAGE1.final}.prev"} and not list(run.rglob("*.png"))
    notes = [line for line in ended.said.splitlines() if line.startswith("note: ")]
    lost = ("checkpoint.pt", "per_class.csv", "curves.png", "per_class.png", "finished.json")
    assert [re.search(r"no (\S+): No space left", line)[1] for line in notes[1:]] == list(lost)
    assert "the run goes on" in notes[0] and all("MB free on the disk of" in line for line in notes)
    assert f"saved {STAGE1.final}" in ended.said and not litter(run)


def test_without_room_in_checkpoints_the_run_folder_has_the_weights(bases, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bases["stage1"], run)
    before = stored(run)
    ended = attempt(STAGE1.module, STAGE1.argv, Fault("full", 3, "checkpoints"), run)
    last = ended.said.splitlines()[-1]
    copy = re.search(r"the weights are in (\S+)$", last)[1]
    assert ended.status == 1 and f"stopped: {STAGE1.final} has not been written: No space left" in last
    after = stored(run)
    assert after[STAGE1.final].sha256 == before[STAGE1.final].sha256 and after[copy].options["wd"] == 0
    assert len(list(run.rglob("*.png"))) == 2 and not litter(run)


def test_a_sweep_whose_folders_are_full_publishes_the_best(bases, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bases["stage1"], run)
    argv = [*FLAGS, "--epochs", "1", "--wd", "0", "1e-3"]
    ended = attempt(STAGE1.module, argv, Fault("full", 16, "output"), run)
    assert ended.status == 0 and "note: no sweep.csv" in ended.said and "goes on without a folder" in ended.said
    assert stored(run)[STAGE1.final].metrics["sweep"]["settings"] == 2


def test_standard_output_on_a_full_disk_does_not_end_a_training(workdir: Path) -> None:
    arguments = [sys.executable, str(ROOT / "main_stage1.py"), *FLAGS, "--epochs", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True)
    words = "note: standard output: No space left on device; the run goes on without\n"
    assert (done.returncode, done.stderr) == (0, words)
    [log] = workdir.rglob("log.txt")
    assert read(STAGE1.final).metrics["epoch"] == 1 and f"saved {STAGE1.final}" in log.read_text()


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_the_room_that_a_run_needs_is_checked_before_it_begins(name, bases, workdir: Path, monkeypatch, capsys) -> None:
    shutil.copytree(bases[name], "run")
    monkeypatch.chdir("run")
    main = {"stage1": main_stage1, "stage2": main_stage2}[name].main
    needed = {"stage1": 3 + 3 * 4, "stage2": 3}[name]  # stage 1 keeps states, of four times the weights
    usage, size = shutil.disk_usage("."), sum(v.nbytes for v in read(STAGE1.final).model.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed * size - 1))
    with pytest.raises(SystemExit) as ended:
        main(COMMANDS[name].argv)
    assert ended.value.code == 2 and not list(Path("output").rglob("log.txt"))
    assert "MB on the disk of output and checkpoints, where" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=max(needed * size, 10**6)))
    main(COMMANDS[name].argv)


def test_the_room_that_features_need_is_that_of_their_arrays(bases, workdir: Path, monkeypatch, capsys) -> None:
    asked: list[float] = []
    monkeypatch.setattr(retraining.train, "require_room", lambda needed, what: asked.append(*needed.values()))
    shutil.copytree(bases["stage1"], "run")
    monkeypatch.chdir("run")
    for features in ("views", "orbit", "replay"):
        views = ["--views", "3"] if features == "views" else []
        for _ in range(2):  # and the second time it is there
            main_stage2.main([*FLAGS, "--finetune_epoch", "2", "--features", features, *views])
        made = sum(
            path.stat().st_size - 128 - 12
            for path in Path("cache").rglob("*.npy")
            if re.match("view_|orbit_|epoch_", path.name)
        )
        assert asked[0] == made > 0 and asked[1] == 0
        asked.clear()
        shutil.rmtree("cache")
