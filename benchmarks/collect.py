"""Prints the result of finished runs as JSON lines: figures, options, provenance.

python -m benchmarks.collect output/cifar100_exp100_resnet20_*/*/checkpoint.pt > benchmarks/results/NAME.jsonl

Lines are ordered by stage and seed; per-class figures stay in the checkpoints.
"""

from __future__ import annotations

import json
import sys

from utils import checkpoints


def main(paths: list[str]) -> None:
    """Reads the checkpoints and prints a line each."""
    files = sorted((checkpoints.read(path) for path in paths), key=lambda f: (str(f.stage), f.options.get("seed")))
    for file in files:
        lines = {key: value for key, value in file.metrics.items() if key not in ("per_class", "test_images")}
        print(json.dumps({"stage": file.stage} | lines | {"options": file.options, "provenance": file.provenance}))


if __name__ == "__main__":
    main(sys.argv[1:])
