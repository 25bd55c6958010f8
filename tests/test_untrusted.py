"""Files that strangers have written: a clean message or the right answer, nothing run, no more memory than there is."""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from benchmarks.fuzz import FORMATS, Format, _checkpoint, as_command, fuzz
from datasets.files import image_size, read_image
from experiment.options import DataOptions
from experiment.restore import built, open_checkpoint
from utils import checkpoints
from utils.checkpoints import checksum, read
from utils.console import plain
from utils.errors import UsageError
from utils.metrics import csv_text
from utils.readers import (
    HoldsCode,
    Unreadable,
    array_shapes,
    map_array,
    parse_tensors,
    read_arrays,
    read_bytes,
    read_json,
)

SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "tests", "build"} & set(path.relative_to(ROOT).parts) and ".venv" not in str(path)
]


def names_of(tree: ast.AST) -> list[str]:
    """What a module calls, with dots."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    assert len(SOURCES) > 70
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        imported = [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in [*node.names, *([ast.alias(node.module)] if isinstance(node, ast.ImportFrom) else [])]
        ]
        assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(imported), path
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, flags = ast.unparse(node.func), {flag.arg: ast.unparse(flag.value) for flag in node.keywords}
            assert name not in ("eval", "exec", "os.system", "os.popen", "np.load", "numpy.load"), f"{path}: {name}"
            assert flags.get("shell", "False") == "False" and flags.get("allow_pickle", "False") == "False", path
            assert name != "torch.load" or (flags["weights_only"] == "True"), path


def test_every_format_has_one_reader() -> None:
    """torch.load, zip archives, JSON and CSV are opened in utils/readers.py alone, images in datasets/files.py."""
    where = {
        "torch.load": {"utils/readers.py"},
        "zipfile.ZipFile": {"utils/readers.py"},
        "np.memmap": {"utils/readers.py"},
        "pd.read_csv": {"utils/readers.py"},
        "simplejpeg.decode_jpeg": {"datasets/files.py"},
        "Image.open": {"datasets/files.py"},
        "json.loads": {"utils/readers.py", "utils/messages.py", "experiment/resuming.py"},  # of a text it has just made
    }
    for name, allowed in where.items():
        found = {
            path.relative_to(ROOT).as_posix()
            for path in SOURCES
            if "benchmarks" not in path.parts and name in names_of(ast.parse(path.read_text()))
        }
        assert found == allowed, name


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_mutated_files(form: Format, tmp_path: Path) -> None:
    """A few, from a seed; make torture reads thousands."""
    number = math.ceil(42 * form.share)
    line, _ = fuzz(form, number, 1, tmp_path)
    assert line["read"] + line["refused"] == number


@pytest.mark.parametrize("form", [form for form in FORMATS if form.command], ids=lambda form: form.name)
def test_mutated_files_as_commands(form: Format, workdir: Path) -> None:
    for seed in range(2):
        blob = next(iter(form.make().values()))
        draw = random.Random(seed)
        broken = form.forge(blob, draw) if form.forge else blob[: draw.randrange(len(blob))]
        status, said = as_command(form, broken, workdir)
        assert status in (0, 2) and "Traceback" not in said, said


class Evil:
    """What a pickle of it does when it is built: it makes a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


EVIL: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save({"model": Evil()}, path),
    "torch, first format": lambda path: torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "pickle, protocol 0": lambda path: path.write_bytes(pickle.dumps(Evil(), 0)),
    "a class": lambda path: torch.save(torch.nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("kind", EVIL)
def test_no_code_from_a_checkpoint(kind: str, workdir: Path) -> None:
    EVIL[kind](Path("x.pt"))
    with pytest.raises(UsageError):
        read("x.pt")
    with pytest.raises(Unreadable):
        parse_tensors(Path("x.pt").read_bytes())
    assert not Path("pwned").exists()


def test_no_code_from_arrays(workdir: Path) -> None:
    np.savez("x.npz", train_images=np.array([Evil()], dtype=object))
    np.save("x.npy", np.array([Evil()], dtype=object))
    for read_it in (lambda: read_arrays("x.npz"), lambda: map_array("x.npy")):
        with pytest.raises(Unreadable, match="no array of numbers"):
            read_it()
    assert not Path("pwned").exists()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def header(shape: object, kind: str = "<f4") -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "shape", [(2**46,), (2**40, 2**40), (-1,), (2.5,), "x", (True,), ((1,),), (1,) * 40, (10**30,)]
)
def test_a_declared_shape_takes_no_memory(shape: object, tmp_path: Path) -> None:
    before = peak()
    (tmp_path / "x.npy").write_bytes(header(shape) + bytes(64))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", header(shape) + bytes(64))
    with pytest.raises(Unreadable):
        map_array(tmp_path / "x.npy")
    with pytest.raises(Unreadable):
        read_arrays(tmp_path / "x.npz")
    with pytest.raises(Unreadable):
        array_shapes(tmp_path / "x.npz", ["train_images"])
    assert peak() - before < 2**28


def test_what_unpacks_to_more_than_memory_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utils.readers.free_memory", lambda device: 10**7)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", header((10**8,), "|u1") + bytes(10**8))
    assert (tmp_path / "x.npz").stat().st_size < 10**6
    with pytest.raises(Unreadable, match=r"of free memory|that become"):
        read_arrays(tmp_path / "x.npz")


def test_a_packed_checkpoint_is_refused(tmp_path: Path) -> None:
    """torch.save packs nothing; what is packed may unpack to anything."""
    _checkpoint().save(tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain_file,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain_file.namelist():
            packed.writestr(name, plain_file.read(name))
    with pytest.raises(Unreadable, match="compressed"):
        parse_tensors((tmp_path / "y.pt").read_bytes())


SPECIAL = (
    "/dev/zero",
    "/dev/urandom",
    "/proc/kmsg",
    "/proc/kcore",
    "/proc/self/mem",
    "/dev/stdin",
    "pipe",
    "folder",
    "a\0b",
)


@pytest.mark.parametrize("name", SPECIAL)
def test_only_regular_files_are_opened(name: str, workdir: Path) -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    if name.startswith("/") and not Path(name).exists():
        pytest.skip(f"no {name} here")
    began, before = time.monotonic(), peak()
    with pytest.raises(Unreadable):
        if read_bytes(name) == b"":  # a file of /proc says that it is empty
            raise Unreadable
    for reader in (read_json, read_arrays, map_array):
        with pytest.raises(Unreadable):
            reader(name)
    with pytest.raises(UsageError):
        read(name)
    with pytest.raises(UsageError):
        read_image(name)
    assert time.monotonic() - began < 5 and peak() - before < 2**28


def forge(path: Path, **changes: object) -> None:
    """A checkpoint with other fields, "a__b" for b in a, and the checksum that belongs to them."""
    _checkpoint().save(path)
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            content[outer] = {**content[outer], inner: value}
        else:
            content[outer] = value
    with contextlib.suppress(ValueError):  # of a circle nobody can have one
        content["checksum"] = checksum(content)
    torch.save(content, path)


def descent(number: int) -> dict[str, object]:
    parent: dict[str, object] | None = None
    for _ in range(number):
        parent = {"path": "x", "sha256": None, "parent": parent}
    assert parent is not None
    return parent


def circle() -> dict[str, object]:
    parent: dict[str, object] = {"path": "x", "sha256": None, "seed": 0, "chosen": {}}
    parent["parent"] = parent
    return parent


FORGED: dict[str, tuple[dict[str, object], str]] = {
    "classes": ({"num_classes": 10**9}, "num_classes 1000000000"),
    "other classes": ({"num_classes": 11}, "10 class_names, num_classes 11"),
    "channels": ({"in_channels": 10**6}, "in_channels 1000000"),
    "a bool for a number": ({"num_classes": True}, "num_classes is True"),
    "names": ({"data__class_names": [1] * 10}, "10 class_names, num_classes 10"),
    "counts": ({"data__class_counts": [-1] * 10}, "class_counts [-1, -1"),
    "fewer counts": ({"data__class_counts": [5] * 9}, "class_counts [5, 5"),
    "mean": ({"data__mean": [float("nan")]}, "data.mean [nan]"),
    "std": ({"data__std": [0.0]}, "data.std [0.0]"),
    "ratio": ({"data__imb_ratio": float("nan")}, "data.imb_ratio nan"),
    "held out": ({"data__val_indices": [-1]}, "data.val_indices are no positions"),
    "side": ({"data__image_size": 10**6}, "data.image_size 1000000"),
    "not shown": ({"stem": "pretrained", "data__stem": "pretrained", "data__shown": {}}, "data.shown {}"),
    "top1": ({"metrics__top1": float("nan")}, "metrics.top1 nan"),
    "per class": ({"metrics__per_class": [2.0] * 10}, "metrics.per_class [2.0"),
    "temperature": ({"metrics__temperature": -1.0}, "metrics.temperature -1.0"),
    "temperature 0": ({"metrics__temperature": 0.0}, "metrics.temperature 0.0"),
    "epoch": ({"metrics__epoch": -5}, "metrics of epoch -5"),
    "sweep": ({"metrics__sweep": "x"}, "sweep 'x'"),
    "select": ({"metrics__select": "x"}, "select 'x'"),
    "a path": ({"network": "../../x", "data__network": "../../x", "options__network": "../../x"}, "network '../../x'"),
    "an escape": ({"data__dataset": "a\x1b[2J", "options__dataset": "a\x1b[2J"}, "data.dataset 'a\\x1b[2J'"),
    "network": ({"data__network": "resnet20"}, "data.network 'resnet20' beside network 'resnet8'"),
    "options": ({"options__dataset": "cifar10"}, "options.dataset 'cifar10' where its data say 'digits'"),
    "its own parent": ({"parent": circle()}, "is not a PyTorch checkpoint, or is damaged"),
    "a line of parents": ({"parent": descent(102)}, "more than 100 parents, or a circle of them"),
    "a parent's choice": ({"parent__chosen": {"select": 3}}, "parent's chosen {'select': 3}"),
    "a newer format": ({"format": 99}, "format 99"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_contents_that_contradict_each_other_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    changes, words = FORGED[kind]
    forge(tmp_path / "x.pt", **changes)
    with pytest.raises(UsageError) as error:
        read(tmp_path / "x.pt")
    assert words in error.value.args[0], error.value


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "NaN": (lambda t: t * torch.nan, "is not finite"),
    "infinite": (lambda t: t / 0, "is not finite"),
    "whole numbers": (lambda t: t.to(torch.int8), "is of int8"),
    "bool": (lambda t: t.bool(), "is of bool"),
    "complex": (lambda t: t.to(torch.complex64), "is of complex64"),
    "eight bits": (lambda t: t.to(torch.float8_e4m3fn), "is of float8_e4m3fn"),
    "empty": (lambda t: torch.empty(t.shape, device="meta"), "is no plain tensor"),
    "sparse": (lambda t: t.to_sparse(), "is no plain tensor"),
    "quantised": (quantised, "is no plain tensor"),
    "another shape": (lambda t: t[None], "do not fit resnet8"),
    "an expanded one": (lambda t: torch.zeros(1).expand(2**40), ""),
    "no tensor": (lambda t: "x", "is no tensor"),
}


def test_an_unknown_head_is_refused_by_name(tmp_path: Path) -> None:
    forge(tmp_path / "x.pt", head="other")
    with pytest.raises(UsageError, match="has a 'other' head"):
        built(open_checkpoint({"pretrained_pth": str(tmp_path / "x.pt")}, "stage1", DataOptions))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["fc.weight", "conv1.weight"])
def test_weights_that_cannot_be_right_are_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    """Of our own files, and of other programs'."""
    change, words = WEIGHTS[kind]
    model = _checkpoint().model
    model[name] = change(model[name])
    before = peak()
    forge(tmp_path / "x.pt", model=model)
    torch.save({"state_dict": model}, tmp_path / "y.pt")
    for path in (tmp_path / "x.pt", tmp_path / "y.pt"):
        with pytest.raises(UsageError) as error:
            built(open_checkpoint({"pretrained_pth": str(path)}, "stage1", DataOptions))
        assert path.name == "y.pt" or words in error.value.args[0], error.value
    assert peak() - before < 2**28


def test_a_flipped_bit_of_a_checkpoint_is_seen_and_the_one_before_it_offered(workdir: Path) -> None:
    _checkpoint().save("x.pt.prev")
    file = _checkpoint()
    file.save("x.pt")
    blob = bytearray(Path("x.pt").read_bytes())
    place = blob.find(file.model["conv1.weight"].numpy().tobytes()[:16])
    assert place > 0
    blob[place] ^= 1
    Path("x.pt").write_bytes(blob)
    with pytest.raises(UsageError) as error:
        read("x.pt")
    assert "damaged" in error.value.args[0] and error.value.args[1].endswith("x.pt.prev, the one before it, is whole")


def test_a_weight_changed_behind_the_archive_s_back_is_seen(workdir: Path) -> None:
    """As a tool would that writes the archive anew, with checksums of its own."""
    file = _checkpoint()
    file.save("x.pt")
    content = torch.load("x.pt", weights_only=True)
    content["model"]["fc.bias"] += 1
    torch.save(content, "x.pt")
    with pytest.raises(UsageError, match="its checksum does not match"):
        read("x.pt")


def test_older_formats_have_no_checksum(workdir: Path) -> None:
    _checkpoint().save("x.pt")
    content = torch.load("x.pt", weights_only=True)
    del content["checksum"]
    torch.save(content | {"format": 3}, "x.pt")
    assert read("x.pt").num_classes == 10
    torch.save(content, "x.pt")
    with pytest.raises(UsageError, match="its checksum does not match"):
        read("x.pt")
    assert checkpoints.FORMAT == 4


def test_a_huge_image_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    before = peak()
    Image.new("1", (60_000, 60_000)).save(tmp_path / "x.png")
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHH", 0, 0, 65_535, 65_535)
    )
    (tmp_path / "x.gif").write_bytes(gif + b"\0\2\2\x4c\1\0;")
    grown = peak() - before
    for name in ("x.png", "x.gif"):
        with pytest.raises(UsageError):
            read_image(tmp_path / name)
    assert peak() - before - grown < 2**28


def test_text_of_a_file_cannot_act_on_the_terminal() -> None:
    assert plain("cat\x1b[2J\x07\r\n\tü\u202e\x9b1m") == "cat\\x1b[2J\\x07\\r\n\tü\\u202e\\x9b1m"
    script = "from utils.command import command; from utils.errors import UsageError\n"
    script += "def main(argv): raise UsageError('a\\x1b]0;x\\x07', 'b')\ncommand(main)([])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, text=True)
    assert done.stderr == "error: a\\x1b]0;x\\x07\nallowed: b\n"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_a_class_name_is_no_formula(name: str) -> None:
    import pandas as pd

    (row,) = pd.read_csv(io.StringIO(csv_text([{"class": 0, "name": name, "accuracy": -0.5}]))).to_dict("records")
    assert row == {"class": 0, "name": f"'{name}", "accuracy": -0.5}


def test_pickled_objects_are_named_as_such() -> None:
    file = io.BytesIO()
    torch.save({"a": Evil()}, file)
    with pytest.raises(HoldsCode):
        parse_tensors(file.getvalue())


def test_an_image_starts_no_program(tmp_path, monkeypatch) -> None:
    """Pillow would have PostScript run by Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    for name in ("gs", "ghostscript"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for name in ("x.png", "x.eps", "x"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            read_image(tmp_path / name)
        assert image_size(tmp_path / name) is None and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", ["twice", "itself", "deep", "in a foreign file"])
def test_lists_within_lists_end(case: str, tmp_path) -> None:
    nested: list[object] = ["x"]
    for _ in range(90 if case != "deep" else 250):
        nested = [nested, nested] if case != "deep" else [nested]
    content: dict[str, object] = {"format": 4, "options": {"x": nested}}
    if case == "itself":
        content["options"] = content
    if case == "in a foreign file":
        content = {"state_dict": {"a": nested, "w": torch.zeros(3)}}
    torch.save(content, tmp_path / "x.pt")
    began = time.perf_counter()
    with pytest.raises(UsageError, match="is not a PyTorch checkpoint"):
        checkpoints.read(tmp_path / "x.pt")
    assert time.perf_counter() - began < 5
