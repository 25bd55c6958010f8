"""A run that is cut off and resumed ends in the bits of one that was not: weights, records, what was selected."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import compare
import main_stage1
import main_stage2
from benchmarks.torture import COMMANDS, equal, outcome, tortured
from engine import Selection, TrainStep, make_sgd
from models import build_model
from retraining.results import Finished
from utils import resume, signals
from utils.command import command
from utils.files import _place, atomic, lock, sha256
from utils.metrics import GroupScore, Report
from utils.resume import GLOBAL_GENERATORS, TrainState, state_files
from utils.run import Run
from utils.typed import fits

DIGITS = ["--dataset", "digits", "--seed", "0"]
STAGE1, STAGE2 = (Path(f"checkpoints/digits_exp100_resnet8_{stage}.pt") for stage in ("stage1", "stage2"))
MAINS = {"main_stage1.py": main_stage1.main, "main_stage2.py": main_stage2.main, "compare.py": compare.main}


class Interruptions:
    """Sends the process a signal after given numbers of steps and epochs, counted over all of its life."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.number = 0, frozenset[int](), signal.SIGTERM
        for name in ("advance", "next_epoch"):
            monkeypatch.setattr(TrainState, name, self.counted(getattr(TrainState, name)))
        monkeypatch.setattr("utils.distributed.signals.check", self.counted(signals.check))

    def counted(self, call):
        def counting(*arguments, **options):
            self.count += 1
            if self.count in self.at:
                signal.raise_signal(self.number)
            return call(*arguments, **options)

        return counting


@pytest.fixture
def interruptions(monkeypatch) -> Interruptions:
    return Interruptions(monkeypatch)


def run_folder(out: str) -> Path:
    """The folder of the only run under --out."""
    (options,) = Path(out).glob("*/*/options.json")
    return options.parent


def cut_off_and_resumed(script: str, arguments: list[str], interruptions: Interruptions, at: list[int]) -> None:
    """Compares a run that is cut off at some moments, each time resumed, with one that is not."""
    main = MAINS[script]
    caches = {out: [] if script == "main_stage1.py" else ["--cache_dir", f"{out}_cache"] for out in ("whole", "cut")}
    result = main([*arguments, *caches["whole"], "--out", "whole"])
    total, interruptions.count = interruptions.count, 0
    interruptions.at = frozenset(1 + place * total // 100 for place in at)
    status = []
    while True:
        try:
            resumed = main([*arguments, *caches["cut"], "--out", "cut", "--resume", "auto"])
            break
        except SystemExit as stop:
            status.append(stop.code)
            assert len(status) <= len(at)
            assert state_files(run_folder("cut")) or any(map(state_files, run_folder("cut").glob("*/")))
    assert status == [143] * len(interruptions.at)
    assert equal(resumed, result)
    assert equal(outcome(Path("cut")), outcome(Path("whole")))
    assert not list(Path("cut").rglob("state-*")) and not list(Path().rglob("*.tmp"))


RECIPES = {
    "plain": "",
    "policies": "--aug autoaugment+cutout --batch_size 3",
    "mixed": "--mixup 0.2 --cutmix 1 --aug randaugment",
    "ema": "--ema 0.9 --momentum 0.5 --nesterov",
    "drw": "--loss ldam --head cosine --drw_epoch 1",
    "class": "--sampler class --loss lade",
    "sqrt": "--sampler sqrt --constraint l2 --warmup_epochs 1",
    "progressive": "--sampler progressive --accum 2 --constraint maxnorm",
    "val": "--val_split 0.2 --select best_val --select_by macro_f1 --eval_every 1",
    "published": "--protocol published",
    "frozen": "--pretrained_pth start.pt --train_scope last_block",
    "sweep": "--wd 0 0.1 --seed 0 1",
    "losses": "--loss ce focal --val_split 0.2",
}


@pytest.mark.parametrize("name", RECIPES)
def test_stage1_ends_in_the_same_bits(workdir, interruptions, name: str) -> None:
    if name == "frozen":
        main_stage1.main([*DIGITS, "--epochs", "1"])
        STAGE1.rename("start.pt")
        interruptions.count = 0
    arguments = [*DIGITS, "--epochs", "3", *RECIPES[name].split()]
    cut_off_and_resumed("main_stage1.py", arguments, interruptions, [7, 29, 50, 51, 93])


CLASSIFIERS = {
    "one": "",
    "views": "--method los crt maxnorm disalign tau-norm --label_smooth 0.9 0.98 --seed 0 1 --views 3",
    "replay": "--method los lws marc --features replay --sampler instance class progressive",
    "orbit": "--method crt cosine ldam --features orbit --sampler sqrt",
    "published": "--protocol published --method maxnorm lade --maxnorm_every epoch step",
    "held out": "--method los crt --select best_val --eval_every 1 --batch_size 16 32",
    "changed": "--method tail-sampling crt h2t --tail_neighbours 1 3 --tail_alpha 0.5 --h2t_rho 0.3 0.6 --views 2",
    "changed, replay": "--method tail-sampling h2t --features replay --sampler class progressive",
    "val": "--method los crt --label_smooth val --select best_val --select_by top1 --eval_every 1",
    "scope": "--method crt --finetune_scope fc last_block all --eval_every 1 --select best_val",
    "scope, projected": "--method maxnorm --finetune_scope all --eval_every 1",
    "scope, replay": "--method crt --finetune_scope all fc --features replay",
}


@pytest.fixture
def stage1(workdir, interruptions) -> None:
    main_stage1.main([*DIGITS, "--epochs", "1", "--val_split", "0.2"])
    interruptions.count = 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_stage2_ends_in_the_same_bits(stage1, interruptions, name: str) -> None:
    arguments = [*DIGITS, "--finetune_epoch", "3", *CLASSIFIERS[name].split()]
    cut_off_and_resumed("main_stage2.py", arguments, interruptions, [7, 29, 50, 51, 93])


@pytest.mark.parametrize("options", ["--method joint los crt cosine", "--tune --method crt focal"])
def test_compare_ends_in_the_same_bits(stage1, interruptions, options: str) -> None:
    arguments = [*DIGITS, "--finetune_epoch", "2", "--seed", "0", "1", *options.split()]
    cut_off_and_resumed("compare.py", arguments, interruptions, [9, 40, 77])


@pytest.mark.parametrize("name", ["scope, projected", "published"])
def test_stage2_goes_on_after_every_step(stage1, interruptions, name: str) -> None:
    arguments = [*DIGITS, "--finetune_epoch", "2", *CLASSIFIERS[name].split()]
    cut_off_and_resumed("main_stage2.py", arguments, interruptions, [*range(0, 100, 3)])


def test_random_numbers_go_on(workdir) -> None:
    """Those of the global generators, which dropout draws from; they and the scale of float16 are part of a state."""
    found = []
    for attempt in range(2):
        with Run(workdir) as run:
            state = TrainState(run, torch.device("cpu"), None, 1, {})
            with state.training(""):
                found.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
                if attempt == 0:
                    state.save()
                    found.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert found[2] == found[1] != found[0]


def parts(run: Run, is_new: bool) -> dict:
    """What is saved of a run, as it begins and after something has happened."""
    model = build_model("resnet8", 10, 1)
    step = TrainStep(model, torch.nn.CrossEntropyLoss(), make_sgd(model.parameters(), 0.1, 0.9, 0, False), ema=0.5)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0 if is_new else 64.0)
    selection, finished = Selection("best_test"), Finished(None, "last")
    if not is_new:
        step(torch.rand(4, 1, 8, 8), torch.arange(4))
        selection.offer(1, model, {"top1": 0.5}, {"class_mean": 0.25})
        selection.offer(2, model, {"top1": 0.25}, None)
        finished.fits["one"], finished._states["a"] = 3, {"seconds": 1.0}
        run.log({"epoch": 1, "lr": 0.1})
        run.resumed.append({"at": "step 1"})
    return {"step": step, "selection": selection, "finished": finished, "run": run}


def test_every_part_takes_up_all_that_it_saves(workdir) -> None:
    Path("new").mkdir()
    Path("old").mkdir()
    with Run(Path("old")) as old, Run(Path("new")) as new:
        new_parts = parts(new, is_new=True)
        for name, part in parts(old, is_new=False).items():
            fresh, saved = new_parts[name], part.state_dict()
            assert not equal(fresh.state_dict(), saved)
            fresh.load_state_dict(copy.deepcopy(saved))
            assert equal(fresh.state_dict(), saved), name
        step = new_parts["step"]
        own = {kind: {key: value + 1 for key, value in found.items()} for kind, found in step.own_state().items()}
        step.load_own_state(own)
        assert equal(step.own_state(), own)
    assert len(Path("new/metrics.jsonl").read_text().splitlines()) == 1


def test_a_refused_start_leaves_the_run_as_it_was(workdir, interruptions, capsys) -> None:
    arguments = [*DIGITS, "--epochs", "3", "--save_every", "1"]
    interruptions.at = {27}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments)
    folder = run_folder("output")
    records, states = (folder / "metrics.jsonl").read_bytes(), [path.read_bytes() for path in state_files(folder)]
    for path in state_files(folder):
        path.write_bytes(b"damaged")
    assert "damaged, and no other" in shown_error(capsys, main_stage1.main, "--resume", str(folder))
    assert records and (folder / "metrics.jsonl").read_bytes() == records
    for path, content in zip(state_files(folder), states):
        path.write_bytes(content)
    (folder / "finished.json").mkdir()
    main_stage1.main(["--resume", str(folder)])
    assert state_files(folder), "the run is not marked as complete, and its state is gone"


def test_a_state_of_another_run_is_refused(workdir, interruptions, capsys) -> None:
    folders = []
    for wd in ("0", "0.1"):
        interruptions.at = {interruptions.count + 9}
        with pytest.raises(SystemExit):
            main_stage1.main([*DIGITS, "--epochs", "3", "--wd", wd, "--out", wd])
        folders.append(run_folder(wd))
    (mine,), (theirs,) = map(state_files, folders)
    mine.write_bytes(theirs.read_bytes())
    assert "another set of options" in shown_error(capsys, main_stage1.main, "--resume", str(folders[0]))
    content = torch.load(theirs, weights_only=True)
    theirs.write_bytes(resume._dump(content | {"format": 99}))
    assert "a state of format 99" in shown_error(capsys, main_stage1.main, "--resume", str(folders[1]))
    for text in (
        "[]",
        "{}",
        "[" * 10**5,
        '{"script": "main_stage1.py", "typed": {}, "seed": 5, "start": null, "options": {}}',
    ):
        (folders[0] / "options.json").write_text(text)
        assert "no run that can be resumed" in shown_error(capsys, main_stage1.main, "--resume", str(folders[0]))
        main_stage1.main([*DIGITS, "--epochs", "1", "--wd", "0", "--out", "0", "--resume", "auto"])


def test_flags_that_are_no_part_of_the_run_are_kept(workdir, interruptions) -> None:
    interruptions.at = {27}
    with pytest.raises(SystemExit):
        main_stage1.main([*DIGITS, "--epochs", "3", "--save_every", "1", "--keep_states", "1", "--threads", "1"])
    main_stage1.main(["--resume", str(run_folder("output")), "--keep_states", "3"])
    options = torch.load(STAGE1, weights_only=True)["options"]
    assert (options["save_every"], options["keep_states"], options["threads"]) == (1, 3, 1)


def test_a_complete_run_is_published_again(workdir) -> None:
    first, second = ([*DIGITS, "--epochs", "1", "--wd", wd, "--resume", "auto"] for wd in ("0", "0.1"))
    for arguments in (first, second, first):
        main_stage1.main(arguments)
    assert torch.load(STAGE1, weights_only=True)["options"]["wd"] == 0


def test_open_files_stay_the_same(workdir, interruptions) -> None:
    numbers = []
    for out in ("first", "second"):
        arguments = [*DIGITS, "--epochs", "3", "--wd", "0", "0.1", "--out", out]
        interruptions.at = {interruptions.count + 9}
        with pytest.raises(SystemExit):
            main_stage1.main(arguments)
        main_stage1.main([*arguments, "--resume", "auto"])
        gc.collect()
        numbers.append(len(os.listdir("/proc/self/fd")))
    assert numbers[0] == numbers[1]


def shown_error(capsys, main, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_resumed(workdir, interruptions, capsys) -> None:
    """auto takes the newest run of the same command from the same file; a complete one is not made again."""
    quick = [*DIGITS, "--epochs", "2"]
    first = main_stage1.main([*quick, "--resume", "auto"])
    assert "a new one begins" in capsys.readouterr().out
    assert equal(main_stage1.main([*quick, "--resume", "auto", "--out", "output/", "--threads", "1"]), first)
    assert "is complete" in capsys.readouterr().out
    assert len(list(Path("output").glob("*/*"))) == 1
    main_stage1.main([*quick, "--resume", "auto", "--wd", "0"])
    assert len(list(Path("output").glob("*/*"))) == 2

    arguments = ["--dataset", "digits", "--finetune_epoch", "2", "--resume", "auto"]
    interruptions.at = {interruptions.count + 25}
    with pytest.raises(SystemExit):
        main_stage2.main(arguments)
    (options,) = Path("output").glob("*stage2/*/options.json")
    seed = json.loads(options.read_text())["seed"]
    main_stage1.main(quick)  # another file than the run above began from
    capsys.readouterr()
    main_stage2.main(arguments)
    assert "a new one begins" in capsys.readouterr().out
    assert "was begun from another checkpoint" in shown_error(capsys, main_stage2.main, "--resume", str(options.parent))
    assert seed != [0] and len(list(Path("output").glob("*stage2/*"))) == 2


def test_a_run_is_resumed_by_its_folder_alone(workdir, interruptions, capsys) -> None:
    """The drawn seed and the options are the run's; other options are refused, files may move."""
    arguments = ["--dataset", "digits", "--epochs", "3", "--wd", "0.01"]
    interruptions.at = {9}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments)
    folder = next(Path("output").glob("*/*"))
    told = capsys.readouterr().err
    assert "ended by SIGTERM" in told and f"to continue: python {ROOT}/main_stage1.py --resume={folder}\n" in told
    assert f"main_stage1.py --resume={folder}\n" in (folder / "log.txt").read_text()
    folder = folder.rename("moved")
    for wrong in (["--wd", "0.1"], ["--lr", "0.05"], ["--seed", "3"]):
        assert "was begun with" in shown_error(capsys, main_stage1.main, "--resume", "moved", *wrong)
    assert "a run of main_stage1.py" in shown_error(capsys, main_stage2.main, "--resume", "moved")
    assert "no run that can be resumed" in shown_error(capsys, main_stage1.main, "--resume", "elsewhere")
    report = main_stage1.main(["--resume", "moved", "--wd", "0.01", "--keep_states", "1"])
    file = torch.load(STAGE1, weights_only=True)
    assert [place["at"] for place in file["provenance"]["resumed"]] == ["step 4 of epoch 1"]
    seed = file["options"]["seed"]
    assert equal(main_stage1.main([*arguments, "--seed", str(seed)]), report)


def test_states_are_few_and_a_damaged_one_is_passed_over(workdir, interruptions, capsys) -> None:
    arguments = [*DIGITS, "--epochs", "4", "--save_every", "1"]
    report = main_stage1.main([*arguments, "--out", "whole"])
    interruptions.at = {interruptions.count * 2 - 4}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments)
    folder = run_folder("output")
    newest, _ = state_files(folder)
    content = bytearray(newest.read_bytes())
    weight = torch.load(newest, weights_only=True)["parts"]["step"]["model"]["fc.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    assert equal(main_stage1.main([*arguments, "--resume", "auto"]), report)
    assert f"{newest.name} is damaged; the state before it is taken" in capsys.readouterr().out
    assert equal(outcome(Path("output")), outcome(Path("whole")))

    with pytest.raises(SystemExit):
        interruptions.at = {interruptions.count + 9}
        main_stage1.main([*arguments, "--out", "third"])
    for path in state_files(run_folder("third")):
        path.write_bytes(b"damaged")
    assert "damaged, and no other" in shown_error(capsys, main_stage1.main, "--resume", str(run_folder("third")))
    assert equal(main_stage1.main([*arguments, "--out", "third", "--resume", "auto"]), report)
    assert "all states of third/" in capsys.readouterr().out and len([*Path("third").glob("*/*")]) == 2


def test_a_state_that_the_disk_does_not_give_is_not_given_up(workdir, interruptions, capsys, monkeypatch) -> None:
    arguments = [*DIGITS, "--epochs", "3", "--save_every", "1"]
    interruptions.at = {27}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments)
    folder, opened = run_folder("output"), os.open
    before = state_files(folder)

    def fails(path: Path, *arguments: int) -> int:
        if str(path).endswith(before[0].name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        assert "Input/output error" in shown_error(capsys, main_stage1.main, "--resume", str(folder))
    assert state_files(folder) == before
    main_stage1.main(["--resume", str(folder)])


def test_a_run_that_another_process_has_completed_is_left_alone(workdir, monkeypatch, capsys) -> None:
    """It was not complete when --resume auto looked, and is when the lock is there."""
    arguments = [*DIGITS, "--epochs", "2", "--resume", "auto"]
    main_stage1.main(arguments)
    folder = run_folder("output")
    metrics = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("experiment.resuming.completed_run", lambda folder: None)
    assert "another process has completed" in shown_error(capsys, main_stage1.main, *arguments)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_complete_run_is_published_to_the_bit(workdir, capsys) -> None:
    """So that what began from it can still be resumed; of a sweep too, and where checkpoints/ has gone."""
    for flags in ([], ["--wd", "0", "0.1"]):
        arguments = [*DIGITS, "--epochs", "1", *flags, "--resume", "auto"]
        main_stage1.main(arguments)
        made = sha256(STAGE1)
        main_stage1.main([*DIGITS, "--epochs", "1", "--lr", "0.01"])
        assert sha256(STAGE1) != made
        main_stage1.main(arguments)
        assert sha256(STAGE1) == made
        shutil.rmtree("checkpoints")
        main_stage1.main(arguments)
        assert sha256(STAGE1) == made and "is complete" in capsys.readouterr().out


def test_a_finished_run_of_a_sweep_whose_weights_are_lost_is_made_again(workdir, interruptions, capsys) -> None:
    arguments = [*DIGITS, "--epochs", "2", "--wd", "0", "0.1"]
    report = main_stage1.main([*arguments, "--out", "whole"])
    interruptions.at = {interruptions.count * 7 // 4}  # in the second run
    with pytest.raises(SystemExit):
        main_stage1.main(arguments)
    (weights,) = run_folder("output").glob("*/checkpoint.pt")
    weights.write_bytes(b"cut off")
    assert equal(main_stage1.main([*arguments, "--resume", "auto"]), report)
    assert "this run is made again" in capsys.readouterr().out


def test_without_its_options_no_run_begins(workdir, monkeypatch, capsys) -> None:
    def refuses(path: Path, text: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("experiment.record.write_text", refuses)
    with pytest.raises(SystemExit) as stop:
        main_stage1.main([*DIGITS, "--epochs", "1"])
    assert stop.value.code == 1 and "options.json" in capsys.readouterr().err and not STAGE1.exists()


def test_a_signal_that_is_ignored_stays_ignored(workdir) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_signal_leaves_half_built_is_not_spoken_of(capfd) -> None:
    class Half:
        def __init__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            self.whole = True

        def __del__(self) -> None:
            self.whole  # noqa: B018

    with pytest.raises(SystemExit) as stop:
        command(lambda argv: Half())([])
    assert stop.value.code == 143 and capfd.readouterr().err == "\nended by SIGTERM\n"


def test_a_complete_run_sweeps_up_what_it_left_when_it_was_killed(workdir) -> None:
    """As after its result was written, before its lock was let go."""
    main_stage1.main([*DIGITS, "--epochs", "1"])
    folder = run_folder("output")
    for left in (folder.with_name(f".{folder.name}.lock"), folder / f".a.1-1-{'0' * 8}-{'0' * 8}.{'0' * 8}.tmp"):
        left.touch()
    place = _place()
    (folder / f".b.1-1-{place[0]}-{place[1]}.{'0' * 8}.tmp").touch()
    main_stage1.main([*DIGITS, "--epochs", "1", "--resume", "auto"])
    assert [path.name[:3] for path in Path("output").rglob(".*")] == [".a."]  # of another host


def test_photos_of_other_content_are_not_gone_on_with(workdir, interruptions, capsys) -> None:
    for split, number in (("train", 4), ("test", 2)):
        for label in ("a", "b"):
            for i in range(number):
                path = Path(f"pets/{split}/{label}/{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (80, 80), (40 * i, 0, 99)).save(path)
    arguments = "--dataset folder --data_dir pets --network resnet8 --stem small --epochs 2 --seed 0 --image_size 80"
    interruptions.at = {interruptions.count + 1}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments.split())
    Image.new("RGB", (80, 80), (1, 2, 3)).save("pets/train/a/0.png")
    assert "another set of training images" in shown_error(
        capsys, main_stage1.main, *arguments.split(), "--resume", "auto"
    )


def test_other_images_are_not_gone_on_with(small_cifar10, interruptions, capsys) -> None:
    arguments = f"--dataset cifar10 --data_dir {small_cifar10} --imb_ratio 2 --network resnet8 --epochs 2 --seed 0"
    interruptions.at = {2}
    with pytest.raises(SystemExit):
        main_stage1.main(arguments.split())
    for path in Path(small_cifar10).rglob("data_batch_1"):
        content = path.read_bytes()
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert "another set of training images" in shown_error(
        capsys, main_stage1.main, *arguments.split(), "--resume", "auto"
    )


def test_a_run_folder_is_one_process_s_at_a_time(workdir, interruptions, capsys) -> None:
    interruptions.at = {9}
    with pytest.raises(SystemExit):
        main_stage1.main([*DIGITS, "--epochs", "3"])
    folder = run_folder("output")
    records = (folder / "options.json").read_text()
    with lock(folder):
        error = shown_error(capsys, main_stage1.main, *DIGITS, "--epochs", "3", "--resume", "auto")
    assert f"{folder} is being run by process" in error and (folder / "options.json").read_text() == records
    main_stage1.main([*DIGITS, "--epochs", "3", "--resume", "auto"])


@pytest.mark.parametrize(
    "name, number", [*((name, signal.SIGKILL) for name in COMMANDS), ("stage 1", signal.SIGTERM)], ids=str
)
def test_killed_at_any_moment_it_ends_in_the_same_bits(tmp_path, name: str, number: signal.Signals) -> None:
    """A few; benchmarks/torture.py kills many."""
    assert tortured(COMMANDS[name], tmp_path, 2, number, random.Random(f"{name} {number}"))["kills"] >= 2


def test_a_second_signal_stops_runs_side_by_side_at_once(workdir) -> None:
    slow = (
        "import sys, time; import main_stage1, engine; call = engine.TrainStep.__call__; "
        "engine.TrainStep.__call__ = lambda self, *batch: (time.sleep(20), call(self, *batch))[1]; "
        "main_stage1.main(sys.argv[1:])"
    )
    arguments = [*DIGITS, "--epochs", "2", "--wd", "0", "0.1", "--parallel", "2", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", slow, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    begun = 0
    for line in process.stdout:
        begun += "run " in line
        if begun == 2:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 8 and process.returncode == 143, error
    assert "ended by SIGTERM" in error and "Traceback" not in error


def test_generators_are_not_put_back_while_a_network_is_built(workdir) -> None:
    """Runs of a sweep side by side share them: the one that is resumed waits for the one that begins."""
    with Run(workdir) as run:
        state = TrainState(run, torch.device("cpu"), None, 1, {})
        with state.training(""):
            state.save()
    put_back = threading.Event()

    def resume() -> None:
        with Run(workdir) as run, TrainState(run, torch.device("cpu"), None, 1, {}).training(""):
            put_back.set()

    thread = threading.Thread(target=resume)
    with GLOBAL_GENERATORS:
        torch.manual_seed(0)
        thread.start()
        assert not put_back.wait(0.5)
        drawn = torch.rand(3)
    thread.join(30)
    torch.manual_seed(0)
    assert put_back.is_set() and torch.equal(torch.rand(3), drawn)


def test_a_state_that_has_no_room_costs_a_line(workdir, interruptions, monkeypatch, capsys) -> None:
    """The run goes on; when it is cut off, the state before is there."""
    arguments = [*DIGITS, "--epochs", "4", "--save_every", "1"]
    report = main_stage1.main([*arguments, "--out", "whole"])
    saved = atomic

    @contextlib.contextmanager
    def full(path: Path):
        if path.name > "state-000001.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with saved(path) as temporary:
            yield temporary

    interruptions.at = {interruptions.count * 7 // 4}
    with monkeypatch.context() as patch:
        patch.setattr("utils.resume.atomic", full)
        with pytest.raises(SystemExit):
            main_stage1.main(arguments)
    said = capsys.readouterr().out
    assert "was not saved: No space left on device" in said and "MB free on the disk of" in said
    assert [path.name for path in state_files(run_folder("output"))] == ["state-000001.pt"]
    assert equal(main_stage1.main([*arguments, "--resume", "auto"]), report)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": 5},
        {"own": []},
        {"parts": {}},
        {"always": {}},
        {"machine": 5},
        {"epoch": "x"},
        {"epoch": -5},
        {"step": 2**60},
    ],
    ids=str,
)
def test_a_state_that_is_not_as_it_should_be_is_refused(change: dict, workdir, interruptions, capsys) -> None:
    interruptions.at = {9}
    with pytest.raises(SystemExit):
        main_stage1.main([*DIGITS, "--epochs", "3", "--out", "out"])
    folder = run_folder("out")
    (state,) = state_files(folder)
    whole = state.read_bytes()
    state.write_bytes(resume._dump(torch.load(state, weights_only=True) | change))
    assert "has a state that is not of this run" in shown_error(capsys, main_stage1.main, "--resume", str(folder))
    blob = bytearray(whole)
    blob[len(blob) // 2] ^= 1
    state.write_bytes(blob)
    assert "damaged, and no other state" in shown_error(capsys, main_stage1.main, "--resume", str(folder))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (True, float, False),
        (1, float, True),
        (1.5, int, False),
        (None, float | None, True),
        ("x", float | None, False),
        ([1, 2.5], list[float], True),
        ([1, "x"], list[float], False),
        ([1, "x"], tuple[int, str], True),
        ((1,), tuple[int, str], False),
        ({"a": None}, dict[str, float | None], True),
        ({1: None}, dict[str, float | None], False),
        ({"top1": 0.5, "per_class": [0.5, None]}, Report, True),
        ({"top1": "0.5"}, Report, False),
        ({"other": 0.5}, Report, False),
        ({"accuracy": 0.5, "classes": 3}, GroupScore, False),
        (torch.zeros(1), torch.Tensor, True),
    ],
)
def test_types_of_what_a_state_holds(value: object, hint: object, expected: bool) -> None:
    assert fits(value, hint) == expected
