"""Every classifier of a command, made on one pass over the frozen backbone: the loops of stage 2.

main_stage2.py and compare.py both run them, which is why they are here and not in a script.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from datasets import LongTailed
from engine import TrainStep, is_due, make_sgd, set_lr, train_epoch
from experiment.data import EVAL_BATCH
from experiment.pretrained import shown_of
from experiment.record import STATE, note_balance
from experiment.restore import restore
from experiment.resuming import make_state
from experiment.threads import settle_threads
from models import trained_part
from retraining.features import FEATURES, Given, Stream, unseen
from retraining.forecast import Forecast
from retraining.methods import Method, Trained
from retraining.options import Options
from retraining.results import ClassifierResult, Finished, FrozenBackbone, Results, name_of
from retraining.settings import by_stream, cached_streams
from retraining.solver import Solver, heads_that_fit
from utils.checkpoints import Checkpoint
from utils.console import counted
from utils.distributed import go_on_alone, on_main_process, world_size
from utils.errors import Diverged
from utils.files import require_room
from utils.options import Resolved
from utils.resume import TrainState
from utils.run import Run
from utils.system import AMP, pick_amp

T = TypeVar("T", bound=Options)
#: What may help where every classifier diverges.
HINT = "a lower --finetune_lr may help"


class Work(NamedTuple):
    """What all trainings of a command share."""

    frozen: FrozenBackbone
    options: Options
    run: Run
    state: TrainState
    forecast: Forecast


def freeze(parent: Checkpoint, data: LongTailed, device: torch.device, options: Options) -> FrozenBackbone:
    """Stage 1's network with its feature source, which shows no progress yet."""
    kind = Given if data.spec.rows else FEATURES[options.features]
    source = kind(
        restore(parent, data),
        data,
        device,
        options.cache_dir,
        f"{parent.sha256} {parent.network} {parent.stem} {shown_of(parent)}",
        options.flip_tta,
        unseen,
        EVAL_BATCH[device.type],
        options.views,
        options.view_seed,
        options.feature_dtype,
        options.check_cache,
        options.standardize,
        AMP[pick_amp(options.amp, device)],
    )
    return FrozenBackbone(source)


def with_threads(resolved: Resolved[T], methods: Sequence[Method], frozen: FrozenBackbone) -> Resolved[T]:
    """The options with the number of CPU threads that is settled where none was typed."""
    options, source, train = resolved.options, frozen.source, frozen.data.train
    images = 0 if options.deterministic else source.images_left(cached_streams(methods), options.eval_every)
    shape = train.channels, train.side, train.side
    threads = settle_threads(lambda: source.model, shape, images, source.device, options.threads, trains=False)
    return resolved.settled(replace(options, threads=threads))


def state_bytes(methods: Sequence[Method], parent: Checkpoint) -> int:
    """About how many bytes a save takes: three copies of every classifier, and a network where one is trained."""
    sizes = {name: value.numel() * value.element_size() for name, value in parent.model.items()}
    head, network = sum(size for name, size in sizes.items() if name.startswith("fc.")), sum(sizes.values())
    trains_network = any(method.scope != "fc" for method in methods)
    return 3 * head * len(methods) + STATE * network * trains_network


def retrain(
    methods: Sequence[Method], frozen: FrozenBackbone, resolved: Resolved[Options], run: Run
) -> list[ClassifierResult]:
    """Makes every classifier: those that see the same batches side by side, on one pass over the backbone."""
    options, results = resolved.options, list[ClassifierResult]()
    run.is_sweep = len(methods) > 1
    fill_cache(methods, frozen, options, run)
    finished = Finished(frozen, options.select, options.select_by)
    state = make_state(run, options, resolved.stored(), frozen.data, frozen.source.device, finished=finished)
    taught = [method for method in methods if isinstance(method, Trained)]
    losses = ((f"{m.name} with --sampler {m.sampler}", m.sampler, m.loss(frozen.stage1, 1.0)) for m in taught)
    note_balance(run, losses)
    afterwards = [m.name for m in methods if m.adjusts and m.start == "class_mean"]
    if afterwards:
        names = ", ".join(dict.fromkeys(afterwards))
        run.say(f"note: classes are balanced twice, by the start and afterwards: {names}")
    waiting = [method for method in methods if method not in finished]
    work = Work(frozen, options, run, state, Forecast(waiting, frozen, options.eval_every))
    for stream, group in by_stream(methods).items():
        trained = [method for method in group if isinstance(method, Trained)]
        if stream is None:
            results += post_hoc(group, frozen, options)
            continue
        heads = [method for method in trained if method.scope == "fc"]
        parts = in_memory(heads, stream, frozen, run, finished) + [[m] for m in trained if m.scope != "fc"]
        for part in parts:
            found = finished.find(part)
            if found is None:
                train = train_heads if part[0].scope == "fc" else train_network
                found = train(part, stream, work)
                finished.add(found)
            results += found
    return results


def fill_cache(methods: Sequence[Method], frozen: FrozenBackbone, options: Options, run: Run) -> None:
    """Says which features lack; several processes make them now, and the first goes on alone.

    Raises:
        UsageError: no room for them.
    """
    source, streams = frozen.source, cached_streams(methods)

    def planned() -> tuple[int, int]:
        arrays, lacking = source.arrays(streams)
        require_room({options.cache_dir: lacking * source.array_bytes}, f"--features {options.features}")
        return arrays, lacking

    arrays, lacking = on_main_process(planned)
    if lacking:
        others = "" if lacking == arrays else f", {arrays - lacking} are in the cache"
        passes = counted(lacking, "pass", "passes")
        run.say(f"features of {len(frozen.data.train):,} training images: {passes} over the backbone{others}")
    if world_size() > 1:
        is_clean = any(m.takes_features or m.start not in ("stage1", "random") for m in methods)
        if any(method.scope == "fc" for method in methods):
            source.fill(streams, is_clean)
        run.say(f"the first of {world_size()} processes goes on alone")
        go_on_alone()


def post_hoc(methods: Sequence[Method], frozen: FrozenBackbone, options: Options) -> list[ClassifierResult]:
    """Methods that train nothing."""
    results = []
    for method in methods:
        began, passes = time.perf_counter(), frozen.source.seconds
        start = frozen.start(method)
        method = method.chosen(start, options.select_by)
        head = method.head(start)
        result = ClassifierResult(method, options.select, options.select_by)
        result.seconds = time.perf_counter() - began - (frozen.source.seconds - passes)
        frozen.measure(result, head, epoch=-1)
        results.append(result)
    return results


def in_memory(
    methods: Sequence[Trained], stream: Stream, frozen: FrozenBackbone, run: Run, finished: Finished
) -> list[Sequence[Trained]]:
    """The methods in groups whose classifiers can be trained side by side; says so where they are several.

    Raises:
        UsageError: see :func:`retraining.solver.heads_that_fit`.
    """
    if not methods:
        return []
    classes, features = frozen.stage1.weight.shape
    if stream.describe() not in finished.fits:
        fit = heads_that_fit(len(methods), classes, features, stream.batch_size, frozen.source.device)
        finished.fits[stream.describe()] = fit
    fit = finished.fits[stream.describe()]
    groups = [methods[first : first + fit] for first in range(0, len(methods), fit)]
    if len(groups) > 1:
        heads = f"{len(methods)} heads of {classes} x {features}"
        run.say(f"{heads}: {fit} fit in memory at a time, {len(groups)} passes")
    return groups


def train_heads(methods: Sequence[Trained], stream: Stream, work: Work) -> list[ClassifierResult]:
    """Trains classifiers on a frozen backbone, all on the same batches."""
    frozen, options, run, state, forecast = work
    results = [ClassifierResult(method, options.select, options.select_by) for method in methods]
    heads = [frozen.trainable_head(method) for method in methods]
    solver = Solver(heads, options.momentum, options.nesterov, graph=options.graph, say=run.say)

    steps = -(-len(frozen.data.train) // stream.batch_size)
    with state.training(name_of(methods[0]), stream.epochs, steps, solver=solver, results=Results(results, frozen)):
        batches = methods[0].batches(frozen.source, frozen.stage1)
        forecast.begin(methods, stream.epochs - state.epoch)
        run.begin_training(stream.epochs - state.epoch, 0, options.eval_every, forecast.left)
        for epoch in range(state.epoch, stream.epochs):
            rates = [method.rate(epoch) for method in methods]
            train = solver.train_epoch(batches(epoch), epoch / stream.epochs, rates, state)
            seconds, due = state.seconds, is_due(epoch, stream.epochs, options.eval_every)
            if due:
                frozen.make_features(stream, epoch)
            for result, head, rate, stats in zip(results, heads, rates, train):
                is_well = result.after(epoch, head.lr * rate, stats, seconds, frozen.data.num_classes)
                if is_well and due:
                    frozen.measure(result, result.method.finished(head.head), epoch)
            forecast.end(methods, stream.epochs - epoch - 1)
            whole = [result for result in results if result.diverged is None]
            run.log_many({result.setting.describe(): result.records[-1] for result in whole}, stream.describe())
            state.next_epoch()

    for result, spent in zip(results, solver.seconds):
        result.seconds = spent
    return results


def train_network(methods: Sequence[Trained], stream: Stream, work: Work) -> list[ClassifierResult]:
    """Trains a classifier together with the backbone or its last block: the ordinary loop, for one method."""
    frozen, options, run, state, forecast = work
    (method,) = methods
    result = ClassifierResult(method, options.select, options.select_by)
    model = copy.deepcopy(frozen.source.model).to(memory_format=torch.channels_last)
    model.load_state_dict(frozen.source.backbone(None, -1))
    start = frozen.start(method)
    model.fc = method.head(start)
    trained = trained_part(model, method.scope)
    batches = frozen.source.train_batches(stream)
    lr, wd = method.finetune_lr, method.finetune_wd
    optimizer = make_sgd(trained.parameters(), lr, options.momentum, wd, options.nesterov)
    step = TrainStep(model, method.loss(start, 0.0), optimizer)

    kept = Results([result], frozen)
    with state.training(name_of(method), stream.epochs, len(batches), step=step, result=kept):
        forecast.begin(methods, stream.epochs - state.epoch)
        run.begin_training(stream.epochs - state.epoch, 0, options.eval_every, forecast.left)
        for epoch in range(state.epoch, stream.epochs):
            rate = method.rate(epoch)
            model.train(options.features == "replay")
            trained.train()
            set_lr(optimizer, lr * rate)
            step.use_loss(method.loss(start, epoch / stream.epochs).to(frozen.source.device))
            steps = batches.epoch(epoch, first=state.step)
            bar = run.bar(steps, len(batches) - state.step, f"epoch {epoch + 1}/{stream.epochs}")
            try:
                stats = train_epoch(step, bar, epoch, lr * rate, state)
                if not state.is_trained:
                    method.project(model.fc, start)
                    state.is_trained = True
                seconds, logits = state.seconds, None
                if is_due(epoch, stream.epochs, options.eval_every):
                    val = frozen.network_logits(model, "val") if frozen.data.val else None
                    logits = frozen.network_logits(model, "test"), val
                result.seconds += seconds
                if not result.after(epoch, lr * rate, stats, seconds, frozen.data.num_classes):
                    break
                if logits:
                    result.offer(epoch + 1, model, *logits, frozen.data)
            except Diverged:
                result.diverged = epoch + 1
                break
            forecast.end(methods, stream.epochs - epoch - 1)
            words = method.setting.describe(["seed", "finetune_scope"])
            run.log_many({method.setting.describe(): result.records[-1]}, words)
            state.next_epoch()
        forecast.begin(methods, 0)  # one that diverges ends early
    return [result]
