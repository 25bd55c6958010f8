"""The machine a run is on: device, seeds, provenance."""

from __future__ import annotations

import ctypes
import datetime
import math
import os
import platform
import resource
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy
import torch

from utils import signals
from utils.console import show
from utils.distributed import launched, launcher, local_rank_and_size, world_size
from utils.errors import UsageError

#: glibc's names of what mallopt sets, and values in bytes: what free memory stays, and from which size it never does.
MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2**30), "M_TOP_PAD": (-2, 2**24), "M_MMAP_THRESHOLD": (-3, 2**25)}
#: Controller of a memory cgroup, version 2 and 1 -> its files of limit and use, and what memory.stat calls page cache.
CGROUPS = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
#: Environment variables that choose kernels, and with them the last bits of a result.
KERNEL_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_COMPILE_DISABLE"),
)
T = TypeVar("T")
R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent


def available_cpus() -> int:
    """CPUs that this process may use: those of the machine, less what affinity and a container's quota take away."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    return count


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU's memory, or of the machine's and its containers'.

    Where the system does not say (other than Linux), half of the machine's memory.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return max(0, min([machine, *left_in_cgroups()]))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def left_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each memory limit on this process leaves, its own and those around it; page cache counts as left."""
    found = []
    for line in own.read_text().splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in CGROUPS:
            continue
        limit, used, cached = CGROUPS[controller]
        place = Path(path)  # absolute within root; a container may see only the upper end of it
        for folder in (root / controller / str(part).lstrip("/") for part in (place, *place.parents)):
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - sum(int(stat[name]) for name in cached)
                found.append(int((folder / limit).read_text()) - taken)
            except (OSError, ValueError, KeyError):  # no such folder, or no limit: "max"
                continue
    return found


#: The options of a training command that :func:`pick_device` takes, in its order.
DEVICE_OPTIONS = ("device", "gpu", "threads", "deterministic")


def pick_device(
    device: str = "auto", gpu: int | None = None, threads: int | None = None, deterministic: bool = False
) -> torch.device:
    """auto: a GPU where there is one, of several processes each its own. ``gpu`` picks it by number and implies cuda.

    Also sets the number of CPU threads: ``threads``, or what PyTorch takes up to :func:`available_cpus`, since more
    threads than CPUs make each other wait. The processes of a machine share its CPUs.

    Raises:
        UsageError: a GPU asked for that is not there, or beside --device cpu or several processes; more threads than
            CPUs.
    """
    make_deterministic(deterministic)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine, here = local_rank_and_size()
    if device == "cpu" and gpu is not None:
        raise UsageError(f"--gpu {gpu} with --device cpu", "one of the two")
    if gpu is not None and world_size() > 1:
        raise UsageError(f"--gpu {gpu} with {world_size()} processes", "no --gpu: each process takes one of its own")
    if gpu is not None and gpu >= gpus:
        numbers = "none, this machine has no GPU: leave --gpu out" if gpus == 0 else f"0 to {gpus - 1}"
        raise UsageError(f"--gpu {gpu}", numbers)
    if device == "cuda" and gpus == 0:
        raise UsageError("--device cuda: this machine has no GPU", "auto, cpu")
    cpus = max(1, available_cpus() // here)
    if threads is not None and threads > cpus:
        raise UsageError(f"--threads {threads}: more than CPUs make each other wait", f"1 to {cpus}")
    torch.set_num_threads(threads or min(torch.get_num_threads(), cpus))
    if device == "cpu" or gpus == 0:
        keep_freed_memory()
        return torch.device("cpu")
    if here > gpus:
        raise UsageError(f"{here} processes on {gpus} GPUs", f"torchrun --nproc-per-node={gpus}, or --device cpu")
    number = mine if gpu is None else gpu
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def make_deterministic(is_on: bool) -> None:
    """Has PyTorch take kernels alone that give the same bits run after run, or any; before CUDA starts.

    An operation without such a kernel raises RuntimeError from then on.
    """
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(is_on)
    torch.backends.cudnn.deterministic = is_on
    torch.utils.deterministic.fill_uninitialized_memory = is_on  # type: ignore[attr-defined]


def deterministic_words(device: torch.device) -> str:
    """One line: what --deterministic costs on a device, and what it does not promise."""
    costs = {
        "cuda": "slower by an amount not measured here (PyTorch: often slower; 24 MB for cuBLAS)",
        "cpu": "steps about 7 % slower (ResNet-20, one thread: new memory is filled)",
    }[device.type]
    limits = "another machine, number of threads or PyTorch may round otherwise"
    return f"deterministic: the same bits run after run, {costs}; {limits}"


def keep_freed_memory() -> None:
    """Lets the process keep up to 1 GiB of freed memory for its next allocations, where the C library is glibc.

    A training step allocates and frees all activations; given back to the system and asked for again, they cost up to
    a quarter of a narrow network's step in page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in MALLOPT.values():
            library.mallopt(parameter, value)


def step_seconds(steps: Callable[[int], object], device: torch.device, number: int = 10) -> float:
    """Seconds of one step: ``steps(number)`` makes so many, first untimed and then timed."""
    steps(number)
    synchronize(device)
    began = time.perf_counter()
    steps(number)
    synchronize(device)
    return (time.perf_counter() - began) / number


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has taken so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB of memory"


def side_by_side(
    task: Callable[[T], R], items: Sequence[T], workers: int, device: torch.device, stopped: threading.Event
) -> list[R]:
    """[task(item) for item in items], ``workers`` at a time, on a GPU each on a stream of its own.

    Where one fails, or Ctrl-C is pressed, ``stopped`` is set so that the others can end too.
    """
    if workers == 1:
        return [task(item) for item in items]

    origin = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_stream(item: T) -> R:
        if origin is None:
            return task(item)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(origin)
        with torch.cuda.stream(stream):
            return task(item)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(on_stream, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        except BaseException as error:
            show("stopping the other runs")
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop = error
            try:
                if not (isinstance(error, signals.Interrupted) and error.is_second):
                    wait([future for future in futures if not future.cancelled()])
            except signals.Interrupted as second:
                stop = second
            if isinstance(stop, signals.Interrupted) and stop.is_second:  # Python would wait for the threads first
                os.write(2, f"\nended by {stop}\n".encode())
                os._exit(stop.status)
            raise


AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_amp(amp: str, device: torch.device) -> str:
    """The key of ``AMP`` to train in: auto is bf16 on a GPU that has it, and off elsewhere.

    Raises:
        UsageError: a precision in which the device is slower than in float32, or which it lacks.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if amp == "bf16" and not has_bf16:
            raise UsageError("--amp bf16: this GPU has no bfloat16", "auto, fp16, off")
        return ("bf16" if has_bf16 else "off") if amp == "auto" else amp
    if amp == "fp16" or (amp == "bf16" and not cpu_has_bf16()):
        allowed = "auto, bf16, off" if cpu_has_bf16() else "auto, off"
        raise UsageError(f"--amp {amp}: this CPU is slower with it than without", allowed)
    return "off" if amp == "auto" else amp


def pick_graph(graph: str, device: torch.device) -> str:
    """Whether steps are CUDA graphs: off, auto (where they prove themselves) or on.

    Raises:
        UsageError: on, where there is no GPU.
    """
    if graph == "on" and device.type != "cuda":
        raise UsageError("--graph on: CUDA graphs need a GPU", "auto, off")
    return graph if device.type == "cuda" and world_size() == 1 else "off"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 (AVX512_BF16 or AMX); others emulate it at half of float32's speed."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def draw_seed() -> int:
    """A fresh seed in [0, 2**31)."""
    return secrets.randbelow(2**31)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, object]:
    """What the rounding of a run on a device depends on."""
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


class Provenance(TypedDict, total=False):
    """What made a result."""

    command: str
    commit: str | None
    uncommitted_changes: bool | None
    versions: dict[str, object]
    device: str
    cpu: dict[str, str | None]
    processes: int
    threads: int
    deterministic: bool
    environment: dict[str, str]
    platform: str
    seconds: float
    date: str
    resumed: list[dict[str, object]]


def provenance(script: str, argv: Sequence[str], device: torch.device, seconds: float) -> Provenance:
    """What made a result: command, commit (and whether files differ from it), versions, machine, seconds, date."""
    changed, on_gpu = _git("status", "--porcelain", "--untracked-files=no"), device.type == "cuda"
    return {
        "command": shlex.join([*launcher(), *script.split(), *argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a str subclass, which weights_only refuses
            "torchvision": version("torchvision"),
            "numpy": str(numpy.__version__),
            "cuda": torch.version.cuda if on_gpu else None,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "cpu": {"model": cpu_model(), "capability": torch.backends.cpu.get_cpu_capability()},
        "processes": launched(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ},
        "platform": sys.platform,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str | None:
    """The CPU's name; None where the system does not tell (other than Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
