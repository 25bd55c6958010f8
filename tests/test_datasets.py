import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import datasets
from datasets import DATASETS, SAMPLERS, Augment, Batches
from datasets.batches import Draws, Windows
from datasets.longtail import choose_subset, class_sizes, hold_out
from utils.errors import UsageError
from utils.metrics import GROUPS, group_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "ratio, images, groups", [(100, 10_847, [35, 35, 30]), (50, 12_608, [41, 41, 18]), (10, 19_573, [69, 31, 0])]
)
def test_cifar100_lt_sizes_and_groups(ratio: int, images: int, groups: list[int]) -> None:
    counts = class_sizes(500, 100, ratio)
    assert sum(counts) == images
    assert [sum(group_of(n) == group for n in counts) for group in GROUPS] == groups
    assert (counts[0], counts[-1]) == (500, 500 // ratio)


@pytest.mark.parametrize("ratio, images", [(10, 20_431), (50, 13_996), (100, 12_406)])
def test_cifar10_lt_sizes(ratio: int, images: int) -> None:
    assert sum(class_sizes(5000, 10, ratio)) == images


def test_step_sizes() -> None:
    assert class_sizes(500, 10, 100, "step") == [500] * 5 + [5] * 5


def test_group_limits() -> None:
    assert [group_of(n) for n in (101, 100, 20, 19)] == ["many", "medium", "medium", "few"]


def test_subset_rules() -> None:
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1])
    assert choose_subset(labels, [3, 2]).tolist() == [1, 2, 5, 0, 3]
    np.random.seed(7)  # LDAM-DRW's generator: one global seed, then every class's positions shuffled in turn
    expected = []
    for label, count in ((0, 3), (1, 2)):
        positions = np.where(labels.numpy() == label)[0]
        np.random.shuffle(positions)
        expected += positions[:count].tolist()
    assert choose_subset(labels, [3, 2], "shuffled", 7).tolist() == expected


@pytest.mark.parametrize(
    "subset, first, last",
    [("first", [2, 176, 304], [301, 422, 962]), ("shuffled", [9470, 27272, 30172], [35560, 35541, 30065])],
)
def test_subsets_of_the_real_cifar100(cifar100_dir: str, subset: str, first: list[int], last: list[int]) -> None:
    data = datasets.load("cifar100", cifar100_dir, imb_ratio=100, subset=subset)
    assert torch.bincount(data.train.labels).tolist() == data.class_counts == class_sizes(500, 100, 100)
    assert data.train.indices[:3].tolist() == first
    assert data.train.indices[-3:].tolist() == last
    assert data.class_names[0] == "apple" and data.class_names[99] == "worm"
    assert torch.bincount(data.test.labels).tolist() == [100] * 100


def test_digits_are_long_tailed_with_a_balanced_test() -> None:
    data = datasets.load("digits", "", imb_ratio=100)
    assert data.class_counts == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
    assert torch.bincount(data.test.labels).tolist() == [50] * 10
    assert not set(data.train.indices.tolist()) & set(data.test.indices.tolist())


def test_small_cifar10_file(small_cifar10: str) -> None:
    data = datasets.load("cifar10", small_cifar10, imb_ratio=10)
    assert data.class_counts == class_sizes(20, 10, 10)
    assert data.train.images.shape[1:] == (3, 32, 32) and data.train.images.dtype == torch.uint8
    assert data.class_names[3] == "name3"


def test_ratio_that_empties_a_class_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--imb_ratio 200 .*\n.*1 to 124"):
        datasets.load("digits", "", imb_ratio=200)


def test_hold_out_leaves_and_takes_at_least_one() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 2 + [3])
    mask = hold_out(labels, 0.1, seed=3)
    assert torch.bincount(labels[mask], minlength=4).tolist() == [10, 1, 1, 0]
    assert torch.equal(mask, hold_out(labels, 0.1, seed=3)) and not torch.equal(mask, hold_out(labels, 0.1, seed=4))
    assert hold_out(labels, 0, seed=3).sum() == 0


def test_validation_split_is_disjoint_and_comes_back_from_its_indices() -> None:
    data = datasets.load("digits", "", val_fraction=0.2, val_seed=5)
    assert data.val is not None
    train, val = set(data.train.indices.tolist()), set(data.val.indices.tolist())
    assert not train & val and len(train) + len(val) == sum(data.class_counts)
    again = datasets.load("digits", "", val_indices=data.val.indices.tolist())
    assert again.val is not None and set(again.val.indices.tolist()) == val
    assert torch.equal(again.train.indices, data.train.indices)
    with pytest.raises(UsageError, match="validation images"):
        datasets.load("digits", "", imb_ratio=10, val_indices=[-1])


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_batches_equal_the_pil_pipeline(name: str, small_cifar10: str, device: torch.device) -> None:
    """Same draws, same pixels: crop with zero padding, flip, ToTensor, Normalize of torchvision on PIL images."""
    spec, data = DATASETS[name], datasets.load(name, small_cifar10, imb_ratio=2)
    n, pad = len(data.train), spec.augment.pad
    batches = Batches(data.train.images, data.train.labels, 32, spec.mean, spec.std, device, spec.augment, seed=(3,))
    draws = batches.draws(2)
    got = [(images.cpu(), labels.cpu()) for images, labels in batches.epoch(2)]
    assert len(got) == len(batches) == -(-n // 32) and len(got[-1][1]) == (n % 32 or 32)
    images, labels = torch.cat([i for i, _ in got]), torch.cat([j for _, j in got])
    assert torch.equal(labels, data.train.labels[draws.order])
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    height, width = data.train.images.shape[2:]
    for row, (index, top, left, flip) in enumerate(zip(*(draw.tolist() for draw in draws))):
        picture = Image.fromarray(data.train.images[index].permute(1, 2, 0).squeeze(2).numpy())
        padded = transforms.functional.pad(picture, [pad])
        cropped = transforms.functional.crop(padded, top, left, height, width)
        expected = normalise(transforms.functional.hflip(cropped) if flip else cropped)
        assert (images[row] - expected).abs().max() < 1e-6


def draw(n: int, augment: Augment, seed: tuple[int, ...], epoch: int) -> Draws:
    images, labels = torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    return Batches(images, labels, 64, (0.0,), (1.0,), CPU, augment, seed).draws(epoch)


def test_draws_follow_their_law() -> None:
    draws = draw(20_000, Augment(pad=4, flip=True), seed=(0,), epoch=0)
    assert torch.equal(draws.order.sort().values, torch.arange(20_000))
    for offsets in (draws.top, draws.left):
        histogram = torch.bincount(offsets, minlength=9).double()
        assert len(histogram) == 9 and (histogram - 20_000 / 9).abs().max() < 4 * (20_000 / 9 * 8 / 9) ** 0.5
    assert abs(draws.flip.double().mean() - 0.5) < 4 * 0.5 / 20_000**0.5
    assert not draw(100, Augment(pad=1, flip=False), (0,), 0).flip.any()
    assert not torch.equal(draws.order, draw(20_000, Augment(4, True), seed=(0,), epoch=1).order)
    assert not torch.equal(draws.order, draw(20_000, Augment(4, True), seed=(0, 1), epoch=0).order)


def test_batches_follow_their_sampler() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    images = torch.zeros(100, 1, 1, 1, dtype=torch.uint8)
    for epoch, expected in ((0, 50), (1, 50)):
        batches = Batches(images, labels, 8, (0.0,), (1.0,), CPU, Augment(0, False), (7,), SAMPLERS["class"], 2)
        got = torch.cat([batch for _, batch in batches.epoch(epoch)])
        assert len(got) == 100 and abs(int(got.sum()) - expected) <= 4
        assert torch.equal(got, labels[batches.draws(epoch).order])


def test_crop_flip_by_hand() -> None:
    images = torch.arange(1, 9, dtype=torch.uint8).reshape(2, 1, 2, 2)  # 1 2 / 3 4 and 5 6 / 7 8
    index, top, left = torch.tensor([1, 0]), torch.tensor([1, 2]), torch.tensor([0, 1])
    out = Windows(images, Augment(1, True), CPU).cut(index, top, left, torch.tensor([True, False]))
    assert out[..., 0].tolist() == [[[5, 0], [7, 0]], [[3, 4], [0, 0]]]


def test_evaluation_batches_are_plain_and_in_order() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2).contiguous()
    got = list(Batches(images, torch.arange(5), 2, (0.0,), (1 / 255,), CPU).epoch())
    assert [labels.tolist() for _, labels in got] == [[0, 1], [2, 3], [4]]
    assert torch.cat([batch for batch, _ in got])[:, 0, 0, 0].tolist() == pytest.approx([0, 1, 2, 3, 4])
