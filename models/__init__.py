"""Networks: ``BACKBONES`` maps a --network name to its constructors; parameter names are the published ones.

A name stands for an architecture, which has one stem for small images and another for photos (``STEMS``), or only one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor

from models.given import GivenFeatures, PretrainedNetwork
from models.heads import HEADS
from models.imagenet import IMAGENET, TIMM, TimmNetwork, imagenet_weights, timm_constants
from models.network import Network, fold, trained_part
from models.resnet import SMALL
from utils.errors import UsageError

__all__ = [
    "BACKBONES",
    "HEADS",
    "STEMS",
    "TIMM",
    "Network",
    "PretrainedNetwork",
    "build_model",
    "fold",
    "imagenet_weights",
    "pick_stem",
    "recognise",
    "sketch",
    "timm_constants",
    "trained_part",
]

#: --stem: 3x3 at stride 1, as for CIFAR; 7x7 at stride 2 with max-pool, as for ImageNet; rows of features have none.
#: ``pretrained`` are timm's networks with weights that somebody trained, which stay as they are.
STEMS: dict[str, dict[str, Callable[..., Network]]] = {
    "small": SMALL,
    "imagenet": IMAGENET,
    "rows": {"features": GivenFeatures},
    "pretrained": {},
}
#: {--network name: {stem: constructor}}
BACKBONES: dict[str, dict[str, Callable[..., Network]]] = {
    name: {stem: table[name] for stem, table in STEMS.items() if name in table} for name in chain(*STEMS.values())
}
#: The largest side, in pixels, of images that get the small stem by default.
SMALL_SIDE = 64


def pick_stem(network: str, side: int, wanted: str = "auto") -> str:
    """The stem of a network for images of so many pixels: the wanted one, or what suits them and is there.

    Raises:
        UsageError: the network has no such stem.
    """
    if network.startswith(TIMM):
        if wanted == "small":
            raise UsageError(f"--stem {wanted} with --network {network}, which has its own", "auto, imagenet")
        return "pretrained" if wanted == "pretrained" else "imagenet"
    there = BACKBONES[network]
    if wanted not in ("auto", *there):
        raise UsageError(f"--stem {wanted} with --network {network}", f"auto, {', '.join(there)}")
    suited = "small" if side <= SMALL_SIDE else "imagenet"
    return next(stem for stem in (wanted, suited, *there) if stem in there)


def build_model(
    network: str, num_classes: int, in_channels: int = 3, head: str = "linear", stem: str | None = None
) -> Network:
    """A freshly initialised network: images (B, in_channels, H, W) -> logits (B, C); ``stem`` None: its first."""
    model: Network
    if network.startswith(TIMM):
        model = TimmNetwork(network.removeprefix(TIMM), num_classes, in_channels)
        model = PretrainedNetwork(model, num_classes) if stem == "pretrained" else model
    else:
        makers = BACKBONES[network]
        model = makers[stem or next(iter(makers))](num_classes=num_classes, in_channels=in_channels)
    if head != "linear":
        model.fc = HEADS[head](model.num_features, num_classes)
    return model


def sketch(
    network: str, num_classes: int, in_channels: int = 3, head: str = "linear", stem: str | None = None
) -> Network:
    """The same network without memory for its weights; with it of those of timm's that look at values meanwhile."""
    if network.startswith(TIMM):
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return build_model(network, num_classes, in_channels, head, stem)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if network.startswith(TIMM) else "meta"):
        return build_model(network, num_classes, in_channels, head, stem)


def recognise(state_dict: Mapping[str, Tensor], head: str = "linear") -> tuple[str, str, int, int] | None:
    """(network, stem, number of classes, input channels) of the network whose names and shapes these are, or None."""
    try:
        num_classes, in_channels = len(state_dict["fc.weight"]), state_dict["conv1.weight"].shape[1]
    except (KeyError, TypeError, IndexError):
        return None
    if num_classes < 1 or in_channels < 1:
        return None
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    for network, makers in BACKBONES.items():
        for stem in makers:
            with torch.device("meta"):
                candidate = build_model(network, num_classes, in_channels, head, stem).state_dict()
            if {name: tensor.shape for name, tensor in candidate.items()} == shapes:
                return network, stem, num_classes, in_channels
    return None
