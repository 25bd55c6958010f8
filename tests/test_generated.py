"""Methods that change the features: samples and their Gaussians longhand, fused channels, what the cache shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_features import collect, make, passes

from datasets.batches import seeded
from retraining import generated
from retraining.features import FEATURES, Stream
from retraining.generated import CHANGES_STREAM, TailSampler, fused, sorted_by_class
from retraining.results import FrozenBackbone
from retraining.settings import by_stream, make_methods

COUNTS = [60, 9, 30, 4, 1]
WIDTH = 6
COMMON = {"seed": (3,), "batch_size": (64,), "finetune_epoch": (4,)}


@pytest.fixture(autouse=True)
def _count(monkeypatch) -> None:
    monkeypatch.setattr(passes, "seen", [], raising=False)


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (104, 6) of five classes in a mixed order, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))[torch.randperm(104, generator=generator)]
    means, mixing = torch.randn(5, WIDTH, generator=generator), torch.randn(5, WIDTH, WIDTH, generator=generator)
    noise = torch.randn(104, 1, WIDTH, generator=generator) @ mixing[labels]
    return 2 * means[labels] + noise[:, 0], labels


def sampler_of(rows, neighbours: int = 2, alpha: float = 0.0, block: int = 104) -> TailSampler:
    features, labels = rows
    return TailSampler(COUNTS, zip(features.split(block), labels.split(block)), neighbours, alpha)


def statistics(rows) -> tuple[np.ndarray, np.ndarray]:
    """Class means (C, D) and covariances (C, D, D) by NumPy."""
    features, labels = (part.numpy().astype(np.float64) for part in rows)
    parts = [features[labels == j] for j in range(5)]
    covariances = [np.cov(part.T) if len(part) > 1 else np.zeros((WIDTH, WIDTH)) for part in parts]
    return np.stack([part.mean(axis=0) for part in parts]), np.stack(covariances)


@pytest.mark.parametrize("block", [104, 7])
def test_means_and_roots_are_the_classes_statistics(rows, block: int) -> None:
    means, covariances = statistics(rows)
    sampler = sampler_of(rows, block=block)
    assert np.abs(sampler.means.numpy() - means).max() < 1e-5
    for root, covariance, count in zip(sampler.roots, covariances, COUNTS):
        assert root.shape == (min(count, WIDTH), WIDTH)
        assert np.abs((root.T @ root).numpy() - covariance).max() < 1e-4
    ordered = sorted_by_class(COUNTS, zip(rows[0].split(block), rows[1].split(block)))
    assert torch.equal(ordered, rows[0][rows[1].argsort(stable=True)])


@pytest.mark.parametrize("neighbours", [1, 3, 99])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_samples_have_the_calibrated_mean_and_covariance(rows, neighbours: int, alpha: float) -> None:
    means, covariances = statistics(rows)
    centred = np.concatenate([rows[0].numpy()[rows[1].numpy() == j] - means[j] for j in range(5)])
    variance = (centred**2).sum() / (104 - 5) / WIDTH
    k = min(neighbours, 5)
    for place in (0, 50):
        anchor = rows[0][place].numpy().astype(np.float64)
        nearest = np.argsort(((means - anchor) ** 2).sum(axis=1))[:k]
        mean = (means[nearest].sum(axis=0) + anchor) / (k + 1)
        covariance = covariances[nearest].mean(axis=0) + alpha * variance * np.eye(WIDTH)
        drawn = sampler_of(rows, neighbours, alpha).around(rows[0][place].expand(100_000, -1), seeded(1)).numpy()
        spread = np.sqrt(np.diag(covariance))
        assert np.abs((drawn.mean(axis=0) - mean) / spread).max() < 5 / 100_000**0.5
        assert np.abs((np.cov(drawn.T) - covariance) / np.outer(spread, spread)).max() < 8 / 100_000**0.5


def test_small_classes_are_filled_up_to_the_largest(rows) -> None:
    features, labels = rows[0].repeat(200, 1), rows[1].repeat(200)
    steps = list(zip(features.split(64), labels.split(64)))
    found = list(sampler_of(rows)(iter(steps), seeded(0)))
    assert [len(own) for _, own in found] == [len(own) for _, own in steps]
    assert torch.equal(torch.cat([own for _, own in found]), labels)
    real = (torch.cat([part for part, _ in found]) == features).all(dim=1)
    for label, count in enumerate(COUNTS):
        share = real[labels == label].double().mean().item()
        assert share == pytest.approx(count / 60, abs=4 * (0.25 / count / 200) ** 0.5 if count < 60 else 0)
    assert torch.equal(rows[0].repeat(200, 1), features)  # which are not written to


def test_steps_may_come_in_any_window_and_again(rows, monkeypatch) -> None:
    steps = list(zip(rows[0].split(16), rows[1].split(16)))
    sampler = sampler_of(rows)

    def drawn(*seed: int) -> torch.Tensor:
        return torch.cat([part for part, _ in sampler(iter(steps), seeded(*seed))])

    once = drawn(0, 1)
    assert torch.equal(drawn(0, 1), once) and not torch.equal(drawn(0, 2), once)
    for size in (1, 3 * 4 * 16 * WIDTH):
        monkeypatch.setattr(generated, "BLOCK_BYTES", size)
        assert [len(own) for _, own in sampler(iter(steps), seeded(0))] == [16] * 6 + [8]


@pytest.mark.parametrize("rho, number", [(0.0, 0), (0.3, 3), (0.59, 5), (1.0, 10)])
def test_channels_are_those_of_the_other_batch(rho: float, number: int) -> None:
    steps = [(torch.arange(70.0).view(7, 10), torch.arange(7)), (torch.arange(20.0).view(2, 10), torch.arange(2))]
    others = [(-1 - features, labels + 100) for features, labels in steps]
    seen = []
    for seed in range(20):
        for (found, labels), (own, expected), (second, _) in zip(
            fused(steps, others, rho, seeded(seed)), steps, others
        ):
            taken = found[0] < 0
            assert int(taken.sum()) == number and torch.equal(labels, expected)
            assert torch.equal(found[:, taken], second[:, taken]) and torch.equal(found[:, ~taken], own[:, ~taken])
            seen.append(tuple(taken.tolist()))
    assert len(set(seen)) > 20 or number in (0, 10)  # others in each step
    assert steps[0][0].min() == 0  # which are not written to


def only(name: str, **wanted):
    [method] = make_methods([name], COMMON | {key: (value,) for key, value in wanted.items()}, wanted, 10)
    return method


@pytest.mark.parametrize("kind", FEATURES)
def test_batches_are_the_sources_changed(kind: str, tmp_path: Path) -> None:
    frozen = FrozenBackbone(make(kind, tmp_path, num_views=2))
    method, tail = only("h2t", h2t_rho=0.5), only("tail-sampling")
    batches, again = method.batches(frozen.source, frozen.stage1), tail.batches(frozen.source, frozen.stage1)
    for epoch in (0, 1):
        own, second = (Stream(3, name, 64, 4) for name in ("class", "instance"))
        plain, labels = (part.clone() for part in collect(frozen.source, epoch, own))
        others = collect(frozen.source, epoch, second)[0].clone()
        expected = fused(
            zip(plain.split(64), labels.split(64)), zip(others.split(64), labels), 0.5, seeded(3, 4, epoch)
        )
        found = list(batches(epoch))
        assert torch.equal(torch.cat([part for part, _ in found]), torch.cat([part for part, _ in expected]))
        assert torch.equal(torch.cat([part for _, part in found]), labels)
        found, same = (list(again(epoch)) for _ in range(2))
        assert all(torch.equal(*pair) for steps in zip(found, same) for pair in zip(*steps))
        is_real = (torch.cat([part for part, _ in found]) == plain).all(dim=1)
        counts = torch.tensor(frozen.stage1.class_counts)
        assert is_real[labels == counts.argmax()].all() and is_real[labels == counts.argmin()].double().mean() < 0.2
    assert CHANGES_STREAM == 4


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_shared_with_plain_methods(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path, num_views=2)
    streams = [only(name).stream for name in ("ce", "crt", "tail-sampling", "h2t")]
    own, rest = source.arrays(streams[:2]), source.arrays(streams)
    assert own == rest and own[0] == {"views": 2, "orbit": 9, "replay": 8}[kind]
    assert source.arrays(streams[3:]) == own  # h2t takes what both read
    for epoch in range(4):
        for stream in streams[:2]:
            collect(source, epoch, stream)
    before = len(passes.seen)
    for stream in streams[2:]:
        assert [source.planned(each)[1] for each in stream.read] == [source.planned(streams[0])[1]] * len(stream.read)
        collect(source, 3, stream)
    assert len(passes.seen) == before


def test_the_keys_of_replay_have_no_more_than_the_images_decide(tmp_path: Path) -> None:
    source = make("replay", tmp_path)
    for stream in (only("h2t").stream, only("h2t", sampler="progressive").stream):
        about = json.loads((source.planned(stream)[0].folder / "about.json").read_text())
        of_the_source = json.loads((source.cache("train", "train").folder / "about.json").read_text())
        more = {"seed", "sampler", "batch_size", "pad", "flip", "trained_on", "eval_batch"}
        assert about.keys() - of_the_source.keys() == more | ({"epochs"} if stream.sampler == "progressive" else set())


def test_heads_of_one_change_are_trained_side_by_side() -> None:
    settings = make_methods(["crt", "h2t", "tail-sampling"], COMMON, [], 10, tune=True)
    groups = by_stream(settings)
    assert [len(group) for group in groups.values()] == [9] + [3] * 6
    assert len({stream.describe() for stream in groups}) == 7
    assert {(stream.sampler, stream.seed) for stream in groups} == {("class", 3)}
