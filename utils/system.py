"""The machine a run is on: device, seeds, provenance."""

from __future__ import annotations

import datetime
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

from utils.options import UsageError

ROOT = Path(__file__).resolve().parent.parent


def pick_device(device: str = "auto", gpu: int | None = None) -> torch.device:
    """auto: a GPU where there is one. ``gpu`` picks it by its number and implies cuda.

    Raises:
        UsageError: a GPU asked for that is not there, or beside --device cpu.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" and gpu is not None:
        raise UsageError(f"--gpu {gpu} with --device cpu", "one of the two")
    if gpu is not None and gpu >= gpus:
        numbers = "none, this machine has no GPU: leave --gpu out" if gpus == 0 else f"0 to {gpus - 1}"
        raise UsageError(f"--gpu {gpu}", numbers)
    if device == "cuda" and gpus == 0:
        raise UsageError("--device cuda: this machine has no GPU", "auto, cpu")
    if device == "cpu" or gpus == 0:
        return torch.device("cpu")
    return torch.device("cuda", gpu or 0)


def draw_seed() -> int:
    """A fresh seed in [0, 2**31)."""
    return secrets.randbelow(2**31)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(script: str, argv: Sequence[str], device: torch.device, seconds: float) -> dict[str, Any]:
    """What made a result: command, commit (and whether files differ from it), versions, device, seconds, date."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(["python", script, *argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a str subclass, which weights_only refuses
            "torchvision": str(torchvision.__version__),
            "numpy": str(numpy.__version__),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "platform": sys.platform,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
