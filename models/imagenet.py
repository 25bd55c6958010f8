"""Networks for photos: torchvision's residual networks with the ImageNet stem (7x7, stride 2, max-pool), and timm's.

torchvision's have the published names and initialisation, so that its files, and those of Decoupling's code, fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from models.network import Network
from utils.errors import UsageError

#: What begins the name of a network of timm's.
TIMM = "timm:"


def make_resnet(block: str, depths: Sequence[int], **options: int) -> Network:
    """torchvision's ResNet with blocks of this name; see :class:`models.torchvision_resnet.ImageNetResNet`."""
    from models.torchvision_resnet import ImageNetResNet  # here, since it is slow to import

    return ImageNetResNet(block, depths, **options)


class TimmNetwork(Network):
    """A backbone of timm's, as ``body``, with a linear classifier on its pooled features."""

    def __init__(self, name: str, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UsageError(
                f"--network {TIMM}{name}: timm is not installed", "first: python -m pip install timm"
            ) from None
        if re.fullmatch(r"\w[\w.-]*", name) is None:  # others stand for downloads, and for folders
            raise UsageError(f"--network {TIMM}{name}: no name of timm's", "one of timm.list_models()")
        try:
            body: nn.Module = timm.create_model(name, pretrained, num_classes=0, in_chans=in_channels)
        except Exception as error:
            if not pretrained and not isinstance(error, RuntimeError | TypeError | ValueError):
                raise
            if pretrained and timm.is_model(name.split(".")[0]):  # whatever a download raises
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                raise UsageError(
                    f"--network {TIMM}{name}: its weights cannot be had ({reason})",
                    "--pretrained FILE, a file of them, .pth or .safetensors",
                ) from None
            near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "a name of timm.list_models()"
            reason = " ".join(str(error).split())
            raise UsageError(f"--network {TIMM}{name}: {reason}", near) from None
        self.body = body
        self.num_features = int(getattr(body, "head_hidden_size", 0) or getattr(body, "num_features", 0))
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes)

    @property
    def last_block(self) -> nn.Module:
        raise UsageError("the last block of a network of timm's", "a ResNet, or all layers")

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features.to(torch.promote_types(features.dtype, torch.float32))


def timm_names(name: str) -> tuple[str, str]:
    """What timm calls the classifier and the first convolution of a network: "head", "patch_embed.proj"."""
    with torch.device("meta"):
        config = cast(dict[str, str], TimmNetwork(name, 2).body.pretrained_cfg)
    return str(config["classifier"]), str(config["first_conv"])


def timm_constants(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that timm's network ``name`` was trained with, of pixels in [0, 1]."""
    with torch.device("meta"):
        config = cast(dict[str, tuple[float, ...]], TimmNetwork(name, 2).body.pretrained_cfg)
    return tuple(config["mean"]), tuple(config["std"])


IMAGENET: dict[str, Callable[..., Network]] = {
    "resnet50": partial(make_resnet, "Bottleneck", (3, 4, 6, 3)),
    "resnext50_32x4d": partial(make_resnet, "Bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnet10": partial(make_resnet, "BasicBlock", (1, 1, 1, 1)),
    "resnet18": partial(make_resnet, "BasicBlock", (2, 2, 2, 2)),
    "resnet34": partial(make_resnet, "BasicBlock", (3, 4, 6, 3)),
    "resnet101": partial(make_resnet, "Bottleneck", (3, 4, 23, 3)),
    "resnet152": partial(make_resnet, "Bottleneck", (3, 8, 36, 3)),
}


def imagenet_weights(network: str) -> dict[str, Tensor]:
    """torchvision's weights of its first ImageNet training (IMAGENET1K_V1) for a network of ``IMAGENET``, downloaded.

    Raises:
        UsageError: there are none for this network, or they could not be had.
    """
    import torchvision.models  # here, since it is slow to import

    try:
        weights = torchvision.models.get_model_weights(network)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        raise UsageError(
            f"--pretrained_pth imagenet: torchvision has no weights of {network}",
            "resnet18, resnet34, resnet50, resnext50_32x4d, resnet101, resnet152; or a file",
        ) from None
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise UsageError(
            f"--pretrained_pth imagenet: {weights.url} could not be downloaded ({error})",
            "that file, downloaded elsewhere, as --pretrained_pth",
        ) from None
    return state
