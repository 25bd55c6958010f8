"""Feature sources and their cache: what they yield, what they reuse, what an interruption leaves."""

from __future__ import annotations

import dataclasses
import io
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
from datasets import DATASETS
from datasets.batches import seeded
from engine import predict
from experiment.data import EVAL_BATCH, eval_batches
from models import build_model
from retraining import features as features_module
from retraining.features import (
    DTYPES,
    FEATURES,
    VIEWS_STREAM,
    FeatureCache,
    Stream,
    gathered,
    head_logits,
    predict_features,
    resident,
)
from retraining.methods import NCM, TauNorm
from retraining.results import FrozenBackbone
from utils import arrays
from utils.arrays import open_array, write_array
from utils.errors import UsageError
from utils.readers import Unreadable

CPU = torch.device("cpu")
STREAM = Stream(seed=3, sampler="instance", batch_size=64, epochs=4)


def passes(steps, total, label):
    """Stands for the progress bar; notes every pass over the backbone."""
    passes.seen.append(label)
    return iter(steps)


@pytest.fixture(autouse=True)
def _count(monkeypatch) -> None:
    monkeypatch.setattr(passes, "seen", [], raising=False)


def make(kind: str, folder: Path, data=None, flip: bool = False, seed: int = 0, **more):
    data = data or datasets.load("digits", "")
    torch.manual_seed(seed)
    model = build_model("resnet8", 10, data.channels)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(0.1 * torch.rand(buffer.shape))
    return FEATURES[kind](
        model, data, CPU, str(folder), f"weights of seed {seed}", flip, passes, EVAL_BATCH["cpu"], **more
    )


def collect(source, epoch: int, stream: Stream = STREAM) -> tuple[torch.Tensor, torch.Tensor]:
    steps = list(source.epoch(stream, epoch))
    assert all(len(labels) == stream.batch_size for _, labels in steps[:-1])
    return torch.cat([features for features, _ in steps]), torch.cat([labels for _, labels in steps])


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_the_networks_of_the_drawn_images(kind: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path, num_views=2)
    data, model = source.data, source.model
    for epoch in (0, 1, 2):
        draws = source.train_batches(STREAM).draws(epoch)
        top, left = draws.top, draws.left  # digits are never flipped
        if kind == "views":
            windows = data.spec.augment.draw(len(data.train), seeded(0, VIEWS_STREAM, epoch % 2))
            top, left = (part[draws.order] for part in windows[:2])
        padded = torch.nn.functional.pad(data.train.images[draws.order].float() / 255, (1, 1, 1, 1))
        crops = [padded[i, :, top[i] : top[i] + 8, left[i] : left[i] + 8] for i in range(len(padded))]
        images = (torch.stack(crops) - data.spec.mean[0]) / data.spec.std[0]
        features, labels = collect(source, epoch)
        assert torch.equal(labels, data.train.labels[draws.order])
        if kind == "replay":
            reference = build_model("resnet8", 10, 1)
            reference.load_state_dict(source.backbone(STREAM, epoch - 1))
            with torch.no_grad():
                expected = torch.cat([reference.train().features(piece) for piece in images.split(64)])
            for name, value in reference.named_buffers():
                assert torch.allclose(value, source.backbone(STREAM, epoch)[name], atol=1e-6), name
        else:
            with torch.no_grad():
                expected = model.eval().features(images)
        assert (features - expected).abs().max() < 1e-5 * expected.max()
        assert not model.training


def test_mixed_precision_is_for_training_images_alone(tmp_path: Path) -> None:
    whole, half = make("views", tmp_path), make("views", tmp_path, amp=torch.bfloat16)
    assert torch.equal(whole.evaluated("test")[0], half.evaluated("test")[0])
    assert passes.seen == ["features of test images"]  # once
    for find in (lambda source: collect(source, 0)[0], lambda source: source.evaluated("train")[0]):
        exact, near = find(whole), find(half)
        assert near.dtype == torch.float32 and 0 < (exact - near).abs().max() < 0.05 * exact.max()


def test_no_view_is_the_image_as_it_is(tmp_path: Path) -> None:
    source = make("views", tmp_path, num_views=0)
    images = (source.data.train.images.float() / 255 - source.data.spec.mean[0]) / source.data.spec.std[0]
    order = source.train_batches(STREAM).draws(1).order
    with torch.no_grad():
        expected = source.model.features(images)[order]
    assert (collect(source, 1)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", FEATURES)
def test_nothing_is_computed_twice(kind: str, tmp_path: Path) -> None:
    first = make(kind, tmp_path, num_views=3)
    kept = [collect(first, epoch)[0].clone() for epoch in range(4)]
    before = len(passes.seen)
    assert before == {"views": 3, "orbit": 9, "replay": 4}[kind]
    second = make(kind, tmp_path, num_views=3)
    assert all(torch.equal(collect(second, epoch)[0], kept[epoch]) for epoch in range(4))
    assert len(passes.seen) == before and " 0 MB computed" in second.size
    other_seed = STREAM._replace(seed=4)
    collect(second, 0, other_seed)
    assert len(passes.seen) == before + (kind == "replay")
    collect(make(kind, tmp_path, seed=1, num_views=3), 0)
    assert len(passes.seen) > before + (kind == "replay")  # another checkpoint


def test_replay_takes_up_where_the_cache_ends(tmp_path: Path) -> None:
    whole = make("replay", tmp_path / "a")
    kept = [collect(whole, epoch)[0].clone() for epoch in range(3)]
    begun = make("replay", tmp_path / "b")
    collect(begun, 0)
    again = make("replay", tmp_path / "b")
    assert all(torch.equal(collect(again, epoch)[0], kept[epoch]) for epoch in range(3))
    assert passes.seen.count("replay of epoch 1") == 2 and passes.seen.count("replay of epoch 2") == 2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", FEATURES)
def test_evaluation_features_give_the_networks_logits_to_the_bit(
    kind: str, flip: bool, tmp_path: Path, small_cifar10: str
) -> None:
    data = datasets.load("cifar10", small_cifar10, imb_ratio=4, val_fraction=0.3)
    source = make(kind, tmp_path, data, flip, num_views=2)
    stream = None if kind != "replay" else STREAM
    if stream:
        collect(source, 0, stream)
    for part in ("test", "val"):
        features = source.evaluated(part, stream, 0)
        assert len(features) == 1 + flip
        reference = build_model("resnet8", 10)
        reference.load_state_dict(source.backbone(stream, 0))
        expected, _ = predict(reference, eval_batches(data, getattr(data, part), CPU), flip)
        assert torch.equal(predict_features(reference.fc, features, source.eval_batch), expected)
    assert len(source.evaluated("train")) == 1


def test_orbit_is_every_crop_and_flip(tmp_path: Path, small_cifar10: str) -> None:
    source = make("orbit", tmp_path, datasets.load("cifar10", small_cifar10, imb_ratio=10))
    collect(source, 0)
    assert len(passes.seen) == 162 and len(list(tmp_path.rglob("orbit_*.npy"))) == 162


def test_orbit_refuses_large_images(tmp_path: Path, small_cifar10: str) -> None:
    data = datasets.load("cifar10", small_cifar10, imb_ratio=10)
    large = torch.zeros(len(data.train), 3, 224, 224, dtype=torch.uint8)
    object.__setattr__(data.train, "images", large)
    with pytest.raises(UsageError, match="--features orbit on images of 224 pixels"):
        make("orbit", tmp_path, data)


def test_the_key_holds_everything_that_features_depend_on(tmp_path: Path) -> None:
    base = make("views", tmp_path)
    folders = {str(base.cache("eval", "train", view_seed=0).folder)}
    for other in (
        make("views", tmp_path, seed=1),
        make("views", tmp_path, datasets.load("digits", "", imb_ratio=50)),
        make("views", tmp_path, datasets.load("digits", "", subset="shuffled")),
        make("views", tmp_path, datasets.load("digits", "", val_fraction=0.2)),
    ):
        folders.add(str(other.cache("eval", "train", view_seed=0).folder))
    folders.add(str(base.cache("eval", "train", view_seed=1).folder))
    folders.add(str(base.cache("train", "train", view_seed=0).folder))
    folders.add(str(base.cache("eval", "test", view_seed=0).folder))
    assert len(folders) == 8


@pytest.mark.parametrize(
    "kind, change",
    [
        ("views", {"view_seed": 1}),
        ("views", {"data": {"val_fraction": 0.2}}),
        ("views", {"seed": 1}),
        ("replay", {"stream": {"sampler": "class"}}),
        ("replay", {"stream": {"batch_size": 32}}),
        ("replay", {"stream": {"seed": 9}}),
        ("replay", {"data": {"val_fraction": 0.2}}),
        ("orbit", {"seed": 1}),
    ],
)
def test_a_cache_that_was_filled_otherwise_is_not_taken(kind: str, change: dict, tmp_path: Path) -> None:
    """The features of a changed source are the same in a used cache folder as in a fresh one."""
    stream = STREAM._replace(**change.get("stream", {}))
    data = datasets.load("digits", "", **change.get("data", {}))
    other = {key: value for key, value in change.items() if key in ("view_seed", "seed")}
    first = make(kind, tmp_path / "used", num_views=2)
    collect(first, 0)
    first.evaluated("test", STREAM if kind == "replay" else None, 0)
    used = make(kind, tmp_path / "used", data, num_views=2, **other)
    fresh = make(kind, tmp_path / "fresh", data, num_views=2, **other)
    assert torch.equal(collect(used, 0, stream)[0], collect(fresh, 0, stream)[0])
    for part in ("test", "val") if data.val else ("test",):
        after = stream if kind == "replay" else None
        assert torch.equal(used.evaluated(part, after, 0)[0], fresh.evaluated(part, after, 0)[0])


def test_a_progressive_replay_depends_on_the_number_of_epochs(tmp_path: Path) -> None:
    source = make("replay", tmp_path)
    short, long = (Stream(3, "progressive", 64, epochs) for epochs in (2, 9))
    for epoch in range(2):
        one, two = collect(source, epoch, short)[1].clone(), collect(source, epoch, long)[1]
    assert not torch.equal(one, two)
    fresh = make("replay", tmp_path / "fresh")
    for epoch in range(2):
        expected = collect(fresh, epoch, long)[0]
    assert torch.equal(collect(source, 1, long)[0], expected)


def test_normalisation_is_part_of_the_key(tmp_path: Path) -> None:
    data = datasets.load("digits", "")
    before = make("views", tmp_path, data).cache("eval", "train").folder
    for change in ({"mean": (0.1,)}, {"std": (0.9,)}):
        spec = dataclasses.replace(data.spec, **change)
        other = make("views", tmp_path, dataclasses.replace(data, spec=spec))
        assert other.cache("eval", "train").folder != before


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "garbage": lambda b: b"garbage",
    "short": lambda b: b[:-100],
    "long": lambda b: b + b"x",
    "half of zeros": lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2),
    "a bit of the array": lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:],
    "a bit of the header": lambda b: b[:90] + bytes([b[90] ^ 1]) + b[91:],
    "a bit of the checksums": lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
    "NaN": lambda b: b[:400] + np.float32("nan").tobytes() * 99 + b[796:],
    "another array": lambda b: saved(np.zeros((3, 2), np.float32)),
    "another array of this shape": lambda b: saved(np.zeros((304, 64), np.float32)),
}


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew_and_that_is_said(damage: str, tmp_path: Path, capsys) -> None:
    whole = collect(make("views", tmp_path, num_views=1), 0)[0].clone()
    [path] = tmp_path.rglob("view_0.npy")
    before = path.read_bytes()
    path.write_bytes(DAMAGE[damage](before))
    assert torch.equal(collect(make("views", tmp_path, num_views=1), 0)[0], whole)
    assert f"note: {path}: " in capsys.readouterr().out and path.read_bytes() == before


def test_a_flipped_bit_anywhere_in_an_array_s_file_is_seen(tmp_path: Path) -> None:
    path, draw = tmp_path / "x.npy", random.Random(0)
    content = np.arange(3 * 2**20, dtype=np.int32)
    with open(path, "wb") as file:
        write_array(file, "x", content.shape, "<i4", [content[:99].tobytes(), content[99:].tobytes()])
    assert np.array_equal(np.load(path), content) and np.array_equal(open_array(path, "x"), content)
    with pytest.raises(Unreadable, match="written under another name"):
        open_array(path, "y")
    size = path.stat().st_size
    for place in [0, 7, 60, 127, size - 1, size - 5, size - 9, *(draw.randrange(size) for _ in range(100))]:
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
            file.flush()
            with pytest.raises(Unreadable):
                open_array(path, "x")
            file.seek(place)
            file.write(bytes([byte]))
    assert np.array_equal(open_array(path, "x"), content)


def test_of_a_large_array_a_sample_is_checked_or_all_of_it(tmp_path: Path, monkeypatch) -> None:
    for name, value in (("BLOCK", 1024), ("CHECKED_WHOLE", 4096), ("SAMPLED", 8)):
        monkeypatch.setattr(arrays, name, value)
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        write_array(file, "x", (2**20,), "|u1", [bytes(2**20)])
    blob = bytearray(path.read_bytes())
    blob[500_000] ^= 1
    path.write_bytes(blob)
    seen = 0
    for _ in range(60):
        try:
            open_array(path, "x")
        except Unreadable:
            seen += 1
    assert 0 <= seen < 20  # 8 of 1025 blocks
    with pytest.raises(Unreadable, match="block 488 of 1025"):
        open_array(path, "x", is_whole=True)


def test_replay_takes_no_running_statistics_of_another_epoch(tmp_path: Path) -> None:
    source = make("replay", tmp_path)
    whole = [collect(source, epoch)[0].clone() for epoch in range(2)]
    first, second = sorted(tmp_path.rglob("batchnorm_?.pt"))
    second.write_bytes(first.read_bytes())
    assert torch.equal(collect(make("replay", tmp_path), 1)[0], whole[1])
    assert second.read_bytes() != first.read_bytes()


def test_replay_without_its_running_statistics_is_made_anew(tmp_path: Path) -> None:
    whole = collect(make("replay", tmp_path), 0)[0].clone()
    [path] = tmp_path.rglob("batchnorm_0.pt")
    path.unlink()
    again = make("replay", tmp_path)
    assert torch.equal(collect(again, 0)[0], whole) and path.is_file()
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match="batchnorm_0"):
        collect(make("replay", tmp_path), 1)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {"a": 1})

    def broken():
        yield torch.ones(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.array("x", (4, 3), broken)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["about.json"]
    got = cache.array("x", (4, 3), lambda: iter([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert got.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert torch.equal(FeatureCache(tmp_path, {"a": 1}).array("x", (4, 3), broken), got)


def test_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {})
    array = cache.array("x", (2, 3), lambda: iter([torch.ones(2, 3)]))
    array += 1  # copy-on-write: the file stays as it is
    assert np.load(cache.folder / "x.npy").max() == 1
    assert str(cache.folder / "x.npy") in Path("/proc/self/maps").read_text()


def test_two_runs_may_want_the_same_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def run(_: int) -> torch.Tensor:
        cache = FeatureCache(tmp_path, {"a": 1})
        barrier.wait(60)
        return cache.array("x", (600, 5), lambda: (torch.full((2, 5), float(i)) for i in range(300)))

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, range(4)):
            assert torch.equal(got[:, 0], torch.arange(300.0).repeat_interleave(2))
    assert not list(tmp_path.rglob("*.tmp"))


def test_cifar_orbit_has_162_views() -> None:
    augment = DATASETS["cifar100"].augment
    assert (2 * augment.pad + 1) ** 2 * (1 + augment.flip) == 162


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_stored_as_asked(dtype: str, tmp_path: Path) -> None:
    pieces = torch.randn(90, 7, generator=torch.Generator().manual_seed(0)).split(40)
    stored = FeatureCache(tmp_path, {"a": 1}, dtype).array("x", (90, 7), lambda: iter(pieces))
    assert stored.dtype == getattr(torch, dtype) and torch.equal(stored, torch.cat(pieces).to(stored.dtype))
    assert next(tmp_path.rglob("x.npy")).stat().st_size == 128 + stored.nbytes + 12  # header and checksums
    again = FeatureCache(tmp_path, {"a": 1}, dtype)
    assert torch.equal(again.array("x", (90, 7), pytest.fail), stored) and again.reused == stored.nbytes


def test_the_type_is_part_of_the_key(tmp_path: Path) -> None:
    folders = {dtype: FeatureCache(tmp_path, {"a": 1}, dtype).folder for dtype in DTYPES}
    assert len(set(folders.values())) == 3
    assert folders["float32"] == FeatureCache(tmp_path, {"a": 1}).folder
    sources = {dtype: make("views", tmp_path, dtype=dtype) for dtype in DTYPES}
    assert len({source.cache("eval", "train").folder for source in sources.values()}) == 3
    assert len({source.cache("eval", "test").folder for source in sources.values()}) == 1


def test_a_feature_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    pieces = [torch.tensor([[1.0, -70_000.0]])]
    with pytest.raises(UsageError, match="--feature_dtype float16: a feature of 7e\\+04"):
        FeatureCache(tmp_path, {}, "float16").array("x", (1, 2), lambda: iter(pieces))
    assert not list(tmp_path.rglob("x.npy"))
    assert torch.isfinite(FeatureCache(tmp_path, {}, "bfloat16").array("x", (1, 2), lambda: iter(pieces))).all()


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_heads_get_the_stored_rows_in_the_same_order_as_float32(
    kind: str, dtype: str, tmp_path: Path, monkeypatch
) -> None:
    whole, small = make(kind, tmp_path, num_views=2), make(kind, tmp_path, num_views=2, dtype=dtype)
    expected = [collect(whole, epoch) for epoch in (0, 1)]
    monkeypatch.setattr(features_module, "BLOCK_BYTES", 4 * 64 * 64)  # orbit: a batch at a time
    for epoch in (0, 1):
        features, labels = collect(small, epoch)
        assert features.dtype == torch.float32 and torch.equal(labels, expected[epoch][1])
        assert torch.equal(features, expected[epoch][0].to(getattr(torch, dtype)).float())
        assert torch.equal(collect(whole, epoch)[0], expected[epoch][0])
    assert small.evaluated("test")[0].dtype == torch.float32
    assert torch.equal(small.evaluated("test")[0], whole.evaluated("test")[0])


def test_a_mapped_array_is_gathered_without_copying_it(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

    rows = 24_576
    array = FeatureCache(tmp_path, {}, "float16").array(
        "x", (rows, 2048), lambda: (torch.ones(512, 2048) for _ in range(48))
    )
    before = anonymous()
    for features, _ in gathered(array, torch.arange(rows), torch.randperm(rows), 64):
        assert features.min() == 1 and anonymous() - before < array.nbytes / 4


def test_a_streamed_epoch_is_the_array_in_its_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, labels, order = torch.randn(70, 5), torch.arange(70), torch.randperm(70)
    array = FeatureCache(tmp_path, {}, "float16").array("x", (70, 5), lambda: iter(whole.split(30)))
    steps = list(gathered(array, labels, order, 16))
    assert [len(rows) for rows, _ in steps] == [16, 16, 16, 16, 6]
    features, found = (torch.cat(part) for part in zip(*steps))
    assert torch.equal(features, whole.half()[order].float()) and torch.equal(found, order)


def test_what_does_not_fit_on_a_device_stays_on_disk(monkeypatch) -> None:
    array, device = torch.ones(10, 4), torch.device("meta")  # stands for a GPU
    for free, place in ((400, "meta"), (300, "cpu")):
        monkeypatch.setattr(features_module, "free_memory", lambda _, free=free: free)
        assert resident(array, device).device.type == place
    assert resident(array, CPU) is array


@pytest.mark.parametrize("sides", [1, 2])
def test_predictions_in_blocks_equal_the_whole(sides: int, monkeypatch) -> None:
    torch.manual_seed(0)
    head, parts = torch.nn.Linear(6, 5), [torch.randn(230, 6) for _ in range(sides)]
    whole = head_logits(head, parts, 50)
    assert isinstance(whole, torch.Tensor) and torch.equal(whole, predict_features(head, parts, 50))
    monkeypatch.setattr(features_module, "LOGIT_BYTES", 4 * 5 * 120)
    blocks = head_logits(head, parts, 50)
    for _ in range(2):
        assert [len(block) for block in blocks] == [100, 100, 30]
        assert torch.equal(torch.cat(list(blocks)), whole)


@pytest.mark.parametrize("metric", ["centred", "cosine", "l2"])
def test_class_means_in_blocks_equal_the_whole(metric: str, tmp_path: Path, monkeypatch) -> None:
    frozen = FrozenBackbone(make("views", tmp_path))
    whole = NCM(ncm_metric=metric).head(frozen.stage1)
    monkeypatch.setattr(features_module, "BLOCK_BYTES", 4 * 64 * 100)
    assert len(list(frozen.stage1.clean())) == 4
    blocks = NCM(ncm_metric=metric).head(frozen.stage1)
    for name, value in whole.state_dict().items():
        assert torch.allclose(blocks.state_dict()[name], value, atol=1e-6), name


def test_held_out_features_in_blocks_equal_the_whole(tmp_path: Path, small_cifar10: str, monkeypatch) -> None:
    data = datasets.load("cifar10", small_cifar10, imb_ratio=4, val_fraction=0.3)
    frozen = FrozenBackbone(make("views", tmp_path, data, flip=True))
    [(whole, labels)] = frozen.stage1.held_out()
    assert torch.equal(whole, torch.stack(frozen.source.evaluated("val")).mean(dim=0))
    tau = TauNorm().chosen(frozen.stage1)
    monkeypatch.setattr(features_module, "BLOCK_BYTES", 4 * 64 * 7)
    features, own = (torch.cat(part) for part in zip(*frozen.stage1.held_out()))
    assert len(list(frozen.stage1.held_out())) > 1 and torch.equal(features, whole) and torch.equal(own, labels)
    assert TauNorm().chosen(frozen.stage1) == tau
