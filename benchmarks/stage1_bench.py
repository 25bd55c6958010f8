"""Stage 1 against the published loop, side by side: input pipeline, training step, evaluation, whole epochs.

    python -m benchmarks.stage1_bench --pairs 9 --json benchmarks/results/stage1_bench.jsonl

Images of CIFAR-100-LT's sizes (random pixels: speed does not depend on them), the restated loop of
benchmarks/published.py on one side, the batches and steps of main_stage1.py on the other.

On a CPU a whole epoch takes minutes, so the parts are timed in turn, as often as --pairs says, on --threads threads,
and multiplied by how often they occur in an epoch; ratios are medians over the pairs. Each side is a process of its
own, since main_stage1.py also sets how freed memory is kept. On a GPU whole epochs are timed, one to warm up and then
five, for ratios 100 and 10, the published loop with 16 workers and its evaluation of every epoch; rows that --json
holds already for this GPU are not run again.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import append_line, published, read_lines, timed
from benchmarks.published import make_loader
from datasets import DATASETS, Batches, ImageSet, LongTailed
from datasets.longtail import class_sizes
from engine import TrainStep, is_due, make_sgd, predict, train_epoch
from experiment.data import eval_batches
from losses import make_loss
from models import build_model
from training.recipe import COMPILED_ON_CPU
from utils.system import cpu_has_bf16, pick_device, provenance, side_by_side
from utils.types import Json

CLASSES, BATCH, EPOCHS, WARM_UP, TIMED, WORKERS = 100, 64, 200, 1, 5, 16
EVALUATIONS = sum(is_due(epoch, EPOCHS, 10) for epoch in range(EPOCHS))
#: Dense bfloat16 operations per second with tensor cores, from NVIDIA's data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

Part = Callable[[], object]


def make_data(ratio: float, test: int = 10_000) -> LongTailed:
    """Random images in the numbers of CIFAR-100-LT."""
    counts = class_sizes(500, CLASSES, ratio)
    generator = torch.Generator().manual_seed(0)

    def images(labels: torch.Tensor) -> ImageSet:
        pixels = torch.randint(256, (len(labels), 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(pixels, labels, torch.arange(len(labels)))

    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    balanced = torch.arange(test) % CLASSES
    return LongTailed(DATASETS["cifar100"], images(labels), None, images(balanced), [""] * CLASSES, counts)


def make_batches(data: LongTailed, device: torch.device) -> Batches:
    """Training batches as main_stage1.py makes them."""
    spec, train = data.spec, data.train
    return Batches(train.images, train.labels, BATCH, spec.mean, spec.std, device, spec.augment)


def make_step(network: str, data: LongTailed, device: torch.device, **way: Any) -> TrainStep:
    """main_stage1.py's step with its published recipe, run in a certain way."""
    model = build_model(network, CLASSES).to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_sgd(model.parameters(), 0.01, 0.9, 5e-3, nesterov=False)
    return TrainStep(model, make_loss("ce", data.class_counts, {}).to(device), optimizer, **way)


def published_model(network: str, device: torch.device) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Network, loss and optimizer of the published loop."""
    model = build_model(network, CLASSES).to(device).train()
    return model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-3)


# On a CPU: parts.


def published_parts(network: str) -> dict[str, tuple[Part, int]]:
    """The published side on a CPU, {name: (call, images that it handles)}."""
    data, device = make_data(100, test=100), torch.device("cpu")
    images, labels = next(iter(make_batches(data, device).epoch()))
    images = images.contiguous()
    model, criterion, optimizer = published_model(network, device)
    few = data.train.take(torch.arange(0, len(data.train), 5))
    train = make_loader(few, data.spec, BATCH, train=True)
    test = make_loader(data.test, data.spec, 100, train=False)
    return {
        "published input": (lambda: list(train), len(few)),
        "published step": repeated(
            lambda: published.train_step(model.train(), images, labels, criterion, optimizer), network
        ),
        "published evaluation": (lambda: published.validate(model, test, criterion), len(data.test)),
    }


def repeated(step: Part, network: str) -> tuple[Part, int]:
    """A step, or several of a narrow network, whose single one is soon over; with the images that it handles."""
    times = 5 if network in COMPILED_ON_CPU else 1
    return lambda: [step() for _ in range(times)], times * BATCH


def our_parts(network: str) -> dict[str, tuple[Part, int]]:
    """The same of main_stage1.py, its step in every way that this CPU can."""
    data, device = make_data(100, test=100), torch.device("cpu")
    batches = make_batches(data, device)
    batch = next(iter(batches.epoch()))
    ways: dict[str, Json] = {"step": {}, "step, compiled": {"compile": "on"}}
    if cpu_has_bf16():
        ways["step, bf16"] = {"amp": torch.bfloat16}
    parts: dict[str, tuple[Part, int]] = {"input": (lambda: [None for _ in batches.epoch()], len(data.train))}
    for name, way in ways.items():
        step = make_step(network, data, device, **way)
        parts[name] = repeated(lambda step=step: step(*batch), network)  # type: ignore[misc]
    test = eval_batches(data, data.test, device)
    parts["evaluation"] = (lambda: predict(step.model, test), len(data.test))
    parts["evaluation, flip"] = (lambda: predict(step.model, test, flip_tta=True), len(data.test))
    return parts


def serve(orders: Connection, network: str, threads: int) -> None:
    """Times the published parts by name, in a process of its own."""
    torch.set_num_threads(threads)
    parts = published_parts(network)
    for name in iter(orders.recv, None):
        orders.send(timed(parts[name][0], torch.device("cpu")) / parts[name][1])


def cpu_totals(t: Mapping[str, float], step: str) -> dict[str, float]:
    """From seconds per image: ratios, and seconds of whole epochs of a 200-epoch run with a certain kind of step."""
    images = sum(class_sizes(500, CLASSES, 100))
    epoch = {
        "published epoch": images * (t["published input"] + t["published step"]) + 10_000 * t["published evaluation"],
        "epoch, published evaluation": images * (t["input"] + t[step]) + 10_000 * t["evaluation, flip"],
        "epoch": images * (t["input"] + t[step]) + 10_000 * t["evaluation"] * EVALUATIONS / EPOCHS,
    }
    ratios = {"input ratio": t["published input"] / t["input"]}
    ratios |= {f"{name} ratio": t["published step"] / t[name] for name in t if name.startswith("step")}
    ratios |= {f"{name} ratio": epoch["published epoch"] / epoch[name] for name in list(epoch)[1:]}
    return epoch | ratios


def on_cpu(network: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """Times the parts in turn and prints medians."""
    spawn = multiprocessing.get_context("spawn")
    orders, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, network, arguments.threads), daemon=True)
    process.start()
    parts = our_parts(network)

    def seconds(name: str) -> float:
        if name in parts:
            return timed(parts[name][0], device) / parts[name][1]
        orders.send(name)
        return float(orders.recv())

    names = ["published input", "input", "published step", *(name for name in parts if name.startswith("step"))]
    names += ["published evaluation", "evaluation", "evaluation, flip"]
    for name in names:  # to warm up
        seconds(name)
    began = time.perf_counter()
    pairs = [{name: seconds(name) for name in names} for _ in range(arguments.pairs)]
    orders.send(None)
    usual = "step, compiled" if network in COMPILED_ON_CPU else "step"
    totals = [cpu_totals(pair, usual) for pair in pairs]
    print(f"\n{network}, {device}, {torch.get_num_threads()} threads, {arguments.pairs} pairs: median (min to max)")
    for name in names:
        rates = [1 / pair[name] for pair in pairs]
        print(f"{name:<34}{statistics.median(rates):>10.1f} images/s  ({min(rates):.1f} to {max(rates):.1f})")
    for name in totals[0]:
        values = [total[name] for total in totals]
        unit = "x" if name.endswith("ratio") else "s"
        print(f"{name:<34}{statistics.median(values):>10.2f} {unit:<9} ({min(values):.2f} to {max(values):.2f})")
    save(arguments, device, began, {"network": network, "seconds_per_image": pairs, "totals": totals})


# On a GPU: epochs.

WAYS: dict[str, Json] = {
    "published": {},
    "graph, bf16": {"amp": torch.bfloat16, "graph": "on"},
    "graph, bf16, compile": {"amp": torch.bfloat16, "graph": "on", "compile": "on"},
    "eager, bf16": {"amp": torch.bfloat16},
    "eager, float32": {},
    "graph, float32": {"graph": "on"},
    "4 at once, graph, bf16": {"amp": torch.bfloat16, "graph": "on"},
}


def gpu_row(network: str, ratio: float, way: str, device: torch.device) -> Json:
    """Seconds of the timed epochs, of an evaluation, and what follows from them."""
    data = make_data(ratio)
    runs = 4 if way.startswith("4") else 1
    warm_up = 0.0
    if way == "published":
        model, criterion, optimizer = published_model(network, device)
        train = make_loader(data.train, data.spec, BATCH, train=True, workers=WORKERS)
        test = make_loader(data.test, data.spec, 100, train=False, workers=WORKERS)
        warm_up = timed(lambda: published.train_epoch(model, train, criterion, optimizer), device)
        epochs = [
            timed(lambda: published.train_epoch(model, train, criterion, optimizer), device) for _ in range(TIMED)
        ]
        evaluation = timed(lambda: published.validate(model, test, criterion), device)
        run = EPOCHS * (statistics.median(epochs) + evaluation)
    else:
        steps = [make_step(network, data, device, **WAYS[way]) for _ in range(runs)]
        fast, test_batches = make_batches(data, device), eval_batches(data, data.test, device)

        def several(count: int) -> None:
            def task(step: TrainStep) -> None:
                for epoch in range(count):
                    train_epoch(step, fast.epoch(epoch), epoch, 0.01)

            side_by_side(task, steps, runs, device, threading.Event())

        warm_up = timed(lambda: several(WARM_UP), device)
        epochs = [timed(lambda: several(TIMED), device) / TIMED] if runs > 1 else []
        epochs = epochs or [timed(lambda: several(1), device) for _ in range(TIMED)]
        predict(steps[0].model, test_batches)
        evaluation = timed(lambda: predict(steps[0].model, test_batches), device)
        run = EPOCHS * statistics.median(epochs) + EVALUATIONS * evaluation * runs + warm_up
    rate = runs * len(data.train) / statistics.median(epochs)
    name = torch.cuda.get_device_name(device)
    peak = next((value for key, value in PEAK.items() if key in name), math.nan)
    return {
        "epoch_s": epochs,
        "evaluation_s": evaluation,
        "warm_up_s": warm_up,
        "run_s": run / runs,
        "images_per_s": rate,
        "model_flop_utilisation": rate * flops_per_image(network) / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
    }


def flops_per_image(network: str) -> float:
    """Of a training step: forward and twice as much backward, counted by PyTorch on the forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(network, CLASSES).eval()(torch.zeros(1, 3, 32, 32))
    return 3.0 * float(counter.get_total_flops())


def on_gpu(networks: list[str], arguments: argparse.Namespace, device: torch.device) -> None:
    """Runs the rows that are missing, most telling first, and prints all."""
    name, deadline = torch.cuda.get_device_name(device), time.monotonic() + 60 * arguments.minutes
    for ratio in (100, 10):
        for network in networks:
            for way in WAYS:
                wanted = {"network": network, "ratio": ratio, "way": way, "gpu": name}
                if any(wanted.items() <= line.items() for line in read_lines(arguments.json)):
                    continue
                if time.monotonic() > deadline:
                    print("out of time: run it again for the other rows")
                    return
                began = time.perf_counter()
                torch.cuda.reset_peak_memory_stats(device)
                save(arguments, device, began, wanted | gpu_row(network, ratio, way, device))
    lines = [line for line in read_lines(arguments.json) if line.get("gpu") == name]
    base = {(r["network"], r["ratio"]): r["run_s"] for r in lines if r["way"] == "published"}
    print(f"{name}: seconds per epoch, per evaluation, per run of {EPOCHS} epochs; images/s; MFU; ratio to published")
    for r in lines:
        epoch, times = statistics.median(r["epoch_s"]), base.get((r["network"], r["ratio"]), math.nan) / r["run_s"]
        print(
            f"{r['network']:<10}{r['ratio']:>5}  {r['way']:<26}{epoch:>8.3f}{r['evaluation_s']:>8.2f}{r['run_s']:>9.1f}"
            f"{r['images_per_s']:>10.0f}{100 * r['model_flop_utilisation']:>7.1f} %{times:>8.1f}x"
        )


def save(arguments: argparse.Namespace, device: torch.device, began: float, content: Mapping[str, object]) -> None:
    """Appends a line to --json."""
    about = provenance("-m benchmarks.stage1_bench", sys.argv[1:], device, time.perf_counter() - began)
    append_line(arguments.json, {**content, "provenance": about})


def main() -> None:
    """Runs the benchmark of the device that there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet34", "resnet32"])
    parser.add_argument("--pairs", type=int, default=9, help="repetitions on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; per core, so one")
    parser.add_argument("--minutes", type=float, default=8, help="begin no further row after so many, on a GPU")
    parser.add_argument("--json", type=Path, help="append raw figures to this file")
    arguments = parser.parse_args()
    device = pick_device(threads=None if torch.cuda.is_available() else arguments.threads)
    if device.type == "cuda":
        on_gpu(arguments.network, arguments, device)
        return
    for network in arguments.network:
        on_cpu(network, arguments, device)
    print("\nGPU: not run, there is none here")


if __name__ == "__main__":
    main()
