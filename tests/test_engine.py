"""The training step against plain loops, and every way of running it against the plain one."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import in_float64
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from datasets import Batches, Mix
from datasets.batches import Augment
from engine import Selection, TrainStep, cosine, is_due, make_sgd, predict, set_lr, train_epoch
from losses import SoftmaxLoss, class_balanced_weights, reweighted
from models import build_model
from training.recipe import constraint
from utils import proof
from utils.errors import Diverged
from utils.graphs import Graphed
from utils.metrics import accuracies
from utils.system import cpu_has_bf16

CPU = torch.device("cpu")
N = 20  # two batches of eight and one of four


def some_batches(device: torch.device = CPU, **options) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Batches(images, torch.arange(N) % 5, 8, (0.5,), (0.25,), device, **options)


def some_model(device: torch.device = CPU, head: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", 5, 1, head).to(device).train()


def some_step(device: torch.device = CPU, model: nn.Module | None = None, lr: float = 0.1, **options) -> TrainStep:
    model = model or some_model(device).to(memory_format=torch.channels_last)
    optimizer = make_sgd(model.parameters(), lr, 0.9, 1e-3, nesterov=False)
    return TrainStep(model, SoftmaxLoss(5, smooth=0.3).to(device), optimizer, **options)


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values())
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


@pytest.fixture
def near(device: torch.device) -> Iterator[float]:
    """How near equal runs come: in float64; on a GPU, whose fused SGD has its learning rate in float32, in float32."""
    if device.type == "cuda":
        yield 1e-3
        return
    with in_float64():
        yield 1e-9


def test_train_epoch_equals_a_plain_loop(device: torch.device, near: float) -> None:
    step, twin = some_step(device), some_model(device)
    optimizer = SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(3):
        stats = train_epoch(step, some_batches(device).epoch(), epoch, 0.1)
        losses, right = 0.0, 0
        for images, labels in some_batches(device).epoch():
            logits = twin(images)
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses, right = losses + loss.item() * len(labels), right + int((logits.argmax(1) == labels).sum())
        assert stats.loss == pytest.approx(losses / N, rel=near)
        assert abs(stats.top1 - right / N) <= (1 / N if device.type == "cuda" else 0)
    assert distance(step.model, twin) < near


@pytest.mark.parametrize("replay", [False, True])
def test_a_frozen_backbone_stays_and_its_statistics_move_in_replay_alone(replay: bool) -> None:
    model = some_model().requires_grad_(False).train(replay)
    model.fc.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = TrainStep(model, SoftmaxLoss(5, smooth=0.9), make_sgd(model.fc.parameters(), 0.1, 0, 0, nesterov=False))
    train_epoch(step, some_batches().epoch(), 0, 0.1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"fc.weight", "fc.bias"} <= changed
    rest = {name.split(".")[-1] for name in changed - {"fc.weight", "fc.bias"}}
    assert rest == ({"running_mean", "running_var", "num_batches_tracked"} if replay else set())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("fc"))


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_the_optimizer_is_sgd(device: torch.device, momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    mine, theirs = (nn.Parameter(start.clone().to(device)) for _ in range(2))
    ours = make_sgd([mine], 0.1, momentum, 0.01, nesterov)
    plain = SGD([theirs], 0.1, momentum=momentum, weight_decay=0.01, nesterov=nesterov)
    for rate in (0.1, 0.1, 0.03, 0.0):
        for parameter, optimizer in (mine, ours), (theirs, plain):
            set_lr(optimizer, rate)
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=1e-6) and not torch.allclose(mine.cpu(), start, atol=1e-2)


def stand_in(step: TrainStep):
    """What a recording does, without a GPU: the runs before it really happen, outputs and loss stay what they were."""

    def record(function):
        criterion = step.criterion

        def run():
            now, step.criterion = step.criterion, criterion
            try:
                return function()
            finally:
                step.criterion = now

        for _ in range(3):
            run()
        outputs = tuple(tensor.clone() for tensor in run())

        def replay() -> None:
            for place, tensor in zip(outputs, run()):
                place.copy_(tensor)

        return replay, outputs

    return record


def options_of_a_step(name: str, model: nn.Module) -> dict:
    return {
        "plain": {},
        "ema": {"ema": 0.7},
        "accum": {"accum": 3},
        "project": {"project": constraint(model.fc, "maxnorm", 0.3)},
    }[name]


@pytest.mark.parametrize("name", ["plain", "ema", "accum", "project"])
@pytest.mark.parametrize("mix", [None, Mix(1.0, 1.0)])
def test_a_graph_equals_the_plain_step(device: torch.device, near: float, name: str, mix: Mix | None) -> None:
    """Weights, momentum, BatchNorm and averages are as if the recording had not run anything; so is the last batch."""
    models = [some_model(device) for _ in range(2)]
    plain, graphed = (some_step(device, model, **options_of_a_step(name, model)) for model in models)
    graphed.graph = Graphed() if device.type == "cuda" else Graphed(stand_in(graphed))
    for epoch, lr in enumerate((0.1, 0.05, 0.02, 0.01)):
        found = []
        for step in (plain, graphed):
            set_lr(step.optimizer, lr)
            batches = some_batches(device, augment=Augment(1, False), mix=mix)
            found.append(train_epoch(step, batches.epoch(epoch), epoch, lr))
            if epoch == 1:
                weights = class_balanced_weights([90, 6, 5, 3, 2])
                step.use_loss(reweighted(step.criterion, weights).to(device))
        assert found[0].loss == pytest.approx(found[1].loss, rel=near)
        assert abs(found[0].top1 - found[1].top1) <= (1 / N if device.type == "cuda" else 0)
    assert distance(*models) < near and distance(plain.averaged, graphed.averaged) < near
    momenta = [[s["momentum_buffer"] for s in step.optimizer.state.values()] for step in (plain, graphed)]
    assert all(torch.allclose(a, b, atol=near) for a, b in zip(*momenta))


def test_a_graph_goes_with_its_step(monkeypatch) -> None:
    monkeypatch.setattr(proof, "STEPS", 0)  # this one replays nothing
    step = some_step()
    step.graph = Graphed(lambda function: (lambda: None, function()))
    step(*next(iter(some_batches().epoch())))
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", [{"compile": "on"}, {"amp": torch.float16}, {"amp": torch.bfloat16, "compile": "on"}])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_other_ways_in_a_graph(way: dict) -> None:
    models = [some_model(torch.device("cuda")) for _ in range(2)]
    for model, graphed in zip(models, ("off", "on")):
        step = some_step(torch.device("cuda"), model, lr=0.02, graph=graphed, **way)
        for epoch in range(3):
            train_epoch(step, some_batches(torch.device("cuda")).epoch(), epoch, 0.02)
    assert distance(*models) < (1e-3 if way == {"compile": "on"} else 2e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_equals_the_plain_one(device: torch.device, near: float) -> None:
    models = [some_model(device).to(memory_format=torch.channels_last) for _ in range(2)]
    for model, compiled in zip(models, ("off", "on")):
        step = some_step(device, model, compile=compiled)
        for epoch in range(2):
            train_epoch(step, some_batches(device).epoch(), epoch, 0.1)
    assert 0 < distance(*models) < near


def test_bf16_follows_float32_with_weights_and_loss_in_float32(device: torch.device) -> None:
    if device.type == "cpu" and not cpu_has_bf16():
        pytest.skip("this CPU has no bfloat16")
    models, stats = [some_model(device) for _ in range(2)], []
    for model, amp in zip(models, (None, torch.bfloat16)):
        step = some_step(device, model, lr=0.002, amp=amp)
        stats += [train_epoch(step, some_batches(device).epoch(), epoch, 0.1) for epoch in range(2)]
        assert {tensor.dtype for kind in step.changing().values() for tensor in kind} == {torch.float32, torch.int64}
    assert 1e-6 < distance(*models) < 2e-2
    assert stats[2].loss == pytest.approx(stats[0].loss, rel=0.02) and stats[3].loss != stats[1].loss
    seen = []
    step = some_step(device, models[1], amp=torch.bfloat16)
    models[1].fc.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    models[1].layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step.criterion.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    step(*next(iter(some_batches(device).epoch())))
    assert seen == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fp16_scales_its_loss_and_trains() -> None:
    device = torch.device("cuda")
    models = [some_model(device) for _ in range(2)]
    for model, amp in zip(models, (None, torch.float16)):
        step = some_step(device, model, lr=0.02, amp=amp)
        for epoch in range(2):
            train_epoch(step, some_batches(device).epoch(), epoch, 0.1)
    assert 1e-6 < distance(*models) < 2e-2


def test_averaged_weights_and_statistics() -> None:
    step = some_step(ema=0.9)
    expected = copy.deepcopy(step.model.state_dict())
    for batch in some_batches().epoch():
        step(*batch)
        for name, value in step.model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value.clone()
    for name, value in step.averaged.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert distance(step.averaged, step.model) > 1e-3 and not any(p.requires_grad for p in step.averaged.parameters())
    assert some_step().averaged.fc is not None


def test_a_mixed_batch_pays_both_labels() -> None:
    step, model = some_step(), some_model()
    images, labels = next(iter(some_batches().epoch()))
    partners, share = labels.roll(1), torch.tensor(0.3)
    loss, _ = step(images, labels, partners, share)
    logits, criterion = model(images), SoftmaxLoss(5, smooth=0.3)
    assert loss.item() == pytest.approx((0.3 * criterion(logits, labels) + 0.7 * criterion(logits, partners)).item())
    found = logits.argmax(1)
    assert step(images, found, partners, share)[1] < 8 and some_step()(images, found, partners, share)[1] == 8


@pytest.mark.parametrize("kind", ["l2", "maxnorm"])
def test_constraints_hold_after_every_step(kind: str) -> None:
    model = some_model()
    step = some_step(model=model, project=constraint(model.fc, kind, 0.4))
    for batch in some_batches().epoch():
        step(*batch)
        norms = model.fc.weight.norm(dim=1)
        assert (norms <= 0.4 + 1e-6).all()
        assert kind == "maxnorm" or torch.allclose(norms, torch.tensor(0.4))
    with torch.no_grad():
        model.fc.weight.mul_(0.01)
    before = model.fc.weight.clone()
    constraint(model.fc, kind, 0.4)()
    assert torch.equal(before, model.fc.weight) == (kind == "maxnorm")


def test_the_learning_rate_is_a_cosine_after_a_rise() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = CosineAnnealingLR(optimizer, 7)
    for epoch in range(7):
        assert cosine(epoch, 7) == pytest.approx(scheduler.get_last_lr()[0])
        assert cosine(epoch + 3, 10, warmup=3) == cosine(epoch, 7)
        optimizer.step()
        scheduler.step()
    assert [cosine(epoch, 10, warmup=3) for epoch in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_predict_in_eval_mode_with_and_without_flip(device: torch.device) -> None:
    model, batches = some_model(device), some_batches(device)
    images = torch.cat([i for i, _ in batches.epoch()])
    plain, labels = predict(model, batches)
    flipped, _ = predict(model, batches, flip_tta=True)
    assert model.training and torch.equal(labels, torch.arange(N) % 5)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(plain, model(images).cpu(), atol=1e-3 if device.type == "cuda" else 1e-5)
        mean = (model(images) + model(images.flip(3))).cpu() / 2
        assert torch.allclose(flipped, mean, atol=1e-3 if device.type == "cuda" else 1e-5)
    assert not torch.allclose(plain, flipped, atol=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(Diverged, match=r"step [23] of 3 of epoch 5 \(loss before: \d.*lr 1e\+20"):
        train_epoch(some_step(lr=1e20), some_batches().epoch(), 4, 1e20)


def test_evaluation_is_due_every_so_often_and_at_the_end() -> None:
    assert [e + 1 for e in range(30) if is_due(e, 30, 10)] == [10, 20, 26, 27, 28, 29, 30]
    assert [e + 1 for e in range(3) if is_due(e, 3, 10)] == [1, 2, 3]
    assert [e + 1 for e in range(8) if is_due(e, 8, 1)] == list(range(1, 9))


@pytest.mark.parametrize("rule, chosen", [("last", 4), ("best_test", 3), ("best_val", 1)])
def test_selection(rule: str, chosen: int) -> None:
    model, selection = nn.Linear(1, 1), Selection(rule)
    for epoch, (test, val) in enumerate([(0.2, 0.9), (0.7, 0.1), (0.7, 0.2), (0.3, 0.3)], start=1):
        nn.init.constant_(model.weight, epoch)
        selection.offer(epoch, model, {"top1": test}, {"class_mean": val})
    assert selection.epoch == chosen and selection.state["weight"].item() == chosen
    assert selection.best_on_test == (3, {"top1": 0.7})


@pytest.mark.parametrize("by, chosen", [("class_mean", 1), ("top1", 2), ("macro_f1", 3)])
def test_selection_goes_by_the_figure_that_is_asked_for(by: str, chosen: int) -> None:
    """Held-out images of two classes, 12 and 3, of which an epoch has so many right: each figure has its own best."""
    model, selection, labels = nn.Linear(1, 1), Selection("best_val", by), torch.tensor([0] * 12 + [1] * 3)
    for epoch, (first, second) in enumerate([(0, 3), (8, 0), (6, 1), (0, 0)], start=1):
        predicted = torch.tensor([0] * first + [1] * (12 - first) + [1] * second + [0] * (3 - second))
        selection.offer(epoch, model, {"top1": 0.5}, accuracies(predicted, labels, [12, 3]))
    assert selection.epoch == chosen
