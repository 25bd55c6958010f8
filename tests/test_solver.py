"""S heads at once equal S separate torch.optim.SGD runs, whatever their losses and settings."""

import copy

import pytest
import torch
from torch import nn

from losses import softmax
from losses.softmax import SoftmaxLoss
from losses.weighted import Focal
from models.heads import CosineHead
from retraining import solver as solver_module
from retraining.solver import Solver, TrainableHead, cpu_chunk, heads_that_fit
from utils.errors import UsageError

COUNTS = [60, 20, 9, 4, 2]
LOSSES = [
    SoftmaxLoss(5),
    SoftmaxLoss(5, smooth=0.83),
    softmax.balanced_softmax(COUNTS),
    softmax.class_balanced(COUNTS),
    softmax.ldam(COUNTS, scale=4),
    softmax.label_aware_smoothing(COUNTS),
    softmax.generalised_reweighting(COUNTS),
    SoftmaxLoss(5, offset=torch.arange(5.0), margin=torch.arange(5.0) / 9, smooth=0.3, weight=torch.arange(1.0, 6)),
    softmax.vector_scaling(COUNTS, 0.6),
    SoftmaxLoss(5, scale=torch.arange(5.0) + 0.5, smooth=0.3, weight=torch.arange(1.0, 6)),
]
LR = [0.1, 0.02, 0.05, 0.1, 0.01, 0.1, 0.03, 0.02, 0.1, 0.02]
WD = [0.0, 1e-3, 0.0, 1e-2, 5e-2, 0.0, 1e-4, 1e-3, 0.0, 1e-3]


def stream(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    features = torch.randn(70, 12, generator=generator).relu()
    labels = torch.randint(5, (70,), generator=generator)
    return list(zip(features.split(16), labels.split(16)))  # the last batch has six


def heads(start: nn.Linear) -> list[TrainableHead]:
    return [
        TrainableHead(copy.deepcopy(start), lambda _, loss=loss: loss, lr, wd) for loss, lr, wd in zip(LOSSES, LR, WD)
    ]


def literal(head: nn.Module, loss: nn.Module, lr: float, wd: float, nesterov: bool, project=None) -> nn.Module:
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=wd, nesterov=nesterov)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = lr * (1 - epoch / 3)
        for features, labels in stream(epoch):
            optimizer.zero_grad()
            loss(head(features), labels).backward()
            optimizer.step()
        if project is not None:
            project(head)
    return head


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("chunk, threads", [(None, 1), (1, 1), (3, 1), (2, 3)])
def test_heads_equal_separate_runs(
    chunk: int | None, threads: int, nesterov: bool, monkeypatch, device: torch.device
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    start = nn.Linear(12, 5)
    group = heads(copy.deepcopy(start).to(device))
    if chunk == 3:  # as for large heads
        monkeypatch.setattr(solver_module, "ALIGNED_FROM", 1)
        monkeypatch.setattr(solver_module, "WINDOW_BYTES", 1)
    solver = Solver(group, 0.9, nesterov, chunk)
    for epoch in range(3):
        steps = ((features.to(device), labels.to(device)) for features, labels in stream(epoch))
        solver.train_epoch(steps, epoch / 3, rate=1 - epoch / 3)
    for trainee, loss, lr, wd in zip(group, LOSSES, LR, WD):
        alone = literal(copy.deepcopy(start), loss, lr, wd, nesterov)
        assert (alone.weight - start.weight).abs().max() > 1e-3
        for ours, theirs in zip(trainee.head.parameters(), alone.parameters()):
            assert (ours.cpu() - theirs).abs().max() < (1e-6 if device.type == "cpu" else 1e-4)


def test_a_loss_may_change_between_epochs(device: torch.device) -> None:
    torch.manual_seed(0)
    start = nn.Linear(12, 5)
    phases = [SoftmaxLoss(5), SoftmaxLoss(5, smooth=0.5), softmax.class_temperatures(COUNTS, 0.5)]
    phases += [softmax.class_balanced(COUNTS), softmax.ldam(COUNTS)]
    trainee = TrainableHead(copy.deepcopy(start).to(device), lambda progress: phases[round(5 * progress)], 0.1, 1e-3)
    solver, alone = Solver([trainee]), copy.deepcopy(start)
    optimizer = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for epoch, loss in enumerate(phases):
        steps = ((features.to(device), labels.to(device)) for features, labels in stream(epoch))
        solver.train_epoch(steps, epoch / 5, rate=1.0)
        for features, labels in stream(epoch):
            optimizer.zero_grad()
            loss(alone(features), labels).backward()
            optimizer.step()
        near = 1e-5 if device.type == "cpu" else 1e-3
        assert (trainee.head.weight.cpu() - alone.weight).abs().max() < near, epoch


def test_a_graph_is_forgotten_when_scales_come_or_go_and_steps_without_them_skip_them() -> None:
    class Graph:
        forgotten = 0

        def forget(self) -> None:
            self.forgotten += 1

    plain, scaled, graph = SoftmaxLoss(5), softmax.class_temperatures(COUNTS, 0.5), Graph()
    phases = [plain, plain, scaled, scaled, plain]
    part = solver_module._LinearChunk(
        [0], [TrainableHead(nn.Linear(12, 5), lambda e: phases[int(e)], 0.1, 0)], 0.9, False
    )
    found = []
    for epoch in range(5):
        part.begin(epoch, [1.0])
        found.append((part.has_scales, graph.forgotten))
        part.graph = graph
    assert found == [(False, 0), (False, 0), (True, 1), (True, 1), (False, 2)]


def test_any_head_and_loss_and_projection_beside_them() -> None:
    """Autograd heads, a loss that changes, and projections train on the same steps as the wide product."""
    torch.manual_seed(0)
    start = nn.Linear(12, 5)

    def shrink(head: nn.Linear) -> None:
        with torch.no_grad():
            head.weight.mul_(0.5)

    cosine, projected, focal, changing = CosineHead(12, 5, 4.0), *(copy.deepcopy(start) for _ in range(3))
    alone = copy.deepcopy(start)
    group = [
        *heads(start),
        TrainableHead(copy.deepcopy(cosine), lambda _: SoftmaxLoss(5), 0.1, 1e-3),
        TrainableHead(projected, lambda _: SoftmaxLoss(5), 0.1, 0.0, lambda: shrink(projected)),
        TrainableHead(focal, lambda _: Focal(2.0), 0.1, 0.0),
        TrainableHead(alone, lambda _: Focal(2.0), 0.1, 0.0, lambda: shrink(alone)),
        TrainableHead(changing, lambda progress: SoftmaxLoss(5, smooth=0.5 if progress > 0.5 else 0.0), 0.1, 0.0),
    ]
    solver = Solver(group)
    for epoch in range(3):
        results = solver.train_epoch(stream(epoch), epoch / 3, rate=1 - epoch / 3)
    assert len(results) == len(solver.seconds) == len(group) and min(solver.seconds) > 0
    expected = [
        literal(copy.deepcopy(cosine), SoftmaxLoss(5), 0.1, 1e-3, False),
        literal(copy.deepcopy(start), SoftmaxLoss(5), 0.1, 0.0, False, shrink),
        literal(copy.deepcopy(start), Focal(2.0), 0.1, 0.0, False),
        literal(copy.deepcopy(start), Focal(2.0), 0.1, 0.0, False, shrink),
    ]
    for trainee, theirs in zip(group[len(LOSSES) :], expected):
        for name, value in theirs.named_parameters():
            assert (trainee.head.get_parameter(name) - value).abs().max() < 1e-6
    plain = literal(copy.deepcopy(start), SoftmaxLoss(5), 0.1, 0.0, False)
    assert (changing.weight - plain.weight).abs().max() > 1e-3


def test_projection_after_every_step() -> None:
    head, calls = nn.Linear(12, 5), []
    Solver(
        [TrainableHead(head, lambda _: SoftmaxLoss(5), 0.1, 0.0, lambda: calls.append(1), each_step=True)]
    ).train_epoch(stream(0), 0.0, 1.0)
    assert len(calls) >= len(stream(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_training_figures_are_those_before_each_step(loss: SoftmaxLoss) -> None:
    torch.manual_seed(1)
    start = nn.Linear(12, 5)
    group = [TrainableHead(copy.deepcopy(start), lambda _: loss, 0.0, 0.0) for _ in range(2)]
    (mean, top1, first), _ = Solver(group).train_epoch(stream(0), 0.0, 1.0)
    logits = [(start(features).detach(), labels) for features, labels in stream(0)]
    losses = sum(float(loss(z, labels)) * len(labels) for z, labels in logits)
    correct = sum(int((z.argmax(1) == labels).sum()) for z, labels in logits)
    assert mean == pytest.approx(losses / 70, rel=1e-5) and top1 == correct / 70
    assert first == pytest.approx(float(loss(*logits[0])), rel=1e-5)


@pytest.mark.parametrize(
    "classes, features, chunk", [(10, 64, 8), (100, 512, 8), (100, 2048, 8), (1000, 2048, 1), (8142, 2048, 1)]
)
def test_large_heads_are_stepped_one_at_a_time(classes: int, features: int, chunk: int) -> None:
    assert cpu_chunk(classes, features) == chunk


def test_as_many_heads_as_memory_holds(monkeypatch) -> None:
    cpu, gpu, matrix = torch.device("cpu"), torch.device("cuda"), 4 * 8142 * 2049
    free = {"cpu": 0.0, "cuda": 0.0}
    monkeypatch.setattr(solver_module, "free_memory", lambda device: int(free[device.type]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def fit(device: torch.device) -> int:
        return heads_that_fit(20, 8142, 2048, 512, device)

    fixed = 24 * matrix + 6 * 4 * 512 * 8142 + 2**25  # best of 20, a step's own
    for heads in (1, 11, 20):
        free["cpu"] = (fixed + (3 * heads + 1) * matrix) / solver_module.SHARE
        assert fit(cpu) == heads
    free["cpu"] = fixed / solver_module.SHARE
    with pytest.raises(UsageError, match=r"20 heads of 8142 x 2048 need 1,935 MB of cpu memory one by one, 1,735 MB"):
        fit(cpu)
    free |= {"cpu": 21 * matrix / solver_module.SHARE, "cuda": 2e9}
    assert 1 <= fit(gpu) < 20
    free["cuda"] = 40e9
    assert fit(gpu) == 20
    free["cpu"] = 19 * matrix
    with pytest.raises(UsageError, match="of cpu memory"):
        fit(gpu)
