"""Several processes that are cut off and resumed end in the bits of those that were not; they agree when to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from interrupting import interrupt
from test_distributed import crew, imported_once, run  # noqa: F401
from test_resume import run_folder

import main_stage1
import main_stage2
from benchmarks.torture import equal, outcome
from utils.resume import state_files

ARGUMENTS = "main_stage1.py --dataset digits --epochs 3 --seed 0 --device cpu"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(arguments: str, interrupted: str = "0 0 SIGTERM") -> subprocess.CompletedProcess[str]:
    """Two processes of a command; ``interrupted`` says which of them gets a signal, in which step, and which one."""
    command = [*LAUNCHER, str(ROOT / "tests/interrupting.py"), *interrupted.split(), *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


OPTIONS = ("--accum 2 --ema 0.9 --mixup 0.2 --aug autoaugment+cutout", "--wd 0 0.1 --sampler class --val_split 0.2")
SIGNALS = ("1 3 SIGTERM", "0 7 SIGINT", "0 0 SIGTERM")


def cut_off_and_resumed(home: Path) -> Any:
    """What a process of a crew does: every command undisturbed, then cut off twice and resumed."""
    found = {}
    for number, options in enumerate(OPTIONS):
        interrupt("0", 0, "")
        arguments = f"{ARGUMENTS.removeprefix('main_stage1.py ')} {options} --out"
        whole = run(main_stage1.main, f"{arguments} whole{number}")
        cut = []
        for rank, step, name in map(str.split, SIGNALS):
            interrupt(rank, int(step), name)
            cut.append(run(main_stage1.main, f"{arguments} cut{number} --resume auto"))
        found[options] = whole, cut
    return found


STAGE2 = (
    "--pretrained_pth {}/checkpoints/digits_exp100_resnet8_stage1.pt --views 2 --finetune_epoch 3 --seed 0 "
    "--device cpu --threads 1 --out"
)


def stage2_cut_off(home: Path) -> Any:
    """The same of stage 2, cut off where the first process is alone."""
    interrupt("0", 2, "SIGTERM")
    return run(main_stage2.main, f"{STAGE2.format(home / 'of2/0')} cut")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    home = tmp_path_factory.mktemp("home")
    return home / "of2" / "0", crew(2, home, cut_off_and_resumed, stage2_cut_off)


@pytest.fixture(scope="module")
def two(found) -> tuple[Path, list[Any]]:
    return found[0], found[1]["cut_off_and_resumed"]


@pytest.fixture(scope="module")
def stage2(found) -> list[Any]:
    return found[1]["stage2_cut_off"]


@pytest.mark.parametrize("number, options", list(enumerate(OPTIONS)))
def test_two_processes_end_in_the_same_bits(two, number: int, options: str) -> None:
    home, (first, second) = two
    whole, (*cut, last) = first[options]
    assert whole["status"] == last["status"] == 0, last
    for words, ended, other in zip(SIGNALS, cut, second[options][1]):
        name = words.split()[2]
        assert ended["status"] == other["status"] == 128 + signal.Signals[name]
        assert ended["error"].count(f"ended by {name}") == 1 and "Traceback" not in ended["error"] + other["error"]
        again = f"main_stage1.py --resume=cut{number}/"
        assert f"to continue: torchrun --nproc-per-node=2 -- {ROOT}/{again}" in ended["error"]
    assert last["out"].count("resumed after step") == 1, last
    assert equal(outcome(home / f"cut{number}"), outcome(home / f"whole{number}"))


def test_one_process_goes_on_with_stage_2_of_two(two, stage2, monkeypatch) -> None:
    home, _ = two
    first, second = stage2
    assert (first["status"], second["status"]) == (143, 1) and not second["error"]
    assert "ended by SIGTERM" in first["error"]
    assert f"to continue: torchrun --nproc-per-node=2 -- {ROOT}/main_stage2.py --resume=cut/" in first["error"]
    monkeypatch.chdir(home)
    flags = STAGE2.format(home).split()
    main_stage2.main([*flags, "cut", "--resume", "auto"])
    assert "resumed after step" in (run_folder("cut") / "log.txt").read_text()
    main_stage2.main([*flags, "whole", "--cache_dir", "other"])
    assert equal(outcome(Path("cut")), outcome(Path("whole")))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves(workdir, name: str) -> None:
    """It reaches both processes, SIGINT twice where a terminal sends it to the whole group."""
    command = [*LAUNCHER, str(ROOT / "main_stage1.py"), *ARGUMENTS.split()[1:], "--epochs", "100000", "--out", "cut"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("    10  "):
            break
    began = time.monotonic()
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 15 and process.returncode != 0
    assert f"ended by {name}" in error and "to continue: torchrun" in error
    assert state_files(run_folder("cut")) and not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize("rank, end", [(1, "raise"), (0, "SIGKILL")])
def test_a_crash_of_one_ends_the_others_and_is_shown(workdir, rank: int, end: str) -> None:
    began = time.monotonic()
    crashed = torchrun(f"{ARGUMENTS} --save_every 1 --out cut", f"{rank} 8 {end}")
    assert crashed.returncode == 1 and time.monotonic() - began < 60
    assert ("what went wrong in this process" if end == "raise" else "SIGKILL") in crashed.stderr
