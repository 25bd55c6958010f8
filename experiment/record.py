"""A run from beginning to end: its folder, the evaluation of its epochs, its checkpoint and figures."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from datasets import LongTailed
from engine import TRAINING, Selection, TrainStats, evaluate, evaluations, is_due, predict
from experiment.data import eval_batches
from experiment.options import DataOptions, TrainOptions, data_name
from experiment.restore import final_path, final_path_of
from experiment.resuming import Resumed, processes_of
from losses import balances
from models import pick_stem, sketch
from utils import checkpoints
from utils.checkpoints import HELD_OUT, Checkpoint, Chosen, Metrics, Sweep
from utils.console import counted, duration
from utils.distributed import barrier, launcher, on_main_process, rank, world_size
from utils.errors import Unsaved, UsageError
from utils.files import require_room, require_writable, write_text
from utils.metrics import (
    FIGURES,
    GROUPS,
    Logits,
    Report,
    fit_temperature,
    per_class_csv,
    per_class_rows,
    percent,
    report,
)
from utils.options import Resolved, Values, flags
from utils.plots import learning_curves, per_class_accuracy
from utils.resume import FINISHED, completed_run
from utils.run import Run, make_folder, one_line
from utils.system import ROOT, deterministic_words, pick_graph, provenance
from utils.types import Record, StateDict

T = TypeVar("T", bound=TrainOptions)
#: Checkpoints of a run that its folder needs room for: one, and another that replaces it.
COPIES = 2
#: What a state takes beside a checkpoint: weights, momentum, averaged weights, and those selected so far.
STATE = 4


def note_balance(run: Run, trainings: Iterable[tuple[str, str, nn.Module]]) -> None:
    """Says which trainings balance the classes twice, by sampler and by loss: (their name, sampler, loss) of each."""
    twice = dict.fromkeys(name for name, sampler, loss in trainings if sampler != "instance" and balances(loss))
    if twice:
        run.say(f"note: classes are balanced twice, by the sampler and by the loss: {', '.join(twice)}")


def begin(
    resolved: Resolved[T],
    stage: str,
    data: LongTailed,
    device: torch.device,
    typed: Values,
    start: Checkpoint | None,
    resumed: Resumed | None,
    state: int,
    runs: int = 1,
    classifiers: int = 1,
) -> Run:
    """Opens the folder of a run and says what will run; fails now what would fail later.

    Args:
        resolved: the options.
        stage: "stage1", "stage2" or "compare".
        data: what it trains and tests on.
        device: where it runs.
        typed: the flags that --resume will begin with again, beside the seeds.
        start: the file that training begins from.
        resumed: the run that it goes on with.
        state: about how many bytes a save takes.
        runs: runs of a sweep, each in a folder of its own inside.
        classifiers: classifiers that it makes, all in one folder.

    Raises:
        UsageError: see :func:`check_places`; or another process has the folder.
    """
    options, seeds = resolved.options, resolved.values("seed")
    several = {"runs": runs, "classifiers": classifiers}
    label = next((f"{number}{what}" for what, number in several.items() if number > 1), f"seed{seeds[0]}")
    kept = resumed.kept if resumed else ()

    script = "compare.py" if stage == "compare" else f"main_{stage}.py"
    parameters, size = model_size(options, data)

    def make() -> Path:
        check_places(options, device, 0 if stage == "compare" else size, state, resumed, runs)
        if resumed:
            return resumed.folder
        folder = make_folder(options.out, final_path(options, stage).stem, label)
        begun = {
            "script": script,
            "typed": {name: value for name, value in typed.items() if name != "resume"},
            "seed": seeds,
            "start": None if start is None else start.sha256,
            "processes": processes_of(script),
            "options": resolved.stored(),
            "sources": dict(resolved.sources),
        }  # without which nothing that the run saves could be taken up again
        write_text(folder / "options.json", json.dumps(begun, indent=1) + "\n")
        return folder

    folder = on_main_process(make)
    run = Run(folder if rank() == 0 else None, is_locked=True)
    if resumed and on_main_process(lambda: completed_run(folder)):
        run.__exit__(None, None, None)
        raise UsageError(f"another process has completed {folder} meanwhile", "the same once more")
    if resumed and not on_main_process(lambda: any(map(any, map(folder.rglob, ("state-*.pt", FINISHED))))):
        run.say("nothing had been saved when it was cut off: it begins anew")
    where = f"{device}, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)
    if world_size() > 1:
        where = f"{where.replace(':0', '')} in each of {world_size()} processes"
    block = {
        "command": shlex.join([*launcher(), script, *flags({k: v for k, v in typed.items() if k not in kept})]),
        "data": data.describe(),
        "network": f"{options.network}, {parameters / 1e6:.2f} M parameters, on {where}",
        "options": resolved.labelled(kept, "as the run began").describe(),
        "folder": f"{run.folder}{', resumed' if resumed else ''}",
    }
    run.say("\n".join(wrapped_line(name, text) for name, text in block.items()))
    if options.deterministic:
        run.say(deterministic_words(device))
    run.resume_by = shlex.join([*launcher(), place_of(script), f"--resume={run.folder}"])
    return run


def wrapped_line(name: str, text: str) -> str:
    """A line of the block that a run begins with, wrapped where it is long."""
    return textwrap.fill(
        text,
        120,
        initial_indent=f"{name:<9}",
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def check_places(
    options: TrainOptions, device: torch.device, size: int, state: int, resumed: Resumed | None, runs: int
) -> None:
    """Raises UsageError where --graph cannot be had, or so many files of ``size`` bytes, and states, be written."""
    pick_graph(options.graph, device)
    is_run = not options.dry_run
    require_writable("the folder", checkpoints.FOLDER, make=is_run)
    require_writable("--resume" if resumed else "--out", resumed.folder if resumed else Path(options.out), make=is_run)
    done = len([*resumed.folder.glob(f"*/{FINISHED}")]) if resumed else 0
    saves, files = (1, max(1, runs - done)) if resumed else (options.keep_states + 1, COPIES * runs)
    room = {resumed.folder if resumed else options.out: saves * state + files * size, checkpoints.FOLDER: size}
    require_room(room, f"a run with checkpoints of {size / 1e6:,.0f} MB and states of {state / 1e6:,.0f} MB")


def model_size(options: DataOptions, data: LongTailed) -> tuple[int, int]:
    """The number of parameters of the options' network, and about how many bytes a checkpoint of it takes."""
    stem = pick_stem(options.network, data.train.side, options.stem)
    model = sketch(options.network, data.num_classes, data.channels, stem=stem)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return sum(parameter.numel() for parameter in model.parameters()), size


def calibrated(logits: Logits, labels: Tensor, class_counts: list[int]) -> Report:
    """The report of held-out images, with the ``temperature`` that suits them."""
    return {**report(logits, labels, class_counts), "temperature": fit_temperature(logits, labels)}


class Evaluator:
    """Evaluates a model after the epochs that are due, logs every epoch, and keeps the selected one."""

    def __init__(self, run: Run, data: LongTailed, device: torch.device, options: TrainOptions, epochs: int) -> None:
        self.run, self.class_counts, self.epochs = run, data.class_counts, epochs
        self.every, self.flip_tta = options.eval_every, options.flip_tta
        self.images = len(data.test) + (len(data.val) if data.val else 0)
        self.test = eval_batches(data, data.test, device)
        self.val = eval_batches(data, data.val, device) if data.val else None
        self.selection = Selection(options.select, options.select_by)

    def as_steps(self, batch_size: int) -> float:
        """About how many training steps all evaluations take."""
        looked_at = evaluations(self.epochs, self.every) * self.images * (2 if self.flip_tta else 1)
        return looked_at / (TRAINING * batch_size)

    def state_dict(self) -> StateDict:
        """What has been selected so far."""
        return self.selection.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Goes on from a state."""
        self.selection.load_state_dict(state)

    def after(self, epoch: int, model: nn.Module, train: TrainStats, lr: float, seconds: float) -> None:
        """Logs epoch (from 0); ``seconds`` is the time of its training part."""
        record: Record = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": train.loss,
            "train_top1": train.top1,
            "seconds": seconds,
        }
        if is_due(epoch, self.epochs, self.every):
            test = evaluate(model, self.test, self.class_counts, self.flip_tta)
            val = calibrated(*predict(model, self.val, self.flip_tta), self.class_counts) if self.val else None
            self.selection.offer(epoch + 1, model, test, val)
            record |= {"test_top1": test["top1"], "test_top5": test["top5"]}
            record |= {f"test_{group}": test["groups"][group]["accuracy"] for group in GROUPS}
            if val is not None:
                record[f"val_{self.selection.by}"] = val[self.selection.by]
        self.run.log(record)
        barrier()


def make_checkpoint(
    run: Run,
    stage: str,
    options: TrainOptions,
    data: LongTailed,
    selection: Selection,
    argv: Sequence[str],
    device: torch.device,
    parent: Checkpoint | None = None,
    stored: Values | None = None,
    head: str = "linear",
    sweep: Sweep | None = None,
) -> Checkpoint:
    """The checkpoint of a run that has ended.

    ``stored`` are the options to keep where the run had several values of one, ``head`` the kind of the classifier,
    ``sweep`` how many settings it was chosen from and on what.
    """
    stem = pick_stem(options.network, data.train.side, options.stem)
    metrics = cast(Metrics, dict(selection.test))
    metrics |= {"epoch": selection.epoch, "select": selection.rule, "flip_tta": options.flip_tta}
    if sweep:
        metrics["sweep"] = sweep
    if selection.val is not None:
        metrics |= {"temperature": selection.val["temperature"], "select_by": selection.by}
    return Checkpoint(
        stage=stage,
        network=options.network,
        num_classes=data.num_classes,
        in_channels=data.channels,
        model=selection.state,
        options=dict(stored or vars(options)),
        data={
            "dataset": options.dataset,
            "imb_type": options.imb_type,
            "imb_ratio": options.imb_ratio,
            "subset": options.subset,
            "subset_seed": options.subset_seed,
            **({} if data.train.is_rows else {"image_size": data.train.side}),
            "network": options.network,
            "stem": stem,
            "name": data_name(options),
            "train_images": data.train.summary(),
            "read": data.train.read,
            "class_names": data.class_names,
            "class_counts": data.class_counts,
            "mean": list(data.spec.mean),
            "std": list(data.spec.std),
            **({"fit": options.fit} if data.spec.own and not data.spec.rows else {}),
            **({} if data.spec.levels is None else {"levels": list(data.spec.levels)}),
            "listing": data.spec.listing,
            **({"test_files": list(data.spec.test_files)} if data.spec.test_files else {}),
            "val_indices": [] if data.val is None else data.val.indices.tolist(),
        },
        metrics=metrics,
        parent=None if parent is None else checkpoints.describe_parent(parent),
        provenance={**provenance(f"main_{stage}.py", argv, device, run.seconds), "resumed": run.resumed},
        head=head,
        stem=stem,
    )


def finish(
    run: Run,
    file: Checkpoint,
    selection: Selection,
    is_final: bool = True,
    beside: Callable[[], None] | None = None,
) -> Report:
    """Writes the checkpoint (final path and run folder), then the plots and the per-class table; returns the report.

    A run that is not ``is_final``, one of several, leaves the final path alone. ``beside`` shows what else there is,
    once the weights are safe.

    Raises:
        Unsaved: the final path could not be written to; the run folder's copy then stands.
    """
    ending = save_weights(file, run, final_path_of(file) if is_final else None)
    if beside is not None:
        beside()
    rows = per_class_rows(selection.test, file.data["class_names"], file.data["class_counts"])
    with run.side_output("per_class.csv") as path:
        path.write_bytes(per_class_csv(rows).encode(errors="surrogateescape"))
    method = f" {file.options['method']}" if "method" in file.options else ""
    title = f"{file.data['dataset']}, ratio {file.data['imb_ratio']}, {file.network}, {file.stage}{method}"
    if run.epochs:  # some methods train nothing
        with run.side_output("curves.png") as path:
            learning_curves(run.epochs, title, path)
    with run.side_output("per_class.png") as path:
        per_class_accuracy(selection.test, rows, f"{title}: {percent(selection.test['top1'])} %", path)

    test, (best_epoch, best) = selection.test, selection.best_on_test
    groups = ", ".join(f"{group} {percent(test['groups'][group]['accuracy'])}" for group in GROUPS)
    run.say(f"selected: {selection_words(file.metrics)}")
    for words in ancestors(file):
        run.say(words)
    if selection.rule != "best_test" and "sweep" not in file.metrics:
        run.say(f"best on the test set, not used: {percent(best['top1'])} % at epoch {best_epoch}")
    run.say(f"test top-1 {percent(test['top1'])} % ({groups}); {ending()}, in {duration(run.seconds)}")
    if is_final:
        run.say(f"next: {following(file)}")
    return test


def following(file: Checkpoint) -> str:
    """The command that comes after the one that made a file, which says all that it needs to know."""
    script = "main_stage2.py" if file.stage == "stage1" else "evaluate.py"
    return shlex.join(["python", place_of(script), "--from", str(final_path_of(file))])


def place_of(script: str) -> str:
    """A script as it can be typed in the current folder."""
    return script if Path(script).is_file() else str(ROOT / script)


def save_weights(file: Checkpoint, run: Run, final: Path | None) -> Callable[[], str]:
    """Writes finished weights to their final path and to the run folder.

    A disk that refuses one does not keep the other back. Returns what to call at the very end: it gives the line that
    says where they are.

    Raises:
        Unsaved: what is returned, where the final path could not be written to; with where the weights are.
    """
    failed: Exception | None = None
    line = ""
    if final is not None:
        try:
            line = checkpoints.save_final(file, final)
        except (OSError, UsageError) as error:
            failed = error
    copy = run.folder / "checkpoint.pt"
    with run.side_output(copy.name) as path:
        file.save(path)
    line = line or (f"saved {copy}" if copy.is_file() else "trained")

    def ending() -> str:
        if failed is None:
            return line
        where = f"the weights are in {copy}" if copy.is_file() else "there is no copy of the weights"
        raise Unsaved(f"{final} has not been written: {one_line(failed)}; {where}") from failed

    return ending


def selection_words(metrics: Metrics | Chosen) -> str:
    """How the stored epoch was chosen, in words: "epoch 200, the last; no flip averaging"."""
    held_out = f"{HELD_OUT} by {FIGURES[metrics.get('select_by', 'class_mean')]}"
    rule = {"last": "the last", "best_test": "the best on the TEST set", "best_val": f"the best on {held_out}"}
    flip = "with flip averaging" if metrics["flip_tta"] else "no flip averaging"
    setting, swept = "", metrics.get("sweep")
    if swept:
        where = held_out if swept["chosen_on"] == HELD_OUT else swept["chosen_on"]
        setting = f"; the best of {counted(swept['settings'], 'setting')} on {where}"
    return f"epoch {metrics['epoch']}, {rule[metrics['select']]}{setting}; {flip}"


def ancestors(file: Checkpoint) -> list[str]:
    """How the weights that a file began from were chosen, a line for each file before it."""
    lines, parent = [], file.parent
    while parent:
        if parent.get("chosen"):  # older files do not say
            lines.append(f"began from {parent['path']}: {selection_words(parent['chosen'])}")
        parent = parent.get("parent")
    return lines
