"""What to run once on a machine with a GPU: correctness there, speed, then the reproduction on real CIFAR-100-LT.

    make gpu

runs ``python -m benchmarks.gpu``: pieces in order of value, each of a few minutes at most. It begins none that would
not end within --minutes, and skips those whose result is in --results already, so that it can be started again and
again. Raw results are written as they come; checkpoints lie under output/gpu/, the first one also in half precision in
--results, in parts that fit anywhere (``cat cifar100_exp100_resnet34_stage1_fp16.pt.part*``).

To expect at ratio 100 on the last epoch, without mirror averaging, from others' logs (not tuning goals): ce with wd 0
38 to 40 %, with wd 5e-3 46 to 47.5 %; tau-norm and weight balancing 51 to 52.5 %; LOS 52 to 54 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import append_line, halved, read_lines
from utils import checkpoints
from utils.metrics import percent, scores
from utils.system import ROOT, provenance
from utils.types import Json

WORK = Path("output", "gpu")
PART_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Piece:
    """One thing to run.

    Attributes:
        name: of its line in the results.
        minutes: that it may take.
        run: does it; returns what to keep.
    """

    name: str
    minutes: float
    run: Callable[[], Json]


class Context:
    """The pieces, and where they read and write: data, ``results`` to keep and ``work`` for checkpoints and runs."""

    def __init__(
        self, data_dir: str, results: Path, work: Path = WORK, dataset: str = "cifar100", network: str = "resnet34"
    ) -> None:
        self.data_dir, self.results, self.work = str(Path(data_dir).resolve()), results.resolve(), work.resolve()
        self.dataset, self.network = dataset, network
        self.deadline = math.inf  # of the piece that runs
        self.work.mkdir(parents=True, exist_ok=True)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Runs a command, showing what it prints; returns that."""
        print(f"$ {' '.join(command)}", flush=True)
        cwd = cwd or self.work
        left = None if self.deadline == math.inf else max(self.deadline - time.monotonic(), 1)
        done = subprocess.run(
            command, timeout=left, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        print(done.stdout[-3000:], flush=True)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {' '.join(command)}")
        return done.stdout

    def script(self, name: str, flags: str) -> str:
        """Runs one of the commands on the data."""
        data = f"--dataset {self.dataset} --network {self.network} --data_dir {self.data_dir}"
        return self.call(sys.executable, str(ROOT / name), *flags.split(), *data.split())

    def tests(self) -> Json:
        """The equalities of the tests, on the GPU."""
        text = self.call(sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", cwd=ROOT)
        return {"pytest": text.strip().splitlines()[-1]}

    def bench(self, module: str, *flags: str) -> Json:
        """A benchmark, which writes its own lines."""
        text = self.call(sys.executable, "-m", f"benchmarks.{module}", *flags, cwd=ROOT)
        if "out of time" in text:
            raise TimeoutError
        return {"printed": text}

    def stage1(self, ratio: int, wd: str, seed: int, more: str = "") -> Json:
        """The published recipe with another weight decay; its checkpoint stays for :meth:`compare`."""
        self.script("main_stage1.py", f"--imb_ratio {ratio} --wd {wd} --seed {seed} {more}")
        path = self.checkpoint(ratio, wd, seed, more)
        made = self.work / f"checkpoints/{self.dataset}_exp{ratio}_{self.network}_stage1.pt"
        shutil.move(made, path)
        file = checkpoints.read(path)
        evaluated = self.work / "evaluated.json"
        self.script("evaluate.py", f"--pretrained_pth {path} --json {evaluated}")
        if (ratio, wd, seed, more) == (100, "5e-3", 0, ""):
            self.keep_half(file)
        return {
            **scores(file.metrics),
            "evaluate.py": scores(json.loads(evaluated.read_text())),
            "seconds": file.provenance["seconds"],
            "options": file.options,
            "provenance": file.provenance,
        }

    def checkpoint(self, ratio: int, wd: str, seed: int, more: str = "") -> Path:
        """Where a stage-1 file is put."""
        name = "_".join(["stage1", f"ratio{ratio}", f"wd{wd}", f"seed{seed}", *re.findall(r"\w+", more)])
        return self.work / f"{name}.pt"

    def keep_half(self, file: checkpoints.Checkpoint) -> None:
        """Writes the checkpoint with weights of two and more dimensions in half precision, in parts."""
        path = self.work / "half.pt"
        halved(file).save(path)
        content = path.read_bytes()
        for number, start in enumerate(range(0, len(content), PART_BYTES)):
            part = self.results / f"{self.dataset}_exp100_{self.network}_stage1_fp16.pt.part{number}"
            part.write_bytes(content[start : start + PART_BYTES])

    def stage2(self, script: str, ratio: int, wd: str, seed: int, flags: str, kept: str) -> Json:
        """compare.py or main_stage2.py on a stage-1 file of before; keeps the files ``kept`` of its run folder."""
        path = self.checkpoint(ratio, wd, seed)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: delete the line of its stage 1 in the results to make it again")
        text = self.script(script, f"--pretrained_pth {path} --imb_ratio {ratio} {flags}")
        found = re.search(r"run folder (\S+)", text)
        assert found is not None
        tag = f"gpu_{Path(script).stem}_ratio{ratio}_wd{wd}_seed{seed}"
        for name in kept.split():
            shutil.copy(self.work / found.group(1) / name, self.results / f"{tag}_{name}")
        return {"files": [f"{tag}_{name}" for name in kept.split()], "printed": text[-6000:]}

    def pieces(self) -> list[Piece]:
        """Everything, most valuable first."""

        def stage1(ratio: int, wd: str, seed: int, more: str = "", minutes: float = 4) -> Piece:
            name = f"stage 1, ratio {ratio}, wd {wd}, seed {seed}{more and f', {more}'}"
            return Piece(name, minutes, lambda: self.stage1(ratio, wd, seed, more))

        def compare(ratio: int, wd: str, seed: int) -> Piece:
            flags, kept = "--finetune_scope fc --seed 0 1 2", "compare.csv compare.md results.jsonl class_profiles.png"
            name = f"compare.py, ratio {ratio}, wd {wd}, seed {seed}"
            return Piece(name, 4, lambda: self.stage2("compare.py", ratio, wd, seed, flags, kept))

        speed = ["--json", str(self.results / "stage1_bench.jsonl")]
        again = ["--json", str(self.results / "stage2_bench.jsonl"), "--pairs", "5"]
        photos = ["--json", str(self.results / "input_bench.jsonl"), "--pairs", "3"]
        sweep = "--label_smooth 0 0.1 0.4 0.8 0.9 0.95 0.97 0.98 0.985 0.99 0.995 --seed 0 1 2"
        plain = "--amp off --graph off"
        return [
            Piece("tests on the GPU", 4, self.tests),
            Piece(
                "speed of stage 1, ResNet-34", 8, lambda: self.bench("stage1_bench", "--network", "resnet34", *speed)
            ),
            stage1(100, "5e-3", 0),
            compare(100, "5e-3", 0),
            stage1(100, "0", 0),
            Piece("speed of stage 1", 8, lambda: self.bench("stage1_bench", *speed)),
            Piece("input of photos, ResNet-50", 6, lambda: self.bench("input_bench", *photos)),
            Piece("speed of stage 2", 5, lambda: self.bench("stage2_bench", *again)),
            *(each(100, "5e-3", seed) for seed in (1, 2) for each in (stage1, compare)),
            *(stage1(100, "0", seed) for seed in (1, 2)),
            *(stage1(100, "5e-3", seed, plain, 6) for seed in (0, 1, 2)),
            *(each(ratio, "5e-3", 0) for ratio in (50, 10) for each in (stage1, compare)),
            *(stage1(100, wd, 0) for wd in ("1e-3", "1e-2")),
            Piece(
                "label_smooth, ratio 100, wd 5e-3, seed 0",
                4,
                lambda: self.stage2("main_stage2.py", 100, "5e-3", 0, sweep, "sweep.csv label_smooth.png"),
            ),
        ]


def main() -> int:
    """Runs what is missing and fits; prints a short table. Exit status 1 where a piece failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing that would not end by then")
    parser.add_argument("--data_dir", default="data/", help="where CIFAR-100 is, or is downloaded to")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    arguments = parser.parse_args()
    began, failed = time.monotonic(), []
    arguments.results.mkdir(parents=True, exist_ok=True)
    log, context = arguments.results / "gpu.jsonl", Context(arguments.data_dir, arguments.results)

    pieces, done = context.pieces(), {line["piece"]: line for line in read_lines(log)}
    if not arguments.list and not torch.cuda.is_available():
        print("not run: this machine has no GPU")
        return 1
    for piece in () if arguments.list else pieces:
        left = arguments.minutes - (time.monotonic() - began) / 60
        if piece.name in done or piece.minutes > left:
            continue
        started, context.deadline = time.perf_counter(), began + 60 * (arguments.minutes + 0.3)
        try:
            found = piece.run()
        except TimeoutError:
            continue
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            failed.append(f"{piece.name}: {error}")
            continue
        about = provenance("-m benchmarks.gpu", sys.argv[1:], torch.device("cuda", 0), time.perf_counter() - started)
        done[piece.name] = {"piece": piece.name, **found, "run": about}
        append_line(log, done[piece.name])
    for piece in pieces:
        line = done.get(piece.name)
        figures = (
            [percent(line.get(key)) for key in ("top1", "many", "medium", "few")] if line and "top1" in line else []
        )
        print(f"{'done' if line else 'to do':<7}{piece.name:<60}{'  '.join(figures)}")
    print("\n".join(f"failed: {text}" for text in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
