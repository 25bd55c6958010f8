"""Files that anybody may have written: every format has its one reader here, which runs nothing that a file holds.

Only regular files are opened, their size is bounded before memory is taken, and what they declare (shapes, lengths) is
held against what they have. Whatever is wrong with a file, a reader raises :class:`Unreadable` with the reason in one
line. Images have theirs in datasets/files.py, CIFAR's pickles torchvision's, which checks their hashes first.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from utils.pickles import Hostile, check_pickles
from utils.system import free_memory

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
Order = Literal["C", "F"]
#: Bytes that are read of a file, at most: lists and records, and files of numbers, where memory may allow less.
MOST_TEXT, MOST_NUMBERS = 2**30, 2**38
#: Bytes of the part of a PyTorch file that is no tensor, see utils/pickles.py, or of the head of safetensors.
MOST_STEPS = 2**24
#: Values in a file of torch.save, letters of the paths to them, lists within lists, and tensors, at most.
MOST_NODES, MOST_LETTERS, MOST_DEPTH, MOST_PARTS = 2_000_000, 2**27, 200, 100_000
#: Pickles that a file of torch's older format begins with: magic number, protocol, machine, content, names of storages.
OLD_PICKLES = 5
#: Bytes of an array's header in .npy and .npz and of a CSV's first line; columns, and letters of a cell.
MOST_HEADER, MOST_COLUMNS, MOST_CELL = 2**16, 1000, 10_000
#: How many times as large as an .npz its arrays may be: images are rarely packed to a tenth, all zeros to a thousandth.
MOST_PACKED = 500


class Unreadable(Exception):
    """A file that cannot be what it should be; str() is the reason."""


class HoldsCode(Unreadable):
    """A file of pickled objects other than tensors, which are not built here."""


class _Dropped:
    """Stands in for an object that is no weight: takes anything, keeps nothing."""

    def __init__(self, *anything: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


#: Plain data that other programs store beside their weights (accuracies, arguments). None of it is built: where a file
#: names one of these, the stand-in is called in its place.
_PLAIN = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
)


def read_bytes(path: str | Path, most: int = MOST_TEXT) -> bytes:
    """The content of a regular file of at most so many bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
        try:
            size = size_of(descriptor, most)
        except BaseException:
            os.close(descriptor)
            raise
        with open(descriptor, "rb") as file:
            content = file.read(size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    except ValueError:  # a NUL in its name
        raise Unreadable("not the name of a file") from None
    except MemoryError:
        raise Unreadable(f"{size / 1e6:,.0f} MB, more than there is memory") from None
    if len(content) < size:
        raise Unreadable("it is being written to")
    return content


def size_of(file: str | Path | int, most: int) -> int:
    """The size of a regular file in bytes; Unreadable where it is missing, something else, empty, or too large."""
    with _refusing("not the name of a file"):
        status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("a folder" if stat.S_ISDIR(status.st_mode) else "no regular file")
    if status.st_size > most:
        raise Unreadable(f"{status.st_size / 1e6:,.0f} MB, where up to {most / 1e6:,.0f} MB are read")
    if status.st_size == 0:  # or one of /proc, which may wait for something to read
        raise Unreadable("it is empty")
    return status.st_size


def read_json(path: str | Path, most: int = MOST_TEXT) -> Any:
    """The value of a JSON file, in UTF-8."""
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"no JSON ({_words(error)})") from None


def sealed(content: object) -> str:
    """Plain values as the text of a JSON file that carries the checksum of what it holds."""
    text = json.dumps(content)
    return json.dumps({"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


def read_sealed(path: str | Path) -> object:
    """The content of a file of :func:`sealed`; Unreadable where it is none, or is damaged."""
    found = read_json(path)
    if not isinstance(found, dict) or "content" not in found or found != json.loads(sealed(found["content"])):
        raise Unreadable("damaged: its checksum does not match")
    content: object = found["content"]
    return content


def seal(blob: bytes) -> bytes:
    """Bytes followed by their checksum."""
    return blob + hashlib.sha256(blob).digest()


def unsealed(blob: bytes) -> bytes:
    """The bytes that :func:`seal` was given; Unreadable where they are damaged."""
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise Unreadable("damaged: its checksum does not match")
    return blob[:-32]


def read_table(path: str | Path) -> pd.DataFrame:
    """The cells of a CSV as text, its first line their names."""
    import pandas as pd  # here, since it is slow to import

    content = read_bytes(path)
    if b"\0" in content:
        raise Unreadable("no CSV (it holds a NUL)")
    content = content if b"\n" in content else content.replace(b"\r", b"\n")  # line ends of old Macs
    head = content.split(b"\n", 1)[0]
    if len(head) > MOST_HEADER or head.count(b",") > MOST_COLUMNS:
        raise Unreadable(f"a first line of {len(head):,} bytes, {head.count(b',') + 1:,} columns")
    names = next(csv.reader([head.decode(errors="replace")]), [])
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise Unreadable(f"two columns {twice[:100]!r}")
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:  # pandas' own are ValueErrors
        raise Unreadable(f"no CSV ({_words(error)})") from None
    for name in table:
        longest = int(table[name].str.len().max()) if len(table) else 0
        if longest > MOST_CELL:
            raise Unreadable(f"a cell of {longest:,} letters in column {name}")
    return table


def parse_tensors(blob: bytes) -> object:
    """The content of a file of torch.save or of safetensors: plain values and tensors, on the CPU.

    Raises:
        HoldsCode: it names classes or functions that are not tensors' own.
        Unreadable: anything else is wrong with it.
    """
    if blob[8:9] == b"{":  # after the length of its head
        return _parse_safetensors(blob)
    file = io.BytesIO(blob)
    is_zip = blob.startswith(b"PK\x03\x04")
    if is_zip:
        _check_archive(file, blob)
    elif not blob.startswith(b"\x80") or _ends_as_archive(file):
        raise Unreadable("no file of torch.save")
    else:
        _check_pickles(blob, OLD_PICKLES)
    file.seek(0)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Dropped, name) for name in _PLAIN]):
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises nearly anything on a file that is damaged or not its own
        is_pickle = type(error).__name__ == "UnpicklingError"
        if is_pickle and (is_zip or re.search("Unsupported (global|class)", str(error))):
            raise HoldsCode("it holds pickled Python objects") from None
        raise Unreadable("no file of torch.save, or damaged") from None
    nodes, letters = _size_of_tree(content, {})
    if nodes > MOST_NODES or letters > MOST_LETTERS:
        raise Unreadable("a file of lists within lists without end")
    taken: dict[int, int] = {}
    for tensor in _tensors(content):
        if tensor.is_nested:
            raise Unreadable("a tensor of tensors")
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            taken[storage.data_ptr()] = storage.nbytes()
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if is_plain and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Unreadable(f"a tensor of shape {tuple(tensor.shape)}, which the file does not have")
    if sum(taken.values()) > len(blob):
        raise Unreadable("it asks for memory that it does not fill")
    return content


def _parse_safetensors(blob: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file of safetensors, which checks names, shapes and places against its length."""
    import safetensors.torch

    length = int.from_bytes(blob[:8], "little")
    if length > MOST_STEPS or blob[8 : 8 + length].count(b'"dtype"') > MOST_PARTS:
        raise Unreadable(f"no file of safetensors: a head of {length:,} bytes")
    try:
        return {str(name): value for name, value in safetensors.torch.load(blob).items()}
    except Exception as error:  # its own and PyTorch's
        raise Unreadable(f"no file of safetensors, or damaged ({_words(error)})") from None


def _size_of_tree(content: object, known: dict[int, tuple[float, float]], depth: int = 0) -> tuple[float, float]:
    """How many values nested dicts, lists and tuples hold, and how many letters the paths to them have.

    Each value is counted wherever it stands; both are infinite in a circle. A list that holds another twice, and so on
    forty times, is small in a file and endless for whoever walks it.
    """
    if isinstance(content, dict):
        inner = list(content.items())
    elif isinstance(content, list | tuple):
        inner = [(0, each) for each in content]
    else:
        return 1, 0
    if id(content) not in known:
        known[id(content)] = math.inf, math.inf  # where it is met inside itself
        if depth <= MOST_DEPTH:
            nodes, letters = 1.0, 0.0
            for key, each in inner:
                below, long = _size_of_tree(each, known, depth + 1)
                nodes, letters = nodes + below, letters + long + below * (1 + len(key) if isinstance(key, str) else 8)
            known[id(content)] = nodes, letters
    return known[id(content)]


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, which may hold themselves."""
    left, seen = [content], set[int]()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each


def _ends_as_archive(file: io.BytesIO) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return True


def _check_pickles(blob: bytes, number: int = 1) -> None:
    try:
        check_pickles(blob, number)
    except Hostile as error:
        raise Unreadable(str(error)) from None
    except Exception:  # pickletools raises nearly anything
        raise Unreadable("no file of torch.save, or damaged") from None


def _check_archive(file: io.BytesIO, blob: bytes) -> None:
    """Raises Unreadable where an archive of torch.save holds more than the file has, or other than its checksums."""
    size = len(blob)
    if blob.count(b"PK\x01\x02") > MOST_PARTS:  # entries of its directory
        raise Unreadable(f"more than {MOST_PARTS:,} parts")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise Unreadable("its parts are compressed, which torch.save never does")
            if sum(member.file_size for member in members) > size:
                raise Unreadable("its parts are larger than the file")
            # torch finds names in small or capital letters
            pickles = [member for member in members if member.filename.casefold().endswith(".pkl")]
            if any(member.file_size > MOST_STEPS for member in pickles):
                raise Unreadable(f"more than {MOST_STEPS / 1e6:,.0f} MB beside its tensors")
            for member in pickles:
                _check_pickles(archive.read(member))
            if len({member.filename.casefold() for member in members}) < len(members):
                raise Unreadable("two of its parts have one name")
            if archive.testzip() is not None:
                raise Unreadable("damaged: a checksum does not match")
    except Unreadable:
        raise
    except Exception:  # zipfile raises nearly anything
        raise Unreadable("a damaged archive") from None


def read_arrays(path: str | Path, names: Iterable[str] | None = None, others: str = "") -> dict[str, Array]:
    """The arrays of an .npz, or those that are named and there: of numbers, with as many bytes as they declare.

    ``others`` are NumPy's letters of what there may be beside numbers: U, texts; V, bits without a meaning.
    """
    found: dict[str, Array] = {}
    most = min(MOST_NUMBERS, free_memory(torch.device("cpu")))
    with _refusing("a damaged .npz"):
        size_of(path, most)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            wanted = [name for name in members if names is None or name in set(names)]
            if 2 * sum(members[name].file_size for name in wanted) > most:  # read, and as arrays
                raise Unreadable(f"its arrays take more than the {most / 1e6:,.0f} MB of free memory")
            for name in wanted:
                with archive.open(members[name]) as part:
                    shape, kind, order = _header(part, name, members[name].file_size, others)
                    content = bytearray(part.read())  # all of it, so that its checksum is looked at
                    found[name] = np.frombuffer(content, kind).reshape(shape, order=order)
    return found


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an .npz by the names of their arrays."""
    members = archive.infolist()
    named = {member.filename.removesuffix(".npy"): member for member in members}
    if len(named) < len(members):
        raise Unreadable("two of its arrays have one name")
    packed, whole = (sum(getattr(member, name) for member in members) for name in ("compress_size", "file_size"))
    if whole > 2**26 and whole > MOST_PACKED * packed:
        raise Unreadable(f"{packed:,} bytes that become {whole:,}")
    return named


def array_names(path: str | Path) -> list[str]:
    """The names of the arrays of an .npz."""
    with _refusing("a damaged .npz"):
        size_of(path, MOST_NUMBERS)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return list(_members(archive))


def array_shapes(path: str | Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of those arrays of an .npz that are named and there, without reading them."""
    found = {}
    with _refusing("a damaged .npz"):
        size_of(path, MOST_NUMBERS)
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            for name in names:
                if name in members:
                    with archive.open(members[name]) as part:
                        found[name] = _header(part, name, members[name].file_size)[0]
    return found


def map_array(path: str | Path, extra: int = 0, others: str = "") -> Array:
    """A .npy file as an array that is mapped into memory, copied where it is written to.

    ``extra`` bytes, which are not the array's, follow it; more or fewer are damage. ``others``: see
    :func:`read_arrays`.
    """
    with _refusing("damaged"):
        size = size_of(path, MOST_NUMBERS)
        with open(path, "rb") as file:
            shape, kind, order = _header(file, Path(path).name, size - extra, others)
            place = file.tell()
        if 0 in shape:
            return np.empty(shape, kind)
        return np.memmap(path, kind, mode="c", offset=place, shape=shape, order=order)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Makes Unreadable of whatever is raised in the block; zipfile and zlib raise nearly anything."""
    try:
        yield
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or _words(error)) from None
    except Exception as error:
        raise Unreadable(f"{what} ({_words(error)})") from None


def _header(file: IO[bytes], name: str, size: int, others: str = "") -> tuple[tuple[int, ...], np.dtype[Any], Order]:
    """Shape, type and order of an array of numbers, in a file of so many bytes (NumPy's formats 1 and 2)."""
    start = file.read(8)
    length = {b"\x01\x00": 2, b"\x02\x00": 4}.get(start[6:])
    if start[:6] != b"\x93NUMPY" or length is None:
        raise Unreadable(f"{name} is no array of NumPy")
    count = int.from_bytes(file.read(length), "little")
    if count > MOST_HEADER:
        raise Unreadable(f"{name} has a header of {count:,} bytes")
    try:
        about = ast.literal_eval(file.read(count).decode("latin1").strip())
        text, shape, is_fortran = about["descr"], about["shape"], about["fortran_order"]
        kind = np.dtype(text)
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise Unreadable(f"{name} has a damaged header") from None
    if not isinstance(text, str) or kind.kind not in f"biufc{others}" or not isinstance(shape, tuple):
        raise Unreadable(f"{name} is no array of numbers")
    if not all(type(length) is int and length >= 0 for length in shape) or len(shape) > 32:
        raise Unreadable(f"{name} has a damaged header")
    if 8 + length + count + math.prod(shape) * kind.itemsize != size:
        raise Unreadable(f"{name} is cut off, or declares another size than it has")
    return shape, kind, "F" if is_fortran else "C"


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
