"""Sweeps: settings, what became of them, and the sorted table over seeds. Both stages and compare.py use it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine import Selection
from utils.checkpoints import HELD_OUT, TEST_SET, Sweep
from utils.errors import Diverged
from utils.metrics import FIGURES, GROUPS, Figure, csv_text, percent
from utils.options import Value
from utils.plots import Point, option_curves
from utils.run import Run


@dataclass(frozen=True)
class Setting:
    """What a table calls one run of a sweep: ``method``, of stage 1 the loss, and the options that a sweep may vary."""

    method: str
    values: Mapping[str, Value]

    @property
    def key(self) -> tuple[tuple[str, Value], ...]:
        """What is the same in all seeds."""
        return (("method", self.method), *((k, v) for k, v in self.values.items() if k != "seed"))

    def describe(self, names: Iterable[str] | None = None) -> str:
        """The setting in one line, or those of its options alone that are named."""
        names = self.values if names is None else names
        return " ".join([self.method, *(f"{name} {short(self.values[name])}" for name in names if name in self.values)])


class Result:
    """What became of one run of a sweep.

    Attributes:
        setting: what tables call it.
        selection: the selected epoch with its reports and weights.
        seconds: time spent on it.
        diverged: the epoch (from 1) in which loss or logits were no longer finite; None where all is well.
    """

    def __init__(self, setting: Setting, select: str, by: Figure = "class_mean") -> None:
        self.setting, self.selection = setting, Selection(select, by)
        self.seconds = 0.0
        self.diverged: int | None = None


R = TypeVar("R", bound=Result)


def varying(settings: Sequence[Setting]) -> list[str]:
    """The options, beside method and seed, that differ between settings of one method."""
    names = []
    for name in dict.fromkeys(name for setting in settings for name in setting.values):
        seen: dict[str, set[Value]] = {}
        for setting in settings:
            if name in setting.values:
                seen.setdefault(setting.method, set()).add(setting.values[name])
        if name != "seed" and any(len(values) > 1 for values in seen.values()):
            names.append(name)
    return names


def short(value: Value) -> str:
    """A value as tables and messages show it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@dataclass
class Row(Generic[R]):
    """All seeds of one setting, with means over them.

    ``score`` is what rows are sorted by: --select_by's figure on held-out images where there are any, else test top-1.
    """

    results: list[R]

    @property
    def setting(self) -> Setting:
        return self.results[0].setting

    @property
    def score(self) -> float:
        return statistics.fmean(score_of(result) for result in self.results)

    def figures(self, of: Callable[[R], float | None]) -> tuple[float, float] | None:
        """Mean and sample standard deviation over seeds (0 for one seed); None where a seed has none."""
        values = [of(result) for result in self.results]
        present = [value for value in values if value is not None]
        if len(present) < len(values):
            return None
        return statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else 0.0


def score_of(result: Result) -> float:
    """--select_by's figure on held-out images where there are any, else test top-1."""
    val = result.selection.val
    return float(result.selection.test["top1"] if val is None else val[result.selection.by])


def where_scored(results: Sequence[Result]) -> str:
    """The images that :func:`score_of` is of; those that diverged have no figures."""
    return HELD_OUT if any(result.selection.val is not None for result in results) else TEST_SET


def score_in_words(results: Sequence[Result]) -> str:
    """What :func:`score_of` is: "class mean on held-out images"."""
    where = where_scored(results)
    return f"{FIGURES[results[0].selection.by] if where == HELD_OUT else 'top-1'} on {where}"


def held_out_measure(results: Sequence[Result]) -> dict[str, Callable[[Result], float | None]]:
    """The table's column of :func:`score_of` where that is of held-out images; {} where it is not."""
    name = f"val {results[0].selection.by.replace('_', ' ')}"
    return {name: score_of} if where_scored(results) == HELD_OUT else {}


def rows_of(results: Sequence[R]) -> list[Row[R]]:
    """One row per setting, best first; settings of which a seed diverged are left out."""
    rows: dict[Hashable, list[R]] = {}
    for result in results:
        rows.setdefault(result.setting.key, []).append(result)
    whole = [Row(row) for row in rows.values() if all(result.diverged is None for result in row)]
    return sorted(whole, key=lambda row: -row.score)


def best_of_each(rows: Iterable[Row[R]], names: Collection[str]) -> list[Row[R]]:
    """The first, and so the best, of each method and each combination of the values of these options."""
    best: dict[Hashable, Row[R]] = {}
    for row in rows:
        values = row.setting.values
        best.setdefault((row.setting.method, *(values.get(name) for name in names)), row)
    return list(best.values())


MEASURES: dict[str, Callable[[Result], float | None]] = {
    "all": lambda r: r.selection.test["top1"],
    **{g: lambda r, g=g: r.selection.test["groups"][g]["accuracy"] for g in GROUPS},  # type: ignore[misc]
}


def table_cells(rows: Sequence[Row[R]], names: Sequence[str], heading: str = "method") -> list[dict[str, str]]:
    """The sorted table: method, the options ``names``, and accuracies in percent, mean ± std over seeds.

    ``heading`` is what the column of the settings' methods is called.
    """
    measures = held_out_measure([result for row in rows for result in row.results]) | MEASURES
    cells = []
    for row in rows:
        values = row.setting.values
        line = {heading: row.setting.method}
        line |= {name: shown_among(values[name], name, rows) if name in values else "" for name in names}
        line["seeds"] = str(len(row.results))
        line |= {name: plus_minus(row.figures(of), len(row.results)) for name, of in measures.items()}
        cells.append(line)
    return cells


def shown_among(value: Value, name: str, rows: Sequence[Row[R]]) -> str:
    """A value of an option as short as tells it from those of the other rows."""
    others = {row.setting.values.get(name) for row in rows} - {value}
    return str(value) if short(value) in map(short, others) else short(value)


def raw_rows(results: Sequence[Result], heading: str = "method") -> list[dict[str, Value]]:
    """One flat row per setting and seed, accuracies as fractions, for CSV."""
    lines = []
    for result in results:
        line = {heading: result.setting.method, **result.setting.values, "diverged": result.diverged}
        if result.diverged is None:
            val = result.selection.val
            by = result.selection.by
            line |= {"epoch": result.selection.epoch, f"val_{by}": None if val is None else val[by]}
            measures = {"test_top1" if name == "all" else f"test_{name}": of(result) for name, of in MEASURES.items()}
            line |= {**measures, "seconds": result.seconds}
        lines.append(line)
    return lines


def curves_over(option: str, rows: Sequence[Row[R]]) -> dict[str, list[Point]]:
    """Per method with several values of an option: (value, :data:`MEASURES` of the best row with it), rising."""
    best: dict[str, dict[float, Row[R]]] = {}
    for row in reversed(rows):  # the best comes last and stays
        value = row.setting.values.get(option)
        if isinstance(value, int | float):
            best.setdefault(row.setting.method, {})[value] = row
    return {
        method: [(x, {name: row.figures(of) for name, of in MEASURES.items()}) for x, row in sorted(found.items())]
        for method, found in best.items()
        if len(found) > 1
    }


def plus_minus(pair: tuple[float, float] | None, seeds: int) -> str:
    """Fractions as percent: "53.92 ± 0.20", or the mean alone for one seed."""
    if pair is None:
        return "-"
    return percent(pair[0]) if seeds == 1 else f"{percent(pair[0])} ± {percent(pair[1])}"


def ranked_rows(results: Sequence[R], run: Run, hint: str, heading: str = "method") -> list[Row[R]]:
    """The sorted rows; says which runs diverged.

    Raises:
        Diverged: every setting has a run that diverged; with a hint. Of several runs sweep.csv has then been written.
    """
    names = ["seed", *varying([result.setting for result in results])]
    for result in results:
        if result.diverged is not None:
            where = f"diverged in epoch {result.diverged}" if result.diverged else "no finite logits"
            run.say(f"{where}: {result.setting.describe(names)}")
    rows = rows_of(results)
    if not rows and len(results) > 1:
        write_sweep(results, run, heading)
    if not rows:
        lost = sum(result.diverged is not None for result in results)
        where = f" in {lost} of {len(results)} runs, at least one of every setting" if len(results) > 1 else ""
        if not any(result.diverged for result in results):  # nothing was trained
            hint = "stage 1's classifier or its features are not fit for that, as a row of zeros is not"
        raise Diverged(f"the loss or the logits are not finite, or the loss has risen a thousandfold{where}: {hint}")
    return rows


def count(results: Sequence[Result]) -> int:
    """How many settings there are, whatever became of them."""
    return len({result.setting.key for result in results})


def write_sweep(results: Sequence[Result], run: Run, heading: str = "method") -> None:
    """Writes sweep.csv, a row for every run."""
    with run.side_output("sweep.csv") as path:
        path.write_bytes(csv_text(raw_rows(results, heading)).encode(errors="surrogateescape"))


def show_sweep(
    results: Sequence[Result], rows: Sequence[Row[R]], run: Run, option: str, title: str, heading: str
) -> None:
    """Writes sweep.csv, prints the sorted table and, where ``option`` was swept, draws accuracy against it."""
    import pandas as pd  # here, since it is slow to import

    write_sweep(results, run, heading)
    names = varying([result.setting for result in results])
    run.say(f"\n{pd.DataFrame(table_cells(rows, names, heading)).to_string(index=False)}\n")
    curves = curves_over(option, rows_of(results))
    if curves:
        with run.side_output(f"{option}.png") as path:
            option_curves(curves, option, title, path)


def choice_in_words(results: Sequence[Result]) -> str:
    """How the result of a sweep was chosen."""
    is_chosen = chosen_on(results) is not None
    return f"sorted and chosen by {score_in_words(results)}" if is_chosen else "the first seed, nothing was chosen"


def chosen_on(results: Sequence[Result]) -> Sweep | None:
    """What a checkpoint says of the sweep that its setting was chosen from; None where only seeds differ."""
    return {"settings": count(results), "chosen_on": where_scored(results)} if count(results) > 1 else None
