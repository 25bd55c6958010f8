"""Compares every way of re-training the classifier on one stage-1 network: table, CSV, Markdown and figures.

    python compare.py --imb_ratio 100
    python compare.py --imb_ratio 100 --tune --seed 0 1 2

takes the file that main_stage1.py left and makes every method's classifier with its published or default values, on
one shared pass over the backbone. ``--tune`` gives each method a grid of at most nine settings and keeps the best on
the images that stage 1 held out (main_stage1.py --val_split), not on the test set. Every option of main_stage2.py can
be typed here too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

import main_stage2
from main_stage2 import (
    HINT,
    SCOPES,
    continue_stage1,
    fitting,
    hash_of_stage1,
    make_lab,
    refuse_head,
    refuse_unused,
    require_held_out,
    retrain,
)
from retraining.methods import METHODS
from retraining.settings import TUNABLE, Setting, make_settings
from retraining.sweep import Lab, Result
from stages import begin, find_run, load_data, say_complete
from sweeps import MEASURES, Row, plus_minus, rows_that_stand, score_of, varying, write_sweep
from utils.distributed import require_single
from utils.metrics import calibration_error, fit_temperature, logit_statistics, report, spread
from utils.options import Choice, Flag, Many, UsageError, command, option, parse_typed, shown
from utils.plots import class_profiles
from utils.resume import complete
from utils.system import DEVICE_OPTIONS, pick_device, provenance

#: The method that is also trained together with the backbone, which is the Decoupling paper's question.
SCOPE_METHOD = "crt"

#: What a column shows of a result, and how its mean and deviation over so many seeds are written.
Column = tuple[Callable[[Result], float | None], Callable[[tuple[float, float] | None, int], str]]


@dataclass(frozen=True)
class Options(main_stage2.Options):
    """compare.py's own options; the others are main_stage2.py's."""

    method: Any = option(tuple(METHODS), Many(Choice(METHODS)), "methods to compare")
    finetune_scope: Any = option(SCOPES, Many(Choice(SCOPES)), f"what is trained; beyond fc for {SCOPE_METHOD} alone")
    tune: bool = option(False, Flag(), "choose each method's options on the held-out images")
    show: Any = option(("joint", "crt", "tau-norm", "maxnorm", "los"), Many(Choice(METHODS)), "methods in the figures")


@command
def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the command; returns the table's rows, best first, accuracies as fractions."""
    require_single("compare.py")
    typed = parse_typed(Options, argv, "compare.py", __doc__)
    typed, resumed = find_run(Options, typed, "compare.py", hash_of_stage1)
    if resumed and resumed.is_complete:
        rows_then: list[dict[str, Any]] = say_complete(resumed)
        return rows_then
    parent, resolved = continue_stage1(typed, Options)
    options: Any = resolved.options
    if parent.head != "linear" and "method" not in typed:
        options = dataclasses.replace(options, method=tuple(fitting(parent.head)))
        print(f"{parent.path} has a {parent.head} head: {shown(options.method)}")
    refuse_head(parent, options.method)
    if "show" in typed and not set(options.show) <= set(options.method):
        raise UsageError(f"--show {shown(options.show)}", f"methods that are compared: {shown(options.method)}")
    device = pick_device(*(getattr(options, name) for name in DEVICE_OPTIONS))
    data = load_data(options, val_indices=parent.data.get("val_indices", []))
    require_held_out(parent, options, data, "--tune" if options.tune else None)
    settings = choose_settings(options, typed, data.num_classes)
    refuse_unused(typed, options, settings)
    with begin(resolved, "compare", data, device, typed, parent, resumed) as run:
        lab = make_lab(parent, data, device, options, run)
        run.say(f"from {parent.path}: {len(settings)} classifiers")
        results = retrain(settings, lab, options, run)
        run.say(lab.source.size)
        rows = rows_that_stand(results, run, HINT)
        if len(results) > 1:
            write_sweep(results, run)
        names = varying(settings) if options.tune else varying([row.setting for row in rows])
        rows = best_of_each(rows) if options.tune else rows
        rows.sort(key=lambda row: -(row.figures(MEASURES["all"]) or (0.0,))[0])
        measured = {id(result): measure(result, lab) for row in rows for result in row.results}
        columns = column_figures(data.val is not None, measured)

        cells = [
            {"method": label(row.setting, names), "seeds": str(len(row.results))}
            | {name: form(row.figures(of), len(row.results)) for name, (of, form) in columns.items()}
            for row in rows
        ]
        frame = pd.DataFrame(cells)
        run.say(f"\n{frame.to_string(index=False)}\n")
        numbers = [numeric(row, names, columns) for row in rows]
        with run.side_output("compare.csv") as path:
            pd.DataFrame(numbers).convert_dtypes().to_csv(path, index=False)
        with run.side_output("compare.md") as path:
            path.write_text(markdown(cells))
        head = {
            "options": dataclasses.asdict(options),
            "provenance": provenance("compare.py", argv, device, run.seconds) | {"resumed": run.resumed},
        }
        lines = [head, *(raw(result, measured[id(result)]) for row in rows for result in row.results)]
        with run.side_output("results.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        profiles = {
            label(row.setting, names): measured[id(row.results[0])]
            for method in options.show
            for row in rows
            if row.setting.method == method and row.setting.scope == "fc"
        }
        if profiles:
            title = f"{data.spec.name}, ratio {options.imb_ratio}, {options.network}"
            with run.side_output("class_profiles.png") as path:
                class_profiles(profiles, data.class_counts, title, path)
        figure = ", class_profiles.png" if profiles else ""
        run.say(f"{how(options, typed, settings)}; sorted by test accuracy")
        run.say(f"compare.csv, compare.md, results.jsonl{figure}: {run.folder}")
        return complete(run, numbers)


def choose_settings(options: Any, typed: dict[str, Any], num_classes: int) -> list[Setting]:
    """Every method on the frozen backbone, and one that also trains the backbone."""
    wanted = {name: getattr(options, name) for name in TUNABLE}
    beyond = tuple(scope for scope in options.finetune_scope if scope != "fc")
    published = options.protocol == "published"
    settings = []
    if "fc" in options.finetune_scope:
        frozen = wanted | {"finetune_scope": ("fc",)}
        settings += make_settings(options.method, frozen, typed, num_classes, published, options.tune)
    if beyond and SCOPE_METHOD in options.method:
        remaining = () if settings else typed
        settings += make_settings(
            [SCOPE_METHOD], wanted | {"finetune_scope": beyond}, remaining, num_classes, published
        )
    left_out = [method for method in options.method if method not in {setting.method for setting in settings}]
    if left_out:
        scope = shown(options.finetune_scope)
        raise UsageError(
            f"--finetune_scope {scope} leaves out {shown(left_out)}", f"fc too, or --method {SCOPE_METHOD}"
        )
    return settings


def how(options: Any, typed: Iterable[str], settings: Sequence[Setting]) -> str:
    """How the options and epochs of the table's rows were chosen, in words."""
    changed = [name for name in TUNABLE if name in typed and name not in ("seed", "finetune_scope")]
    words = f"--{' --'.join(changed)} as typed, the rest at its default" if changed else "default values"
    if options.tune:
        beyond = any(setting.scope != "fc" for setting in settings)
        words += f"; tuned on held-out images{', except with the backbone' if beyond else ''}"
    if options.select == "best_test":
        words += "; epochs chosen on the TEST set"
    return words


def best_of_each(rows: Iterable[Row]) -> list[Row]:
    """The first, and so best on held-out images, of each method and scope."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        best.setdefault((row.setting.method, row.setting.scope), row)
    return list(best.values())


def measure(result: Result, lab: Lab) -> dict[str, Any]:
    """The whole test report, with per-class Logits Magnitude, RSD and weight norms (without flip averaging)."""
    labels = lab.data.test.labels
    logits = lab.logits_of(result, "test")
    found = report(logits, labels, lab.data.class_counts)
    found |= logit_statistics(lab.logits_of(result, "test", flip=False), labels)
    found["weight_norm"] = result.classifier.get_parameter("weight").norm(dim=1).tolist()
    found["temperature"] = found["ece_calibrated"] = None
    if lab.data.val is not None:
        found["temperature"] = fit_temperature(lab.logits_of(result, "val"), lab.data.val.labels)
        found["ece_calibrated"] = calibration_error(logits, labels, found["temperature"])
    return found


def column_figures(held_out: bool, measured: dict[int, dict[str, Any]]) -> dict[str, Column]:
    """The table's columns: what each shows of a result, and how a mean and deviation over seeds are written."""

    def over_classes(name: str, place: int) -> Callable[[Result], float | None]:
        def of(result: Result) -> float | None:
            pair = spread(measured[id(result)][name])
            return None if pair is None else pair[place]

        return of

    def plain(name: str) -> Callable[[Result], float | None]:
        return lambda result: measured[id(result)][name]

    columns: dict[str, Column] = {name: (of, plus_minus) for name, of in MEASURES.items()}
    if held_out:
        columns["val"] = score_of, plus_minus
    columns |= {
        "LoMa": (over_classes("logits_magnitude", 0), number),
        "LoMa spread": (over_classes("logits_magnitude", 1), number),
        "RSD": (over_classes("rsd", 0), number),
        "norm spread": (over_classes("weight_norm", 1), number),
        "ECE": (plain("ece"), plus_minus),
        "ECE scaled": (plain("ece_calibrated"), plus_minus),
        "seconds": (lambda result: result.seconds, number),
    }
    return columns


def number(pair: tuple[float, float] | None, seeds: int) -> str:
    """A mean over seeds to three digits."""
    return "-" if pair is None else f"{pair[0]:.3g}"


def label(setting: Setting, names: Iterable[str]) -> str:
    """A row's name: the method, what is trained where it is more than the classifier, and the options that differ."""
    scope = [] if setting.scope == "fc" else [f"({setting.scope})"]
    others = [name for name in names if name != "finetune_scope"]
    return " ".join([setting.describe(others).replace("finetune_", ""), *scope])


def numeric(row: Row, names: Iterable[str], columns: dict[str, Column]) -> dict[str, Any]:
    """A row for CSV: all its options, and mean and standard deviation over seeds of every column, as fractions."""
    options = {name: value for name, value in row.setting.values.items() if name != "seed"}
    line: dict[str, Any] = {"row": label(row.setting, names), "method": row.setting.method, **options}
    line["seeds"] = len(row.results)
    for name, (of, _) in columns.items():
        mean, deviation = row.figures(of) or (None, None)
        line |= {name.replace(" ", "_"): mean, f"{name.replace(' ', '_')}_std": deviation}
    return line


def raw(result: Result, found: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured of one setting and seed."""
    values = {"method": result.setting.method, **result.setting.values}
    selection = result.selection
    return {**values, "epoch": selection.epoch, "select": selection.rule, "seconds": result.seconds, **found}


def markdown(cells: Sequence[dict[str, str]]) -> str:
    """The table in Markdown."""
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(cell.values()) for cell in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
