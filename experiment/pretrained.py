"""Networks of timm's with weights that somebody trained: opened, and a data set as they are to be shown it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from datasets import DATASETS, ImageSet, LongTailed
from datasets.photos import Photos
from experiment.options import DataOptions
from models import TIMM
from models.given import INTERPOLATIONS, Preprocessing
from models.imagenet import TimmNetwork
from models.pretrained import crop_mode, pretrained_network
from utils import checkpoints
from utils.checkpoints import Checkpoint, short
from utils.console import counted
from utils.distributed import main_process_first
from utils.errors import UsageError
from utils.options import Values

T = TypeVar("T", bound=DataOptions)
#: --pretrained: the weights that timm itself has for a network, which are downloaded.
OWN_WEIGHTS = "timm"


class Opened(NamedTuple):
    """A network of timm's with its weights.

    Attributes:
        network: the backbone.
        shown: how images are to be shown to it.
        about: what it is, in words, its licence too.
        path, sha256: the file of its weights, None of timm's own, and the hash of that file or of the weights.
    """

    network: TimmNetwork
    shown: Preprocessing
    about: str
    path: Path | None
    sha256: str


def open_pretrained(network: str, weights: str, options: DataOptions) -> Opened:
    """The network that ``timm:NAME`` names, with timm's own weights or those of a file.

    ``options`` may have another image_size, mean or std than timm's data config.

    Raises:
        UsageError: see :func:`models.pretrained.pretrained_network`; a network or file that is not of timm's.
    """
    if not network.startswith(TIMM):
        raise UsageError(f"--network {network} with pretrained weights", "timm:NAME")
    file = read_weights(weights)
    content = None if file is None else file.foreign
    with main_process_first():  # it may be a download
        opened, shown, licence = pretrained_network(network.removeprefix(TIMM), content, weights, options.image_size)
    shown = replace(shown, mean=options.mean or shown.mean, std=options.std or shown.std)
    about = f"{network}, weights of {weights} (timm states for its own: {licence}); images: {shown.describe()}"
    mode = crop_mode(opened)
    if mode not in ("center", {"crop": "center", "pad": "border"}.get(options.fit, options.fit)):
        about += f"\nnote: of images that are not square timm shows it more than the centre ({mode})"
        about += ": --fit squash, --fit pad" if DATASETS[options.dataset].own else ""
    if file is not None:
        return Opened(opened, shown, about, file.path, str(file.sha256))
    digest = hashlib.sha256()
    checkpoints.add_weights(digest, opened.state_dict())
    return Opened(opened, shown, about, None, digest.hexdigest())


def read_weights(weights: str) -> Checkpoint | None:
    """The file of weights that --pretrained names; None for timm's own.

    Raises:
        UsageError: see :func:`utils.checkpoints.read`; no file, or a checkpoint of this project.
    """
    if weights == OWN_WEIGHTS:
        return None
    if not Path(weights).is_file():
        raise UsageError(f"--pretrained {weights}: there is no such file", f"{OWN_WEIGHTS}, or a file of weights")
    file = checkpoints.read(weights)
    if file.stage is not None:
        raise UsageError(f"{weights}: a checkpoint of this project", f"--from {weights}")
    return file


def for_images_of(options: T, shown: Preprocessing) -> T:
    """Options by which images are read as they are to be shown; UsageError where they say something else of them.

    Small images of one's own stay as they are: they are enlarged before the network, as in prediction.
    """
    if options.input != "files" or options.flip is not None or options.jitter is not None:
        raise UsageError("--input, --flip, --jitter with a network of timm's", "without, which reads files")
    spec = DATASETS[options.dataset]
    options = replace(options, image_size=shown.size if spec.photos and not spec.own else None)
    return replace(options, mean=shown.mean, std=shown.std) if spec.own else options


def shown_as(data: LongTailed, shown: Preprocessing | None) -> LongTailed:
    """A data set as a pretrained network is to be shown it; None: as it is.

    Raises:
        UsageError: images that are not in colour.
    """
    if shown is None:
        return data
    if data.channels != 3:
        raise UsageError(
            f"a network of timm's: {data.spec.name} has {counted(data.channels, 'channel')}", "colour images"
        )

    def seen(part: ImageSet) -> ImageSet:
        if not isinstance(part.images, Photos):
            return part
        return replace(part, images=part.images.shown_as(shown.size, shown.resize, shown.interpolation))

    spec = replace(data.spec, mean=shown.mean, std=shown.std)
    val = None if data.val is None else seen(data.val)
    return replace(data, spec=spec, train=seen(data.train), val=val, test=seen(data.test))


def shown_of(file: Checkpoint) -> Preprocessing | None:
    """How images are shown to the pretrained network of a checkpoint; None where it is none."""
    if "shown" not in file.data:
        return None
    shown, data = file.data["shown"], file.data
    if shown["interpolation"] not in INTERPOLATIONS:
        raise UsageError(f"{file.path}: images shown by {short(shown['interpolation'])}", ", ".join(INTERPOLATIONS))
    return Preprocessing(
        shown["size"], shown["resize"], shown["interpolation"], tuple(data["mean"]), tuple(data["std"])
    )


def stored_as(shown: Preprocessing) -> checkpoints.Data:
    """What a checkpoint's data say of it."""
    how: checkpoints.Shown = {"size": shown.size, "resize": shown.resize, "interpolation": shown.interpolation}
    return {"shown": how, "mean": list(shown.mean), "std": list(shown.std)}


def without_size(typed: Values) -> Values:
    """Typed flags without the size that images are shown in, which of others is a property of the data."""
    return {name: value for name, value in typed.items() if name != "image_size"}
