"""Augmentation policies and mixing: against torchvision image by image, against their laws, and inside batches."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from itertools import product

import pytest
import torch
from torch import Generator, Tensor

import datasets
from datasets import AUGMENTATIONS, Augment, Batches, Mix
from datasets.augment import AutoAugment, Cutout, Policy, RandAugment
from datasets.batches import POLICY_STEPS, seeded

CPU = torch.device("cpu")
POLICIES = {name: policy for name, policy in AUGMENTATIONS.items() if policy}
SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}
Law = dict[Hashable, float]


def pictures(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random images, each with a range of its own; the first is of one colour."""
    low, high = torch.randint(0, 256, (2, n, shape[0], 1, 1), generator=seeded(seed)).sort(dim=0).values
    high[0] = low[0]
    return (low + torch.rand(n, *shape, generator=seeded(seed, 1)) * (high - low)).round().to(torch.uint8)


def check_law(drawn: Iterable[Hashable], law: Law) -> None:
    """Every outcome within four standard deviations, and all together; none that the law has not."""
    counts, possible = Counter(drawn), {key: p for key, p in law.items() if p > 0}
    n = counts.total()
    assert counts.keys() <= possible.keys() and sum(law.values()) == pytest.approx(1)
    for key, p in possible.items():
        assert abs(counts[key] - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, (key, counts[key], n * p)
    square = sum((counts[key] - n * p) ** 2 / (n * p) for key, p in possible.items())
    assert square <= len(possible) + 4 * (2 * len(possible)) ** 0.5


def signs(name: str, magnitude: float, p: float) -> list[tuple[Hashable, float]]:
    """The operation and its negative, half of p each, where it has one."""
    return [((name, sign * magnitude), p / 2) for sign in (1, -1)] if name in SIGNED else [((name, magnitude), p)]


def add(law: Law, p: float, *places: list[tuple[Hashable, float]]) -> None:
    """With probability p two independent outcomes."""
    for (first, p1), (second, p2) in product(*places):
        law[first, second] = law.get((first, second), 0) + p * p1 * p2


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment()], ids=lambda policy: type(policy).__name__)
def test_policies_equal_torchvision_image_by_image(
    policy: AutoAugment | RandAugment, shape: tuple[int, int, int], device: torch.device
) -> None:
    images, library, done = pictures(700, shape).to(device), policy.library, set()
    expected = list(images)
    for drawn in policy.draw(700, shape[1:], seeded(1)):
        for i, (name, magnitude) in ((i, operation) for i, operation in enumerate(drawn) if operation):
            expected[i] = library._apply_image_or_video_transform(
                expected[i], name, magnitude, interpolation=library.interpolation, fill=library._fill
            )
            done.add(name)
    assert done >= library._AUGMENTATION_SPACE.keys() - {"ShearX"}  # which AutoAugment does not have on CIFAR-10
    got = policy(images.clone(), seeded(1))
    error = (got.int() - torch.stack(expected).int()).abs().float().mean()
    # On a GPU the floats of contrast's means and of blurs may depend on how many images there are.
    assert got.dtype == torch.uint8 and error <= (0 if device == CPU else 0.5)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_do_not_depend_on_the_memory_format(name: str) -> None:
    policy, images = POLICIES[name], pictures(100, (3, 32, 32))
    expected = policy(images.clone(), seeded(2))
    for stored in (images.to(memory_format=torch.channels_last), images.repeat_interleave(2, dim=3)[..., ::2]):
        assert not stored.is_contiguous() and torch.equal(policy(stored, seeded(2)), expected)
        assert torch.equal(stored, images)  # as it was
    assert not torch.equal(policy(images.clone(), seeded(3)), expected)


def test_law_of_autoaugment() -> None:
    policy, law = AutoAugment(), {}
    table, pairs = policy.library._AUGMENTATION_SPACE, policy.library._policies
    assert len(pairs) == 25 and pairs[1] == (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9))  # CIFAR-10's
    for pair in pairs:
        places = []
        for name, p, level in pair:
            magnitude = 0.0 if level is None else float(table[name][0](10, 8, 32)[level])
            places.append([(None, 1 - p), *signs(name, magnitude, p)])
        add(law, 1 / 25, *places)
    rounds = policy.draw(20_000, (8, 32), seeded(0))
    check_law(zip(*rounds), law)
    largest = dict(sorted(filter(None, rounds[1])))
    assert largest["TranslateX"] == pytest.approx(150 / 331 * 32) and largest["Contrast"] == pytest.approx(0.6)


def test_law_of_randaugment() -> None:
    part, law = 9 / 30, {}
    magnitudes = {"ShearX": 0.3 * part, "ShearY": 0.3 * part, "Rotate": 30 * part, "Posterize": 7, "Solarize": 1 - part}
    magnitudes |= {"TranslateX": 150 / 331 * 8 * part, "TranslateY": 150 / 331 * 32 * part}
    magnitudes |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9 * part)
    magnitudes |= dict.fromkeys(("Identity", "AutoContrast", "Equalize"), 0)
    place = [outcome for name, magnitude in magnitudes.items() for outcome in signs(name, round(magnitude, 4), 1 / 14)]
    add(law, 1, place, place)
    rounds = RandAugment().draw(20_000, (32, 8), seeded(0))
    rounded = [[(name, round(magnitude, 4)) for name, magnitude in filter(None, drawn)] for drawn in rounds]
    check_law(zip(*rounded, strict=True), law)
    for drawn in rounded:
        check_law(drawn, dict(place))
        check_law((name for name, _ in drawn), dict.fromkeys(magnitudes, 1 / 14))


@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 32, 32), (1, 12, 8)])
def test_cutout_and_its_law(channels: int, height: int, width: int, device: torch.device) -> None:
    images = torch.randint(1, 256, (20_000, channels, height, width), generator=seeded(0)).to(device, torch.uint8)
    before = images.clone()
    got, half = Cutout()(images, seeded(1)), width // 4
    hole = got[:, 0] == 0
    assert torch.equal(images, before) and torch.equal(got, images.masked_fill(hole[:, None], 0))
    spans, area = [], torch.ones((), dtype=torch.int64, device=device)
    for inside in (hole.any(dim=2), hole.any(dim=1)):
        first, extent = inside.byte().argmax(dim=1), inside.sum(dim=1)
        spans, area = [*spans, *first.tolist(), *(first + extent).tolist()], area * extent
    assert torch.equal(hole.sum(dim=(1, 2)), area)  # a full rectangle
    rows, columns = ([(max(c - half, 0), min(c + half, size)) for c in range(size)] for size in (height, width))
    law: Law = {(*row, *column): 1 / (height * width) for row, column in product(rows, columns)}
    assert len(law) == height * width  # the hole tells its centre
    check_law(zip(*(spans[i : i + 20_000] for i in range(0, 80_000, 20_000))), law)
    assert area.max() == (2 * half) ** 2 and area.min() == half**2


def test_chain_goes_on_with_the_same_generator() -> None:
    images, generator = pictures(50, (3, 32, 32)), seeded(4)
    by_hand = Cutout()(AutoAugment()(images.clone(), generator), generator)
    assert torch.equal(POLICIES["autoaugment+cutout"](images.clone(), seeded(4)), by_hand)


def colours(size: int, steps: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    """Batches of images (size, 2, 8, 16) of one colour each, which is the label: 1 and up."""
    labels = torch.arange(1, size + 1, device=device)
    return [(labels.float()[:, None, None, None].repeat(1, 2, 8, 16), labels)] * steps


def mixed(mix: Mix, batches: list[tuple[Tensor, ...]], generator: Generator) -> Iterator[tuple[Tensor, ...]]:
    return (mix(*batch, generator) for batch in batches)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_mixup(size: int, device: torch.device) -> None:
    batches, orders = colours(size, 30, device), set()
    for images, labels, partners, share in mixed(Mix(0.5, 0), batches, seeded(size)):
        assert torch.equal(labels, batches[0][1]) and torch.equal(partners.sort().values, labels)
        assert share.shape == () and 0 <= share <= 1
        expected = (share * labels + (1 - share) * partners)[:, None, None, None]
        torch.testing.assert_close(images, expected.expand_as(images), rtol=0, atol=1e-5)
        orders.add(tuple(partners.tolist()))
    assert len(orders) == {1: 1, 2: 2, 9: 30}[size]


@pytest.mark.parametrize("alpha", [0.2, 1, 4])
def test_law_of_mixup(alpha: float) -> None:
    n, variance = 4000, 1 / (4 * (2 * alpha + 1))
    shares = torch.stack([share for *_, share in mixed(Mix(alpha, 0), colours(1, n), seeded(0))]).double()
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))  # central moment
    assert abs(shares.mean() - 0.5) < 4 * (variance / n) ** 0.5
    assert abs((shares - 0.5).square().mean() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 9])
def test_cutmix(size: int, device: torch.device) -> None:
    batches, sides = colours(size, 100, device), set()
    for images, labels, partners, share in mixed(Mix(0, 1), batches, seeded(size)):
        assert torch.equal(labels, batches[0][1]) and torch.equal(partners.sort().values, labels)
        own, foreign = (images == kind[:, None, None, None] for kind in (labels, partners))
        assert (own | foreign).all() and share.shape == () and 0 <= share <= 1
        for box in foreign[labels != partners].flatten(0, 1):  # of the same area in every image and channel
            rows, columns = box.any(dim=1), box.any(dim=0)
            assert torch.equal(box, rows[:, None] & columns) and share == 1 - box.sum() / (8 * 16)
            sides.add((int(rows.sum()), int(columns.sum())))
    assert size == 1 or len(sides) > 10
    assert torch.equal(batches[0][0], colours(size, 1, device)[0][0])  # as they were


def test_law_of_cutmix() -> None:
    """How often each pixel is kept, over all lambdas, which are uniform here, and all centres."""
    batches = mixed(Mix(0, 1), colours(2, 8000), seeded(0))
    kept, shares = zip(*((images[0, 0] == 1, share) for images, _, partners, share in batches if partners[0] == 2))
    n, kept, shares = len(shares), torch.stack(kept), torch.stack(shares)
    covered = []
    for extent in (8, 16):
        pixel, centre = torch.arange(extent), torch.arange(extent)[:, None]
        half = ((torch.arange(1000) + 0.5) / 1000).sqrt().mul(extent).int()[:, None, None] // 2
        covered.append(((pixel >= centre - half) & (pixel < centre + half)).float().mean(dim=1))
    expected = 1 - covered[0].T @ covered[1] / 1000
    assert abs(n - 4000) < 4 * 2000**0.5
    assert (kept.float().mean(dim=0) - expected).abs().max() < 4 * 0.5 / n**0.5
    assert abs(shares.mean() - expected.mean()) < 4 * shares.std() / n**0.5


def test_mixup_and_cutmix_take_turns_with_their_own_parameters() -> None:
    shares: dict[bool, list[float]] = {True: [], False: []}
    for images, _, _, share in mixed(Mix(100, 1), colours(9, 400), seeded(0)):
        shares[bool((images == images.round()).all())].append(float(share))
    assert abs(len(shares[True]) - 200) < 4 * 10
    assert max(abs(share - 0.5) for share in shares[False]) < 0.25  # Beta(100, 100)
    assert min(shares[True]) < 0.45 and max(shares[True]) > 0.95


def make(device: torch.device, policy: Policy | None = None, mix: Mix | None = None) -> Batches:
    """Batches of two of 301 images whose normalised pixels are the bytes; labels are positions."""
    images, pixels = pictures(301, (3, 32, 32), seed=9), ((0.0,) * 3, (1 / 255,) * 3)
    return Batches(images, torch.arange(301), 2, *pixels, device, Augment(4, True), (3,), policy=policy, mix=mix)


@pytest.mark.parametrize("name", POLICIES)
def test_batches_apply_the_policy_to_exactly_the_crops(name: str, device: torch.device) -> None:
    policy, chunk, epochs = POLICIES[name], 2 * POLICY_STEPS, []
    assert 2 * chunk < 301
    plain, batches = make(device), make(device, policy)
    for epoch in (0, 1):
        crops, labels = map(torch.cat, zip(*plain.epoch(epoch)))
        parts = enumerate(crops.round().to(torch.uint8).split(chunk))
        by_hand = [policy(part.contiguous(), seeded(3, epoch, 1, number)) for number, part in parts]
        got = list(batches.epoch(epoch))
        assert [len(part) for _, part in got] == [2] * 150 + [1] and len(batches) == 151
        assert got[0][0].is_contiguous(memory_format=torch.channels_last)
        images, same = map(torch.cat, zip(*got))
        assert torch.equal(same, labels) and torch.equal(images.round().to(torch.uint8), torch.cat(by_hand))
        assert torch.equal(torch.cat([again for again, _ in batches.epoch(epoch)]), images)
        epochs.append(images)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("mix", [Mix(0.2, 0), Mix(0, 1), Mix(0.2, 1)], ids=str)
def test_mixing_in_batches_equals_mixing_them_by_hand(mix: Mix, device: torch.device) -> None:
    plain, batches_of = make(device, Cutout()), make(device, Cutout(), mix)
    got = list(batches_of.epoch(1))
    by_hand = [mix(*batch, seeded(3, 1, 2, number)) for number, batch in enumerate(plain.epoch(1))]
    for other in (by_hand, batches_of.epoch(1)):
        assert all(torch.equal(a, b) for batches in zip(got, other, strict=True) for a, b in zip(*batches, strict=True))
    assert [len(batch[0]) for batch in got] == [2] * 150 + [1]
    assert torch.equal(*(torch.cat([batch[1] for batch in batches]) for batches in (got, plain.epoch(1))))
    assert [float(batch[3]) for batch in got] != [float(batch[3]) for batch in batches_of.epoch(2)]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, *_ in got)
    assert all(images.min() >= 0 and images.max() < 255.01 for images, *_ in got)


@pytest.mark.parametrize("first", [0, 1, POLICY_STEPS - 1, POLICY_STEPS, 150, 151])
def test_an_epoch_can_begin_at_any_step(first: int, device: torch.device) -> None:
    batches = make(device, POLICIES["autoaugment+cutout"], Mix(0.2, 1))
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, first))
    assert len(rest) == 151 - first
    assert all(torch.equal(a, b) for pair in zip(whole[first:], rest, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("kind", ["digits", "colour"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_runs(name: str, kind: str, device: torch.device) -> None:
    images = datasets.load("digits", "").train.images if kind == "digits" else pictures(301, (3, 32, 32))
    args = (images, torch.arange(len(images)), 64, (0.0,) * images.shape[1], (1.0,) * images.shape[1], device)
    plain, batches = (Batches(*args, Augment(1, False), policy=policy) for policy in (None, AUGMENTATIONS[name]))
    (crops, order), (got, same) = (map(torch.cat, zip(*one.epoch())) for one in (plain, batches))
    assert torch.equal(order, same) and got.shape == crops.shape and got.dtype == torch.float32
    assert got.min() >= 0 and got.max() <= 1.0001 and got.std() > 0.1
    changed = (got != crops).flatten(1).any(dim=1).float().mean()
    assert changed == 0 if name == "crop_flip" else changed > 0.3  # little changes where there is no colour
    whole = torch.cat([part for part, _ in Batches(*args, policy=AUGMENTATIONS[name]).epoch()])
    assert torch.equal((whole * 255).round().to(torch.uint8).cpu(), images)  # evaluation: as they are
