"""The input of the 224-pixel recipe: from JPEGs and from the cache, beside the published PIL pipeline, per CPU core.

    python -m benchmarks.input_bench --images FOLDER --pairs 9 --json benchmarks/results/input_bench.jsonl

FOLDER holds JPEGs, for instance some of ImageNet's; without it pictures are drawn. On one thread, in turn, as often as
--pairs says:

* ``PIL``: open, RandomResizedCrop(224), flip, ColorJitter(0.4, 0.4, 0.4), ToTensor, Normalize, one image at a time, as
  Decoupling's loader does in its worker processes;
* ``files`` and ``cache``: what a worker process of ours does, decoding or reading, cropping, flipping;
* ``device part``: what is left, colour jitter and normalisation of whole batches. Training does it on the GPU; where
  there is none it is the same core's work too, which the last rows count.

On a GPU: images per second of ResNet-50 training steps (bf16, --batch) fed by --workers processes from files, from the
cache and by the GPU's JPEG decoder, and of the same step on one batch again and again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count, islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks import append_line, timed
from datasets import DATASETS, Batches
from datasets.batches import Batch, seeded
from datasets.files import read_image
from datasets.photos import INPUTS, Photos, ResizedCrop, _Reader
from datasets.scan import write_pixels
from engine import TrainStep, make_sgd
from losses import make_loss
from models import build_model
from utils.arrays import open_array
from utils.system import available_cpus, pick_device, provenance

SPEC = DATASETS["imagenet_lt"]
SIDE, ROUNDS, STEPS, WARM_UP = 256, 4, 60, 15
CPU = torch.device("cpu")


def jpegs_in(folder: Path) -> list[str]:
    """The JPEGs of a folder, relative to it."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return sorted(str(path.relative_to(folder)) for path in found)


def make_photos(folder: Path, store: Path, repeat: int, workers: int = 0) -> dict[str, Photos]:
    """The folder's JPEGs, ``repeat`` times over, as files and as a cache."""
    paths = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    sizes = torch.tensor([read_image(folder / path).shape[1:] for path in paths], dtype=torch.int32)
    target = store / f"train_{SIDE}.npy"
    write_pixels(folder, paths * repeat, SIDE, target, available_cpus())
    pixels = open_array(target, "")
    args = (folder, paths * repeat, sizes.repeat(repeat, 1), 224)
    return {how: Photos(*args, pixels if how == "cache" else None, how, workers) for how in INPUTS}


def pil_part(folder: Path, photos: Photos) -> Callable[[], object]:
    """The published pipeline over all photos, image by image."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )

    def run() -> None:
        for path in photos.paths:
            with Image.open(folder / path) as image:
                pipeline(image.convert("RGB"))

    return run


def per_core(folder: Path, pairs: int, path: Path | None, argv: list[str]) -> None:
    """The parts of a core in turn; prints medians, least and greatest, and appends them to ``path``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        photos = make_photos(folder, Path(place), ROUNDS)
        n, augment = len(photos["files"]), ResizedCrop()
        draws = augment.draw(n, seeded(0))
        order = torch.arange(n)
        readers = {how: _Reader(photos[how], augment, on_gpu=False) for how in ("files", "cache")}
        batches = Batches(photos["files"], order, n, SPEC.mean, SPEC.std, CPU, augment)
        pixels = readers["cache"].read(order, *draws[:2])
        assert isinstance(pixels, torch.Tensor)

        def device_part() -> None:
            for part in order.split(64):
                batches._normalise(augment.jittered(pixels[part], part, *(draw[part] for draw in draws)))

        parts: dict[str, Callable[[], object]] = {"PIL": pil_part(folder, photos["files"])}
        parts |= {how: lambda how=how: readers[how].read(order, *draws[:2]) for how in readers}  # type: ignore[misc]
        parts["device part"] = device_part
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(pairs):
            for name, part in parts.items():
                seconds[name].append(timed(part, CPU))
    rows = {how: [a / b for a, b in zip(seconds["PIL"], seconds[how])] for how in readers}
    for how in readers:
        rest = zip(seconds["PIL"], seconds[how], seconds["device part"])
        rows[f"{how} and device part"] = [a / (b + c) for a, b, c in rest]
    speeds = {name: n / statistics.median(values) for name, values in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:24} {speed:9,.0f} images/s")
    for name, ratios in rows.items():
        print(f"{name:24} {statistics.median(ratios):9.2f} times PIL ({min(ratios):.2f} to {max(ratios):.2f})")
    content = {
        "what": "input of the 224-pixel recipe per core",
        "images": n,
        "seconds": seconds,
        "images_per_second": speeds,
        "times_pil": rows,
        "provenance": provenance("-m benchmarks.input_bench", argv, CPU, sum(map(sum, seconds.values()))),
    }
    append_line(path, content)


def images_per_second(step: TrainStep, stream: Iterator[Batch], size: int) -> float:
    """Images of ``size`` a batch that training gets through, after some steps to warm up."""
    for batch in islice(stream, WARM_UP):
        step(*batch)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for batch in islice(stream, STEPS):
        step(*batch)
    torch.cuda.synchronize()
    return size * STEPS / (time.perf_counter() - began)


def on_gpu(folder: Path, size: int, workers: int, device: torch.device, path: Path | None, argv: list[str]) -> None:
    """Images per second of ResNet-50 training fed in every way, and of the step alone."""
    with tempfile.TemporaryDirectory() as place:
        photos = make_photos(folder, Path(place), -(-size * 32 // len(jpegs_in(folder))), workers)
        labels = torch.arange(len(photos["files"])) % 1000
        counts = torch.bincount(labels, minlength=1000).tolist()
        model = build_model("resnet50", 1000, stem="imagenet").to(device).to(memory_format=torch.channels_last).train()
        optimizer = make_sgd(model.parameters(), 0.1, 0.9, 5e-4, nesterov=False)
        step = TrainStep(model, make_loss("ce", counts, {}).to(device), optimizer, amp=torch.bfloat16, graph="on")
        for how in ("step alone", "cache", "files", "nvjpeg"):
            source = photos["cache" if how == "step alone" else how]
            batches = Batches(source, labels, size, SPEC.mean, SPEC.std, device, ResizedCrop())
            whole = (batch for epoch in count() for batch in batches.epoch(epoch) if len(batch[1]) == size)
            speed = images_per_second(step, repeat(next(whole)) if how == "step alone" else whole, size)
            print(f"ResNet-50, bf16, batch {size}, {how:10} {speed:9,.0f} images/s", flush=True)
            content = {"what": "ResNet-50 training", "input": how, "images_per_second": speed, "batch": size}
            made = provenance("-m benchmarks.input_bench", argv, device, size * STEPS / speed)
            append_line(path, content | {"workers": workers, "provenance": made})


def draw_pictures(folder: Path, number: int = 48) -> Path:
    """JPEGs of ImageNet's typical size, 500 x 375 pixels and about 100 kB, from random colours."""
    for i in range(number):
        generator = np.random.default_rng(i)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        rough = smooth + generator.integers(-20, 21, smooth.shape, dtype=np.int16)
        Image.fromarray(rough.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; drawn at random, if not given")
    parser.add_argument("--pairs", type=int, default=9, help="repetitions")
    parser.add_argument("--batch", type=int, default=256, help="GPU: images per step")
    parser.add_argument("--workers", type=int, default=16, help="GPU: worker processes")
    parser.add_argument("--json", type=Path, help="append results to this file")
    options = parser.parse_args()
    device = pick_device()
    with tempfile.TemporaryDirectory() as place:
        folder = options.images or draw_pictures(Path(place))
        per_core(folder, options.pairs, options.json, sys.argv[1:])
        if device.type == "cuda":
            on_gpu(folder, options.batch, options.workers, device, options.json, sys.argv[1:])
        else:
            print("ResNet-50 training: not run (no GPU)")


if __name__ == "__main__":
    main()
