import pytest
import torch
from torch import nn
from torch.optim import SGD

from datasets import Batches
from engine import Selection, is_due, predict, train_epoch
from losses import LabelSmoothing
from models import build_model
from utils.options import Diverged

CPU = torch.device("cpu")


def some_batches(n: int = 20, size: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Batches(images, torch.arange(n) % 5, size, (0.5,), (0.25,), CPU)


def test_train_epoch_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    model, twin = build_model("resnet8", 5, 1), build_model("resnet8", 5, 1)
    twin.load_state_dict(model.state_dict())
    optimizers = [SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1e-3) for m in (model, twin)]
    stats = train_epoch(model.train(), some_batches().epoch(), LabelSmoothing(0.3), optimizers[0])
    twin.train()
    losses, right = 0.0, 0
    for images, labels in some_batches().epoch():
        logits = twin(images)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        losses, right = losses + loss.item() * len(labels), right + int((logits.argmax(1) == labels).sum())
    assert stats.loss == pytest.approx(losses / 20, rel=1e-6) and stats.top1 == right / 20
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("replay", [False, True])
def test_a_frozen_backbone_stays_and_its_statistics_move_in_replay_alone(replay: bool) -> None:
    model = build_model("resnet8", 5, 1).requires_grad_(False)
    model.fc.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = SGD(model.fc.parameters(), 0.1)
    train_epoch(model.train(replay), some_batches().epoch(), LabelSmoothing(0.9), optimizer)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"fc.weight", "fc.bias"} <= changed
    rest = {name.split(".")[-1] for name in changed - {"fc.weight", "fc.bias"}}
    assert rest == ({"running_mean", "running_var", "num_batches_tracked"} if replay else set())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("fc"))


def test_predict_in_eval_mode_with_and_without_flip() -> None:
    model, batches = build_model("resnet8", 5, 1).train(), some_batches()
    images = torch.cat([i for i, _ in batches.epoch()])
    plain, labels = predict(model, batches)
    flipped, _ = predict(model, batches, flip_tta=True)
    assert model.training and torch.equal(labels, torch.arange(20) % 5)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(plain, model(images), atol=1e-5)
        assert torch.allclose(flipped, (model(images) + model(images.flip(3))) / 2, atol=1e-5)
    assert not torch.allclose(plain, flipped, atol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = build_model("resnet8", 5, 1)
    with pytest.raises(Diverged, match=r"step \d of 3 .*loss before.*lr 1e\+20"):
        train_epoch(model.train(), some_batches().epoch(), LabelSmoothing(), SGD(model.parameters(), 1e20))


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
    assert selection.oracle == (3, {"top1": 0.7})
