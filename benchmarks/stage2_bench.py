"""Stage 2 against the published loop, side by side: a sweep of 32 label_smooth values, 20 epochs, CIFAR-100-LT sizes.

    python -m benchmarks.stage2_bench --pairs 7 --json benchmarks/results/stage2_bench.jsonl

A full run of the published loop would take days on a CPU, so every part is timed on its own, all parts in turn and so
often as --pairs says, and multiplied by how often it occurs; ratios are medians over pairs. The published side is its
step (train mode, the whole network's backward, SGD on fc, loss and top-1/top-5 read back at every step) and its
evaluation of every epoch with mirror images; its image loader is left out, in its favour. The classifiers alone are
compared with as many separate runs on cached features (TensorDataset, DataLoader, autograd, loss.item()).

    python -m benchmarks.stage2_bench --memory --data_dir data/

measures the peak memory of main_stage2.py with 32 values instead (one view, one epoch: neither adds to it).
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import append_line, published, timed
from datasets.longtail import class_sizes
from engine import for_evaluation
from experiment.data import EVAL_BATCH as EVAL_BATCHES
from losses.softmax import SoftmaxLoss
from models import Network, build_model
from models.heads import make_linear
from retraining.features import features_of, predict_features
from retraining.solver import Solver, TrainableHead
from utils.metrics import accuracies
from utils.system import ROOT, pick_device, provenance

IMAGES, TEST, CLASSES, BATCH, EPOCHS, VALUES, VIEWS = 10_847, 10_000, 100, 64, 20, 32, 20
COUNTS = class_sizes(500, CLASSES, 100)
EVAL_BATCH = EVAL_BATCHES["cuda" if torch.cuda.is_available() else "cpu"]


def published_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """One step of the published stage-2 loop: everything is differentiated, ``fc`` alone is stepped."""
    optimizer = torch.optim.SGD(model.get_submodule("fc").parameters(), lr=5e-4, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.98)
    return lambda: published.train_step(model.requires_grad_(True).train(), images, labels, criterion, optimizer)


def published_evaluation(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """One step of the published evaluation, with mirror images."""
    criterion = nn.CrossEntropyLoss()
    return lambda: published.validate_step(model.eval(), images, labels, criterion)


def backbone_pass(model: Network, images: Tensor, train: bool) -> Callable[[], None]:
    """Features of a batch, as the sources make them."""
    frozen = copy.deepcopy(model).requires_grad_(False).train() if train else for_evaluation(model)

    def step() -> None:
        features_of(frozen, images)

    return step


def classifiers(features: Tensor, labels: Tensor, fc: nn.Linear, values: int) -> Callable[[], None]:
    """One epoch of so many classifiers at once."""
    heads = []
    for i in range(values):
        loss = SoftmaxLoss(CLASSES, smooth=0.5 + 0.49 * i / VALUES)
        heads.append(TrainableHead(make_linear(fc.weight, fc.bias), lambda _, loss=loss: loss, 5e-4, 0.0))  # type: ignore[misc]
    solver = Solver(heads)

    def epoch() -> None:
        order = torch.randperm(IMAGES).to(features.device)
        solver.train_epoch(((features[i], labels[i]) for i in order.split(BATCH)), 0.0, 1.0)

    return epoch


def evaluations(features: Tensor, labels: Tensor, fc: nn.Linear, values: int) -> Callable[[], None]:
    """One evaluation of so many classifiers on cached features of the test images and their mirror images."""

    def run() -> None:
        for _ in range(values):
            accuracies(predict_features(fc, [features, features], EVAL_BATCH).argmax(dim=1), labels, COUNTS)

    return run


def separate_run(features: Tensor, labels: Tensor, fc: nn.Linear) -> Callable[[], None]:
    """One epoch of one classifier on cached features, as it is usually written."""
    loader = DataLoader(TensorDataset(features, labels), BATCH, shuffle=True)
    head = make_linear(fc.weight, fc.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=5e-4, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.98)

    def epoch() -> None:
        total = correct = 0.0
        for batch, targets in loader:
            logits = head(batch)
            loss = criterion(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
            correct += (logits.argmax(dim=1) == targets).sum().item()

    return epoch


def totals(t: dict[str, float]) -> dict[str, float]:
    """Seconds of whole sweeps from the seconds of their parts, and the ratios."""
    steps = IMAGES / BATCH
    published = EPOCHS * (steps * t["published step"] + TEST / BATCH * t["published evaluation"])
    test_pass = 2 * TEST / EVAL_BATCH * t["eval-mode pass"]
    whole: dict[str, float] = {"published, one value": published, "published, sweep": VALUES * published}
    for values, name in ((1, "one value"), (VALUES, "sweep")):
        whole[f"classifiers, {name}"] = EPOCHS * t[f"epoch of {values}"]
        heads = whole[f"classifiers, {name}"] + EPOCHS * t[f"evaluation of {values}"]
        whole[f"replay, {name}"] = EPOCHS * (steps * t["train-mode pass"] + test_pass) + heads
        whole[f"views, {name}"] = VIEWS * IMAGES / EVAL_BATCH * t["eval-mode pass"] + test_pass + heads
    whole["separate cached runs"] = VALUES * EPOCHS * t["separate epoch"]
    for mode in ("replay", "views"):
        whole[f"ratio: {mode}, sweep"] = whole["published, sweep"] / whole[f"{mode}, sweep"]
        whole[f"ratio: {mode}, one value"] = published / whole[f"{mode}, one value"]
        whole[f"ratio: {mode}, sweep to one value"] = whole[f"{mode}, sweep"] / whole[f"{mode}, one value"]
    whole["ratio: classifiers alone"] = whole["separate cached runs"] / whole["classifiers, sweep"]
    return whole


def peak_memory(network: str, data_dir: str) -> None:
    """Runs the sweep's command once on untrained weights and prints the largest resident memory of the process."""
    values = [f"{0.5 + 0.49 * i / VALUES:.5f}" for i in range(VALUES)]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(build_model(network, CLASSES).state_dict(), Path(folder, "start.pt"))
        command = [sys.executable, str(ROOT / "main_stage2.py"), "--pretrained_pth", "start.pt", "--seed", "0"]
        command += ["--data_dir", str(Path(data_dir).resolve()), "--label_smooth", *values]
        subprocess.run([*command, "--views", "1", "--finetune_epoch", "1"], cwd=folder, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of {VALUES} values, {network}: {peak:,.0f} MiB")


def main() -> None:
    """Times all parts in turn; prints a table and appends the raw seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--network", default="resnet34")
    parser.add_argument("--json", type=Path, help="append the raw seconds of every pair to this file")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, and nothing else")
    parser.add_argument("--data_dir", default="data/", help="where CIFAR-100 is, for --memory")
    arguments = parser.parse_args()
    if arguments.memory:
        peak_memory(arguments.network, arguments.data_dir)
        return

    torch.manual_seed(0)
    device = pick_device()
    model = build_model(arguments.network, CLASSES).to(device)
    images = torch.randn(max(BATCH, EVAL_BATCH), 3, 32, 32, device=device)
    counts = torch.tensor(COUNTS, device=device)
    labels = torch.arange(CLASSES, device=device).repeat_interleave(counts)[torch.randperm(IMAGES).to(device)]
    test_labels = torch.arange(CLASSES).repeat_interleave(TEST // CLASSES)
    features = torch.randn(IMAGES, model.num_features, device=device).relu()
    test = torch.randn(TEST, model.num_features, device=device).relu()
    fc = make_linear(model.fc.get_parameter("weight"), model.fc.get_parameter("bias"))
    batch = images[:BATCH], labels[:BATCH]
    parts = {
        "published step": published_step(model, *batch),
        "train-mode pass": backbone_pass(model, batch[0], train=True),
        "published evaluation": published_evaluation(model, *batch),
        "eval-mode pass": backbone_pass(model, images[:EVAL_BATCH], train=False),
        "separate epoch": separate_run(features.cpu(), labels.cpu(), make_linear(fc.weight.cpu(), fc.bias.cpu())),
        f"epoch of {VALUES}": classifiers(features, labels, fc, VALUES),
        "epoch of 1": classifiers(features, labels, fc, 1),
        f"evaluation of {VALUES}": evaluations(test, test_labels, fc, VALUES),
        "evaluation of 1": evaluations(test, test_labels, fc, 1),
    }
    for part in parts.values():
        timed(part, device)
    began = time.perf_counter()
    pairs = [{name: timed(part, device) for name, part in parts.items()} for _ in range(arguments.pairs)]
    results = [totals(pair) for pair in pairs]

    threads = torch.get_num_threads()
    print(f"{arguments.network}, {device}, {threads} threads, {arguments.pairs} pairs; seconds: median (min to max)")
    for name in parts:
        values = [pair[name] for pair in pairs]
        print(f"{name:<36}{statistics.median(values):>12.4f}  ({min(values):.4f} to {max(values):.4f})")
    print("\nwhole sweeps, extrapolated from the parts")
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"{name:<36}{statistics.median(values):>12.2f}  ({min(values):.2f} to {max(values):.2f})")
    if arguments.json:
        about = provenance("-m benchmarks.stage2_bench", sys.argv[1:], device, time.perf_counter() - began)
        for pair, result in zip(pairs, results):
            record = {"network": arguments.network, "parts": pair, "totals": result, "provenance": about}
            append_line(arguments.json, record)


if __name__ == "__main__":
    main()
