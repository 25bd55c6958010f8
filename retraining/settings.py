"""The classifiers that a command makes: the product of what was asked for, an instance of a method for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from experiment.options import TrainOptions
from experiment.sweeps import R, Row, score_in_words, short, varying
from losses import auto_label_smooth
from losses.softmax import AUTO_EXCESS
from retraining.features import Stream
from retraining.methods import METHODS, Method, Trained
from utils.errors import UsageError
from utils.options import Resolved, Value

#: --start of methods that would continue stage 1's classifier, where there is none.
WITHOUT_STAGE1 = "class_mean"
#: All options that a sweep may take several values of, beside --method.
TUNABLE = tuple(
    dict.fromkeys([*Trained.options(), *(name for method in METHODS.values() for name in method.options())])
)
#: --finetune_lr val: the learning rate that would stand without it, times each of these.
VAL_RATES = (0.04, 0.2, 1.0, 5.0, 25.0)
#: --label_smooth val: 0 and C/(C + excess), from mild to beyond the published excess.
VAL_EXCESSES = tuple(AUTO_EXCESS * 4.0**power for power in (4, 3, 2, 1, 0, -1))
#: The options whose value ``val`` chooses on held-out images; of the last two :meth:`Method.chosen` does.
VAL = ("finetune_lr", "label_smooth", "tau", "mla_tau")


def make_methods(
    names: Sequence[str],
    axes: Mapping[str, Sequence[Value]],
    typed: Collection[str],
    num_classes: int,
    published: bool = False,
    tune: bool = False,
    is_first: bool = False,
    recipe: Mapping[str, Value] | None = None,
) -> list[Method]:
    """The product of all values, method by method; an option that a method does not take is left out there.

    ``val`` stands for a method for each value of its grid, see :func:`on_grid`.

    Args:
        names: keys of ``METHODS``.
        axes: the values of options of ``TUNABLE``; where there are none, or None alone, the method's own default.
        typed: the options that the user gave; each must be of use to one method at least.
        num_classes: C, for label_smooth auto.
        published: the papers' value where a method's default departs from it.
        tune: let every method's grid stand where ``axes`` leaves it free.
        is_first: there is no stage 1, so that methods that would continue its classifier start from class means.
        recipe: what the data set's recipe has in place of the methods' own values; ``val`` goes around these.

    Raises:
        UsageError: an option that none of the methods takes, or values that do not go together.
    """
    for name in typed:
        harmless = name == "seed" or (name == "finetune_scope" and tuple(axes[name]) == ("fc",))
        if name in TUNABLE and not harmless and not any(name in METHODS[key].options() for key in names):
            takers = [key for key, method in METHODS.items() if name in method.options()]
            raise UsageError(
                f"--{name} with --method {' '.join(names)}", f"a method that takes it: {', '.join(takers)}"
            )
    recipe = recipe or {}
    given = {name: tuple(values) for name, values in axes.items() if tuple(values) != (None,)}
    found: list[Method] = []
    for key in names:
        method = METHODS[key]
        make: Callable[..., Method] = method
        defaults = method.options()
        own = {**defaults, **recipe}
        values = {name: given.get(name, (default,)) for name, default in defaults.items()}
        if published:
            values |= {name: (value,) for name, value in method.published.items() if name not in typed}
        if tune:
            free = {name: choices[0] for name, choices in values.items() if name not in typed}
            first = {name: own[name] if value == "val" else value for name, (value, *_) in values.items()}
            for name, grid in make(**first).grid(num_classes).items():
                if name in free:  # the default comes first, and so wins where several are equally good
                    values[name] = tuple(sorted(grid, key=lambda value: value != free[name]))
        for combination in product(*values.values()):
            chosen = dict(zip(values, combination))
            val = [name for name in VAL if chosen.get(name) == "val"]
            chosen |= {name: own[name] for name in val}
            if is_first and chosen["start"] == "stage1":
                chosen["start"] = WITHOUT_STAGE1
            if chosen.get("label_smooth") == "auto":
                chosen["label_smooth"] = auto_label_smooth(num_classes)
            made = make(**chosen)
            if made.scope != "fc" and not method.takes_scope:
                takers = [name for name, each in METHODS.items() if each.takes_scope]
                raise UsageError(f"--finetune_scope {made.scope} with --method {key}", ", ".join(takers))
            rates = recipe if "finetune_lr" in val else given
            if isinstance(made, Trained) and "finetune_lr" not in rates:
                made = made.at_batch_size()
            found += [each.checked(typed) for each in on_grid(made, val, num_classes)]
    return list(dict.fromkeys(found))


def val_smooths(num_classes: int) -> list[float]:
    """The grid of --label_smooth val."""
    return [0.0, *(num_classes / (num_classes + excess) for excess in VAL_EXCESSES)]


def on_grid(method: Method, val: Sequence[str], num_classes: int) -> list[Method]:
    """A method that trains, with every combination of these options' grids.

    Its own values come first, and so win where several are equally good.
    """
    if not isinstance(method, Trained):
        return [method]
    own, change = method.setting.values, partial(replace, method)
    grids = {"finetune_lr": [method.finetune_lr * rate for rate in VAL_RATES], "label_smooth": val_smooths(num_classes)}
    axes = [sorted(grids[name], key=lambda value: value != own[name]) for name in val]
    return [change(**dict(zip(val, values))) for values in product(*axes)]


def kept_apart(resolved: Resolved[TrainOptions]) -> list[str]:
    """The options whose values are rows of their own; of one that is ``val`` the best row alone is kept.

    Values that are typed beside ``val`` join its grid.
    """
    chosen = {"seed", *(name for name in VAL if "val" in resolved.values(name))}
    return [name for name in resolved.axes if name not in chosen]


def choices_of_val(rows: Sequence[Row[R]], resolved: Resolved[TrainOptions], num_classes: int) -> list[str]:
    """What ``val`` chose for methods that train, a line for each option."""
    grids = {
        "finetune_lr": f"{', '.join(map(short, VAL_RATES))} times the default",
        "label_smooth": ", ".join(map(short, val_smooths(num_classes))),
    }
    differing = varying([row.setting for row in rows])
    others = [name for name in kept_apart(resolved) if name in differing]
    lines = []
    for name, values in grids.items():
        if "val" in resolved.values(name):
            settings = [row.setting for row in rows if name in row.setting.values]
            best = ", ".join(f"{setting.describe(others)} {short(setting.values[name])}" for setting in settings)
            grid = " and ".join([values, *(short(value) for value in resolved.values(name) if value != "val")])
            lines.append(f"--{name} val: {best}, the best of {grid} by {score_in_words(rows[0].results)}")
    return lines


def by_stream(methods: Sequence[Method]) -> dict[Stream | None, list[Method]]:
    """Those that see the same batches, together."""
    groups: dict[Stream | None, list[Method]] = {}
    for method in methods:
        groups.setdefault(method.stream, []).append(method)
    return groups


def cached_streams(methods: Sequence[Method]) -> list[Stream]:
    """The batches of which features of a frozen backbone are kept."""
    groups = by_stream(methods).items()
    return [stream for stream, group in groups if stream and any(method.scope == "fc" for method in group)]


def settings_table(methods: Sequence[Method]) -> str:
    """The options of every classifier, a line for each: None above stands for what its method says here."""
    names = [name for name in TUNABLE if name != "seed"]
    lines = dict.fromkeys(method.setting.describe(names) for method in methods)
    return "\n".join(["classifiers:", *(f"  {line}" for line in lines)])
