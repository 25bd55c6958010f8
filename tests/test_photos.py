"""Photos: crops, colour and scaling against torchvision's, every way of reading them, and files that fail."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets import Batches, files
from datasets.batches import seeded
from datasets.files import read_image
from datasets.geometry import LONGEST, centre, placed, resample, rescaled, shortened, square
from datasets.photos import ATTEMPTS, Crops, Photos, ResizedCrop
from datasets.scan import write_pixels
from utils.errors import UsageError

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(90, 120), (64, 48), (100, 100), (40, 200), (33, 71)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Smooth colours, which survive scaling and JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, (height, width) in enumerate(SIZES):
        picture(height, width, k).save(tmp_path / f"{k}.jpg", quality=95)
    return tmp_path


def photos_in(folder: Path, size: int = 32, **more) -> Photos:
    sizes = torch.tensor(SIZES, dtype=torch.int32)
    return Photos(folder, [f"{k}.jpg" for k in range(len(SIZES))], sizes, size, **more)


def test_boxes_are_those_of_the_equations() -> None:
    """torchvision's RandomResizedCrop, restated attempt by attempt."""
    augment, generator = ResizedCrop(), seeded(0)
    sizes = torch.tensor(SIZES * 400)
    chances = augment.draw(len(sizes), generator)[0]
    central = 0
    for (height, width), chance, box in zip(sizes.tolist(), chances.double().tolist(), augment.boxes(chances, sizes)):
        areas, ratios, (down, across) = chance[:ATTEMPTS], chance[ATTEMPTS:-2], chance[-2:]
        for u, v in zip(areas, ratios):
            area = height * width * (0.08 + 0.92 * u)
            ratio = math.exp(math.log(3 / 4) + v * (math.log(4 / 3) - math.log(3 / 4)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                expected = [int(down * (height - h + 1)), int(across * (width - w + 1)), h, w]
                break
        else:
            central += 1
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            expected = [(height - h) // 2, (width - w) // 2, h, w]
        assert box.tolist() == expected
    assert central > 5  # the long image has them


def test_the_law_of_crops_is_torchvisions() -> None:
    n = 4000
    torch.manual_seed(0)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(torch.empty(3, 90, 120), [0.08, 1], [3 / 4, 4 / 3])
                           for _ in range(n)]).double()  # fmt: skip
    augment = ResizedCrop()
    ours = augment.boxes(augment.draw(n, seeded(1))[0], torch.tensor([[90, 120]]).expand(n, 2)).double()
    for mine, other in zip(ours.T, theirs.T):
        assert mine.mean() == pytest.approx(float(other.mean()), abs=4 * float(other.std()) * math.sqrt(2 / n))
        assert mine.std() == pytest.approx(float(other.std()), rel=0.1)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_a_batch_is_torchvisions_pipeline_with_the_same_draws(folder: Path, jitter: float) -> None:
    photos, augment = photos_in(folder), ResizedCrop(jitter=jitter)
    batches = Batches(photos, torch.arange(5), 3, MEAN, STD, CPU, augment, seed=(4,))
    draws = batches.draws(2)
    boxes = augment.boxes(draws.chances[:, :], photos.sizes[draws.order])
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    expected = []
    for k, index in enumerate(draws.order.tolist()):
        image = F.resized_crop(read_image(folder / f"{index}.jpg"), *boxes[k].tolist(), [32, 32], antialias=True)
        image = (F.horizontal_flip(image) if draws.flip[k] else image).float() / 255
        if jitter:
            for kind in draws.sequence[k].tolist():
                image = changes[kind](image, float(draws.factors[k, kind]))
        expected.append(F.normalize(image, MEAN, STD))
    images, labels = (torch.cat(parts) for parts in zip(*batches.epoch(2)))
    assert torch.equal(labels, draws.order)
    assert (images - torch.stack(expected)).abs().max() < 2e-5
    assert images.is_contiguous(memory_format=torch.channels_last) or len(images) == 5


def test_draws_of_colour_are_even_and_independent() -> None:
    _, flip, factors, sequence = ResizedCrop(jitter=0.4).draw(20_000, seeded(3))
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and abs(float(factors.mean()) - 1) < 0.01
    assert abs(float(flip.float().mean()) - 0.5) < 0.02 and not ResizedCrop(flip=False).draw(50, seeded(0))[1].any()
    orders, counts = sequence.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and counts.min() > 3000


def test_test_images_are_scaled_and_cut_as_published(folder: Path) -> None:
    photos = photos_in(folder, size=224)
    view = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    pixels = Batches(photos, torch.arange(5), 2, (0.0,) * 3, (1.0,) * 3, CPU).epoch()
    expected = torch.stack([view(read_image(folder / f"{k}.jpg")) for k in range(5)])
    assert torch.equal((torch.cat([images for images, _ in pixels]) * 255).round().byte(), expected)


def test_scaling_as_matrix_products_is_torchvisions() -> None:
    images = torch.stack([torch.from_numpy(np.array(picture(64, 64, k))) for k in range(6)])
    boxes = [[0, 0, 64, 64], [3, 5, 20, 31], [10, 0, 54, 40], [0, 20, 5, 7], [8, 8, 48, 48], [1, 2, 60, 9]]
    flip = torch.tensor([False, True, False, True, True, False])
    ours = resample(images, torch.tensor(boxes), flip, 32)
    for image, box, mirrored, mine in zip(images, boxes, flip, ours):
        theirs = F.resized_crop(image.permute(2, 0, 1), *box, [32, 32], antialias=True)
        theirs = (theirs.flip(2) if mirrored else theirs).permute(1, 2, 0)
        assert (mine.int() - theirs.int()).abs().max() <= 1


def test_the_cache_shows_the_same_crops_up_to_resolution(folder: Path) -> None:
    target = folder / "train_64.npy"
    write_pixels(folder, [f"{k}.jpg" for k in range(5)], 64, target, 1)
    store = np.load(target, mmap_mode="c")
    both = [photos_in(folder), photos_in(folder, store=store, how="cache")]
    for augment in (ResizedCrop(jitter=0), None):
        args = (torch.arange(5), 5, (0.0,) * 3, (1.0,) * 3, CPU, augment)
        [[files, _]], [[cached, _]] = (list(Batches(photos, *args).epoch(1)) for photos in both)
        apart = (files - cached).abs().flatten(1).mean(dim=1)
        assert apart.max() < 0.05, apart  # another crop or a mirrored one is at 0.1 or more
        assert (files - cached.flip(3)).abs().flatten(1).mean(dim=1).min() > 0.05
    # Taken out of order, the rows of the store follow.
    some = both[1][torch.tensor([3, 1])]
    assert torch.equal(some.show(0, [0, 0, 64, 64]), both[1].show(3, [0, 0, 64, 64]))
    assert some.fingerprint() != both[1].fingerprint() != both[0].fingerprint()


def with_store(folder: Path, side: int = 64) -> Photos:
    target = folder / f"train_{side}.npy"
    write_pixels(folder, [f"{k}.jpg" for k in range(5)], side, target, 1)
    return photos_in(folder, store=np.load(target, mmap_mode="c"), how="cache")


def test_boxes_in_the_cache_hold_a_pixel_of_it_at_least() -> None:
    sizes = torch.tensor([[1000, 1000], [1000, 1000], [1, 2000], [1, 2000], [30, 3000]])
    boxes = torch.tensor([[0, 0, 1000, 1000], [995, 996, 5, 4], [0, 0, 1, 1], [0, 1999, 1, 1], [0, 2970, 30, 30]])
    found = rescaled(boxes, sizes, torch.tensor([16, 16]))
    assert found.tolist() == [[0, 0, 16, 16], [15, 15, 1, 1], [0, 0, 16, 1], [0, 15, 16, 1], [0, 15, 16, 1]]


@pytest.mark.parametrize("augment", [ResizedCrop(), None])
def test_a_gpu_cuts_the_cache_as_workers_do(folder: Path, augment: ResizedCrop | None) -> None:
    """Its way, all images of a step at once, run on the CPU."""
    photos, order = with_store(folder), torch.tensor([3, 0, 4, 1, 2])
    draws = ResizedCrop().draw(5, seeded(2))[:2] if augment else ()
    both = []
    for on_gpu in (False, True):
        crops = Crops(photos, augment, CPU)
        crops.on_gpu = on_gpu
        both.append(next(crops._run([(order, *draws)])).int())
    assert (both[0] - both[1]).abs().max() <= 1 and both[0].float().std() > 20


@pytest.mark.parametrize("augment", [ResizedCrop(), None])
def test_the_gpus_decoder_gets_whole_files_and_its_images_are_cut_as_others(
    folder: Path, augment: ResizedCrop | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the decoder, which needs a GPU."""
    photos, order = photos_in(folder), torch.tensor([3, 0, 4, 1, 2])
    draws = ResizedCrop().draw(5, seeded(2))[:2] if augment else ()
    [expected] = Crops(photos, augment, CPU)._run([(order, *draws)])
    crops = Crops(photos, augment, CPU)
    photos.how = "nvjpeg"

    def decode(contents, mode, device):
        return [torch.from_numpy(simplejpeg.decode_jpeg(c.numpy().tobytes())).permute(2, 0, 1) for c in contents]

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    [found] = crops._run([(order, *draws)])
    assert torch.equal(found, expected) and capsys.readouterr().out == ""

    def fail(contents, mode, device):
        raise RuntimeError("a progressive one")

    monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
    for _ in range(2):
        [found] = crops._run([(order, *draws)])
        assert torch.equal(found, expected)
    assert capsys.readouterr().out.count("decoded on the CPU (a progressive one)") == 1
    with pytest.raises(UsageError, match="--input nvjpeg"):
        Crops(photos, augment, CPU)


def test_a_fingerprint_changes_with_whatever_is_seen(folder: Path) -> None:
    plain, cached = photos_in(folder), with_store(folder)
    pixels = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    held = Photos(folder, [], torch.full((3, 2), 8, dtype=torch.int32), 80, pixels)
    others = [
        photos_in(folder, size=40),
        photos_in(folder, identity="x"),
        photos_in(folder, how="nvjpeg"),
        plain[torch.tensor([0, 1])],
        plain[torch.tensor([1, 0])],
        Photos(folder, [f"{k}.png" for k in range(5)], plain.sizes, 32),
        Photos(folder, plain.paths, plain.sizes + 1, 32),
        with_store(folder, 32),
        held,
        held[torch.tensor([0, 1])],
        held[torch.tensor([1, 2])],
        Photos(folder, [], held.sizes, 80, pixels + 1),
    ]
    prints = [photos.fingerprint() for photos in (plain, cached, *others)]
    assert len(set(prints)) == len(prints) and photos_in(folder).fingerprint() == prints[0]
    assert torch.equal(plain[torch.tensor([3, 1])].sizes, plain.sizes[[3, 1]])


def test_worker_processes_change_nothing(folder: Path) -> None:
    found = []
    for workers in (0, 2):
        batches = Batches(photos_in(folder, workers=workers), torch.arange(5), 2, MEAN, STD, CPU, ResizedCrop())
        state = torch.get_rng_state()
        epochs = [torch.cat([images for images, _ in batches.epoch(epoch)]) for epoch in (0, 1)]
        assert torch.equal(state, torch.get_rng_state())
        found.append(torch.stack(epochs))
    assert torch.equal(*found) and not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_bad_is_named(folder: Path, workers: int) -> None:
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:300])
    batches = Batches(photos_in(folder, workers=workers), torch.arange(5), 2, MEAN, STD, CPU, ResizedCrop())
    with pytest.raises(UsageError, match=r"3\.jpg cannot be read"):
        list(batches.epoch(0))


KINDS = {  # mode of the image: file name
    "RGB": "a.png", "L": "a.jpg", "CMYK": "b.jpg", "P": "b.png", "RGBA": "c.png", "LA": "d.png", "1": "e.png",
    "I;16": "f.png", "I;16 tiff": "a.tif", "RGB bmp": "a.bmp", "RGB gif": "a.gif", "RGB webp": "a.webp",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_rgb(kind: str, tmp_path: Path) -> None:
    image, path = picture(20, 30, 7), tmp_path / KINDS[kind]
    if kind.startswith("I;16"):
        image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(kind.split()[0])
    image.save(path, **({"lossless": True} if kind == "RGB webp" else {}))
    pixels = read_image(path)
    assert pixels.shape == (3, 20, 30) and pixels.dtype == torch.uint8
    wanted = picture(20, 30, 7).convert("L") if kind in ("L", "LA", "I;16", "I;16 tiff") else picture(20, 30, 7)
    expected = torch.from_numpy(np.array(wanted.convert("RGB"))).permute(2, 0, 1)
    if kind not in ("1", "P", "RGB gif"):  # which lose colours
        assert (pixels.int() - expected.int()).abs().float().mean() < (6 if path.suffix == ".jpg" else 0.51)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0 cut off", b"\x89PNG\r\n\x1a\n cut off"])
def test_what_is_no_image_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.jpg cannot be read"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(UsageError, match=r"none\.jpg cannot be read \(No such file"):
        read_image(tmp_path / "none.jpg")


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UsageError, match="32 bits"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("shape", [(1, 65_500), (65_500, 1), (2, 400), (1, 17)])
def test_a_line_is_shown_within_bounds(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.arange(shape[0] * shape[1] * 3).reshape(3, *shape).remainder(251).byte()
    largest: list[int] = []
    scale = F.resize

    def resize(images: torch.Tensor, size: list[int], how: F.InterpolationMode, antialias: bool) -> torch.Tensor:
        scaled = scale(images, size, how, antialias=antialias)
        largest.append(scaled.numel())
        return scaled

    monkeypatch.setattr(F, "resize", resize)
    for view, side in ((centre(image, 224), 224), (square(image, 32), 32)):
        assert view.shape == (3, side, side)
    assert max(largest) <= 3 * 256 * 256 * LONGEST
    middle = [slice(n // 2 - 4, n // 2 + 4) if n > 8 else slice(0, n) for n in shape]
    assert int(view.min()) >= int(image[:, middle[0], middle[1]].min())  # it is the middle that is shown


def test_images_that_are_not_longer_are_not_touched() -> None:
    for shape in ((5, 80), (80, 5), (30, 40), (1, 16)):
        image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        assert shortened(image) is image
        theirs = F.center_crop(F.resize(image, [32], antialias=True), [28, 28])
        assert (centre(image, 28).int() - theirs.int()).abs().max() <= 1


def test_an_image_of_too_many_pixels_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_PIXELS", 60 * 50)
    for name, size in {"a.jpg": (60, 51), "b.png": (61, 50)}.items():
        Image.new("RGB", size).save(tmp_path / name)
        with pytest.raises(UsageError, match=rf"{name} has {size[0]} x {size[1]} pixels"):
            read_image(tmp_path / name)
    Image.new("RGB", (60, 50)).save(tmp_path / "c.jpg")
    assert read_image(tmp_path / "c.jpg").shape == (3, 50, 60)


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("shape", [(40, 200), (201, 41), (64, 64), (1, 300)])
def test_all_of_an_image_is_seen_where_it_is_squashed_or_padded(fit: str, shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 200, dtype=torch.uint8)
    for view in (centre(image, 80, fit), square(image, 32, fit)):
        side = view.shape[1]
        seen = (view[0] > 0).nonzero()
        high, wide = (max(1, round(side * length / max(shape))) for length in shape) if fit == "pad" else (side, side)
        rows, columns = (int(part.max() - part.min()) + 1 for part in seen.T)
        assert abs(rows - high) <= 1 and abs(columns - wide) <= 1, (rows, columns)
        assert abs(int(seen[:, 0].min()) - (side - rows) // 2) <= 1
        assert set(view.flatten().tolist()) <= {0, 200}


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("augment", [ResizedCrop(jitter=0), None])
def test_files_the_cache_and_a_gpu_show_the_same_of_images_that_are_fitted(
    folder: Path, fit: str, augment: ResizedCrop | None
) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    from_files, from_cache = photos_in(folder, size=48, fit=fit), with_store(folder, 200)
    from_cache.fit, from_cache.size, from_cache.resize = fit, from_files.size, from_files.resize
    draws = (ResizedCrop().draw(5, torch.Generator().manual_seed(1))) if augment else None
    steps = [(order, draws[0], draws[1])] if draws else [(order,)]
    views = []
    for photos in (from_files, from_cache):
        crops = Crops(photos, augment, CPU)
        views.append(next(crops.cuts(steps) if draws else crops.whole(s[0] for s in steps)).int())
    on_gpu = Crops(from_cache, augment, CPU)
    on_gpu.on_gpu = on_gpu.photos.store is not None
    views.append(on_gpu._finish(torch.from_numpy(from_cache.store[order.numpy()]), *steps[0]).int())
    black = [view.amax(dim=3) == 0 for view in views]
    assert torch.equal(black[1], black[2]) and (views[1] - views[2]).abs().max() <= 2
    assert (black[0] != black[1]).float().mean() < 0.02
    same = ~(black[0] | black[1])
    assert (views[0] - views[1])[same].abs().float().mean() < 6


def test_a_crop_shows_no_more_black_than_it_must(folder: Path) -> None:
    photos = photos_in(folder, size=48, fit="pad")
    index = torch.arange(5).repeat(200)
    chances = ResizedCrop().draw(1000, torch.Generator().manual_seed(0))[0]
    cut = photos.boxes(ResizedCrop(), index, chances)
    assert cut is not None and cut.places is not None
    assert (cut.boxes[:, 2:] >= 1).all() and (cut.places[:, 2:] >= 1).all()
    sizes, ends = photos.sizes[index], cut.boxes[:, :2] + cut.boxes[:, 2:]
    assert (
        (cut.boxes[:, :2] >= 0).all() and (ends <= sizes).all() and (cut.places[:, :2] + cut.places[:, 2:] <= 48).all()
    )
    is_part = cut.places[:, 2:] < 48  # black above and below, or beside: all of the image is there
    assert is_part.any() and (cut.boxes[:, 2:] == sizes)[is_part].float().mean() > 0.98
    ones = torch.tensor([[-30, 0, 100, 100]]), torch.tensor([[40, 100]])
    assert [part.tolist() for part in placed(*ones, 10)] == [[[0, 0, 40, 100]], [[3, 0, 4, 10]]]
