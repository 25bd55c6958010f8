"""Settings: one value for every option of a classifier. A sweep is the product of what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

import sweeps
from losses import auto_label_smooth
from retraining.features import Stream
from retraining.methods import METHODS, Method
from utils.options import UsageError

#: What every method that trains takes beside its own options, in its order; None is always given by the command.
TRAINED: Mapping[str, Any] = {
    "seed": None,
    "batch_size": None,
    "finetune_epoch": None,
    "finetune_scope": "fc",
    "sampler": "instance",
}
#: Images per step that the methods' learning rates are for; at other sizes they are scaled in proportion.
REFERENCE_BATCH = 64
#: All options that a sweep may take several values of, beside --method.
TUNABLE = tuple(dict.fromkeys([*TRAINED, *(name for method in METHODS.values() for name in method.options)]))


class Setting(sweeps.Setting):
    """One classifier to make: a method and a value for each option that it takes."""

    @property
    def stream(self) -> Stream | None:
        """What decides its batches; None for a method that trains nothing."""
        if not METHODS[self.method].is_trained:
            return None
        return Stream(*(self.values[name] for name in ("seed", "sampler", "batch_size", "finetune_epoch")))

    @property
    def scope(self) -> str:
        """fc, last_block or all."""
        return str(self.values.get("finetune_scope", "fc"))


def make_settings(
    methods: Sequence[str],
    wanted: Mapping[str, Sequence[Any] | None],
    typed: Collection[str],
    num_classes: int,
    published: bool = False,
    tune: bool = False,
) -> list[Setting]:
    """The product of all values, method by method; an option that a method does not take is left out there.

    Args:
        methods: keys of ``METHODS``.
        wanted: the values of each option of ``TUNABLE``; None for the method's own default.
        typed: the options that the user gave; each must be of use to one method at least.
        num_classes: C, for label_smooth auto.
        published: the papers' value where a method's default departs from it.
        tune: let every method's grid stand where ``wanted`` leaves it free.

    Raises:
        UsageError: an option that none of the methods takes, or values that do not go together.
    """
    for name in typed:
        harmless = name == "seed" or (name == "finetune_scope" and wanted[name] == ("fc",))
        if name in TUNABLE and not harmless and not any(name in options_of(METHODS[m]) for m in methods):
            takers = [key for key, method in METHODS.items() if name in options_of(method)]
            raise UsageError(
                f"--{name} with --method {' '.join(methods)}", f"a method that takes it: {', '.join(takers)}"
            )
    settings: list[Setting] = []
    for key in methods:
        method = METHODS[key]
        defaults = options_of(method) | (dict(method.published) if published else {})
        values = {name: wanted.get(name) or (default,) for name, default in defaults.items()}
        if tune:
            free = {name: choices[0] for name, choices in values.items() if name not in typed}
            for name, grid in method.grid(free, num_classes).items():
                if name in free:  # the default comes first, and so wins where several are equally good
                    values[name] = tuple(sorted(grid, key=lambda value: value != free[name]))
        for combination in product(*values.values()):
            one = dict(zip(values, combination))
            if wanted.get("finetune_lr") is None and "finetune_lr" in one:
                one["finetune_lr"] *= one["batch_size"] / REFERENCE_BATCH
            if one.get("label_smooth") == "auto":
                one["label_smooth"] = auto_label_smooth(num_classes)
            if one.get("finetune_scope", "fc") != "fc" and not method.takes_scope:
                takers = [name for name, each in METHODS.items() if each.takes_scope]
                raise UsageError(f"--finetune_scope {one['finetune_scope']} with --method {key}", ", ".join(takers))
            method.settle(one, typed)
            settings.append(Setting(key, one))
    return sweeps.distinct(settings)


def options_of(method: Method) -> dict[str, Any]:
    """All options that a method takes, with its defaults."""
    return {**(TRAINED if method.is_trained else {}), **method.options}


def by_stream(settings: Sequence[Setting]) -> dict[Stream | None, list[Setting]]:
    """The settings that see the same batches, together."""
    groups: dict[Stream | None, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.stream, []).append(setting)
    return groups
