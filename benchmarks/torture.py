"""Runs that are killed, and disks that fail: nothing is lost, and what is resumed ends in the same bits.

    make torture                                        everything: an hour on one core
    python -m benchmarks.torture --kills 20 --faults 0  a part of it
    python -m benchmarks.torture --only compare --signal SIGTERM

Each command below is run undisturbed once. Then it is killed at a random moment, started again with --resume auto and
killed again, until it ends by itself; weights, metrics, records and what the command returns must then be equal to the
last bit. So often, until there were --kills kills of each command by SIGKILL, and as many by SIGTERM. Disks fail as
benchmarks/faults.py has it. A report goes to benchmarks/results/torture.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import append_line, read_lines
from benchmarks.faults import PRELOADED, Stage, every, litter, trial
from utils.command import command
from utils.readers import read_sealed
from utils.system import ROOT, provenance
from utils.types import Json

RESULTS = ROOT / "benchmarks" / "results" / "torture.jsonl"
SIGNALS = "SIGKILL", "SIGTERM"
DIGITS = "--dataset digits --threads 1 --save_every 1"


@dataclass(frozen=True)
class Command:
    """A command that is killed; ``before`` runs first and is not."""

    module: str
    flags: str
    before: str = ""

    @property
    def arguments(self) -> list[str]:
        """What is typed."""
        return f"{DIGITS} {self.flags} --out output --resume auto".split()


STAGE1 = "--dataset digits --epochs 2 --seed 0 --val_split 0.2"
COMMANDS = {
    "stage 1": Command("main_stage1", "--epochs 8 --seed 0 --ema 0.9 --mixup 0.2 --aug autoaugment+cutout"),
    "stage-1 sweep": Command("main_stage1", "--epochs 3 --seed 0 1 --wd 0 0.1 --val_split 0.2 --parallel 2"),
    "stage 2, views": Command(
        "main_stage2",
        "--method los crt disalign maxnorm --label_smooth 0.9 0.98 --seed 0 1 --views 4 --finetune_epoch 5",
        STAGE1,
    ),
    "stage 2, replay": Command(
        "main_stage2", "--method los lws --sampler instance class --seed 0 --features replay --finetune_epoch 4", STAGE1
    ),
    "compare": Command("compare", "--method joint los crt cosine tau-norm --seed 0 1 --finetune_epoch 3", STAGE1),
}


#: Commands whose disk fails; each replaces an older result, of the options in ``before``.
QUICK = "--dataset digits --seed 0 --threads 1"
FAULTS = {
    "stage 1, disk": ("--epochs 1", "--epochs 2 --save_every 1 --wd 0"),
    "stage 2, disk": ("--finetune_epoch 1 --views 0", "--finetune_epoch 1 --views 1 --label_smooth 0.5"),
}


def equal(one: object, other: object) -> bool:
    """Whether two things hold the same tensors, to the bit, and the same values; times apart."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in one if not str(name).startswith("seconds")]
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in names)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))


def outcome(out: Path) -> list[object]:
    """What the only run below --out has left: weights, metrics and data of its checkpoints, records, what it returned.

    Left out are options and provenance, which say how often it was resumed.
    """
    (options,) = out.glob("*/*/options.json")
    found: list[object] = []
    for path in sorted(options.parent.rglob("*")):
        name = path.relative_to(options.parent).as_posix()
        if path.name == "checkpoint.pt":
            file = torch.load(path, weights_only=True)
            found.append((name, {key: file[key] for key in ("model", "metrics", "data", "head", "stem")}))
            found.append((name, (file["parent"] or {}).get("sha256")))
        if path.name == "metrics.jsonl":
            found.append((name, read_lines(path)))
        if path.name == "finished.json":
            found.append((name, read_sealed(path)))
    return found


def _life(module: str, arguments: list[str], folder: str, answer: Connection) -> None:
    os.chdir(folder)
    status = 0
    with open("said.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        answer.send("started")
        try:
            import_module(module).main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
    answer.send(status)
    os._exit(0)


def life(module: str, arguments: list[str], folder: Path, seconds: float, number: int) -> tuple[int | None, float]:
    """Runs a command in a process of its own and sends it a signal after some time.

    Returns its exit status, None where the signal has killed it, and the seconds that it ran.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "benchmarks.torture"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which the server that forks needs to find them
    ours, theirs = context.Pipe()
    process = context.Process(target=_life, args=(module, arguments, str(folder), theirs))
    process.start()
    theirs.close()
    ours.recv()
    began = time.perf_counter()
    if not ours.poll(seconds):
        os.kill(process.pid or 0, number)
    status = None
    with contextlib.suppress(EOFError):
        status = ours.recv()
    spent = time.perf_counter() - began
    process.join()
    assert status is not None or process.exitcode == -number, (folder / "said.txt").read_text()
    return status, spent


def prepared(part: Command, folder: Path) -> Path:
    """A folder with what a command starts from."""
    folder.mkdir()
    if part.before:
        assert life("main_stage1", part.before.split(), folder, 600, signal.SIGKILL)[0] == 0
    shutil.rmtree(folder / "output", ignore_errors=True)
    return folder


def tortured(part: Command, folder: Path, kills: int, number: int, draw: random.Random) -> Json:
    """Kills a command ``kills`` times, over as many runs of it as that takes; what was seen.

    Raises:
        AssertionError: a run that was resumed does not end as the undisturbed one, or leaves hidden files.
    """
    base = prepared(part, folder / "base")
    shutil.copytree(base, folder / "whole")
    status, seconds = life(part.module, part.arguments, folder / "whole", 600, signal.SIGKILL)
    assert status == 0, (folder / "whole" / "said.txt").read_text()
    expected = outcome(folder / "whole" / "output")
    seen = {"kills": 0, "inside_a_write": 0, "runs": 0, "most_kills_of_a_run": 0}
    while seen["kills"] < kills:
        run = folder / f"run{seen['runs']}"
        shutil.copytree(base, run)
        lives = 0
        while True:
            longer = seconds * (1 + lives / 20)  # on a machine that is busier now it would never come to its end
            status, _ = life(part.module, part.arguments, run, draw.uniform(0, longer), number)
            if status == 0:
                break
            said = (run / "said.txt").read_text()
            assert status in (None, 128 + number) and "Traceback" not in said, said
            lives += 1
            seen["inside_a_write"] += any(name.endswith(".tmp") for name in litter(run))
            assert lives < 200, said
        assert equal(outcome(run / "output"), expected), f"{run} has not ended as {folder / 'whole'}"
        left = [*litter(run), *(str(path) for path in (run / "output").rglob("state-*"))]
        assert not left, left
        seen["runs"] += 1
        seen["kills"] += lives
        seen["most_kills_of_a_run"] = max(seen["most_kills_of_a_run"], lives)
        shutil.rmtree(run)
    return seen | {"seconds_of_a_run": round(seconds, 2)}


def failing(name: str, folder: Path, most: int, draw: random.Random) -> Json:
    """Lets every operation on files of a command fail in turn, or ``most`` of them; what was seen.

    Raises:
        AssertionError: see :func:`benchmarks.faults.trial`.
    """
    before, flags = (f"{QUICK} {words}".split() for words in FAULTS[name])
    base, stage = folder / "base", "stage1" if name == "stage 1, disk" else "stage2"
    base.mkdir()
    for module, arguments in [("main_stage1", f"{QUICK} --epochs 1".split()), (f"main_{stage}", before)]:
        assert life(module, arguments, base, 600, signal.SIGKILL)[0] == 0
    shutil.rmtree(base / "output")
    command = Stage(f"main_{stage}", tuple(flags), f"checkpoints/digits_exp100_resnet8_{stage}.pt")
    faults = every(command, base, folder / "whole")
    seen: Json = {"faults": min(most, len(faults)), "of": len(faults), "published": 0, "old_one_stands": 0}
    for fault in draw.sample(faults, seen["faults"]):
        ended = trial(command, fault, base, folder / "run")
        seen["old_one_stands" if ended.status else "published"] += 1
        shutil.rmtree(folder / "run")
    return seen


@command
def main(argv: list[str]) -> int:
    """Runs the command; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each command by each signal")
    parser.add_argument("--faults", type=int, default=10**9, help="of each command, of all that there are")
    parser.add_argument("--only", nargs="+", choices=[*COMMANDS, *FAULTS], help="of the commands")
    parser.add_argument("--signal", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    about = provenance("-m benchmarks.torture", argv, torch.device("cpu"), 0)
    trials: list[tuple[str, dict[str, str], Callable[[Path], Json]]] = []
    for name, part in COMMANDS.items():
        for number in map(signal.Signals.__getitem__, options.signal if options.kills else ()):
            draw = random.Random(options.seed)
            call = partial(tortured, part, kills=options.kills, number=number, draw=draw)
            trials.append((name, {"signal": number.name}, call))
    for name in FAULTS if options.faults else ():
        call = partial(failing, name, most=options.faults, draw=random.Random(options.seed))
        trials.append((name, {}, call))
    for name, what, trial_of in trials:
        if options.only is None or name in options.only:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                line = {"command": name, **what, **trial_of(Path(folder))}
            line |= {"passed": True, "seconds": round(time.perf_counter() - began, 1)}
            print(json.dumps(line), flush=True)
            append_line(RESULTS, line | {"seed": options.seed, "provenance": about})
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
