"""Stage 2: freezes stage 1's backbone and re-trains its classifier, by one method and setting or by many at once.

    python main_stage2.py --imb_ratio 100 --cur_stage stage2 --label_smooth 0.98

is Label Over-Smooth's published command (20 epochs of SGD on ``fc``, lr 5e-4, no weight decay). It continues from the
file that main_stage1.py left for the same data. To expect, from others: 53.92 % on CIFAR-100-LT at ratio 100 (Zhao et
al., NeurIPS 2025, selection not stated). Options that take several values are swept, on one pass over the backbone:

    python main_stage2.py --imb_ratio 100 --label_smooth 0.9 0.95 0.98 0.99 --method los crt --seed 0 1 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

from experiment.record import begin, calibrated, check_places, finish, make_checkpoint, model_size, wrapped_line
from experiment.resuming import Resumed, find_run, say_complete
from experiment.sweeps import best_of_each, choice_in_words, chosen_on, ranked_rows, show_sweep, varying
from models.heads import head_name
from retraining.dry_run import dry_run
from retraining.methods import Method
from retraining.options import (
    Options,
    continue_stage1,
    hash_of_stage1,
    origin,
    prepare,
    recipe_values,
    refuse_unused,
    tunable_values,
)
from retraining.results import ClassifierResult, FrozenBackbone
from retraining.settings import TUNABLE, choices_of_val, kept_apart, make_methods, settings_table
from retraining.train import HINT, freeze, retrain, state_bytes, with_threads
from utils.checkpoints import Checkpoint
from utils.command import command
from utils.console import show
from utils.distributed import go_on_alone, on_main_process, process_group
from utils.metrics import Report, report
from utils.options import Resolved, Values, parse_typed
from utils.resume import complete
from utils.run import Run


@command
@process_group()
def main(argv: Sequence[str]) -> Report:
    """Runs the command; returns the chosen classifier's report on the test set."""
    typed = parse_typed(Options, argv, "main_stage2.py", __doc__)
    typed, found = on_main_process(lambda: find_run(Options, typed, "main_stage2.py", hash_of_stage1))
    resumed = found and Resumed(*found)
    if resumed and resumed.is_complete:
        return cast(Report, say_complete(resumed))
    if typed.get("print_options"):
        parent, resolved = continue_stage1(Options, typed)
        show(f"{resolved.table()}\n{settings_table(choose_methods(resolved, typed, parent.num_classes))}")
        return Report()
    parent, resolved, device, data = prepare(Options, typed)
    options, names = resolved.options, resolved.values("method")
    methods = choose_methods(resolved, typed, data.num_classes)
    refuse_unused(typed, resolved, methods)
    state, frozen = state_bytes(methods, parent), freeze(parent, data, device, options)
    resolved = with_threads(resolved, methods, frozen)
    if options.dry_run:
        go_on_alone()
        check_places(options, device, model_size(options, data)[1], state, resumed, 1)
        show(dry_run(methods, frozen, options.eval_every))
        return Report()
    with begin(resolved, "stage2", data, device, typed, parent, resumed, state, classifiers=len(methods)) as run:
        frozen.source.progress = run.bar
        own = [name for name in methods[0].options() if name not in ("seed", "batch_size", "finetune_epoch")]
        what = methods[0].setting.describe(own) if len(methods) == 1 else f"{len(methods)} classifiers"
        is_auto = "los" in names and {"auto", None} & set(resolved.values("label_smooth"))
        words = " (label_smooth auto: extrapolated from 0.98 at 100 classes)"
        run.say(wrapped_line("from", f"{origin(parent)}: {what}{words if is_auto and data.num_classes != 100 else ''}"))
        results = retrain(methods, frozen, resolved, run)
        if frozen.source.seconds > 1:
            run.say(frozen.source.size)
        return complete(run, conclude(results, frozen, resolved, run, argv, parent))


def choose_methods(resolved: Resolved[Options], typed: Values, num_classes: int) -> list[Method]:
    """Every method with every setting that the options ask for."""
    options, names = resolved.options, [str(name) for name in resolved.values("method")]
    return make_methods(
        names,
        tunable_values(resolved),
        typed,
        num_classes,
        published=options.protocol == "published",
        is_first=not options.has_stage1,
        recipe=recipe_values(options),
    )


def conclude(
    results: list[ClassifierResult],
    frozen: FrozenBackbone,
    resolved: Resolved[Options],
    run: Run,
    argv: Sequence[str],
    parent: Checkpoint,
) -> Report:
    """Shows the sorted table of a sweep and saves the best classifier; returns its test report."""
    options, data, settings = resolved.options, frozen.data, [result.setting for result in results]
    rows = best_of_each(ranked_rows(results, run, HINT), kept_apart(resolved))
    chosen, sweep = rows[0].results[0], chosen_on(results)

    def table() -> None:
        if len(results) > 1:
            title = f"{data.spec.name}, ratio {options.imb_ratio}, {options.network}"
            show_sweep(results, rows, run, "label_smooth", title, "method")
            for line in choices_of_val(rows, resolved, data.num_classes):
                run.say(line)
            name = chosen.setting.describe(["seed", *varying(settings)])
            run.say(f"{choice_in_words(results)}: {name}")

    run.epochs = chosen.records
    chosen.selection.test = report(frozen.logits_of(chosen, "test"), data.test.labels, data.class_counts)
    if data.val is not None:
        chosen.selection.val = calibrated(frozen.logits_of(chosen, "val"), data.val.labels, data.class_counts)
    chosen.selection.state = frozen.state_dict(chosen)
    stored = {**vars(options), **dict.fromkeys(TUNABLE), **chosen.setting.values, "method": chosen.method.name}
    device, head = frozen.source.device, head_name(chosen.classifier)
    before = parent if parent.path else None
    file = make_checkpoint(run, "stage2", options, data, chosen.selection, argv, device, before, stored, head, sweep)
    if "shown" in parent.data:
        file.data["shown"] = parent.data["shown"]
    return finish(run, file, chosen.selection, beside=table)


if __name__ == "__main__":
    main(sys.argv[1:])
