"""Both stages against their published loops written out: every option that shapes the training, to the last weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import in_float64
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import datasets
import evaluate
import main_stage1
import main_stage2
from datasets import DATASETS, Batches
from datasets.batches import Draws, seeded
from losses import auto_label_smooth
from models import build_model
from retraining.features import VIEWS_STREAM
from utils import checkpoints
from utils.metrics import report

SPEC = DATASETS["digits"]


def draw_epoch(data, seed: int, stage: int, epoch: int) -> Draws:
    pixels = (data.train.images, data.train.labels, 1, SPEC.mean, SPEC.std, torch.device("cpu"))
    return Batches(*pixels, SPEC.augment, (seed, stage)).draws(epoch)


def draw_view(data, seed: int, epoch: int, views: int) -> Draws:
    """The order of the epoch; crops and flips of the view, which belong to the image and not to the step."""
    order = draw_epoch(data, seed, 2, epoch).order
    windows = SPEC.augment.draw(len(data.train), seeded(0, VIEWS_STREAM, epoch % views))
    return Draws(order, *(part[order] for part in windows))


def literal_batches(data, size: int, draws: Draws):
    for start in range(0, len(data.train), size):
        images, labels = [], []
        for row in range(start, min(start + size, len(data.train))):
            i = int(draws.order[row])
            padded = F.pad(data.train.images[i].to(torch.get_default_dtype()) / 255, (1, 1, 1, 1))
            top, left = int(draws.top[row]), int(draws.left[row])
            images.append((padded[:, top : top + 8, left : left + 8] - SPEC.mean[0]) / SPEC.std[0])
            labels.append(int(data.train.labels[i]))
        yield torch.stack(images), torch.tensor(labels)


def literal_run(model, parameters, data, *, draws, size, lr, momentum, nesterov, wd, smooth, train):
    optimizer = SGD(parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=wd)
    scheduler = CosineAnnealingLR(optimizer, len(draws))
    for each in draws:
        model.train(train)
        for images, labels in literal_batches(data, size, each):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=smooth).backward()
            optimizer.step()
        scheduler.step()


def assert_equal(ours: dict, theirs: dict, near: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < near, name


@in_float64()
def test_stage1_is_the_literal_loop(workdir) -> None:
    main_stage1.main(
        "--dataset digits --imb_ratio 50 --imb_type step --subset shuffled --subset_seed 3 --seed 5 --epochs 3 "
        "--lr 0.02 --momentum 0.8 --nesterov --wd 0.003 --batch_size 50 --label_smooth 0.2".split()
    )
    data = datasets.load("digits", "", imb_type="step", imb_ratio=50, subset="shuffled", subset_seed=3)
    assert data.class_counts == [124] * 5 + [2] * 5
    torch.manual_seed(5)
    model = build_model("resnet8", 10, 1)
    literal_run(
        model, model.parameters(), data, draws=[draw_epoch(data, 5, 1, epoch) for epoch in range(3)], size=50, lr=0.02,
        momentum=0.8, nesterov=True, wd=0.003, smooth=0.2, train=True,
    )  # fmt: skip
    file = checkpoints.read("checkpoints/digits_step50_resnet8_stage1.pt")
    assert file.model["fc.weight"].dtype == torch.float64
    assert_equal(file.model, model.state_dict(), 1e-9)
    assert file.data["class_counts"] == data.class_counts


@pytest.mark.parametrize("features, smooth", [("views", "auto"), ("replay", "0.7"), ("orbit", "0.5")])
def test_stage2_is_the_literal_loop(workdir, features: str, smooth: str) -> None:
    main_stage1.main("--dataset digits --seed 1 --epochs 3".split())
    start = checkpoints.read("checkpoints/digits_exp100_resnet8_stage1.pt").model
    main_stage2.main(
        f"--dataset digits --seed 6 --finetune_epoch 3 --finetune_lr 0.03 --finetune_wd 0.01 --momentum 0.7 --nesterov "
        f"--batch_size 60 --label_smooth {smooth} --features {features} {'--views 2' * (features == 'views')}".split()
    )
    data = datasets.load("digits", "")
    model = build_model("resnet8", 10, 1)
    model.load_state_dict(start)
    d = auto_label_smooth(10) if smooth == "auto" else float(smooth)
    draws = [draw_view(data, 6, e, 2) if features == "views" else draw_epoch(data, 6, 2, e) for e in range(3)]
    literal_run(
        model, model.fc.parameters(), data, draws=draws, size=60, lr=0.03, momentum=0.7, nesterov=True, wd=0.01,
        smooth=d, train=features == "replay",
    )  # fmt: skip
    file = checkpoints.read("checkpoints/digits_exp100_resnet8_stage2.pt")
    assert len(data.train) % 60 != 0  # there is a tail batch
    assert_equal(file.model, model.state_dict(), 1e-5)  # features are float32; no ReLU is differentiated through
    drifted = (file.model["bn1.running_mean"] - start["bn1.running_mean"]).abs().max() > 1e-6
    assert drifted == (features == "replay")
    ours = build_model("resnet8", 10, 1)
    ours.load_state_dict(file.model)
    images = (data.test.images.float() / 255 - SPEC.mean[0]) / SPEC.std[0]
    with torch.no_grad():
        assert (ours.eval()(images) - model.eval()(images)).abs().max() < 1e-5
    assert (file.model["fc.weight"] - start["fc.weight"]).abs().max() > 1e-2
    assert file.options["label_smooth"] == d


@pytest.mark.parametrize("flip", [False, True])
def test_the_stored_accuracy_is_that_of_the_weights(workdir, small_cifar10, flip: bool) -> None:
    flag = "--flip_tta" if flip else "--no_flip_tta"
    main_stage1.main(
        f"--dataset cifar10 --data_dir {small_cifar10} --imb_ratio 10 --network resnet8 --epochs 3 --seed 0 {flag}"
        "".split()
    )
    file = checkpoints.read("checkpoints/cifar10_exp10_resnet8_stage1.pt")
    data = datasets.load("cifar10", small_cifar10, imb_ratio=10)
    model = build_model("resnet8", 10).eval()
    model.load_state_dict(file.model)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.spec.mean, data.spec.std))
    images = (data.test.images.float() / 255 - mean) / std
    with torch.no_grad():
        plain, mirrored = model(images), model(images.flip(3))
    figures = [report(z, data.test.labels, data.class_counts) for z in (plain, (plain + mirrored) / 2)]
    assert figures[0]["ece"] != figures[1]["ece"]
    assert file.metrics["ece"] == pytest.approx(figures[flip]["ece"], rel=1e-4)
    assert file.metrics["per_class"] == figures[flip]["per_class"] and file.metrics["flip_tta"] == flip
    common = ["--dataset", "cifar10", "--data_dir", small_cifar10, "--imb_ratio", "10"]
    for argv, expected in ([], flip), (["--flip_tta"], True), (["--no-flip_tta"], False):
        result = evaluate.main([*common, *argv])
        assert result["ece"] == pytest.approx(figures[expected]["ece"], rel=1e-4) and result["flip_tta"] == expected
