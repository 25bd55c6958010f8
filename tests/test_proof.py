"""A fast way of stepping that fails, or computes something else, is found and left out; a right one changes nothing."""

import copy
import os
import shutil

import pytest
import torch
from test_engine import CPU, distance, options_of_a_step, some_batches, some_model, some_step, stand_in
from test_solver import LOSSES as SOFTMAX
from test_solver import WD, heads, stream
from torch import Tensor, nn

from datasets import Mix
from datasets.batches import Augment
from engine import TrainStep, train_epoch
from losses import SoftmaxLoss
from models import build_model
from retraining.solver import Solver, TrainableHead
from utils.errors import UsageError
from utils.graphs import Graphed
from utils.proof import BOUNDS, STEPS, Proven, _turned, bound, compiled

AUTO = {"bound": BOUNDS["float32"]}


def run_of(step: TrainStep, epochs: int = 2, mix: Mix | None = None) -> list[float]:
    """Loss and hits of some epochs."""
    found = []
    for epoch in range(epochs):
        batches = some_batches(CPU, augment=Augment(1, False), mix=mix)
        found += train_epoch(step, batches.epoch(epoch), epoch, 0.1)
    return found


def raises(function):
    function()  # the runs before a capture have changed the weights
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def stale(place: int):
    """A recorder whose replays keep seeing one of the first inputs."""

    def record(function):
        inputs = function.__closure__[-1].cell_contents  # where Graphed puts each step's inputs
        first = inputs[place].clone()

        def run():
            inputs[place].copy_(first)
            return function()

        outputs = function()

        def replay() -> None:
            for there, tensor in zip(outputs, run()):
                there.copy_(tensor)

        return replay, outputs

    return record


def lost(*tensors_of):
    """A recorder whose replays leave some tensors as they are."""

    def record(function):
        outputs = function()

        def replay() -> None:
            kept = [(t, t.detach().clone()) for of in tensors_of for t in of()]
            for there, tensor in zip(outputs, function()):
                there.copy_(tensor)
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

        return replay, outputs

    return record


def old_outputs(place: int):
    """A recorder that always returns the first loss, or number of hits."""

    def record(function):
        outputs = function()
        kept = outputs[place].clone()

        def replay() -> None:
            for there, tensor in zip(outputs, function()):
                there.copy_(tensor)
            outputs[place].copy_(kept)

        return replay, outputs

    return record


def a_kind(step: TrainStep, kind: str):
    return lambda: step.changing()[kind]


WRONG = {  # what is wrong with a replay: its recorder, options of the step, words of the line
    "raises": (lambda step: raises, "plain", "it raises RuntimeError: operation not permitted"),
    "old images": (lambda step: stale(0), "plain", "step 2"),
    "old labels": (lambda step: stale(1), "plain", "step 2"),
    "lost weights": (lambda step: lost(a_kind(step, "weights")), "plain", "its weights differ by 1 of a step"),
    "lost momentum": (lambda step: lost(a_kind(step, "momentum")), "plain", "its momentum differ"),
    "lost statistics": (lambda step: lost(a_kind(step, "statistics")), "plain", "its statistics"),
    "lost averages": (lambda step: lost(a_kind(step, "averages")), "ema", "its averages differ"),
    "one lost weight": (lambda step: lost(lambda: [step.model.fc.weight]), "plain", "its weights differ"),
    "old loss": (lambda step: old_outputs(0), "plain", "its loss is"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_graph_is_found_and_left_out(fault: str) -> None:
    """Once, with one line; every number is that of a run without it."""
    recorder, options, words = WRONG[fault]
    models = [some_model() for _ in range(2)]
    plain, step = (some_step(model=model, **options_of_a_step(options, model)) for model in models)
    lines: list[str] = []
    step.graph = Graphed(recorder(step), say=lines.append, **AUTO)
    assert run_of(plain) == run_of(step)
    assert distance(*models) == distance(plain.averaged, step.averaged) == 0
    assert len(lines) == 1 and lines[0].startswith("--graph auto: not used, ")
    assert words in lines[0] and "\n" not in lines[0]
    step.graph = Graphed(recorder(step), must=True, **AUTO)
    with pytest.raises(UsageError, match=r"(?s)--graph on: it.*allowed: auto, off"):
        run_of(step)


def test_old_partners_and_an_old_share_are_found() -> None:
    for place in (2, 3):
        step, lines = some_step(), []
        step.graph = Graphed(stale(place), say=lines.append, **AUTO)
        run_of(step, 1, Mix(1.0, 0.0))
        assert len(lines) == 1, place


@pytest.mark.parametrize("name", ["plain", "ema", "accum", "project"])
def test_a_right_graph_is_used_and_every_bit_stays(name: str) -> None:
    models = [some_model().to(memory_format=torch.channels_last) for _ in range(2)]
    plain, step = (some_step(model=model, **options_of_a_step(name, model)) for model in models)
    recorded, lines = [], []

    def record(function):
        recorded.append(function.__closure__[-1].cell_contents)
        return stand_in(step)(function)

    step.graph = Graphed(record, must=True, say=lines.append, **AUTO)
    assert run_of(plain) == run_of(step) and distance(*models) == 0 and not lines
    assert distance(plain.averaged, step.averaged) == 0
    assert [tuple(images.shape) for images, _ in recorded] == [(8, 1, 8, 8), (4, 1, 8, 8)]
    batch = next(iter(some_batches(CPU, augment=Augment(1, False)).epoch()))
    assert recorded[0][0].stride() == _turned(batch[0], 1).stride() == batch[0].stride()  # channels last


def test_steps_that_draw_are_compared_on_the_same_draws() -> None:
    """Dropout: the same random numbers go into both; check and recording draw none that count."""
    found, models = [], [with_dropout() for _ in range(2)]
    for model, graphed in zip(models, (False, True)):
        step = some_step(model=model)
        step.graph = Graphed(stand_in(step), must=True, **AUTO) if graphed else None
        torch.manual_seed(3)
        found.append((run_of(step), torch.get_rng_state().tolist()))
    assert found[0] == found[1] and distance(*models) == 0


def with_dropout() -> nn.Module:
    model = some_model()
    model.layer3.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.5))
    return model


def test_other_draws_are_not_compared_where_a_compiler_makes_them() -> None:
    step = some_step(model=with_dropout())
    batch = next(iter(some_batches().epoch()))

    def otherwise(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.rand(7)
        return step.plain(*inputs)

    for same_draws, is_used in ((False, True), (True, False)):
        proven = Proven("--compile", same_draws=same_draws, say=lambda line: None)
        proven(otherwise, step.plain, step.changing, *batch)
        assert (proven.failed == "") == is_used


def test_another_rounding_passes_and_a_fault_as_large_as_a_step_does_not(monkeypatch) -> None:
    """In every arithmetic; frozen tensors do not water it down."""
    torch.manual_seed(0)
    weights = [torch.randn(50, 50) for _ in range(20)]
    change = [0.01 * torch.randn(50, 50) if i < 2 else torch.zeros(50, 50) for i in range(20)]
    after = [w + c for w, c in zip(weights, change)]
    for near in BOUNDS.values():
        for noise, is_fine in ((near / 2, True), (1.0, False)):
            fast = [a + noise * c.std() * torch.randn(50, 50) for a, c in zip(after, change)]
            assert (Proven("", bound=near)._changes("weights", weights, after, fast) == "") == is_fine
        assert Proven("", bound=near)._changes("weights", weights, after, weights)
        assert Proven("", bound=near)._changes("weights", weights, after, [a * torch.nan for a in after])
    assert bound(torch.bfloat16, CPU) > bound(torch.float16, CPU) > bound(None, CPU) == BOUNDS["float32"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    assert bound(None, torch.device("cuda")) == BOUNDS["tf32"]


def test_a_mistake_of_the_user_stays_one() -> None:
    """What the plain step raises is no fault of the fast way."""
    step = some_step(model=build_model("resnet8", 5, 1).train())
    step.graph = Graphed(stand_in(step))
    with pytest.raises(UsageError, match="a last batch of one image"):
        step(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64))


# Stage 2's solver.


def graphs_of(solver: Solver, recorder, **options) -> list[Graphed]:
    """Gives the linear part of a solver on a CPU a graph."""
    part = solver.parts[0]
    part.graph = Graphed(recorder(part), **options)
    return [part.graph]


def replayed(part):
    """A right recorder."""

    def record(function):
        outputs = tuple(tensor.clone() for tensor in function())

        def replay() -> None:
            for place, tensor in zip(outputs, function()):
                place.copy_(tensor)

        return replay, outputs

    return record


@pytest.mark.parametrize(
    "recorder, words",
    [
        (replayed, ""),
        (lambda part: raises, "it raises RuntimeError"),
        (lambda part: stale(0), "step 2"),
        (lambda part: stale(1), "step 2"),
        (lambda part: lost(lambda: part.changing()["weights"]), "its weights differ by 1 of a step"),
        (lambda part: lost(lambda: part.changing()["weights"][3:4]), "its weights differ"),
        (lambda part: lost(lambda: part.changing()["momentum"]), "its momentum differ"),
        (lambda part: old_outputs(0), "its loss is"),
    ],
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_solver_s_graph_proves_itself(recorder, words: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    start, found, lines = nn.Linear(12, 5), [], []
    for graphed in (False, True):
        solver = Solver(heads(start), 0.9, nesterov, chunk=len(SOFTMAX))
        graph = graphs_of(solver, recorder, say=lines.append)[0] if graphed else None
        stats = [solver.train_epoch(stream(epoch), epoch / 3, 1 - epoch / 3) for epoch in range(3)]
        found.append((stats, [t.head.weight for t in solver.parts[0].classifiers]))
        if graph and not words:
            assert len(graph._recorded) == 2 and not lines
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
    assert len(lines) == bool(words) and words in "".join(lines)
    if words:
        solver = Solver(heads(start), 0.9, nesterov, chunk=len(SOFTMAX))
        graphs_of(solver, recorder, must=True)
        with pytest.raises(UsageError, match="--graph on: it"):
            solver.train_epoch(stream(0), 0.0, 1.0)


def test_a_changed_loss_proves_itself_anew() -> None:
    start = nn.Linear(12, 5)
    phases = [SoftmaxLoss(5), SOFTMAX[2]]
    solver = Solver([TrainableHead(copy.deepcopy(start), lambda progress: phases[progress > 0], 0.1, WD[1])])
    [graph] = graphs_of(solver, replayed)
    checked = []
    check = graph.proven._check
    graph.proven._check = lambda *given: checked.append(len(given[3][0])) or check(*given)
    for epoch in range(4):
        solver.train_epoch(stream(epoch), float(epoch > 1), 1.0)
    assert checked == [16, 6, 16, 6]


# torch.compile.


def test_a_compiler_that_fails_or_errs_is_left_out() -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    for wrong, words in ((broken, "it raises RuntimeError: no compiler"), (None, "its loss is")):
        models, lines = [some_model() for _ in range(2)], []
        plain = some_step(model=models[0])
        step = some_step(model=models[1], compile="auto", say=lines.append)
        step.faster = wrong or (lambda images, model=models[1]: 1.3 * model(images))
        assert run_of(plain) == run_of(step) and distance(*models) == 0
        assert len(lines) == 1 and lines[0].startswith("--compile auto: not used, ") and words in lines[0]
        step = some_step(compile="on")
        step.faster = wrong or (lambda images, model=step.model: 1.3 * model(images))
        with pytest.raises(UsageError, match="--compile on: it"):
            run_of(step)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
def test_the_check_of_a_compiler_changes_no_bit_and_takes_few_steps(monkeypatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    models = [some_model().to(memory_format=torch.channels_last) for _ in range(2)]
    alone = some_step(model=models[0])
    alone.network = compiled(models[0])
    steps = []
    step = some_step(model=models[1], compile="on")
    plain = step.plain
    step.plain = lambda *batch: steps.append(len(batch[1])) or plain(*batch)
    assert run_of(alone) == run_of(step) and distance(*models) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(torch.backends.cpu.get_cpu_capability())
    assert steps.count(8) == 2 * 2 + 2 * STEPS and steps.count(4) == 2 + 2 * STEPS
