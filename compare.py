"""Compares every way of re-training the classifier on one stage-1 network: table, CSV, Markdown and figures.

    python compare.py --imb_ratio 100
    python compare.py --imb_ratio 100 --tune --seed 0 1 2

takes the file that main_stage1.py left and makes every method's classifier with its published or default values, on
one shared pass over the backbone. ``--tune`` gives each method a grid of at most nine settings and keeps the best on
the images that stage 1 held out (main_stage1.py --val_split), not on the test set. Every option of main_stage2.py can
be typed here too.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from datasets import LongTailed
from experiment.record import begin, check_places, place_of, wrapped_line
from experiment.resuming import Resumed, find_run, say_complete
from experiment.sweeps import (
    MEASURES,
    Row,
    best_of_each,
    held_out_measure,
    plus_minus,
    ranked_rows,
    score_in_words,
    varying,
    write_sweep,
)
from retraining.dry_run import dry_run
from retraining.measures import Measures, measure
from retraining.methods import METHODS, Method
from retraining.options import (
    SCOPES,
    continue_stage1,
    hash_of_stage1,
    origin,
    prepare,
    recipe_values,
    refuse_unused,
    tunable_values,
)
from retraining.options import (
    Options as Stage2Options,
)
from retraining.results import ClassifierResult
from retraining.settings import TUNABLE, VAL, choices_of_val, kept_apart, make_methods, settings_table
from retraining.train import HINT, freeze, retrain, state_bytes, with_threads
from utils.command import command
from utils.console import counted, duration, show
from utils.distributed import go_on_alone, on_main_process, process_group
from utils.errors import UsageError
from utils.metrics import csv_text, spread
from utils.options import Choice, Flag, Resolved, Value, Values, flags, option, parse_typed, shown
from utils.plots import class_profiles
from utils.resume import complete
from utils.run import Run
from utils.system import provenance

#: The method that is also trained together with the backbone, which is the Decoupling paper's question.
SCOPE_METHOD = "crt"

#: The columns that are in the files alone.
UNPRINTED = ("LoMa", "LoMa spread", "RSD", "norm spread", "ECE scaled")

#: What a column shows of a result, and how its mean and deviation over so many seeds are written.
Column = tuple[Callable[[ClassifierResult], float | None], Callable[[tuple[float, float] | None, int], str]]


@dataclass(frozen=True)
class Options(Stage2Options):
    """compare.py's own options; the others are main_stage2.py's."""

    method: str = option("joint", Choice(METHODS), "methods to compare", "recipe", several=tuple(METHODS))
    finetune_scope: str = option(
        "fc",
        Choice(SCOPES),
        f"what is trained; beyond fc for {SCOPE_METHOD} alone",
        "network",
        several=SCOPES,
    )
    tune: bool = option(False, Flag(), "choose each method's options on the held-out images", "evaluation")
    show: str = option(
        "joint",
        Choice(METHODS),
        "methods in the figures",
        "evaluation",
        several=("joint", "crt", "tau-norm", "maxnorm", "los"),
    )


@command
@process_group()
def main(argv: Sequence[str]) -> list[dict[str, Value]]:
    """Runs the command; returns the table's rows, sorted as they are printed, accuracies as fractions."""
    typed = parse_typed(Options, argv, "compare.py", __doc__)
    typed, found = on_main_process(lambda: find_run(Options, typed, "compare.py", hash_of_stage1))
    resumed = found and Resumed(*found)
    if resumed and resumed.is_complete:
        return cast(list[dict[str, Value]], say_complete(resumed))
    if typed.get("print_options"):
        parent, resolved = continue_stage1(Options, typed)
        show(f"{resolved.table()}\n{settings_table(choose_methods(resolved, typed, parent.num_classes))}")
        return []
    parent, resolved, device, data = prepare(Options, typed, "tune")
    options, names = resolved.options, resolved.values("method")
    if "show" in typed and not set(resolved.values("show")) <= set(names):
        raise UsageError(f"--show {shown(resolved.values('show'))}", f"methods that are compared: {shown(names)}")
    methods = choose_methods(resolved, typed, data.num_classes)
    refuse_unused(typed, resolved, methods)
    state, frozen = state_bytes(methods, parent), freeze(parent, data, device, options)
    resolved = with_threads(resolved, methods, frozen)
    if options.dry_run:
        go_on_alone()
        check_places(options, device, 0, state, resumed, 1)
        show(dry_run(methods, frozen, options.eval_every))
        return []
    with begin(resolved, "compare", data, device, typed, parent, resumed, state, classifiers=len(methods)) as run:
        frozen.source.progress = run.bar
        run.say(wrapped_line("from", f"{origin(parent)}: {counted(len(methods), 'classifier')}"))
        results = retrain(methods, frozen, resolved, run)
        if frozen.source.seconds > 1:
            run.say(frozen.source.size)
        rows = ranked_rows(results, run, HINT)
        if len(results) > 1:
            write_sweep(results, run)
        differing = varying([result.setting for result in results])
        rows = best_of_each(rows, ["finetune_scope", "start"] if options.tune else kept_apart(resolved))
        measured = {id(result): measure(result, frozen) for row in rows for result in row.results}
        columns = column_figures(results, measured)
        numbers = write_table(rows, differing, columns, run)
        write_results(rows, measured, resolved, argv, device, run)
        figure = write_profiles(rows, differing, measured, resolved, data, run)
        on_fc = [row for row in rows if row.results[0].method.scope == "fc"]
        for line in choices_of_val(on_fc or rows, resolved, data.num_classes):
            run.say(line)
        run.say(f"{how(options, typed, methods)}; sorted by {score_in_words(results)}")
        run.say(
            f"magnitudes, calibration and all options: compare.csv, compare.md, results.jsonl{figure}: {run.folder}"
        )
        best = rows[0]
        accuracy = plus_minus(best.figures(MEASURES["all"]), len(best.results))
        where = "held-out images" if data.val else "the TEST set, so not a result to report"
        run.say(f"best on {where}: {label(best, differing)}, test top-1 {accuracy} %, in {duration(run.seconds)}")
        seeds: Values = {} if options.has_stage1 else {"seed": resolved.values("seed")}  # which part what is held out
        run.say(f"next: {following({**seeds, **typed}, best, differing)}")
        return complete(run, numbers)


def write_table(
    rows: Sequence[Row[ClassifierResult]], differing: Collection[str], columns: dict[str, Column], run: Run
) -> list[dict[str, Value]]:
    """Prints the table, and writes it as CSV and Markdown; returns the rows of the CSV."""
    cells = [
        {"method": label(row, differing), "seeds": str(len(row.results))}
        | {name: form(row.figures(of), len(row.results)) for name, (of, form) in columns.items()}
        for row in rows
    ]
    import pandas as pd  # here, since it is slow to import

    printed = [name for name in cells[0] if name not in UNPRINTED and any(cell[name] != "-" for cell in cells)]
    run.say(f"\n{pd.DataFrame(cells)[printed].to_string(index=False)}\n")
    numbers = [numeric(row, differing, columns) for row in rows]
    with run.side_output("compare.csv") as path:
        path.write_bytes(csv_text(numbers).encode())
    with run.side_output("compare.md") as path:
        path.write_text(markdown(cells))
    return numbers


def write_results(
    rows: Sequence[Row[ClassifierResult]],
    measured: dict[int, Measures],
    resolved: Resolved[Options],
    argv: Sequence[str],
    device: torch.device,
    run: Run,
) -> None:
    """Writes results.jsonl: the options and where it was run, then a line for every classifier."""
    head = {
        "options": resolved.stored(),
        "provenance": provenance("compare.py", argv, device, run.seconds) | {"resumed": run.resumed},
    }
    lines = [head, *(measured[id(result)].line(result) for row in rows for result in row.results)]
    with run.side_output("results.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_profiles(
    rows: Sequence[Row[ClassifierResult]],
    differing: Collection[str],
    measured: dict[int, Measures],
    resolved: Resolved[Options],
    data: LongTailed,
    run: Run,
) -> str:
    """Draws the class profiles of the methods of --show; returns what to add to the list of files."""
    profiles = {
        label(row, differing): measured[id(row.results[0])].profile
        for name in resolved.values("show")
        for row in rows
        if row.setting.method == name and row.results[0].method.scope == "fc"
    }
    if profiles:
        options = resolved.options
        title = f"{data.spec.name}, ratio {options.imb_ratio}, {options.network}"
        with run.side_output("class_profiles.png") as path:
            class_profiles(profiles, data.class_counts, title, path)
    return ", class_profiles.png" if profiles else ""


def choose_methods(resolved: Resolved[Options], typed: Values, num_classes: int) -> list[Method]:
    """Every method on the frozen backbone, and one that also trains the backbone."""
    options, values = resolved.options, tunable_values(resolved)
    names, scopes = ([str(value) for value in resolved.values(name)] for name in ("method", "finetune_scope"))
    beyond = tuple(scope for scope in scopes if scope != "fc")
    published, recipe = options.protocol == "published", recipe_values(options)
    methods: list[Method] = []
    if "fc" in scopes:
        frozen = {**values, "finetune_scope": ("fc",)}
        is_first = not options.has_stage1
        methods += make_methods(names, frozen, typed, num_classes, published, options.tune, is_first, recipe)
    if beyond and SCOPE_METHOD in names:
        remaining: Values = {} if methods else typed
        if methods:  # nothing is chosen with the backbone, which would be trained anew for every value
            values |= {name: (recipe.get(name),) for name in VAL if "val" in values[name]}
        values["finetune_scope"] = beyond
        methods += make_methods([SCOPE_METHOD], values, remaining, num_classes, published, recipe=recipe)
    left_out = [name for name in names if name not in {method.name for method in methods}]
    if left_out:
        raise UsageError(
            f"--finetune_scope {shown(scopes)} leaves out {shown(left_out)}", f"fc too, or --method {SCOPE_METHOD}"
        )
    return methods


def following(typed: Values, row: Row[ClassifierResult], differing: Collection[str]) -> str:
    """The command that makes a row's classifier and saves it."""
    method, values = row.setting.method, row.setting.values
    own = {name: values[name] for name in differing if name in values}
    others = {*TUNABLE, "tune", "show", "resume"} - METHODS[method].options().keys()
    kept = {name: value for name, value in typed.items() if name not in others}
    return shlex.join(["python", place_of("main_stage2.py"), *flags({**kept, "method": method, **own})])


def how(options: Options, typed: Iterable[str], methods: Sequence[Method]) -> str:
    """How the options and epochs of the table's rows were chosen, in words."""
    changed = [name for name in TUNABLE if name in typed and name not in ("seed", "finetune_scope")]
    typed_words = f"--{' --'.join(changed)} as typed" if changed else ""
    words = f"{typed_words}, the other options at their defaults" if changed else "options at their defaults"
    if options.tune:
        beyond = any(method.scope != "fc" for method in methods)
        words = f"options chosen on held-out images{', except with the backbone' if beyond else ''}"
        words += f", {typed_words}" if changed else ""
    if options.select == "best_test":
        words += "; epochs chosen on the TEST set"
    return words


def column_figures(results: Sequence[ClassifierResult], measured: dict[int, Measures]) -> dict[str, Column]:
    """The table's columns: what each shows of a result, and how a mean and deviation over seeds are written."""

    def over_classes(name: str, place: int) -> Callable[[ClassifierResult], float | None]:
        def of(result: ClassifierResult) -> float | None:
            pair = spread(measured[id(result)].per_class[name])
            return None if pair is None else pair[place]

        return of

    columns: dict[str, Column] = {}
    columns |= {name: (of, plus_minus) for name, of in (held_out_measure(results) | MEASURES).items()}
    columns |= {
        "LoMa": (over_classes("logits_magnitude", 0), mean_as(".3g")),
        "LoMa spread": (over_classes("logits_magnitude", 1), mean_as(".3g")),
        "RSD": (over_classes("rsd", 0), mean_as(".3g")),
        "norm spread": (over_classes("weight_norm", 1), mean_as(".3g")),
        "ECE": (lambda result: measured[id(result)].report["ece"], plus_minus),
        "ECE scaled": (lambda result: measured[id(result)].ece_calibrated, plus_minus),
        "seconds": (lambda result: result.seconds, mean_as(".1f")),
    }
    return columns


def mean_as(form: str) -> Callable[[tuple[float, float] | None, int], str]:
    """A mean over seeds in a format, ".1f" for instance."""
    return lambda pair, seeds: "-" if pair is None else format(pair[0], form)


def label(row: Row[ClassifierResult], names: Iterable[str]) -> str:
    """A row's name: the method, what is trained where it is more than the classifier, and the options that differ."""
    scope = row.results[0].method.scope
    others = [name for name in names if name != "finetune_scope"]
    words = row.setting.describe(others).replace("finetune_", "")
    return words if scope == "fc" else f"{words} ({scope})"


def numeric(row: Row[ClassifierResult], names: Iterable[str], columns: dict[str, Column]) -> dict[str, Value]:
    """A row for CSV: all its options, and mean and standard deviation over seeds of every column, as fractions."""
    options = {name: value for name, value in row.setting.values.items() if name != "seed"}
    line: dict[str, Value] = {"row": label(row, names), "method": row.setting.method, **options}
    line["seeds"] = len(row.results)
    for name, (of, _) in columns.items():
        mean, deviation = row.figures(of) or (None, None)
        line |= {name.replace(" ", "_"): mean, f"{name.replace(' ', '_')}_std": deviation}
    return line


def markdown(cells: Sequence[dict[str, str]]) -> str:
    """The table in Markdown."""
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(cell.values()) for cell in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
