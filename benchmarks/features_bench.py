"""Stage 2 on features of one's own: 100,000 rows of 768 numbers, 1,000 classes, against two ways without this project.

    python -m benchmarks.features_bench --dir DIR

writes such features (class means and noise, long-tailed) as float32 into DIR, 0.3 GB, and takes the time of

* ``heads``: main_stage2.py with 32 values of label_smooth, trained side by side for --epochs;
* ``loop``: what one would write by hand: a loop over the mapped rows, one head, one epoch, nn.Linear and SGD;
* ``one epoch``: main_stage2.py with the 32 heads for one epoch, in turn with ``loop``, for the ratio of both;
* ``logistic``: scikit-learn's LogisticRegression, one head, to the end or 100 iterations.

Each part is a process of its own, in which a thread samples the anonymous memory: pages of mapped files do not count,
since the system drops them where memory is short.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import append_line
from benchmarks.inat_bench import anonymous, sampled
from utils.command import command
from utils.readers import map_array
from utils.system import ROOT, pick_device, provenance
from utils.types import Json

ROWS, TEST, WIDTH, CLASSES, HEADS, BATCH, RATIO = 100_000, 5_000, 768, 1_000, 32, 64, 100
RESULTS = ROOT / "benchmarks" / "results" / "features_bench.jsonl"


def write(folder: Path, rows: int) -> None:
    """Features of ``rows`` training rows: unit noise around class means of norm 4, class sizes falling to 1 / RATIO."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    means = generator.standard_normal((CLASSES, WIDTH), dtype=np.float32) * (4 / WIDTH**0.5)
    shares = float(RATIO) ** -np.linspace(0, 1, CLASSES)
    more = np.searchsorted(np.cumsum(shares / shares.sum()), (np.arange(rows - CLASSES) + 0.5) / (rows - CLASSES))
    labels = np.sort(np.concatenate([np.arange(CLASSES), more]))
    for name, own in (("train", labels), ("test", np.arange(TEST) % CLASSES)):
        features = np.lib.format.open_memmap(
            folder / f"{name}_features.npy", mode="w+", dtype=np.float32, shape=(len(own), WIDTH)
        )
        for start in range(0, len(own), 8192):
            noise = generator.standard_normal((min(8192, len(own) - start), WIDTH), dtype=np.float32)
            features[start : start + 8192] = means[own[start : start + 8192]] + noise
        features.flush()
        np.save(folder / f"{name}_labels.npy", own)


def heads(folder: Path, epochs: int) -> Json:
    """main_stage2.py with 32 heads; its seconds, and those of the heads' steps."""
    import main_stage2

    smooths = [f"{value:.4f}" for value in np.linspace(0.5, 0.998, HEADS)]
    command = ["--dataset", "features", "--data_dir", str(folder), "--method", "ce", "--label_smooth", *smooths]
    command += ["--finetune_epoch", str(epochs), "--eval_every", str(epochs), "--batch_size", str(BATCH), "--seed", "0"]
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        report = main_stage2.main([*command, "--threads", str(torch.get_num_threads())])
        return {"heads": HEADS, "epochs": epochs, "seconds": time.perf_counter() - began, "test_top1": report["top1"]}


def loop(folder: Path, epochs: int) -> Json:
    """One head, one epoch, by hand."""
    rows, labels = map_array(folder / "train_features.npy"), map_array(folder / "train_labels.npy")
    head = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=5e-4, momentum=0.9)
    began = time.perf_counter()
    for index in torch.randperm(len(labels)).split(BATCH):
        features, own = torch.from_numpy(rows[index.numpy()]), torch.from_numpy(labels[index.numpy()])
        loss = F.cross_entropy(head(features), own, label_smoothing=0.98)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"heads": 1, "epochs": 1, "seconds": time.perf_counter() - began}


def logistic(folder: Path, epochs: int) -> Json:
    """scikit-learn's logistic regression, balanced, one head."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = map_array(folder / "train_features.npy"), map_array(folder / "train_labels.npy")
    model = LogisticRegression(class_weight="balanced", max_iter=100)
    began = time.perf_counter()
    model.fit(rows, labels)
    seconds = time.perf_counter() - began
    right = model.predict(map_array(folder / "test_features.npy")) == map_array(folder / "test_labels.npy")
    return {"heads": 1, "iterations": int(model.n_iter_[0]), "seconds": seconds, "test_top1": float(right.mean())}


PARTS: dict[str, Callable[[Path, int], Json]] = {"heads": heads, "loop": loop, "logistic": logistic}


def measured(name: str, folder: Path, epochs: int, threads: int | None, argv: Sequence[str]) -> Json:
    """Runs a part; called in a process of its own."""
    device = pick_device("cpu", threads=threads)
    torch.manual_seed(0)
    imported = anonymous()
    with sampled() as peak:
        found = PARTS[name](folder, epochs)
    memory = {"peak_anonymous_mb": peak[0], "of_which_imports_mb": imported}
    about = provenance("-m benchmarks.features_bench", [], device, float(found["seconds"]))
    about["command"] = shlex.join(["python", "-m", "benchmarks.features_bench", *argv])
    return {"part": name, **found, **memory, "provenance": about}


@command
def main(argv: Sequence[str]) -> None:
    """Runs all parts; prints and appends what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where 0.3 GB of features may lie")
    parser.add_argument("--rows", type=int, default=ROWS, help="fewer, to try it")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of one epoch in turn with the loop")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args(argv)
    folder, results = arguments.dir.resolve(), RESULTS if arguments.rows == ROWS else None
    words = ["DIR" if word == str(arguments.dir) else word for word in argv]
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads or os.cpu_count()))  # scikit-learn's BLAS
    write(folder, arguments.rows)

    def part(name: str, epochs: int) -> Json:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            line = pool.submit(measured, name, folder, epochs, arguments.threads, words).result()
        figures = {key: value for key, value in line.items() if isinstance(value, float | int)}
        print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in figures.items()), flush=True)
        append_line(results, {"rows": arguments.rows, **line})
        return line

    ratios = []
    for _ in range(arguments.rounds):
        ours, theirs = (float(part(name, 1)["seconds"]) for name in ("heads", "loop"))
        ratios.append(HEADS * theirs / ours)
    print(f"one epoch of {HEADS} loops over one of {HEADS} heads: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    part("logistic", 0)
    part("heads", arguments.epochs)


if __name__ == "__main__":
    main(sys.argv[1:])
