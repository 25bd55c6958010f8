"""Reports a checkpoint's accuracy on the untouched, balanced test set: overall, many/medium/few, per class.

    python evaluate.py --imb_ratio 100 --cur_stage stage2
    python evaluate.py --pretrained_pth FILE --json report.json --csv classes.csv
    python evaluate.py --pretrained_pth FILE --test_prior balanced --test_imb 10 50

The file says which data set and network it is of; a flag that contradicts it is an error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from datasets import DATASETS, NATURAL, ImageSet
from engine import predict
from experiment.data import eval_batches, load_data_of
from experiment.options import (
    DataOptions,
    check_data_flags,
    checkpoint_option,
    constants_of,
    file_defaults,
    file_identity,
    recipe_layers,
    refuse_contradictions,
)
from experiment.priors import priors_of, source_prior_option, test_prior_option
from experiment.record import ancestors, selection_words
from experiment.restore import files_read, open_latest, restore
from utils import metrics
from utils.checkpoints import IDENTITY, STAGES, Parent
from utils.command import command
from utils.console import counted, write
from utils.distributed import on_main_process, process_group, rank
from utils.errors import UsageError
from utils.files import Target, require_targets, sha256, write_text
from utils.metrics import (
    accuracies,
    bootstrap_interval,
    calibration_error,
    fit_temperature,
    group_accuracies,
    logit_statistics,
    per_class_csv,
    per_class_rows,
    percent,
    shifted,
    shifted_table,
    spread,
    table,
)
from utils.options import Choice, Flag, Number, Text, Values, Vector, option, parse_typed, resolve
from utils.priors import long_tailed
from utils.readers import Unreadable, size_of
from utils.system import pick_device, provenance
from utils.types import Json


class ByGroup(TypedDict):
    """Accuracy of the groups of test rows, and the interval of all where groups are drawn anew."""

    names: list[str]
    rows: list[int]
    top1: list[float]
    interval: list[float]


#: Bytes of a file that is hashed to see whether it is the one that training began from.
MOST_CHECKPOINT = 2**34


@dataclass(frozen=True)
class Options(DataOptions):
    """evaluate.py's own options; those of every command are in experiment/options.py."""

    cur_stage: str | None = option(None, Choice(STAGES), "which stage's file; without it, the latest there is", "files")
    pretrained_pth: str | None = checkpoint_option()
    flip_tta: bool | None = option(
        None, Flag(), "average the logits of an image and its mirror; None: as stored", "evaluation"
    )
    statistics: str = option(
        "test", Choice(("test", "train")), "images that Logits Magnitude and RSD are of", "evaluation"
    )
    test_prior: str | None = test_prior_option(", known (with --test_imb: each test set's own)")
    source_prior: str | None = source_prior_option()
    test_imb: tuple[float, ...] | None = option(
        None,
        Vector(Number(float, 1), "the ratio of a test set"),
        "accuracy on long-tailed test sets of these ratios too, in the training set's order of classes and against it",
        "evaluation",
    )
    json: str | None = option(None, Text("a file to write"), "write the report as JSON", "files")
    csv: str | None = option(None, Text("a file to write"), "write the per-class table as CSV", "files")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_prior == "known" and self.test_imb is None:
            raise UsageError("--test_prior known without --test_imb", "both, or another --test_prior")


@command
@process_group()
def main(argv: Sequence[str]) -> Json:
    """Runs the command; returns what --json writes."""
    began = time.perf_counter()
    typed = parse_typed(Options, argv, "evaluate.py", __doc__)
    file = open_latest(typed, Options)
    stored = file_identity(file) | ({"cur_stage": file.stage} if file.stage else {})
    refuse_contradictions(typed, stored, str(file.path))
    stored_flip = file.metrics.get("flip_tta", False)
    layers: dict[str, Values] = {str(file.path): stored | {"flip_tta": stored_flip}, "its options": file_defaults(file)}
    known = {"dataset": "cifar100", **file_defaults(file), **stored, **typed}
    if not file.data and DATASETS[str(known["dataset"])].own:
        layers[f"{file.path}'s weights"] = dict(constants_of(file))
    options = resolve(Options, typed, layers | recipe_layers(str(known["dataset"]), known)).options
    check_data_flags(options, typed)
    flip_tta = bool(options.flip_tta)
    reports = {"json": b'{\n "checkpoint"', "csv": b"class,name,"}
    asked = [(f"--{name}", getattr(options, name), head) for name, head in reports.items()]
    targets = [Target(flag, path, head) for flag, path, head in asked if path is not None]
    read = [*files_read(file, options), *([Path(options.test_prior)] if options.test_prior else [])]
    on_main_process(lambda: require_targets(targets, read))

    device = pick_device(options.device, options.gpu, options.threads)
    data = load_data_of(file, options)
    is_known = options.test_prior == "known"
    wanted = "balanced" if is_known else options.test_prior
    priors = priors_of(wanted, options.source_prior, file, data.class_names, data.class_counts)
    model = restore(file, data).to(device)
    batches = eval_batches(data, data.test, device)
    logits, labels = predict(model, batches)
    seen = (logits, labels) if options.statistics == "test" else predict(model, eval_batches(data, data.train, device))
    statistics = logit_statistics(*seen) | {"weight_norm": model.fc.get_parameter("weight").norm(dim=1).tolist()}
    if flip_tta:
        logits, _ = predict(model, batches, flip_tta=True)
    temperature, scale = None, 1.0
    if data.val is not None:
        temperature = scale = fit_temperature(*predict(model, eval_batches(data, data.val, device), flip_tta))
    own, test_prior = logits, None
    if priors is not None:
        own = logits / scale
        test_prior = priors.test(lambda: own.double().softmax(dim=1))
        logits, scale = priors.reweighted(own, test_prior), 1.0
    report = metrics.report(logits, labels, data.class_counts)
    calibrated = None if temperature is None else calibration_error(logits, labels, scale)

    def per_class(prior: Tensor) -> list[float | None]:
        """The classes' accuracies in a test set of this prior."""
        if priors is None or not is_known:
            return report["per_class"]
        return accuracies(priors.reweighted(own, prior).argmax(dim=1), labels, data.class_counts)["per_class"]

    tests = [
        {"distribution": name, "ratio": ratio, **shifted(per_class(prior), prior, data.class_counts)}
        for name, ratio, prior in test_sets(options.test_imb or (), data.class_counts)
    ]
    rows = [
        {**row, **{name: values[row["class"]] for name, values in statistics.items()}}
        for row in per_class_rows(report, data.class_names, data.class_counts)
    ]
    spreads = {name: spread(values) for name, values in statistics.items()}
    by_group = None if data.test.groups is None else of_groups(logits, labels, data.test)

    result: Json = {
        "checkpoint": str(file.path),
        "sha256": file.sha256,
        "stage": file.stage,
        **{key: getattr(options, key) for key in IDENTITY},
        "input": options.input,
        "seed": file.options.get("seed"),
        "method": file.options.get("method"),
        "label_smooth": file.options.get("label_smooth"),
        "select": file.metrics.get("select"),
        "select_by": file.metrics.get("select_by"),
        "epoch": file.metrics.get("epoch"),
        "flip_tta": flip_tta,
        **{key: value for key, value in report.items() if key not in ("per_class", "test_images")},
        "temperature": temperature,
        "ece_calibrated": calibrated,
        "prior": priors.report(test_prior) if priors is not None and test_prior is not None else None,
        "test_imb": tests or None,
        "statistics": options.statistics,
        **spreads,
        "by_group": by_group,
        "class_counts": data.class_counts,
        "class_names": data.class_names,
        "per_class": rows,
        "training": file.provenance,
        "provenance": provenance("evaluate.py", argv, device, time.perf_counter() - began),
    }
    if rank() > 0:
        return result
    if options.json is not None:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.csv is not None:
        write_text(options.csv, per_class_csv(rows))

    method = f" {file.options['method']}" if "method" in file.options else ""
    seed = file.options.get("seed", "unknown")
    write(f"{file.path}: {file.stage or 'of another program'}{method}, {file.network}, seed {seed}")
    made = f", {options.imb_type} ratio {options.imb_ratio}, subset {options.subset}"
    write(f"{data.describe()}{'' if options.imb_ratio == NATURAL else made}\n")
    if priors is not None and test_prior is not None:
        write(priors.describe(test_prior, data.class_names) + "\n")
    write(table(report) + "\n")
    if tests:
        write(
            f"expected on other test sets{', each with its own prior' if is_known else ''}: means of the classes' ",
            end="",
        )
        write(
            "accuracies, weighted by their shares; nothing is drawn. Ratios are of the largest to the smallest class;"
        )
        write(f"forward: in training's order, backward: training's smallest is the largest\n{shifted_table(tests)}\n")
    write(f"class mean {percent(report['class_mean'])}, macro-F1 {percent(report['macro_f1'])}, ", end="")
    write(f"worst class {percent(report['worst_class'])}, harmonic mean {percent(report['harmonic_mean'])}; ", end="")
    scaled = "" if calibrated is None or priors is not None else f", after temperature scaling {percent(calibrated)}"
    write(f"calibration error {percent(report['ece'])}{scaled}")
    words = ("-" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}" for pair in spreads.values())
    write("over classes: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(spreads, words)))
    if by_group:
        write(group_words(by_group))
    verdict = ""
    if file.metrics and flip_tta == stored_flip:
        same = all(report[key] == file.metrics.get(key) for key in ("top1", "top5", "per_class"))
        stored_top1 = percent(file.metrics["top1"])
        verdict = f"; {'the same figures as in training' if same else f'in training it was {stored_top1} %'}"
    write(f"selected in training: {selection_words(file.metrics) if file.metrics else 'unknown'}")
    write("".join(f"{words}\n" for words in ancestors(file)), end="")
    write(f"flip averaging here: {'on' if flip_tta else 'off'}{verdict}")
    parent = file.parent
    if parent and is_replaced(parent):
        write(f"note: {parent['path']} has been replaced since this file was made from it")
    return result


def of_groups(logits: Tensor, labels: Tensor, test: ImageSet) -> ByGroup:
    """Top-1 accuracy in each group of test rows: logits (N, C), labels (N,)."""
    groups = test.groups
    assert groups is not None
    hits = logits.argmax(dim=1) == labels
    low, high = bootstrap_interval(hits, groups)
    top1, rows = group_accuracies(hits, groups).tolist(), torch.bincount(groups).tolist()
    return {"names": list(test.group_names), "rows": rows, "top1": top1, "interval": [low, high]}


def group_words(by_group: ByGroup) -> str:
    """What was measured of groups, in a line."""
    every, (low, high) = by_group["top1"], by_group["interval"]
    mean = percent(sum(every) / len(every))
    worst, best = (by_group["names"][every.index(value)] for value in (min(every), max(every)))
    span = f"mean {mean}, {percent(min(every))} ({worst}) to {percent(max(every))} ({best})"
    return (
        f"{counted(len(every), 'group')}: {span}; top-1 where groups are drawn anew: {percent(low)} to {percent(high)} "
        "(95 %, cluster bootstrap)"
    )


def test_sets(ratios: Sequence[float], class_counts: Sequence[int]) -> list[tuple[str, float, Tensor]]:
    """(name, ratio, prior (C,)) of the test sets of --test_imb: uniform, and SADE's forward and backward of each."""
    if not ratios:
        return []
    names = {"forward": False, "backward": True}
    tails = [(name, ratio, long_tailed(class_counts, ratio, names[name])) for name in names for ratio in ratios]
    return [("uniform", 1.0, long_tailed(class_counts, 1)), *tails]


def is_replaced(parent: Parent) -> bool:
    """Whether the file that training began from is there and is another one now."""
    with suppress(Unreadable, OSError):
        size_of(parent["path"], MOST_CHECKPOINT)
        return sha256(parent["path"]) != parent["sha256"]
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
