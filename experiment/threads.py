"""How many CPU threads a long run takes: one, where other programs keep the other CPUs busy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from utils.console import counted, duration, show, step_time
from utils.distributed import world_size

#: Images of the steps that are timed, at most.
IMAGES = 16
#: Seconds that a run must take at least, a third of it with one thread, and times that one thread must be faster.
LONG, CLEARLY = 60.0, 1.5


def settle_threads(
    network: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    images: int,
    device: torch.device,
    chosen: int | None,
    trains: bool,
) -> int | None:
    """Has PyTorch take one CPU thread where that is clearly faster than all, and says so; returns what is settled.

    Where threads wait for CPUs that others use, two can take five times as long as one. Short runs, runs on a GPU or of
    several processes, and a number of threads that was ``chosen`` stay as they are.

    Args:
        network: gives a network to time, of its own where it ``trains``.
        shape: c, H, W of its images.
        images: how many it will look at.
        device: where it will.
        chosen: --threads.
        trains: whether a step goes backward too.
    """
    many = torch.get_num_threads()
    if chosen is not None or device.type != "cpu" or many == 1 or world_size() > 1 or not images:
        return chosen
    with torch.random.fork_rng(devices=[]):
        model = network().train(trains)
    batch = torch.zeros(min(images, IMAGES), *shape)

    def seconds(threads: int) -> float:
        """Of an image; the faster of two steps."""
        torch.set_num_threads(threads)
        times = []
        for _ in range(2):
            began = time.perf_counter()
            with torch.set_grad_enabled(trains):
                out = model(batch)
                if trains:
                    out.sum().backward()
            times.append(time.perf_counter() - began)
        return min(times) / len(batch)

    try:
        seconds(many)  # the first steps are slower than the others
        together = seconds(many)
        if together * images < LONG:
            return None
        alone, together = seconds(1), min(together, seconds(many))
    finally:
        torch.set_num_threads(many)
    if together < CLEARLY * alone or alone * images < LONG / 3:
        return None
    torch.set_num_threads(1)
    show(
        f"1 thread, since {counted(many, 'thread')} make each other wait: an image takes {step_time(alone)}, not "
        f"{step_time(together)}, so of all {duration(alone * images)}, not {duration(together * images)}; "
        f"--threads {many} takes all"
    )
    return 1
