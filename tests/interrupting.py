"""A command of several processes, one of which gets a signal in its n-th step, or fails there where it says raise.

torchrun --nproc-per-node=2 tests/interrupting.py RANK STEP SIGNAL main_stage1.py --dataset digits ...
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils.resume import TrainState

ADVANCE = TrainState.advance


def interrupt(rank: str, step: int, name: str) -> None:
    """Lets the process of this rank get a signal in its n-th step from now on, or fail there."""
    steps = count(1)

    def advance(self: TrainState, *measured: torch.Tensor, **options: int) -> None:
        if next(steps) == step and rank == os.environ["RANK"]:
            if name == "raise":
                raise RuntimeError("what went wrong in this process")
            os.kill(os.getpid(), signal.Signals[name])
        ADVANCE(self, *measured, **options)

    TrainState.advance = advance


if __name__ == "__main__":
    rank, step, name, script, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    interrupt(rank, int(step), name)
    __import__(script.removesuffix(".py")).main(arguments)
