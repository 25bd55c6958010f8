"""Options: a frozen dataclass per script; its parser, its help and its checks are made from its fields.

A field is declared with :func:`option`: default, what is allowed, one line of help and, where it differs from
the default, the published value. Only what the user typed leaves the parser; everything else is filled in by
:func:`resolve`, which also remembers where each value came from.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from utils import signals

T = TypeVar("T")
_UNSET = object()


class UsageError(Exception):
    """A mistake in what was asked for. Shown as two lines, the problem and what is allowed; exit status 2."""

    def __init__(self, problem: str, allowed: str) -> None:
        super().__init__(problem, allowed)

    def __str__(self) -> str:
        problem, allowed = (text.replace("\n", " ") for text in self.args)
        return f"error: {problem}\nallowed: {allowed}"


class Diverged(Exception):
    """Training cannot go on (a loss that is not finite). Shown without a traceback; exit status 1."""


class Unsaved(Exception):
    """Finished weights that could not be put where they belong. Shown without a traceback; exit status 1."""


#: What a disk says that is full, over a quota or a limit, broken, gone or not to be written to.
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ETIMEDOUT),
)


def disk_words(error: OSError) -> str:
    """A disk's error in one line: what it is, the file, and how much is free on the disk of its folder."""
    words = error.strerror or str(error)
    if not error.filename:
        return words
    place = Path(os.fsdecode(error.filename)).absolute()
    there = next(folder for folder in place.parents if folder.is_dir())
    try:
        free = f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB free on the disk of {there})"
    except OSError:
        free = ""
    return f"{words}: {os.fsdecode(error.filename)}{free}"


def command(main: Callable[..., T]) -> Callable[..., T]:
    """Wraps a script's ``main(argv)``: a mistake of the user's ends in its message and an exit status, no traceback."""

    @wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> T:
        for stream in (sys.stdout, sys.stderr):  # a "±" must not end a run where the locale has none
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            with signals.handled():
                return main(sys.argv[1:] if argv is None else list(argv))
        except UsageError as error:
            status, message = 2, str(error)
        except (Diverged, Unsaved) as error:
            status, message = 1, f"stopped: {error}"
        except KeyboardInterrupt as error:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            status, message = getattr(error, "status", 130), f"\nended by {str(error) or 'SIGINT'}{notes}"
        except BrokenPipeError:  # the reader of our output has gone, as in "| head"
            sys.stdout = open(os.devnull, "w")
            status, message = 141, "stopped: standard output was closed"
        except OSError as error:
            if error.errno not in DISK:
                raise
            status, message = 1, f"stopped: {disk_words(error)}"
        with contextlib.suppress(OSError):  # nobody listens
            print(message, file=sys.stderr)
        raise SystemExit(status)

    return wrapper


# What a value may be. Each kind turns text into a value, raises ValueError otherwise, and says what it allows.


@dataclass(frozen=True)
class Number:
    """A finite int or float in [low, high] (``above`` excludes low itself), or one of ``words``."""

    type: Callable[[Any], Any]
    low: float | None = None
    high: float | None = None
    above: bool = False
    words: tuple[str, ...] = ()

    def __call__(self, value: Any) -> Any:
        if value in self.words:
            return value
        number = self.type(value)
        if not math.isfinite(number) or (not isinstance(value, str) and number != value):
            raise ValueError
        if self.low is not None and (number < self.low or (self.above and number == self.low)):
            raise ValueError
        if self.high is not None and number > self.high:
            raise ValueError
        return number

    @property
    def allowed(self) -> str:
        noun = "a whole number" if self.type is int else "a number"
        if self.low is not None and self.high is not None:
            noun += f" in {'(' if self.above else '['}{self.low}, {self.high}]"
        elif self.low is not None:
            noun += f" {'above' if self.above else 'from'} {self.low}{'' if self.above else ' up'}"
        return " or ".join([noun, *self.words])


@dataclass(frozen=True)
class Choice:
    """One of the names of a table or sequence, or any that begins with ``prefix``."""

    names: Iterable[str]
    prefix: str | None = None

    def __call__(self, value: Any) -> str:
        if value in self.names or (self.prefix and re.fullmatch(rf"{self.prefix}[\w.-]+", str(value))):
            return str(value)
        raise ValueError

    @property
    def allowed(self) -> str:
        return ", ".join([*self.names, *([f"{self.prefix}NAME"] if self.prefix else [])])


@dataclass(frozen=True)
class Text:
    """Any text; ``allowed`` says what it stands for."""

    allowed: str = "a path"

    def __call__(self, value: Any) -> str:
        if not str(value):
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Flag:
    """On or off: ``--name`` and ``--no-name``."""

    allowed: str = "given or not"

    def __call__(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Many:
    """One or more values of a kind, each different; a single one stands for itself. Each is a run of its own."""

    kind: Number | Choice

    def __call__(self, value: Any) -> tuple[Any, ...]:
        values = tuple(self.kind(each) for each in (value if isinstance(value, list | tuple) else [value]))
        if not values or len(set(values)) < len(values):
            raise ValueError
        return values

    @property
    def allowed(self) -> str:
        return f"{self.kind.allowed}; each value once"


@dataclass(frozen=True)
class Vector:
    """Numbers that belong together, one for each channel of an image."""

    kind: Number

    def __call__(self, value: Any) -> tuple[Any, ...]:
        return tuple(self.kind(each) for each in (value if isinstance(value, list | tuple) else [value]))

    @property
    def allowed(self) -> str:
        return f"{self.kind.allowed}, for each channel"


Kind = Number | Choice | Text | Flag | Many | Vector


def ratio_number(value: Any) -> float:
    """A float, kept as an int where it is whole, so that 100 and 100.0 name the same file."""
    number = float(value)
    return int(number) if number.is_integer() and number < 2**53 else number


def option(default: Any, kind: Kind, help: str, *, published: Any = _UNSET, aliases: tuple[str, ...] = ()) -> Any:
    """A field of an options class. ``published``: the papers' value, used by ``--protocol published``."""
    metadata: dict[str, Any] = {"kind": kind, "help": help, "aliases": aliases}
    if published is not _UNSET:
        metadata["published"] = published
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Passes every field of a newly built options object through its kind (call it from ``__post_init__``).

    Raises:
        UsageError: naming the flag, the value and what is allowed.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        object.__setattr__(options, field.name, convert(field, value))


def convert(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value through its option's kind; UsageError where it is not allowed."""
    kind: Kind = field.metadata["kind"]
    try:
        return kind(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"--{field.name} {shown(value)}", kind.allowed) from None


def shown(value: Any) -> str:
    """A value as it is typed: several with a space between."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class _Values(argparse.Action):
    """Stores several values; says so where a flag comes twice, since the first values do not join the last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            print(f"{option_string} is given twice: {shown(values)} counts")
        setattr(namespace, self.dest, values)


class _OnOff(argparse.Action):
    """Stores True for --name, False for --no-name and --no_name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string is not None and option_string[:5] not in ("--no-", "--no_"))


class _Parser(argparse.ArgumentParser):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # argparse knows -1 and -0.5 for numbers, but takes -1e-5 for a flag.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", f"what {self.prog} --help lists")


def make_parser(cls: type[Any], prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of an options class: every field as ``--a_b`` and ``--a-b``, no abbreviations, no defaults."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(cls):
        kind: Kind = field.metadata["kind"]
        names = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
        if isinstance(kind, Flag):
            names += [f"--{no}{field.name}" for no in ("no_", "no-")]
        names = list(dict.fromkeys([*names, *(f"--{name[2:].replace('_', '-')}" for name in names)]))
        text = f"{field.metadata['help']} (default: {shown(field.default)}"
        if "published" in field.metadata:
            text += f"; --protocol published: {field.metadata['published']}"
        text = (text + ")").replace("%", "%%")
        if isinstance(kind, Flag):
            parser.add_argument(*names, dest=field.name, action=_OnOff, nargs=0, help=text)
        else:
            one = kind.kind if isinstance(kind, Many | Vector) else kind
            if isinstance(one, Choice) or (isinstance(one, Number) and (one.low is not None or one.words)):
                text += f" [{kind.allowed.replace('%', '%%')}]"
            metavar = field.name.split("_")[-1].upper()
            many: dict[str, Any] = {"nargs": "+", "action": _Values} if isinstance(kind, Many | Vector) else {}
            parser.add_argument(*names, dest=field.name, metavar=metavar, help=text, **many)
    return parser


def parse_typed(cls: type[Any], argv: Sequence[str], prog: str, description: str | None) -> dict[str, Any]:
    """What the user typed, and nothing else, as {field name: checked value}.

    Raises:
        UsageError: an unknown flag (with the nearest known ones), a missing or a forbidden value.
    """
    parser = make_parser(cls, prog, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        several = [field.name for field in dataclasses.fields(cls) if isinstance(field.metadata["kind"], Many)]
        takers = f", several of {', '.join(several)}" if several else ""
        raise UsageError(f"{prog}: {unknown[0]!r} is one value too many", f"one value an option{takers}")
    if unknown:
        flags = [name for name in parser._option_string_actions if name.startswith("--") and "-" not in name[2:]]
        wanted = unknown[0].split("=")[0].replace("--", "").replace("-", "_")
        near = [flag for flag in flags if wanted and (wanted in flag or wanted.endswith(flag[2:]))]
        near += [f for f in difflib.get_close_matches(f"--{wanted}", flags, cutoff=0.5) if f not in near]
        hint = f"{', '.join(near[:3])}, and " if near else ""
        raise UsageError(f"{prog} has no {unknown[0]}", f"{hint}what {prog} --help lists")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return {name: convert(fields[name], value) for name, value in vars(namespace).items()}


def published_values(cls: type[Any]) -> dict[str, Any]:
    """The published values of those fields of which the default departs from them."""
    return {f.name: f.metadata["published"] for f in dataclasses.fields(cls) if "published" in f.metadata}


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """An options object and, for every field, where its value came from."""

    options: T
    sources: Mapping[str, str]

    def describe(self) -> str:
        """The values grouped by where they came from, one line a group."""
        groups: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            groups.setdefault(source, []).append(f"{name} {shown(getattr(self.options, name))}")
        last = groups.pop("default", None)
        if last is not None:
            groups["default"] = last
        width = max(map(len, groups)) + 2
        return "\n".join(
            textwrap.fill(", ".join(values), 120, initial_indent=source.ljust(width), subsequent_indent=" " * width)
            for source, values in groups.items()
        )


def resolve(cls: Callable[..., T], typed: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Resolved[T]:
    """Fills an options class: what was typed wins, then each layer in its order, then the field's default.

    Layers are named by their source ("--dataset digits", a checkpoint's path) and may hold keys this class lacks.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        for source, layer in [("typed", typed), *layers.items(), ("default", {field.name: field.default})]:
            if field.name in layer:
                values[field.name], sources[field.name] = layer[field.name], source
                break
    return Resolved(cls(**values), sources)
