"""Feature sources: what a frozen backbone makes of the training batches, computed once and kept in a cache on disk.

``FEATURES`` maps a --features name to a source. All share the order of images that the sampler and the seed give, and
differ in BatchNorm and augmentation:

* ``views``: BatchNorm in eval mode, V augmented views of every image; epoch e shows view e mod V. V = 0 is the image
  as it is.
* ``orbit``: eval mode, every crop and flip there is (162 of a CIFAR image); an epoch draws its own.
* ``replay``: train mode, as published: each batch normalises by its own statistics, and the running ones drift.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from datasets import SAMPLERS, Augment, Batches, DatasetSpec, ImageSet, LongTailed
from datasets.batches import Batch, Draws, seeded
from datasets.rows import Rows
from engine import evaluations, for_evaluation, forward
from models import Network, PretrainedNetwork
from utils.arrays import open_array, write_array
from utils.console import show
from utils.distributed import in_turn, on_main_process, rank, world_size
from utils.errors import UsageError
from utils.files import atomic, require_writable, sweep, write_text
from utils.metrics import LOGIT_BYTES, Logits
from utils.readers import Array, Unreadable, parse_tensors, read_bytes, seal, unsealed
from utils.system import free_memory

#: Raise it when the way features are computed or kept changes, so that no old file is taken for a new one.
FORMAT = 3
#: Keeps the views' random numbers apart from the stages'.
VIEWS_STREAM = 3
#: The largest image side of which all crops and flips are kept.
ORBIT_SIDE = 64
#: --feature_dtype: torch's type and what NumPy calls its bits (it has no bfloat16).
DTYPES = {"float32": (torch.float32, "<f4"), "float16": (torch.float16, "<f2"), "bfloat16": (torch.bfloat16, "<i2")}
#: Bytes of float32 features that are held at a time where all of an array are walked through.
BLOCK_BYTES = 2**27
#: Share of a GPU's free memory that one array may take; a larger one stays on disk and is streamed from there.
RESIDENT = 0.5

#: Features (N, D): in memory, mapped from a file, or rows that are read when they are wanted.
Features = Tensor | Rows
#: (steps, their number, what they are) -> the steps, shown as they pass.
Progress = Callable[[Iterable[Batch], int, str], Iterator[Batch]]


def unseen(steps: Iterable[Batch], number: int, what: str) -> Iterator[Batch]:
    """Steps of which no progress is shown."""
    return iter(steps)


class Stream(NamedTuple):
    """What decides the batches of an epoch.

    The first four fields decide which images they show, and so their features; ``change`` says what a method then makes
    of these, and ``second`` is the sampler of further batches that it takes for it, one beside each.
    """

    seed: int
    sampler: str
    batch_size: int
    epochs: int
    change: str = ""
    second: str = ""

    @property
    def read(self) -> list[Stream]:
        """The streams whose features it takes."""
        return [self, self._replace(sampler=self.second)] if self.second else [self]

    def describe(self) -> str:
        """One phrase for the log."""
        words = f"seed {self.seed}, {self.sampler} sampler, batch {self.batch_size}"
        return f"{words}, {self.change}" if self.change else words


class FeatureCache:
    """Named arrays in a folder of their own, chosen by a fingerprint of everything that their content depends on.

    A file is written beside its final name and renamed when it is whole, so an interrupted write leaves nothing to be
    mistaken for it, and two runs that want the same file at once each write the same bytes. Arrays are .npy files of
    ``dtype``, a key of ``DTYPES``, with checksums (:mod:`utils.arrays`), and come back memory-mapped; one that is
    damaged is made anew. They may be larger than memory, and are only read: a page that is written to would be copied
    into it. Of several processes the first alone reads and writes.

    Args:
        root: the folder of all caches.
        about: what the content depends on.
        dtype: key of ``DTYPES``.
        is_checked: check all of an array when it is opened, of a large one too.

    Attributes:
        folder: where the files are.
        computed, reused: bytes of arrays written and found.
        seconds: time spent on writing them, the making included.
    """

    def __init__(
        self, root: str | Path, about: Mapping[str, object], dtype: str = "float32", is_checked: bool = False
    ) -> None:
        self.dtype, self.bits = DTYPES[dtype]
        self.is_checked = is_checked
        if dtype != "float32":  # which older versions did not name
            about = {**about, "dtype": dtype}
        text = json.dumps(about, sort_keys=True, indent=1)
        sweep(root, deep=True)
        self.folder = Path(root, hashlib.sha256(text.encode()).hexdigest()[:16])
        if rank() == 0 and not (self.folder / "about.json").is_file():
            require_writable("--cache_dir", self.folder)
            write_text(self.folder / "about.json", text + "\n")
        self.computed = self.reused = 0
        self.seconds = 0.0
        self._seen: set[str] = set()

    def array(
        self, name: str, shape: tuple[int, int], compute: Callable[[], Iterator[Tensor]], anew: bool = False
    ) -> Tensor:
        """The array (rows, D); where it is missing or ``anew``, made of the pieces (B, D) that ``compute`` yields.

        Several processes make it together, see :func:`utils.distributed.in_turn`; the others than the first return
        nothing (0, D).

        Raises:
            UsageError: another process would make another array.
        """
        path = self.folder / f"{name}.npy"
        array = None if anew or rank() > 0 else self._mapped(path, shape)
        wanted, is_new = on_main_process(lambda: (self._name(path), array is None))
        if wanted != self._name(path):
            raise UsageError(
                f"process {rank()} has another checkpoint, images or PyTorch than the first", "the same for all"
            )
        if rank() > 0:
            if is_new:
                list(compute())  # all of it goes to the first
            return torch.empty(0, *shape[1:], dtype=self.dtype)
        if is_new:
            began = time.perf_counter()
            self._write(path, shape, compute())
            self.seconds += time.perf_counter() - began
            array = self._mapped(path, shape)
        if array is None:
            raise UsageError(f"--cache_dir {self.folder}: {path.name} is gone", "a cache that nobody deletes meanwhile")
        if name not in self._seen:
            self._seen.add(name)
            self.computed += array.nbytes * is_new
            self.reused += array.nbytes * (not is_new)
        return torch.from_numpy(array).view(self.dtype)

    def _write(self, path: Path, shape: tuple[int, int], pieces: Iterator[Tensor]) -> None:
        # Plain writes: on a full disk they fail with an error, a memory map with the process.
        def stored() -> Iterator[bytes]:
            written = 0
            for piece in pieces:
                assert piece.shape[1:] == shape[1:]
                found = piece.cpu().to(self.dtype)
                if self.dtype == torch.float16 and bool((found.isinf() & piece.cpu().isfinite()).any()):
                    too_large = f"a feature of {float(piece.abs().max()):.3g} is too large"
                    raise UsageError(f"--feature_dtype float16: {too_large}", "bfloat16, float32")
                yield found.contiguous().view(torch.uint8).numpy().tobytes()
                written += len(piece)
            assert written == shape[0]

        require_writable("--cache_dir", self.folder)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            write_array(file, self._name(path), shape, self.bits, stored())

    def _mapped(self, path: Path, shape: tuple[int, int]) -> Array | None:
        """The array of a file, memory-mapped; None where the file is missing, damaged (which is said) or another's."""
        if not path.exists():
            return None
        try:
            array = open_array(path, self._name(path), self.is_checked)
        except Unreadable as error:
            show(f"note: {path}: {error}; it is made anew")
            return None
        return array if array.dtype == self.bits and array.shape == shape else None

    def _name(self, path: Path) -> str:
        """What a file's checksums call it: a file of another folder is not taken for it."""
        return f"{self.folder.name}/{path.name}"

    def tensors(self, name: str) -> Path:
        """The path of a small file of tensors beside the arrays."""
        return self.folder / f"{name}.pt"


@dataclass
class FeatureSource:
    """The features of a frozen backbone, as its classifiers are to see them.

    Attributes:
        model: the network; its classifier is not used.
        data: the data set.
        device: where the features go.
        cache_dir, checkpoint: the cache's root, and the SHA-256 of the file that the weights came from.
        flip: whether test and held-out images come with their mirror images.
        progress: shows the passes over the backbone.
        eval_batch: images per step where BatchNorm is in eval mode.
        num_views, view_seed: number of views (0: images as they are) and the seed of their crops and flips (``views``).
        dtype: key of ``DTYPES``: what the training images' features are stored as. Those of test and held-out images
            are float32, so that figures are those of the network itself. Heads get float32 whatever is stored.
        check_cache: check all of an array of the cache when it is opened, of a large one too.
        standardize: key of ``STANDARDIZE``, what a pretrained network's features become.
        amp: dtype of the backbone's arithmetic on training images, None for float32.
        images: how many images the backbone has looked at.
    """

    model: Network
    data: LongTailed
    device: torch.device
    cache_dir: str
    checkpoint: str
    flip: bool
    progress: Progress
    eval_batch: int
    num_views: int = 20
    view_seed: int = 0
    dtype: str = "float32"
    check_cache: bool = False
    standardize: str = "none"
    amp: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self.labels = self.data.train.labels.to(self.device)
        self.caches: dict[str, FeatureCache] = {}
        self.images = 0
        self._latest: dict[str, tuple[str, list[Features]]] = {}
        self._batches: Batches | None = None
        self._fingerprints = {
            part: None if images is None else images.fingerprint()
            for part, images in (("train", self.data.train), ("val", self.data.val), ("test", self.data.test))
        }

    def epoch(self, stream: Stream, epoch: int) -> Iterator[Batch]:
        """The steps of an epoch (from 0): features (B, D) and labels (B,)."""
        raise NotImplementedError

    def planned(self, stream: Stream) -> tuple[FeatureCache, int]:
        """Where the arrays of a stream's training images go, and how many they are."""
        raise NotImplementedError

    def planned_evaluations(self, stream: Stream, part: str, every: int) -> tuple[FeatureCache, int]:
        """The same of "test" or "val" images, evaluated after the epochs that are due, see :func:`engine.is_due`."""
        raise NotImplementedError

    def fill(self, streams: Sequence[Stream], is_clean: bool) -> None:
        """Has all processes make what the first will need: the arrays of these streams and of test and held-out images.

        ``is_clean``: those of training images as they are too. What has no such arrays makes none.
        """

    def arrays(self, streams: Iterable[Stream]) -> tuple[int, int]:
        """How many arrays of training images these streams need, a pass over the backbone each, and how many lack."""
        return lacking(self.planned(each) for stream in streams for each in stream.read)

    def images_left(self, streams: Sequence[Stream], every: int) -> int:
        """How many images the backbone must still look at for these streams, evaluations included."""
        images = self.arrays(streams)[1] * len(self.labels)
        for part, held in (("test", self.data.test), ("val", self.data.val)):
            if held is not None:
                images += lacking(self.planned_evaluations(stream, part, every) for stream in streams)[1] * len(held)
        return images

    @property
    def array_bytes(self) -> int:
        """What an array of training images takes on disk."""
        return len(self.labels) * self.width * DTYPES[self.dtype][0].itemsize

    @property
    def width(self) -> int:
        """D: the numbers of a feature."""
        return self.model.fc.get_parameter("weight").shape[1]

    def evaluated(self, part: str, stream: Stream | None = None, epoch: int = -1) -> list[Features]:
        """Features (N, D) of "test", "val" or "train" as they are, followed by their mirror images' where wanted.

        They are as they are stored, of type ``dtype`` and perhaps on disk; see :func:`feature_blocks`.
        ``stream`` and ``epoch`` say after which epoch; -1 is stage 1's backbone. Training images are never mirrored.
        """
        raise NotImplementedError

    def backbone(self, stream: Stream | None, epoch: int) -> dict[str, Tensor]:
        """The network's state dict after an epoch, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    @property
    def seconds(self) -> float:
        """Time spent on making features so far."""
        return sum(cache.seconds for cache in self.caches.values())

    @property
    def size(self) -> str:
        """One line: where the cache is, and how much was computed and found there."""
        caches = self.caches.values()
        computed, reused = (sum(getattr(cache, name) for cache in caches) / 1e6 for name in ("computed", "reused"))
        made = f"{computed:,.0f} MB computed in {self.seconds:.0f} s"
        return f"features in {self.cache_dir}: {made}, {reused:,.0f} MB reused"

    def cache(self, batchnorm: str, part: str, **more: object) -> FeatureCache:
        """The folder of one part's features."""
        spec = self.data.spec
        about = {
            "format": FORMAT,
            "checkpoint": self.checkpoint,
            "images": self._fingerprints[part],
            "part": part,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "batchnorm": batchnorm,
            "torch": str(torch.__version__),
            "device": self.device.type,
            **({"amp": str(self.amp)} if self.amp and part == "train" else {}),
            **more,
        }
        key = json.dumps(about, sort_keys=True)
        if key not in self.caches:
            dtype = self.dtype if part == "train" else "float32"
            self.caches[key] = FeatureCache(self.cache_dir, about, dtype, self.check_cache)
        return self.caches[key]

    def plain(self, part: str, cache: FeatureCache, name: str, network: Callable[[], Network]) -> list[Features]:
        """The features that a network makes of a part's images, and of their mirror images where wanted."""
        images: ImageSet = getattr(self.data, part)

        def compute(mirrored: bool = False) -> Iterator[Tensor]:
            steps = own_steps(images, self.data.spec, self.eval_batch, self.device)
            steps = ((pixels.flip(dims=(3,)) if mirrored else pixels, labels) for pixels, labels in steps)
            number = -(-len(images) // self.eval_batch)
            amp = self.amp if part == "train" else None
            return self.passes(network(), steps, number, f"features of {part} images", amp)

        key = f"{cache.folder}/{name}"
        if self._latest.get(part, ("", []))[0] != key:  # kept for the next classifier that asks
            shape = len(images), self.width
            found = [cache.array(name, shape, compute)]
            if self.flip and part != "train":
                found.append(cache.array(f"{name}_mirrored", shape, partial(compute, mirrored=True)))
            self._latest[part] = key, [resident(array, self.device) for array in found]
        return self._latest[part][1]

    def passes(
        self, model: Network, steps: Iterable[Batch], number: int, what: str, amp: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """The features (B, D) of the images of ``number`` steps, of which several processes have some each."""

        def mine() -> Iterator[Tensor]:
            for images, _ in self.progress(steps, len(range(rank(), number, world_size())), what):
                yield self.look(model, images, amp)
                self.images += len(images)

        return in_turn(mine(), number, self.width)

    def look(self, model: Network, images: Tensor, amp: torch.dtype | None) -> Tensor:
        """The features (B, D) float32 of images, with the arithmetic of ``amp`` or float32."""
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            return features_of(model, images).float()

    def train_batches(self, stream: Stream) -> Batches:
        """The published batches of a stream: the sampler's order, each image newly cropped and flipped."""
        if self._batches is None:  # whose images serve every stream
            train, augment = self.data.train, self.data.spec.augment
            self._batches = Batches(train.images, train.labels, 1, *self._pixels(), self.device, augment)
        batches = copy.copy(self._batches)
        batches.batch_size, batches.epochs = stream.batch_size, stream.epochs
        batches.sampler, batches.seed = SAMPLERS[stream.sampler], (stream.seed, 2)
        return batches

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.data.spec.mean, self.data.spec.std


class _EvalMode(FeatureSource):
    """What views and orbit share: a backbone that never changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fast = for_evaluation(self.model)
        self._is_fit = False

    def fill(self, streams: Sequence[Stream], is_clean: bool) -> None:
        parts = {"train": is_clean, "test": True, "val": self.data.val is not None}
        for part in filter(parts.get, parts):
            self.evaluated(part)
        for stream in streams:
            self.make(stream)

    def make(self, stream: Stream) -> object:
        """Makes the arrays of a stream's training images that lack."""
        raise NotImplementedError

    def evaluated(self, part: str, stream: Stream | None = None, epoch: int = -1) -> list[Features]:
        return [self.standardized(array) for array in self._raw(part)]

    def _raw(self, part: str) -> list[Features]:
        return self.plain(part, self.cache("eval", part, eval_batch=self.eval_batch), "features", lambda: self.fast)

    def standardized(self, raw: Features) -> Features:
        """What is kept of a network's features (N, D), as its classifier sees it."""
        if not isinstance(self.model, PretrainedNetwork):
            return raw
        self.fit()
        assert isinstance(raw, Tensor)
        return Rows(raw, torch.arange(len(raw)), "", self.model.standardized)

    def fit(self) -> None:
        """Gives a pretrained network the statistics of the training images' features."""
        if isinstance(self.model, PretrainedNetwork) and not self._is_fit:
            rows = max(1, BLOCK_BYTES // (4 * self.width))
            blocks = self._raw("train")[0].split(rows)
            self.model.fit((block.to(self.device).float() for block in blocks), self.standardize)
            self._is_fit = True

    def backbone(self, stream: Stream | None, epoch: int) -> dict[str, Tensor]:
        self.fit()
        return super().backbone(stream, epoch)

    def planned_evaluations(self, stream: Stream, part: str, every: int) -> tuple[FeatureCache, int]:
        return self.cache("eval", part, eval_batch=self.eval_batch), 1 + self.flip

    def view(self, cache: FeatureCache, name: str, *windows: Tensor) -> Tensor:
        """The features (N, D) of all training images under one crop each, in file order."""
        train = self.data.train

        def compute() -> Iterator[Tensor]:
            steps = own_steps(train, self.data.spec, self.eval_batch, self.device, windows)
            return self.passes(self.fast, steps, -(-len(train) // self.eval_batch), name.replace("_", " "), self.amp)

        return cache.array(name, (len(train), self.width), compute)


class Views(_EvalMode):
    """V augmented views of every image, shared by all seeds and samplers; epoch e shows view e mod V."""

    def epoch(self, stream: Stream, epoch: int) -> Iterator[Batch]:
        order = self.train_batches(stream).draws(epoch).order
        yield from gathered(self.seen(epoch), self.labels, order, stream.batch_size)

    def seen(self, epoch: int) -> Features:
        """The features (N, D) of all training images as an epoch shows them, in file order."""
        return self.numbered(epoch % self.num_views) if self.num_views else self.evaluated("train")[0]

    def make(self, stream: Stream) -> None:
        for epoch in range(self.planned(stream)[1]):
            self.seen(epoch)

    def planned(self, stream: Stream) -> tuple[FeatureCache, int]:
        if not self.num_views:
            return self.cache("eval", "train", eval_batch=self.eval_batch), 1
        return self._cache(), min(self.num_views, stream.epochs)

    def numbered(self, view: int) -> Features:
        """The features (N, D) of one view of all training images, in file order."""
        windows = self.data.spec.augment.draw(len(self.labels), seeded(self.view_seed, VIEWS_STREAM, view))
        return self.standardized(resident(self.view(self._cache(), f"view_{view}", *windows), self.device))

    def _cache(self) -> FeatureCache:
        more = {"view_seed": self.view_seed, **asdict(self.data.spec.augment), "eval_batch": self.eval_batch}
        return self.cache("eval", "train", **more)


class Orbit(_EvalMode):
    """Every crop and flip of every image; an epoch's draws are replay's."""

    def __post_init__(self) -> None:
        side = self.data.train.side
        if side > ORBIT_SIDE:
            raise UsageError(f"--features orbit on images of {side} pixels: too many crops to keep", "views, replay")
        super().__post_init__()

    def planned(self, stream: Stream) -> tuple[FeatureCache, int]:
        augment = self.data.spec.augment
        assert isinstance(augment, Augment)
        cache = self.cache("eval", "train", orbit=True, pad=augment.pad, eval_batch=self.eval_batch)
        return cache, (2 * augment.pad + 1) ** 2 * (1 + augment.flip)

    def make(self, stream: Stream) -> list[Tensor]:
        augment = self.data.spec.augment
        assert isinstance(augment, Augment)
        offsets, sides = 2 * augment.pad + 1, 1 + augment.flip
        cache, number = self.planned(stream)
        ones, views = torch.ones(len(self.labels), dtype=torch.int64), []
        for view in range(number):
            top, left, flip = view // sides // offsets, view // sides % offsets, view % sides
            views.append(self.view(cache, f"orbit_{top}_{left}_{flip}", top * ones, left * ones, flip * ones > 0))
        return views

    def epoch(self, stream: Stream, epoch: int) -> Iterator[Batch]:
        augment = self.data.spec.augment
        assert isinstance(augment, Augment)
        offsets, sides = 2 * augment.pad + 1, 1 + augment.flip
        draws = self.train_batches(stream).draws(epoch)
        assert isinstance(draws, Draws)
        wanted = (draws.top * offsets + draws.left) * sides + draws.flip
        views = self.make(stream)
        batches = max(1, BLOCK_BYTES // (4 * views[0].shape[1] * stream.batch_size))
        for order, chosen in zip(*(part.split(batches * stream.batch_size) for part in (draws.order, wanted))):
            features = views[0].new_empty(len(order), views[0].shape[1])
            for number, view in enumerate(views):
                rows = torch.nonzero(chosen == number).flatten()
                features[rows] = view[order[rows]]
            labels = self.labels[order.to(self.device)]
            features = features.to(self.device).float()
            yield from zip(features.split(stream.batch_size), labels.split(stream.batch_size))


class Replay(FeatureSource):
    """The published loop: train-mode BatchNorm on each batch, running statistics that drift from epoch to epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start = self._buffers()

    def epoch(self, stream: Stream, epoch: int) -> Iterator[Batch]:
        batches, cache = self.train_batches(stream), self._cache(stream, "train")
        draws = batches.draws(epoch)

        def compute() -> Iterator[Tensor]:
            self._load(stream, epoch - 1)
            self.model.train()
            yield from self.passes(self.model, batches.cut(draws), len(batches), f"replay of epoch {epoch + 1}")
            self.model.eval()
            buffer = io.BytesIO()  # torch would hide why a disk refuses it
            torch.save({"cache": cache.folder.name, "epoch": epoch, "buffers": self._buffers()}, buffer)
            with atomic(cache.tensors(f"batchnorm_{epoch}")) as path:
                path.write_bytes(seal(buffer.getvalue()))

        anew = self._statistics(cache, epoch) is None
        shape = len(draws.order), self.width
        features = resident(cache.array(f"epoch_{epoch}", shape, compute, anew), self.device)
        labels = self.labels[draws.order.to(self.device)]
        for rows, own in zip(features.split(stream.batch_size), labels.split(stream.batch_size)):
            yield rows.to(self.device).float(), own

    def planned(self, stream: Stream) -> tuple[FeatureCache, int]:
        return self._cache(stream, "train"), stream.epochs

    def planned_evaluations(self, stream: Stream, part: str, every: int) -> tuple[FeatureCache, int]:
        return self._cache(stream, part), evaluations(stream.epochs, every) * (1 + self.flip)

    def evaluated(self, part: str, stream: Stream | None = None, epoch: int = -1) -> list[Features]:
        def network() -> Network:
            self._load(stream, epoch)
            return for_evaluation(self.model)

        if stream is None or epoch < 0:
            return self.plain(part, self.cache("eval", part, eval_batch=self.eval_batch), "features", network)
        return self.plain(part, self._cache(stream, part), f"after_epoch_{epoch}", network)

    def backbone(self, stream: Stream | None, epoch: int) -> dict[str, Tensor]:
        self._load(stream, epoch)
        return super().backbone(stream, epoch)

    def _cache(self, stream: Stream, part: str) -> FeatureCache:
        augment = self.data.spec.augment
        more = {"seed": stream.seed, "sampler": stream.sampler, "batch_size": stream.batch_size, **asdict(augment)}
        if stream.sampler == "progressive":
            more["epochs"] = stream.epochs  # else the order of an epoch does not depend on how many follow
        more |= {"trained_on": self._fingerprints["train"], "eval_batch": self.eval_batch}
        return self.cache("train", part, **more)

    def _load(self, stream: Stream | None, epoch: int) -> None:
        """Sets the running statistics to those after an epoch; -1 is stage 1's."""
        self.model.eval()
        state = self.start
        if stream is not None and epoch >= 0:
            cache = self._cache(stream, "train")
            found = self._statistics(cache, epoch)
            if found is None:
                path = cache.tensors(f"batchnorm_{epoch}")
                raise UsageError(f"--cache_dir: {path} is gone or damaged", "a cache without it: delete it")
            state = found
        for name, value in self.model.named_buffers():
            value.copy_(state[name])

    def _statistics(self, cache: FeatureCache, epoch: int) -> dict[str, Tensor] | None:
        """The running statistics after an epoch; None where their file is missing, damaged or another's."""
        try:
            found = parse_tensors(unsealed(read_bytes(cache.tensors(f"batchnorm_{epoch}"))))
        except Unreadable:
            return None
        if not isinstance(found, dict) or (found.get("cache"), found.get("epoch")) != (cache.folder.name, epoch):
            return None
        buffers, wanted = found.get("buffers"), dict(self.model.named_buffers())
        if not isinstance(buffers, dict) or buffers.keys() != wanted.keys():
            return None
        if any(not is_like(buffers[name], value) for name, value in wanted.items()):
            return None
        return cast(dict[str, Tensor], buffers)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.named_buffers()}


class Given(FeatureSource):
    """Features that are given, so that there is nothing to compute or to keep: rows, standardized as they are read."""

    def epoch(self, stream: Stream, epoch: int) -> Iterator[Batch]:
        generator = seeded(stream.seed, 2, epoch)
        order = SAMPLERS[stream.sampler](self.data.train.labels, epoch, stream.epochs, generator)
        views = self.data.train.views
        view = views[epoch % len(views)].through(self.model.features) if views else self.evaluated("train")[0]
        yield from gathered(view, self.labels, order, stream.batch_size)

    def arrays(self, streams: Iterable[Stream]) -> tuple[int, int]:
        return 0, 0

    def images_left(self, streams: Sequence[Stream], every: int) -> int:
        return 0

    def evaluated(self, part: str, stream: Stream | None = None, epoch: int = -1) -> list[Features]:
        if part not in self._latest:
            rows = getattr(self.data, part).images
            self._latest[part] = "", [resident(rows.through(self.model.features), self.device)]
        return self._latest[part][1]


FEATURES: dict[str, type[FeatureSource]] = {"views": Views, "orbit": Orbit, "replay": Replay}


def lacking(planned: Iterable[tuple[FeatureCache, int]]) -> tuple[int, int]:
    """How many arrays caches are to have, {folder: the most that one plan says}, and how many of them lack."""
    wanted: dict[Path, int] = {}
    for cache, number in planned:
        wanted[cache.folder] = max(number, wanted.get(cache.folder, 0))
    missing = (max(0, number - len([*folder.glob("*.npy")])) for folder, number in wanted.items())
    return sum(wanted.values()), sum(missing)


def own_steps(
    part: ImageSet, spec: DatasetSpec, size: int, device: torch.device, windows: Sequence[Tensor] = ()
) -> Iterator[Batch]:
    """The batches of images in their order, ``size`` at a time: as they are, or cropped by ``windows``, draws (N, ...).

    Of several processes each has whole ones in turn, so that no number depends on how many there are.
    """
    pixels = (part.images, part.labels, size, spec.mean, spec.std, device)
    share = rank(), world_size()
    if not windows:
        return Batches(*pixels, share=share).epoch()
    mine = torch.arange(len(part)).split(size)[share[0] :: share[1]]
    if not mine:
        return iter(())
    index = torch.cat(mine)
    return Batches(*pixels, spec.augment).cut(spec.augment.draws(index, *(draw[index] for draw in windows)))


@torch.no_grad()
def features_of(model: Network, images: Tensor) -> Tensor:
    """Images (B, c, H, W) -> raw features (B, D), without gradient."""
    return forward(model.raw_features, images)


def is_like(value: object, other: Tensor) -> bool:
    """Whether this is a finite tensor of another's type and shape."""
    return (
        isinstance(value, Tensor)
        and (value.shape, value.dtype) == (other.shape, other.dtype)
        and bool(value.isfinite().all())
    )


def resident(array: Features, device: torch.device) -> Features:
    """An array on the device where it fits (:data:`RESIDENT`); where not, and on a CPU, mapped as it is."""
    is_large = device.type != "cpu" and array.nbytes > RESIDENT * free_memory(device)
    return array if is_large or device.type == "cpu" else array.to(device)


def feature_blocks(
    arrays: Sequence[Features], labels: Tensor, classes: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Arrays (N, D) in blocks (n, D), float32 on the device, each with its labels; of two arrays their mean.

    Neither a block's features nor its logits take more than :data:`BLOCK_BYTES`.
    """
    rows = max(1, BLOCK_BYTES // (4 * max(arrays[0].shape[1], classes)))
    for *sides, own in zip(*(array.split(rows) for array in arrays), labels.split(rows)):
        found = [side.to(device).float() for side in sides]
        yield found[0] if len(found) == 1 else (found[0] + found[1]) / 2, own.to(device)


def gathered(features: Features, labels: Tensor, order: Tensor, batch: int) -> Iterator[Batch]:
    """The images of an order (N,) in batches: features (B, D), float32 on the labels' device, and labels (B,).

    Rows of a mapped array (N, D) are read as the batches need them, and its pages stay the file's: the system drops
    and reads them again where memory is short.
    """
    labels = labels[order.to(labels.device)]
    for rows, own in zip(order.to(features.device).split(batch), labels.split(batch)):
        yield features[rows].to(labels.device).float(), own


def predict_features(head: nn.Module, parts: Sequence[Features], batch: int) -> Tensor:
    """Logits (N, C) of float32 features (N, D) on the CPU; with mirror images' features too, the mean of both logits.

    In batches of ``batch`` images, as :func:`engine.predict` makes them, so that both agree to the last bit.
    """
    device = next(head.parameters()).device

    def logits(features: Features) -> Tensor:
        return torch.cat([head(rows.to(device)).cpu() for rows in features.split(batch)])

    with torch.inference_mode():
        sides = [logits(part) for part in parts]
    return sides[0] if len(sides) == 1 else (sides[0] + sides[1]) / 2


class LogitBlocks:
    """The same logits in blocks of at most :data:`LOGIT_BYTES`, computed anew whenever they are iterated over."""

    def __init__(self, head: nn.Module, parts: Sequence[Features], batch: int) -> None:
        classes = len(head.get_parameter("weight"))
        self.rows = batch * max(1, LOGIT_BYTES // (4 * classes * batch))
        self.head, self.parts, self.batch = head, parts, batch

    def __iter__(self) -> Iterator[Tensor]:
        for sides in zip(*(part.split(self.rows) for part in self.parts)):
            yield predict_features(self.head, list(sides), self.batch)


def head_logits(head: nn.Module, parts: Sequence[Features], batch: int) -> Logits:
    """Logits (N, C) as :func:`predict_features` gives them, whole where they fit into one block."""
    blocks = LogitBlocks(head, parts, batch)
    return predict_features(head, parts, batch) if len(parts[0]) <= blocks.rows else blocks
