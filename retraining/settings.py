"""The classifiers that a command makes: the product of what was asked for, an instance of a method for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product

from losses import auto_label_smooth
from retraining.features import Stream
from retraining.methods import METHODS, Method, Trained
from utils.errors import UsageError
from utils.options import Value

#: --start of methods that would continue stage 1's classifier, where there is none.
WITHOUT_STAGE1 = "class_mean"
#: All options that a sweep may take several values of, beside --method.
TUNABLE = tuple(
    dict.fromkeys([*Trained.options(), *(name for method in METHODS.values() for name in method.options())])
)


def make_methods(
    names: Sequence[str],
    axes: Mapping[str, Sequence[Value]],
    typed: Collection[str],
    num_classes: int,
    published: bool = False,
    tune: bool = False,
    is_first: bool = False,
) -> list[Method]:
    """The product of all values, method by method; an option that a method does not take is left out there.

    Args:
        names: keys of ``METHODS``.
        axes: the values of options of ``TUNABLE``; where there are none, or None alone, the method's own default.
        typed: the options that the user gave; each must be of use to one method at least.
        num_classes: C, for label_smooth auto.
        published: the papers' value where a method's default departs from it.
        tune: let every method's grid stand where ``axes`` leaves it free.
        is_first: there is no stage 1, so that methods that would continue its classifier start from class means.

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
    given = {name: tuple(values) for name, values in axes.items() if tuple(values) != (None,)}
    found: list[Method] = []
    for key in names:
        method = METHODS[key]
        make: Callable[..., Method] = method
        defaults = method.options()
        values = {name: given.get(name, (default,)) for name, default in defaults.items()}
        if published:
            values |= {name: (value,) for name, value in method.published.items() if name not in typed}
        if tune:
            free = {name: choices[0] for name, choices in values.items() if name not in typed}
            for name, grid in make(**{name: choices[0] for name, choices in values.items()}).grid(num_classes).items():
                if name in free:  # the default comes first, and so wins where several are equally good
                    values[name] = tuple(sorted(grid, key=lambda value: value != free[name]))
        for combination in product(*values.values()):
            chosen = dict(zip(values, combination))
            if is_first and chosen["start"] == "stage1":
                chosen["start"] = WITHOUT_STAGE1
            if chosen.get("label_smooth") == "auto":
                chosen["label_smooth"] = auto_label_smooth(num_classes)
            made = make(**chosen)
            if made.scope != "fc" and not method.takes_scope:
                takers = [name for name, each in METHODS.items() if each.takes_scope]
                raise UsageError(f"--finetune_scope {made.scope} with --method {key}", ", ".join(takers))
            if isinstance(made, Trained) and "finetune_lr" not in given:
                made = made.at_batch_size()
            found.append(made.checked(typed))
    return list(dict.fromkeys(found))


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
