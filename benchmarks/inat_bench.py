"""Stage 2 at the size of iNaturalist 2018: 437,513 images of 2,048 features, 8,142 classes, features on disk.

    python -m benchmarks.inat_bench --dir DIR

writes random features (half of them zero, as after a ReLU) as float16 into DIR, 1.8 GB for each of four views, runs
what stage 2 does with all images through its own cache, stream, solver and metrics, and removes the files:

* an epoch of one head (Label Over-Smooth, batch 512), with one view on disk and with four, all of them open;
* the report on 24,426 test images;
* the class means of nearest-class-mean.

Neither time nor memory depends on what the features are. Each part is a process of its own, in which a thread samples
the anonymous memory: pages of mapped files do not count, since the system drops them where memory is short. Figures of
20 heads are extrapolated from one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import append_line
from datasets import SAMPLERS
from datasets.batches import seeded
from datasets.published import CLASS_COUNTS
from experiment.data import EVAL_BATCH
from losses.softmax import SoftmaxLoss, auto_label_smooth
from retraining.features import DTYPES, FeatureCache, feature_blocks, gathered, head_logits, resident
from retraining.methods import NCM, Stage1
from retraining.solver import Solver, TrainableHead
from utils.command import command
from utils.errors import UsageError
from utils.metrics import report
from utils.system import ROOT, pick_device, provenance
from utils.types import Json

COUNTS = json.loads(CLASS_COUNTS.read_text())["inat2018"]["train"]
IMAGES, TEST, CLASSES, FEATURES, BATCH, VIEWS, SWEEP = sum(COUNTS), 24_426, len(COUNTS), 2_048, 512, 4, 20
RESULTS = ROOT / "benchmarks" / "results" / "inat_bench.jsonl"


@dataclass(frozen=True)
class Case:
    """What every part gets: the features' folder and type, the number of training images, threads."""

    folder: Path
    dtype: str
    images: int
    threads: int | None

    def cache(self, part: str) -> FeatureCache:
        """Where a part's features are; test images' are float32, as in stage 2."""
        about = {"benchmark": "inat", "part": part, "images": self.images}
        return FeatureCache(self.folder, about, self.dtype if part == "train" else "float32")

    def view(self, number: int) -> Tensor:
        """The features (N, D) of a view of the training images, written where they are missing."""
        return self.cache("train").array(f"view_{number}", (self.images, FEATURES), lambda: random(self.images, number))

    def test(self) -> Tensor:
        """Those of the test images."""
        number = round(TEST * self.images / IMAGES)
        return self.cache("test").array("features", (number, FEATURES), lambda: random(number, VIEWS))

    def labels(self) -> Tensor:
        """Training labels (N,): all of them, or so many in even steps."""
        labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
        return labels[torch.linspace(0, len(labels) - 1, self.images, dtype=torch.float64).long()]


def random(number: int, seed: int) -> Iterator[Tensor]:
    """Rows of random features, in pieces."""
    generator = torch.Generator().manual_seed(seed)
    for piece in torch.arange(number).split(4096):
        yield torch.randn(len(piece), FEATURES, generator=generator).relu()


def write(case: Case, device: torch.device) -> Json:
    """Writes all files, as stage 2 writes what the backbone makes."""
    views = [case.view(number) for number in range(VIEWS)]
    return {"bytes_per_view": views[0].nbytes, "test_bytes": case.test().nbytes}


def epoch(case: Case, device: torch.device, views: int) -> Json:
    """One epoch of one head on the last of the views; a few steps on every view come before and are not timed."""
    labels = case.labels().to(device)
    arrays = [resident(case.view(number), device) for number in range(views)]
    head, loss = nn.Linear(FEATURES, CLASSES).to(device), SoftmaxLoss(CLASSES, smooth=auto_label_smooth(CLASSES))
    solver = Solver([TrainableHead(head, lambda _: loss, 5e-4, 0.0)])

    def train(number: int, images: int) -> float:
        order = SAMPLERS["instance"](labels.cpu(), number, views, seeded(0, 2, number))[:images]
        began = time.perf_counter()
        [(mean, *_)] = solver.train_epoch(gathered(arrays[number], labels, order, BATCH), number / views, 1.0)
        assert mean > 0
        return time.perf_counter() - began

    for number in range(views):
        train(number, 2 * BATCH)
    seconds = train(views - 1, case.images)
    products = 4 * case.images * CLASSES * (FEATURES + 1)
    return {"images_per_s": case.images / seconds, "gflop_per_s": products / seconds / 1e9, "part_s": seconds}


def evaluation(case: Case, device: torch.device) -> Json:
    """The whole report of one head on the test images."""
    features = resident(case.test(), device)
    head, labels = nn.Linear(FEATURES, CLASSES).to(device), torch.arange(len(features)) % CLASSES
    began = time.perf_counter()
    report(head_logits(head, [features], EVAL_BATCH[device.type]), labels, COUNTS)
    seconds = time.perf_counter() - began
    return {"logit_bytes": 4 * len(features) * CLASSES, "images_per_s": len(features) / seconds, "part_s": seconds}


def class_means(case: Case, device: torch.device) -> Json:
    """The head of nearest class mean, from one view."""
    features, labels = resident(case.view(0), device), case.labels()
    head = nn.Linear(FEATURES, CLASSES).to(device).requires_grad_(False)
    stage1 = Stage1(head, COUNTS, lambda: feature_blocks([features], labels, CLASSES, device), None)
    began = time.perf_counter()
    NCM().head(stage1)
    return {"part_s": time.perf_counter() - began}


PARTS: dict[str, Callable[[Case, torch.device], Json]] = {
    "write": write,
    "epoch, 1 view": lambda case, device: epoch(case, device, 1),
    f"epoch, {VIEWS} views": lambda case, device: epoch(case, device, VIEWS),
    "report on test images": evaluation,
    "class means": class_means,
}


def anonymous() -> float:
    """The process's anonymous memory in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


@contextmanager
def sampled() -> Iterator[list[float]]:
    """[the largest anonymous memory in MB so far], until the block ends."""
    peak, done = [anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measured(name: str, case: Case) -> Json:
    """Runs a part; called in a process of its own."""
    device = pick_device(threads=case.threads)
    began, imported = time.perf_counter(), anonymous()
    torch.manual_seed(0)
    with sampled() as peak:
        found = PARTS[name](case, device)
    if device.type == "cuda":
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    seconds = time.perf_counter() - began
    memory = {"peak_anonymous_mb": peak[0], "of_which_imports_mb": imported}
    about = provenance("-m benchmarks.inat_bench", [], device, seconds)
    size = {"images": case.images, "feature_dtype": case.dtype, "batch": BATCH}
    return {"part": name, **size, **found, **memory, "provenance": about}


@command
def main(argv: Sequence[str]) -> None:
    """Runs all parts; prints and appends what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where 7.4 GB of features may lie meanwhile")
    parser.add_argument("--images", type=int, default=IMAGES, help="fewer, to try it")
    parser.add_argument("--feature_dtype", default="float16", choices=DTYPES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS)[1:], choices=list(PARTS)[1:])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", action="store_true", help="leave the features for the next time")
    parser.add_argument("--json", type=Path, help=f"append to this file; {RESULTS.name}, if all images are there")
    arguments = parser.parse_args(argv)
    case = Case(arguments.dir.resolve(), arguments.feature_dtype, arguments.images, arguments.threads)
    results = arguments.json or (RESULTS if arguments.images == IMAGES else None)

    folders = [case.cache(part).folder for part in ("train", "test")]
    shown = {str(arguments.dir): "DIR"} | {str(path): path.name for path in (arguments.json,) if path}
    words = [shown.get(word, word) for word in argv]  # a machine's folders are of no use to others
    try:
        size = arguments.images * FEATURES * DTYPES[arguments.feature_dtype][0].itemsize
        needed = VIEWS * size + 4 * TEST * FEATURES - sum(f.stat().st_size for path in folders for f in path.iterdir())
        if shutil.disk_usage(case.folder).free < 1.1 * needed:
            raise UsageError(f"--dir {arguments.dir}: too full", f"a folder with {1.1 * needed / 1e9:.1f} GB free")
        for name in ["write", *arguments.parts]:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                line = pool.submit(measured, name, case).result()
            line["provenance"]["command"] = shlex.join(["python", "-m", "benchmarks.inat_bench", *words])
            figures = {key: value for key, value in line.items() if isinstance(value, float | int)}
            print(f"{name}: " + ", ".join(f"{key} {value:,.0f}" for key, value in figures.items()), flush=True)
            if name.startswith("epoch"):
                line["extrapolated"] = {"heads": SWEEP, "epoch_s": SWEEP * line["part_s"]}
                print(f"    extrapolated: an epoch of {SWEEP} heads {SWEEP * line['part_s'] / 60:,.0f} minutes")
            append_line(results, line)
    finally:
        for folder in [] if arguments.keep else folders:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
