"""Options: a frozen dataclass per script; its parser, its help and its checks are made from its fields.

A field is declared with :func:`option`: default, what is allowed, one line of help and, where it differs from
the default, the published value. Only what the user typed leaves the parser; everything else is filled in by
:func:`resolve`, which also remembers where each value came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from utils.console import show
from utils.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
T_co = TypeVar("T_co", bound="DataclassInstance", covariant=True)
D = TypeVar("D")


class _Unset:
    """No value, where None is one."""


_UNSET = _Unset()
#: The headings of --help, in their order.
GROUPS = ("before a run", "data", "network", "optimisation", "recipe", "evaluation", "files", "machine")


#: What an option's value may be.
Value = bool | int | float | str | tuple[float, ...] | None
#: {option: its values}, of those that a sweep runs over.
Axes = Mapping[str, tuple[Value, ...]]
#: {option: value} as typed, or as a file or a recipe has it; several typed values are a tuple.
Values = Mapping[str, object]

# What a value may be. Each kind turns text into a value, raises ValueError otherwise, and says what it allows.


@dataclass(frozen=True)
class Number:
    """A finite int or float in [low, high] (``above`` excludes low itself), or one of ``words``."""

    type: Callable[[str | float], float]
    low: float | None = None
    high: float | None = None
    above: bool = False
    words: tuple[str, ...] = ()

    def __call__(self, value: object) -> float | str:
        if isinstance(value, str) and value in self.words:
            return value
        if not isinstance(value, str | int | float):
            raise ValueError
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

    def __call__(self, value: object) -> str:
        name = str(value)
        if name in set(self.names) or (self.prefix and re.fullmatch(rf"{self.prefix}[\w.-]+", name)):
            return name
        raise ValueError

    @property
    def allowed(self) -> str:
        return ", ".join([*self.names, *([f"{self.prefix}NAME"] if self.prefix else [])])


@dataclass(frozen=True)
class Text:
    """Any text; ``allowed`` says what it stands for."""

    allowed: str = "a path"

    def __call__(self, value: object) -> str:
        if not str(value):
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Flag:
    """On or off: ``--name`` and ``--no-name``."""

    allowed: str = "given or not"

    def __call__(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Vector:
    """Numbers that belong together; ``each`` says what they are for."""

    kind: Number
    each: str = "for each channel"

    def __call__(self, value: object) -> tuple[float, ...]:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(float(self.kind(each)) for each in values)

    @property
    def allowed(self) -> str:
        return f"{self.kind.allowed}, {self.each}"


Kind = Number | Choice | Text | Flag | Vector


def ratio_number(value: str | float) -> float:
    """A float, kept as an int where it is whole, so that 100 and 100.0 name the same file."""
    number = float(value)
    return int(number) if number.is_integer() and number < 2**53 else number


@dataclass(frozen=True)
class Spec:
    """What is known of an option beside its name, type and default.

    Attributes:
        kind: what its values may be.
        help: one line.
        group: the heading under which --help lists it.
        sweep: whether a command line may give several values, each of which is a run of its own.
        several: those that are run where none is given; () for the default alone.
        published: {"": the papers' value}, used by ``--protocol published``; {} where that is the default.
        aliases: other names of its flag.
        alone: the value of the flag where none follows it; None: one must.
    """

    kind: Kind
    help: str
    group: str
    sweep: bool = False
    several: tuple[Value, ...] = ()
    published: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    alone: Value = None

    @property
    def allowed(self) -> str:
        """What its values may be, in words."""
        return f"{self.kind.allowed}; each value once" if self.sweep else self.kind.allowed


def option(
    default: D,
    kind: Kind,
    help: str,
    group: str,
    *,
    sweep: bool = False,
    several: tuple[Value, ...] = (),
    published: Value | _Unset = _UNSET,
    aliases: tuple[str, ...] = (),
    alone: Value = None,
) -> D:
    """A field of an options class; see :class:`Spec`."""
    papers: dict[str, Value] = {} if isinstance(published, _Unset) else {"": published}
    spec = Spec(kind, help, group, sweep or bool(several), several, papers, aliases, alone)
    return dataclasses.field(default=default, metadata={"spec": spec})


def spec_of(cls: type[DataclassInstance] | DataclassInstance) -> dict[str, Spec]:
    """What is known of every option of an options class, in the order of its fields."""
    return {field.name: field.metadata["spec"] for field in dataclasses.fields(cls)}


def check(options: DataclassInstance) -> None:
    """Passes every field of a newly built options object through its kind (call it from ``__post_init__``).

    Raises:
        UsageError: naming the flag, the value and what is allowed.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        object.__setattr__(options, field.name, convert(field.name, field.metadata["spec"], value))


def convert(name: str, spec: Spec, value: object) -> Value:
    """A single value through its option's kind; UsageError where it is not allowed."""
    try:
        return spec.kind(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"--{name} {shown(value)}", spec.allowed) from None


def convert_typed(name: str, spec: Spec, value: object) -> Value | tuple[Value, ...]:
    """What was typed of an option: one value, or the tuple of values of one that a sweep may run over."""
    if not spec.sweep:
        return convert(name, spec, value)
    values = value if isinstance(value, list | tuple) else [value]
    converted = tuple(convert(name, spec, each) for each in values)
    if not converted or len(set(converted)) < len(converted):
        raise UsageError(f"--{name} {shown(value)}", spec.allowed)
    return converted


def flags(typed: Values) -> list[str]:
    """The words of a command line that sets these options."""
    words: list[str] = []
    for name, value in typed.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{name}")
        else:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def shown(value: object) -> str:
    """A value as it is typed: several with a space between."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class _Values(argparse.Action):
    """Stores a flag's values; says so where it comes twice, since the first values do not join the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            show(f"{option_string} is given twice: {shown(values)} counts")
        setattr(namespace, self.dest, values)


class _OnOff(argparse.Action):
    """Stores True for --name, False for --no-name and --no_name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        is_on = option_string is not None and option_string[:5] not in ("--no-", "--no_")
        if getattr(namespace, self.dest, is_on) != is_on:
            show(f"{option_string} beside its opposite: {option_string} counts")
        setattr(namespace, self.dest, is_on)


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of every flag, and of a switch how it is turned off."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _OnOff):
            return f"--{action.dest}, --no_{action.dest}"
        if action.dest == "help":
            return "--help"
        metavar = {"+": f"{action.metavar} ...", "?": f"[{action.metavar}]"}.get(str(action.nargs), action.metavar)
        names = [name for name in action.option_strings if "-" not in name[2:]]
        return f"{', '.join(names)} {metavar}"


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [options]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=_Help,
        )
        # argparse knows -1 and -0.5 for numbers, but takes -1e-5 for a flag.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", f"what {self.prog} --help lists")


def make_parser(cls: type[DataclassInstance], prog: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of an options class: every field as ``--a_b`` and ``--a-b``, no abbreviations, no defaults."""
    parser = _Parser(prog, description)
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, spec in spec_of(cls).items():
        kind = spec.kind
        flags = [f"--{each}" for each in (name, *spec.aliases)]
        if isinstance(kind, Flag):
            flags += [f"--{no}{name}" for no in ("no_", "no-")]
        flags = list(dict.fromkeys([*flags, *(f"--{flag[2:].replace('_', '-')}" for flag in flags)]))
        text = f"{spec.help} (default: {shown(spec.several or defaults[name])}"
        text += f"; --protocol published: {spec.published['']}" if spec.published else ""
        text = (text + ")").replace("%", "%%")
        group = groups[spec.group]
        if isinstance(kind, Flag):
            group.add_argument(*flags, dest=name, action=_OnOff, nargs=0, help=text)
            continue
        each = kind.kind if isinstance(kind, Vector) else kind
        if isinstance(each, Choice) or (isinstance(each, Number) and (each.low is not None or each.words)):
            text += f" [{spec.allowed.replace('%', '%%')}]"
        metavar = name.split("_")[-1].upper()
        number = "+" if spec.sweep or isinstance(kind, Vector) else None if spec.alone is None else "?"
        group.add_argument(
            *flags, dest=name, metavar=metavar, help=text, nargs=number, const=spec.alone, action=_Values
        )
    return parser


def parse_typed(cls: type[DataclassInstance], argv: Sequence[str], prog: str, description: str | None) -> Values:
    """What the user typed, and nothing else, as {field name: checked value}.

    Raises:
        UsageError: an unknown flag (with the nearest known ones), a missing or a forbidden value.
    """
    specs, parser = spec_of(cls), make_parser(cls, prog, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        several = [name for name, spec in specs.items() if spec.sweep]
        takers = f", several of {', '.join(several)}" if several else ""
        raise UsageError(f"{prog}: {unknown[0]!r} is one value too many", f"one value an option{takers}")
    if unknown:
        near = nearest(unknown[0].split("=")[0].lstrip("-").replace("-", "_"), specs)
        hint = f"{', '.join(f'--{name}' for name in near)}, and " if near else ""
        raise UsageError(f"{prog} has no {unknown[0]}", f"{hint}what {prog} --help lists")
    return {name: convert_typed(name, specs[name], value) for name, value in vars(namespace).items()}


def nearest(wanted: str, specs: Mapping[str, Spec]) -> list[str]:
    """Up to three options that somebody who typed ``wanted`` may have meant: by name, then by what they are for."""
    names = {flag: name for name, spec in specs.items() for flag in (name, *spec.aliases)}
    stem = wanted.removesuffix("s")
    near = [name for flag, name in names.items() if stem and (stem in flag or wanted.endswith(f"_{flag}"))]
    near += [names[flag] for flag in difflib.get_close_matches(wanted, names, cutoff=0.75)]
    words = [word.removesuffix("s") for word in wanted.split("_") if len(word) > 3]
    near += [name for name, spec in specs.items() if words and all(word in spec.help for word in words)]
    return list(dict.fromkeys(near))[:3]


def changed(options: T, values: Values) -> T:
    """The options with other values, checked as all are."""
    return dataclasses.replace(options, **values)


def published_values(cls: type[DataclassInstance]) -> Values:
    """The published values of those fields of which the default departs from them."""
    return {name: spec.published[""] for name, spec in spec_of(cls).items() if spec.published}


@dataclass(frozen=True)
class Resolved(Generic[T_co]):
    """An options object and what belongs to it.

    Attributes:
        options: a single value of every option; of those in ``axes`` the first.
        axes: the options that have several values, {name: values}; a sweep runs their product.
        sources: where each option's value came from, {name: "typed", a layer's name or "default"}.
    """

    options: T_co
    axes: Axes
    sources: Mapping[str, str]

    def values(self, name: str) -> tuple[Value, ...]:
        """The values of an option; one where it is not swept."""
        return self.axes.get(name) or (getattr(self.options, name),)

    def swept(self, name: str, values: tuple[Value, ...]) -> Resolved[T_co]:
        """The same with an option that runs over these values."""
        return Resolved(changed(self.options, {name: values[0]}), {**self.axes, name: values}, self.sources)

    def settled(self, options: T) -> Resolved[T]:
        """The same with options of which some that were auto, or left open, have a value now."""
        before, after = vars(self.options), vars(options)
        sources = {name: "auto" if before[name] != after[name] else source for name, source in self.sources.items()}
        return Resolved(options, self.axes, sources)

    def labelled(self, names: Iterable[str], source: str) -> Resolved[T_co]:
        """The same with another word for where the values of these options came from."""
        return dataclasses.replace(self, sources={**self.sources, **dict.fromkeys(names, source)})

    def stored(self) -> dict[str, Value | tuple[Value, ...]]:
        """Every option with its value, or its values where it is swept."""
        return {**vars(self.options), **self.axes}

    def runs(self, outermost: str) -> list[T_co]:
        """The product of the axes, an options object for each combination; ``outermost`` varies slowest."""
        names = sorted(self.axes, key=lambda name: name != outermost)
        combinations = itertools.product(*(self.axes[name] for name in names))
        return [changed(self.options, dict(zip(names, values))) for values in combinations]

    def describe(self) -> str:
        """The values that are not the defaults, and in brackets where they came from: "lr 0.05 (--dataset digits)"."""
        groups: dict[str, list[str]] = {}
        values, defaults = self.stored(), {field.name: field.default for field in dataclasses.fields(self.options)}
        for name, source in self.sources.items():
            is_plain = source == "auto" and values[name] in ("off", 1)
            if source != "default" and values[name] != defaults[name] and not is_plain:
                groups.setdefault(source, []).append(f"{name} {shown(values[name])}")
        return (
            "; ".join(f"{', '.join(words)} ({source})" for source, words in groups.items()) or "all at their defaults"
        )

    def table(self) -> str:
        """Every option, in the groups of --help: its value and where that came from."""
        values, lines = self.stored(), []
        width, specs = max(map(len, self.sources)), spec_of(self.options)
        for group in GROUPS:
            members = [name for name in self.sources if specs[name].group == group]
            lines += [f"{group}:"] * bool(members)
            lines += [
                f"  {name:<{width}}  {self._cell(name, values[name]):<28}  {self.sources[name]}".rstrip()
                for name in members
            ]
        return "\n".join(lines)

    def _cell(self, name: str, value: object) -> str:
        """A value as the table shows it; a seed that is drawn is another in every run."""
        return "anew in each run" if self.sources[name] == "drawn" else str(shown(value))


def resolve(cls: type[T], typed: Values, layers: Mapping[str, Values]) -> Resolved[T]:
    """Fills an options class: what was typed wins, then each layer in its order, then the field's default.

    Layers are named by their source ("--dataset digits", a checkpoint's path) and may hold keys this class lacks.
    """
    values: dict[str, object] = {}
    axes: dict[str, tuple[Value, ...]] = {}
    sources: dict[str, str] = {}
    specs = spec_of(cls)
    for field in dataclasses.fields(cls):
        name, spec = field.name, specs[field.name]
        default: Values = {name: spec.several or field.default}
        for source, layer in [("typed", typed), *layers.items(), ("default", default)]:
            if name in layer:
                value, sources[name] = layer[name], source
                break
        if spec.sweep and isinstance(value, tuple):
            if len(value) > 1:
                axes[name] = value
            values[name] = value[0]
        else:
            values[name] = value
    make: Callable[..., T] = cls
    return Resolved(make(**values), axes, sources)
