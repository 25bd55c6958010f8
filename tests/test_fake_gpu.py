"""An epoch on a GPU, as far as it goes without one: nothing left on the CPU, no hidden wait for the GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_gpu import GPU, FakeGPU, Wrong, fake_gpu, on_gpu
from test_engine import some_batches
from test_solver import COUNTS
from test_solver import LOSSES as SOFTMAX
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import engine
from datasets import AUGMENTATIONS, SAMPLERS, Batches, Mix
from datasets.batches import Augment
from engine import TrainStep, make_sgd, predict, set_lr, train_epoch
from losses import LOSSES, class_balanced_weights, make_loss, reweighted
from losses.weighted import LADE
from models import build_model
from models.heads import HEADS, MARC, CosineHead, ScaledLinear
from models.network import Network, pooled
from retraining import features
from retraining.features import feature_blocks, gathered, predict_features, resident
from retraining.solver import Solver, TrainableHead
from training.recipe import constraint
from utils import metrics

#: PyTorch's own deep copy asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
WAITS = (Wrong, DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture
def gpu(monkeypatch):
    """The mode; an epoch's losses and hits are ones when it fetches them at its end."""
    monkeypatch.setattr(
        engine, "all_reduce_sum", lambda values: torch.ones(values.shape) if values.device == GPU else values
    )
    with fake_gpu(monkeypatch) as mode:
        yield mode


class Small(Network):
    """A network of few operations, since fake ones are slow."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), HEADS[head](4, 5)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return pooled(self.bn1(self.conv1(images)))


def some_step(loss: str = "ce", head: str = "linear", model: nn.Module | None = None, **options) -> TrainStep:
    model = on_gpu((model or Small(head)).train())
    optimizer = make_sgd(model.parameters(), 0.1, 0.9, 1e-3, nesterov=False)
    options.setdefault("project", constraint(model.fc, "maxnorm", 0.3) if head == "linear" else None)
    return TrainStep(model, make_loss(loss, COUNTS, {}).to(GPU), optimizer, **options)


def epoch_of(step: TrainStep, epoch: int = 0, **options) -> None:
    """An epoch, to the one point where its losses are fetched; what it leaves behind is on the GPU."""
    train_epoch(step, some_batches(GPU, augment=Augment(1, True), **options).epoch(epoch), epoch, 0.1)
    assert all(tensor.device == GPU for kind in step.changing().values() for tensor in kind)


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_epoch_stays_on_the_gpu(gpu: FakeGPU, loss: str, head: str) -> None:
    epoch_of(some_step(loss, head, amp=torch.bfloat16), mix=Mix(0.2, 1.0))
    if loss != "lade":  # which cannot be had in parts
        epoch_of(some_step(loss, head, ema=0.9, accum=2))


def test_bf16_and_the_optimizer_and_a_changed_loss(gpu: FakeGPU) -> None:
    """A real network; the classifier in float32, the learning rate on the GPU, DRW's loss between epochs."""
    step, seen = some_step(model=build_model("resnet8", 5, 1), amp=torch.bfloat16), []
    for module in (step.model.conv1, step.model.fc):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert step.optimizer.param_groups[0]["lr"].device == GPU
    set_lr(step.optimizer, 0.05)
    step.use_loss(reweighted(make_loss("ce", COUNTS, {}), class_balanced_weights(COUNTS)).to(GPU))
    epoch_of(step)
    assert seen[:2] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("aug", AUGMENTATIONS)
def test_batches_are_made_without_a_wait(gpu: FakeGPU, aug: str) -> None:
    mixes = [None, Mix(1.0, 0.0), Mix(0.0, 1.0), Mix(1.0, 1.0)]
    ways = list(zip(SAMPLERS.values(), mixes))
    for epoch, (sampler, mix) in enumerate(ways if aug == "crop_flip" else ways[3:]):
        options = {"augment": Augment(1, True), "policy": AUGMENTATIONS[aug], "mix": mix, "sampler": sampler}
        batches = list(Batches(*pixels(), (0.5,), (0.25,), GPU, epochs=4, **options).epoch(epoch))
        assert [tuple(images.shape) for images, *_ in batches] == [(8, 1, 8, 8), (8, 1, 8, 8), (4, 1, 8, 8)]
        assert all(tensor.device == GPU for batch in batches for tensor in batch)
        assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in batches)


def pixels() -> tuple[torch.Tensor, torch.Tensor, int]:
    return torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 5, 8


@pytest.mark.parametrize("flip", [False, True])
def test_evaluation_fetches_logits_and_labels_alone(gpu: FakeGPU, monkeypatch, flip: bool) -> None:
    gpu.may_fetch = True
    monkeypatch.setattr(engine, "bool", lambda found: True, raising=False)  # whether logits are finite, on the CPU
    monkeypatch.setattr(engine, "for_evaluation", lambda model: model.eval())  # whose .to() cannot take fake tensors
    logits, labels = predict(on_gpu(Small("linear")), some_batches(GPU), flip)
    assert logits.shape == (20, 5) and labels.shape == (20,) and logits.device == labels.device == torch.device("cpu")
    assert gpu.fetched == 6


def test_probabilities_are_made_where_the_logits_are(gpu: FakeGPU) -> None:
    """The other measures are made of logits on the CPU, where :func:`engine.predict` leaves them."""
    found = metrics.confidences(torch.zeros(20, 5, device=GPU), 2.0)
    assert all(part.device == GPU for part in found)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("number", [*range(len(SOFTMAX)), None])
def test_the_solver_s_epoch_stays_on_the_gpu(gpu: FakeGPU, number: int | None, nesterov: bool) -> None:
    """Every loss of the family alone, and all at once, with a projection and without."""
    losses = SOFTMAX if number is None else [SOFTMAX[number]]
    heads = [on_gpu(nn.Linear(12, 5)) for _ in losses]
    group = [TrainableHead(head, lambda _, loss=loss: loss, 0.1, 1e-3) for head, loss in zip(heads, losses)]
    group[0].project = constraint(heads[0], "maxnorm", 0.3)
    solver = Solver(group, 0.9, nesterov, graph="off")
    [part] = solver.parts
    part.begin(0.0, [1.0] * 16)
    window = [(torch.zeros(n, 12, device=GPU), torch.zeros(n, dtype=torch.int64, device=GPU)) for n in (16, 6)]
    sums = solver._advance(window, part)
    part.end()
    assert sums.shape == (3, len(losses)) and sums.device == GPU
    assert all(tensor.device == GPU for kind in part.changing().values() for tensor in kind)


@pytest.mark.parametrize("head", [CosineHead(12, 5), ScaledLinear(nn.Linear(12, 5)), MARC(nn.Linear(12, 5))])
def test_other_heads_stay_on_the_gpu(gpu: FakeGPU, head: nn.Module) -> None:
    head = on_gpu(copy.deepcopy(head))
    solver = Solver([TrainableHead(head, lambda _: LADE(COUNTS), 0.1, 1e-3)])
    solver.parts[0].begin(0.0, [1.0] * 16)
    solver.parts[0].optimizer.param_groups[0]["fused"] = True  # the only one that is stood in for
    loss, hits = solver.parts[0].step(torch.zeros(6, 12, device=GPU), torch.zeros(6, dtype=torch.int64, device=GPU))
    assert loss.device == hits.device == GPU


@pytest.mark.parametrize("fits", [True, False])
def test_features_come_to_the_gpu(gpu: FakeGPU, monkeypatch, fits: bool) -> None:
    """Whether they are held there or stay on disk."""
    monkeypatch.setattr(features, "free_memory", lambda device: 10**9 if fits else 0)
    array, labels = torch.zeros(20, 12, dtype=torch.float16), torch.arange(20) % 5
    held = resident(array, GPU)
    assert (held.device == GPU) == fits
    steps = [*gathered(held, labels.to(GPU), torch.randperm(20), 8), *feature_blocks([held, held], labels, 5, GPU)]
    assert [len(own) for _, own in steps] == [8, 8, 4, 20]
    assert all(rows.device == own.device == GPU and rows.dtype == torch.float32 for rows, own in steps)
    if fits:  # in inference mode FakeTensorMode does not take a real tensor to the GPU
        gpu.may_fetch = True
        assert predict_features(on_gpu(nn.Linear(12, 5)), [held.float()], 8).device == torch.device("cpu")
        assert gpu.fetched == 3


# What these tests are there to find.


def test_waits_and_mixed_devices_are_found(gpu: FakeGPU) -> None:
    there, here = torch.zeros(4, 5, device=GPU), torch.zeros(4, 5)
    index = torch.zeros(4, dtype=torch.int64)
    for wrong in (
        lambda: there.sum().item(),
        lambda: bool((there > 0).any()),
        lambda: int(there.argmax()),
        lambda: there.tolist(),
        lambda: there.nonzero(),
        lambda: there[there > 0],
        lambda: there.cpu(),
        lambda: here.copy_(there),
        lambda: there + here,
        lambda: there[index],
        lambda: here[index.to(GPU)],
        lambda: nn.functional.cross_entropy(there, index),
    ):
        with pytest.raises(WAITS):
            wrong()
    assert (there + torch.tensor(1.0) + here.to(GPU)).device == GPU


def test_a_planted_wait_and_a_label_left_behind_are_found(gpu: FakeGPU, monkeypatch) -> None:
    step = some_step()
    monkeypatch.setattr(TrainStep, "_loss", lambda self, logits, labels, mean: logits.sum() * logits.mean().item())
    with pytest.raises(WAITS):
        epoch_of(step)
    monkeypatch.undo()
    with fake_gpu(monkeypatch):
        monkeypatch.setattr(Batches, "_labels", lambda self, which: self.labels[which].cpu())
        with pytest.raises(WAITS):
            epoch_of(some_step())
        monkeypatch.setattr(Batches, "_labels", lambda self, which: self.classes[:8])
        with pytest.raises(WAITS):
            epoch_of(some_step())
