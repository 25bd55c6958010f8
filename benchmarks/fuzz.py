"""Damaged and forged files: every reader gives the right answer or one clean message, whatever the bytes.

    python -m benchmarks.fuzz                          10,000 files, a quarter of an hour on one core; in make torture
    python -m benchmarks.fuzz --number 500 --only npz

Files of every format are mutated (bits, bytes, cuts, blocks, lengths; of checkpoints also single values, with a
checksum that is right again) and given to the project's own readers, in processes that are watched for time, memory and
what they run. Where a file carries a checksum that nobody has forged, its answer must be the original's. The slowest go
through real commands, too. A report goes to benchmarks/results/fuzz.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import main_stage1
from benchmarks import append_line
from datasets.files import Files, Manifest, read_image
from datasets.own import _kept_statistics, listing_of, read_npz
from datasets.published import read_list
from datasets.spec import DEFAULT_IMAGE_OPTIONS
from experiment.options import DataOptions
from experiment.restore import built, open_checkpoint
from models import build_model
from utils import checkpoints
from utils.arrays import open_array, write_array
from utils.checkpoints import Checkpoint
from utils.command import command
from utils.errors import UsageError
from utils.readers import (
    MOST_NODES,
    Unreadable,
    _size_of_tree,
    parse_tensors,
    read_bytes,
    read_json,
    seal,
    sealed,
    unsealed,
)
from utils.resume import TrainState, state_files
from utils.system import ROOT, provenance
from utils.types import Json

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.jsonl"
#: Seconds of CPU and bytes that a reader may take for a file of at most a megabyte.
MOST_SECONDS, MOST_MEMORY = 20, 1_500_000_000
#: Files that a process reads before another one takes over, and of all how many go through a command.
TURN, WORST = 100, 40
SIZES = {"train": 30, "test": 9}
#: What Python reports when code or another program is about to be run.
CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect")
NUMBERS = (0, 1, -1, 2**31, 2**63 - 1, -(2**63), 10**30, 0.5, -1.0, 1e300, float("nan"), float("inf"))
VALUES: tuple[object, ...] = (*NUMBERS, None, True, "", "x", "../../x", "\x1b[31m", "=1+1", [], {}, [0], {"a": 1}, b"x")


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: what its files are called.
        make: {variant: the bytes of a file that is right}.
        read: path -> what a command would take from it, as text; Unreadable or UsageError where it refuses.
        has_checksum: nobody can change it unseen.
        forge: bytes, a generator -> bytes of other content with the checksum that belongs to it; None: its bytes
            are mutated.
        share: of the number of files of other formats.
        command: script and flags, {} the path.
    """

    name: str
    make: Callable[[], Mapping[str, bytes]]
    read: Callable[[Path], str]
    has_checksum: bool = False
    command: tuple[str, ...] = ()
    forge: Callable[[bytes, random.Random], bytes] | None = None
    share: float = 1.0


# What is right


def _checkpoint(network: str = "resnet8") -> Checkpoint:
    torch.manual_seed(0)
    model = build_model(network, 10, 1)
    report = {"top1": 0.5, "top5": 0.9, "per_class": [0.5] * 10, "epoch": 3, "select": "last", "flip_tta": False}
    data = {
        **{"dataset": "digits", "imb_type": "exp", "imb_ratio": 100, "subset": "first", "subset_seed": 0},
        **{"image_size": 8, "network": network, "stem": "small", "name": "digits", "train_images": "x", "read": "x"},
        **{"class_names": [str(i) for i in range(10)], "class_counts": [124 - 10 * i for i in range(10)]},
        **{"mean": [0.3], "std": [0.4], "val_indices": [1, 5, 9]},
    }
    parent = {"path": "a.pt", "sha256": "0" * 64, "seed": 0, "chosen": {**_chosen(), "epoch": 2}, "parent": None}
    return Checkpoint(
        stage="stage2",
        network=network,
        num_classes=10,
        in_channels=1,
        model=model.state_dict(),
        options={"method": "los", "seed": 0, "network": network, "dataset": "digits", "data_dir": "data/"},
        data=data,  # type: ignore[arg-type]
        metrics={**report, "temperature": 1.5},  # type: ignore[typeddict-item]
        parent=parent,  # type: ignore[arg-type]
    )


def _chosen() -> dict[str, object]:
    return {"epoch": 3, "select": "last", "flip_tta": False}


def _saved(write: Callable[[Path], object], name: str = "x") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name))
        return Path(folder, name).read_bytes()


def _own() -> dict[str, bytes]:
    return {"own": _saved(_checkpoint().write)}


def _others() -> dict[str, bytes]:
    model = _checkpoint().model
    named = {f"module.encoder.{name}": value for name, value in model.items()}
    return {
        "state dict": _saved(lambda path: torch.save(model, path)),
        "legacy": _saved(lambda path: torch.save(model, path, _use_new_zipfile_serialization=False)),
        "safetensors": _saved(lambda path: save_file(model, path)),
        "wrapped": _saved(lambda path: torch.save({"state_dict": named, "epoch": 3, "best": np.float64(0.5)}, path)),
    }


def _manifest() -> dict[str, bytes]:
    files = {
        split: Files(
            [f"{split}/{i}.png" for i in range(n)], torch.arange(n) % 3, torch.full((n, 2), 80).int(), torch.arange(n)
        )
        for split, n in SIZES.items()
    }
    made = Manifest("folder", "/data", files, ["a", "b", "c"], {"source": "data"})
    return {"manifest": _saved(made.write)}


def _npz() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    arrays = {
        **{
            f"{split}_images": draw.integers(0, 256, (n, 12, 12, 3), np.uint8)
            for split, n in (("train", 30), ("test", 9))
        },
        **{f"{split}_labels": np.arange(n)[:, None] % 3 for split, n in (("train", 30), ("test", 9))},
    }
    makers = {"stored": np.savez, "compressed": np.savez_compressed}
    return {name: _saved(lambda p, m=make: m(p, **arrays), "x.npz") for name, make in makers.items()}  # type: ignore[misc]


def _lists() -> dict[str, bytes]:
    lines = "".join(f"train/n0{i % 3}/image_{i}.JPEG {i % 3}\n" for i in range(40))
    return {"list": lines.encode()}


def _coco() -> dict[str, bytes]:
    images = [{"id": i, "file_name": f"train_val2018/Birds/{i % 3}/{i}.jpg"} for i in range(40)]
    entries = [{"image_id": i, "category_id": i % 3} for i in range(40)]
    return {"coco": json.dumps({"images": images, "annotations": entries}).encode()}


def _csv() -> dict[str, bytes]:
    lines = "".join(f"images/{i}.png,class {i % 3},{('train', 'train', 'test')[i // 3 % 3]}\n" for i in range(40))
    return {"csv": f"path,label,split\n{lines}".encode()}


def _images() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    pixels = np.kron(draw.integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    found: dict[str, bytes] = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        for mode in ("RGB", "L") if kind != "GIF" else ("P",):
            file = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(file, kind)
            found[f"{kind} {mode}"] = file.getvalue()
    return found


def _array() -> dict[str, bytes]:
    content = np.random.default_rng(0).normal(size=(300, 64)).astype("<f4").tobytes()

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            write_array(file, "cache/x.npy", (300, 64), "<f4", [content])

    return {"array": _saved(write)}


RUN = ["--dataset", "digits", "--imb_ratio", "10", "--epochs", "3", "--seed", "0", "--save_every", "1", "--out"]


@functools.cache
def _cut_off() -> Path:
    """The folder of a run of stage 1 that was cut off after two epochs; it is there until the process ends."""
    out = Path(_KEPT.name, "output")
    next_epoch = TrainState.next_epoch

    def cut(self: TrainState) -> None:
        next_epoch(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    TrainState.next_epoch = cut  # type: ignore[method-assign]
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.suppress(SystemExit), quiet[0], quiet[1]:
            main_stage1.main([*RUN, str(out)])
    finally:
        TrainState.next_epoch = next_epoch  # type: ignore[method-assign]
    return next(out.glob("*/*"))


_KEPT = tempfile.TemporaryDirectory()


def _state() -> dict[str, bytes]:
    return {"state": state_files(_cut_off())[0].read_bytes()}


def _statistics() -> dict[str, bytes]:
    return {"statistics": sealed(["set", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).encode()}


def _json() -> dict[str, bytes]:
    return {"json": json.dumps({"result": [0.5, None, {"a": "b"}], "options": {"lr": 0.1}}).encode()}


# What is read of it


def _answer(path: Path) -> str:
    file = open_checkpoint({"pretrained_pth": str(path)}, "stage2", DataOptions)
    model = built(file).eval()
    images = torch.linspace(-1, 1, 8 * 8 * 2 * file.in_channels).reshape(2, file.in_channels, 8, 8)
    with torch.inference_mode():
        rows = model(images)
    about = [file.stage, file.data.get("class_names"), file.metrics.get("temperature"), file.metrics.get("top1")]
    return f"{rows.tolist()} {about} {file.parent} {file.options}"


def _whole(path: Path) -> str:
    manifest = Manifest.load(path)
    if manifest is None:
        raise Unreadable("none")
    parts = {
        split: (files.paths, files.labels.tolist(), files.sizes.tolist()) for split, files in manifest.splits.items()
    }
    return str((manifest.name, manifest.root, manifest.class_names, manifest.about, parts))


def _gone_on(path: Path) -> str:
    """The end of the run that was cut off, from another state."""
    run = _cut_off()
    folder = path.parent / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(run / "options.json", folder)
    shutil.copy(path, folder / state_files(run)[0].name)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return str(main_stage1.main(["--resume", str(folder), "--threads", "1"])["top1"])
        except SystemExit as ended:
            if ended.code in (1, 2):
                raise Unreadable(said.getvalue()) from None
            raise


def _kept(path: Path) -> str:
    folder = path.parent / "set"  # they say where they are
    folder.mkdir(exist_ok=True)
    found = _kept_statistics(Path(shutil.copy(path, folder)), 3)
    if found is None:
        raise Unreadable("none")
    return str(found)


def _source(path: Path) -> str:
    source = read_npz(str(path), DEFAULT_IMAGE_OPTIONS)
    return str([source.class_names, source.train.fingerprint(), source.test.labels.tolist()])


def _listed(path: Path) -> str:
    folder = path.parent / "images"
    if not folder.exists():
        folder.mkdir()
        for i in range(40):
            Image.new("L", (9, 9)).save(folder / f"{i}.png")
    _, _, listing = listing_of("csv", str(path), DEFAULT_IMAGE_OPTIONS)
    return str(listing.splits)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# What is done to it


def mutated(blob: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """The bytes with one to four changes."""
    content = bytearray(blob)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        size, kind = len(content), draw.randrange(9)
        place = draw.randrange(size) if size else 0
        if draw.random() < 0.5:  # where headers and directories are
            place = (
                min(draw.randrange(200), max(0, size - 1))
                if draw.random() < 0.5
                else max(0, size - draw.randrange(1, 900))
            )
        length = min(draw.choice((1, 2, 4, 8, 64, 1024)), max(0, size - place))
        if kind <= 1 and size:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 2 and size:
            content[place : place + length] = draw.randbytes(length)
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            content[place : place + length] = bytes(length)
        elif kind == 5:
            number = draw.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1))
            content[place : place + 8] = number.to_bytes(8, draw.choice(("little", "big")))[: max(1, length)]
        elif kind == 6:
            del content[place : place + length]
        elif kind == 7:
            content[place:place] = content[place : place + length] * draw.choice((1, 2, 50))
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            content[place : place + length] = other[start : start + length]
    return bytes(content)


def forged(parse: Callable[[bytes], object], dump: Callable[[Json], bytes], blob: bytes, draw: random.Random) -> bytes:
    """A file of which one to three values are others, with the checksum that belongs to them."""
    content = parse(blob)
    assert isinstance(content, dict)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantised tensors
        for _ in range(draw.randint(1, 3)):
            place, key = _leaf(content, draw)
            place[key] = _other(place[key], draw)
    return dump(content)


def _with_checksum(content: Json) -> bytes:
    if _size_of_tree(content, {})[0] < MOST_NODES:  # else nobody could
        with contextlib.suppress(Exception):
            content["checksum"] = checkpoints.checksum(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _sealed(content: Json) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return seal(file.getvalue())


def _leaf(content: Json, draw: random.Random) -> tuple[Json, str]:
    while True:
        place: Json = content
        key = draw.choice(list(place))
        while isinstance(place[key], dict | list) and len(place[key]) and draw.random() < 0.8:
            place = place[key]
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if key not in ("format", "checksum"):
            return place, key


def _other(value: object, draw: random.Random) -> object:
    if isinstance(value, torch.Tensor) and draw.random() < 0.8:
        changes: tuple[Callable[[torch.Tensor], object], ...] = (
            lambda t: t.float() * float("nan"),
            lambda t: torch.full_like(t.float(), float("inf")),
            lambda t: t.to(torch.int8),
            lambda t: t.bool(),
            lambda t: t.to(torch.complex64),
            lambda t: t[None],
            lambda t: t.flatten()[:0],
            lambda t: torch.zeros(1).expand(2**40) if t.dim() else t,
            lambda t: torch.empty(t.shape, device="meta"),
            lambda t: t.to_sparse() if t.dim() else t,
            lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            lambda t: t.double() * 1e300,
            lambda t: torch.nested.nested_tensor([t.float().flatten(), t.float().flatten()[:1]]),
            lambda t: bytearray(t.numpy().tobytes()),
        )
        return draw.choice(changes)(value)
    if isinstance(value, list) and value and draw.random() < 0.5:
        return draw.choice((value[:-1], value * 2, value[::-1], [*value, draw.choice(VALUES)]))
    if draw.random() < 0.1:  # few bytes that stand for a walk without end
        shared: list[object] = [value]
        for _ in range(draw.choice((3, 12))):
            shared = [shared] * 50
        return shared
    if isinstance(value, dict) and draw.random() < 0.3:
        circle: dict[object, object] = dict(value)
        circle[draw.choice(["parent", "chosen", "x"])] = circle
        return circle
    return copy.deepcopy(draw.choice(VALUES))


FORMATS = (
    Format("checkpoint", _own, _answer, True, ("evaluate.py", "--pretrained_pth", "{}", "--device", "cpu")),
    Format(
        "checkpoint, forged",
        _own,
        _answer,
        command=("evaluate.py", "--pretrained_pth", "{}", "--device", "cpu"),
        forge=partial(forged, parse_tensors, _with_checksum),
    ),
    Format(
        "another program's checkpoint",
        _others,
        _answer,
        False,
        ("evaluate.py", "--pretrained_pth", "{}", "--dataset", "digits"),
    ),
    Format("state of a run", _state, lambda path: str(parse_tensors(unsealed(read_bytes(path)))), True),
    Format(
        "state of a run, forged",
        _state,
        _gone_on,
        forge=partial(forged, lambda blob: parse_tensors(unsealed(blob)), _sealed),
        share=0.2,
    ),
    Format("statistics of images", _statistics, _kept, True),
    Format("array of the cache", _array, lambda path: _digest(open_array(path, "cache/x.npy").tobytes()), True),
    Format("manifest", _manifest, _whole, True),
    Format("npz", _npz, _source, False, ("main_stage1.py", "--dataset", "npz", "--data_dir", "{}", "--dry_run")),
    Format("csv", _csv, _listed, False, ("main_stage1.py", "--dataset", "csv", "--data_dir", "{}", "--dry_run")),
    Format("list", _lists, lambda path: str(read_list(path))),
    Format("list in COCO's form", _coco, lambda path: str(read_list(path))),
    Format("json", _json, lambda path: str(read_json(path))),
    Format("image", _images, lambda path: _digest(read_image(path).numpy().tobytes())),
)
SUFFIX = {"npz": ".npz", "csv": ".csv", "list in COCO's form": ".json"}


# How it is watched


class _TooSlow(BaseException):
    """A file takes longer than it may."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooSlow


def _watch(form: Format, jobs: Sequence[tuple[int, bytes]], folder: Path, answer: Connection) -> None:
    """Reads some files in a process of its own and sends for each (number, what came of it, seconds, what it said)."""
    os.chdir(folder)
    torch.set_num_threads(1)
    ran: list[str] = []
    is_on = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if (
            is_on and event.startswith(CODE) and arguments[0] != "git"  # which says what commit this is
        ):
            ran.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    for each in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(each, _stop)
    path = folder / f"file{SUFFIX.get(form.name, '.pt')}"
    for number, blob in jobs:
        path.write_bytes(blob)
        before, words = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
        answer.send((number, "died", 0.0, ""))  # unless another word follows
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of CPU, since others may be busy too
        signal.alarm(10 * MOST_SECONDS)
        began, is_on = time.process_time(), True
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                words, outcome = form.read(path), "read"
        except (UsageError, Unreadable) as error:
            words, outcome = str(error), "refused"
        except _TooSlow:
            outcome = "too slow"
        except BaseException:
            words, outcome = traceback.format_exc(), "traceback"
        is_on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > MOST_MEMORY:
            outcome = "too much memory"
        if ran:
            words, outcome = str(ran), "code was run"
            ran.clear()
        answer.send(
            (number, outcome, time.process_time() - began, words if len(words) < 4000 else _digest(words.encode()))
        )
    answer.send(None)


@dataclass
class Seen:
    """What came of one file."""

    number: int
    outcome: str
    seconds: float
    words: str


def watch(form: Format, jobs: Sequence[tuple[int, bytes]], folder: Path) -> Iterator[Seen]:
    """What comes of some files, in a process that may die of them."""
    left = list(jobs)
    while left:
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        process = multiprocessing.get_context("fork").Process(target=_watch, args=(form, left, folder, theirs))
        process.start()
        theirs.close()
        latest: Seen | None = None
        with contextlib.suppress(EOFError):
            while (found := ours.recv()) is not None:
                seen = Seen(*found)
                if latest is not None and latest.number == seen.number:
                    yield seen
                    latest = None
                else:
                    latest = seen
        process.join()
        if latest is None:
            return
        yield latest  # it died of this one
        left = [job for job in left if job[0] > latest.number]


def fuzz(form: Format, number: int, seed: int, folder: Path) -> tuple[Json, list[tuple[float, bytes]]]:
    """Mutates a format's files so many times; what came of them, and the slowest with their seconds.

    Raises:
        AssertionError: a traceback, a hang, memory, code, or another answer than the original's.
    """
    bases, draw = list(form.make().items()), random.Random(f"{form.name} {seed}")
    whole = {name: next(watch(form, [(0, blob)], folder)) for name, blob in bases}
    assert all(seen.outcome == "read" for seen in whole.values()), whole
    counts, slowest = Counter[str](), list[tuple[float, bytes]]()
    for start in range(0, number, TURN):
        jobs, names = [], {}
        for place in range(start, min(start + TURN, number)):
            name, blob = draw.choice(bases)
            others = [blob for _, blob in bases]
            jobs.append((place, form.forge(blob, draw) if form.forge else mutated(blob, draw, others)))
            names[place] = name
        blobs = dict(jobs)
        for seen in watch(form, jobs, folder):
            if seen.outcome == "read" and form.has_checksum and seen.words != whole[names[seen.number]].words:
                seen.outcome = "another answer"
            counts[seen.outcome] += 1
            slowest.append((seen.seconds, blobs[seen.number]))
            if seen.outcome not in ("read", "refused"):
                kept = Path(
                    tempfile.gettempdir(), f"fuzz_{_digest(blobs[seen.number])[:12]}{SUFFIX.get(form.name, '.pt')}"
                )
                kept.write_bytes(blobs[seen.number])
                raise AssertionError(f"{form.name} {kept}: {seen.outcome}\n{seen.words}")
        slowest = sorted(slowest, key=lambda pair: -pair[0])[:WORST]
    line = {"format": form.name, "files": number, "read": counts["read"], "refused": counts["refused"]}
    return line | {"slowest_seconds": round(slowest[0][0], 3) if slowest else 0.0}, slowest


def as_command(form: Format, blob: bytes, folder: Path) -> tuple[int, str]:
    """Exit status and words of a real command on a file."""
    path = folder / f"file{SUFFIX.get(form.name, '.pt')}"
    path.write_bytes(blob)
    script, *flags = (word.format(path) for word in form.command)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            import_module(script.removesuffix(".py")).main(flags)
            return 0, said.getvalue()
        except SystemExit as error:
            return int(error.code or 0), said.getvalue()


@command
def main(argv: list[str]) -> int:
    """Runs the command; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="of files, over all formats")
    parser.add_argument("--only", nargs="+", choices=[form.name for form in FORMATS], help="of the formats")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    about = provenance("-m benchmarks.fuzz", argv, torch.device("cpu"), 0)
    forms = [form for form in FORMATS if options.only is None or form.name in options.only]
    worst: list[tuple[float, Format, bytes]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        os.chdir(folder)
        for form in forms:
            began = time.perf_counter()
            number = math.ceil(form.share * options.number / sum(form.share for form in forms))
            line, slowest = fuzz(form, number, options.seed, folder)
            worst += [(seconds, form, blob) for seconds, blob in slowest if form.command]
            line |= {"passed": True, "seconds": round(time.perf_counter() - began, 1), "seed": options.seed}
            print(json.dumps(line), flush=True)
            append_line(RESULTS, line | {"provenance": about})
        worst = sorted(worst, key=lambda each: -each[0])[:WORST]
        statuses = Counter[int]()
        for _, form, blob in worst:
            status, said = as_command(form, blob, folder)
            assert status in (0, 1, 2) and "Traceback" not in said, said
            statuses[status] += 1
        line = {"format": "the slowest, as commands", "files": len(worst), "statuses": dict(sorted(statuses.items()))}
        print(json.dumps(line), flush=True)
        append_line(RESULTS, line | {"passed": True, "seed": options.seed, "provenance": about})
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
