"""Shows what the method is for, in under a minute on a CPU: both stages and the evaluation on digits, three seeds.

    make demo

runs the commands it prints and ends in a table of both stages, mean and standard deviation over the seeds. Exit status
1 if stage 2 does not lift overall accuracy by two points and few-shot accuracy by five, so that it is a smoke test too.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import evaluate
import main_stage1
import main_stage2
from utils.console import counted
from utils.files import write_text
from utils.metrics import scores
from utils.types import Json

T = TypeVar("T")
SEEDS = (0, 1, 2)
COLUMNS = {"top1": "all", "many": "many", "medium": "medium", "few": "few"}


def run(script: str, main: Callable[[list[str]], T], arguments: str, quiet: bool) -> T:
    """Runs one command in this process, printing, unless ``quiet``, it and what it prints."""
    if quiet:
        with contextlib.redirect_stdout(io.StringIO()):
            return main(shlex.split(arguments))
    if script == "evaluate.py":  # the others say it themselves
        print(f"command  python {script} {arguments}", flush=True)
    result = main(shlex.split(arguments))
    print()
    return result


def main() -> int:
    """Runs the demo; returns the exit status."""
    began, folder = time.perf_counter(), Path("output", "demo")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"cd {folder}\n")
    with contextlib.chdir(folder):  # the user's own checkpoints stay as they are
        results = train_and_evaluate()
    lines = [
        {"stage": stage, "seed": row["seed"]} | scores(row) | {"provenance": row["training"]}
        for stage, rows in results.items()
        for row in rows
    ]
    write_text(folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = {stage: [scores(row) for row in rows] for stage, rows in results.items()}

    means = {
        stage: {key: statistics.mean(float(row[key] or 0) for row in rows) for key in COLUMNS}
        for stage, rows in found.items()
    }
    print(f"Digits, imbalance ratio 100, seeds {SEEDS}: top-1 % on the test set, mean and standard deviation.")
    print("Last epoch, no flip averaging." + "".join(f"{name:>14}" for name in COLUMNS.values()))
    for stage, rows in found.items():
        cells = []
        for key in COLUMNS:
            deviation = statistics.stdev(float(row[key] or 0) for row in rows)
            cells.append(f"{100 * means[stage][key]:.1f} ± {100 * deviation:.1f}".rjust(14))
        print(f"{stage:<30}" + "".join(cells))
    gains = {key: means["stage 2"][key] - means["stage 1"][key] for key in COLUMNS}
    print(f"{'stage 2 - stage 1':<30}" + "".join(f"{100 * gain:+.1f}".rjust(14) for gain in gains.values()))
    threads = counted(torch.get_num_threads(), "thread")
    print(f"{time.perf_counter() - began:.0f} s, {threads}; plots and figures in {folder}/")
    return 0 if gains["top1"] > 0.02 and gains["few"] > 0.05 else 1


def train_and_evaluate() -> dict[str, list[Json]]:
    """Both stages for every seed: what evaluate.py reports, {stage: one result a seed}."""
    found: dict[str, list[Json]] = {"stage 1": [], "stage 2": []}
    for seed in SEEDS:
        quiet = seed != SEEDS[0]
        trained = f"--dataset digits --eval_every 20 --seed {seed}"
        run("main_stage1.py", main_stage1.main, trained, quiet)
        result = run("evaluate.py", evaluate.main, "--dataset digits --cur_stage stage1", True)
        found["stage 1"].append(result)
        run("main_stage2.py", main_stage2.main, trained, quiet)
        result = run("evaluate.py", evaluate.main, "--dataset digits --cur_stage stage2", quiet)
        found["stage 2"].append(result)
    return found


if __name__ == "__main__":
    sys.exit(main())
