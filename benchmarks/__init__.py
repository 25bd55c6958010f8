"""Benchmarks and the literal commands behind the figures of the README; here what several of them need."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from utils.checkpoints import Checkpoint
from utils.system import synchronize
from utils.types import Json


def timed(part: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    part()
    synchronize(device)
    return time.perf_counter() - began


def read_lines(path: Path | None) -> list[Json]:
    """The JSON lines of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def append_line(path: Path | None, content: Mapping[str, object]) -> None:
    """Adds a JSON line to a file; without a path, nothing."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(content) + "\n")


def halved(file: Checkpoint) -> Checkpoint:
    """A checkpoint with its weights of two and more dimensions in half precision; loading makes float32 of them."""
    return dataclasses.replace(file, model={k: v.half() if v.dim() > 1 else v for k, v in file.model.items()})
