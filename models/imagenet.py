"""Networks for photos: torchvision's residual networks with the ImageNet stem (7x7, stride 2, max-pool), and timm's.

torchvision's have the published names and initialisation, so that its files, and those of Decoupling's code, fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.network import Network, pooled
from utils.options import UsageError

#: What begins the name of a network of timm's.
TIMM = "timm:"


class ImageNetResNet(Network, torchvision.models.ResNet):  # type: ignore[misc]
    """torchvision's ResNet (He et al., CVPR 2016; ResNeXt: Xie et al., CVPR 2017) as a :class:`Network`."""

    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        **more: Any,
    ) -> None:
        super().__init__(block, list(depths), num_classes=num_classes, **more)
        self.num_features = self.fc.get_parameter("weight").shape[1]
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    @property
    def last_block(self) -> nn.Module:
        stage = self.get_submodule("layer4")
        assert isinstance(stage, nn.Sequential)
        return stage[-1]

    def features(self, images: Tensor) -> Tensor:
        maps = images
        for name in self.parts:
            maps = self.get_submodule(name)(maps)
        return pooled(maps)


class TimmNetwork(Network):
    """A backbone of timm's, as ``body``, with a linear classifier on its pooled features."""

    def __init__(self, name: str, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UsageError(f"--network {TIMM}{name}: timm is not installed", "pip install timm") from None
        try:
            body: Any = timm.create_model(name, num_classes=0, in_chans=in_channels)
        except (RuntimeError, TypeError, ValueError) as error:
            near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "a name of timm.list_models()"
            reason = " ".join(str(error).split())
            raise UsageError(f"--network {TIMM}{name}: {reason}", near) from None
        self.body: nn.Module = body
        self.num_features = int(getattr(body, "head_hidden_size", None) or body.num_features)
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
        config: Any = TimmNetwork(name, 2).body.pretrained_cfg
    return str(config["classifier"]), str(config["first_conv"])


IMAGENET: dict[str, Callable[..., Network]] = {
    "resnet50": partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3)),
    "resnext50_32x4d": partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnet10": partial(ImageNetResNet, BasicBlock, (1, 1, 1, 1)),
    "resnet18": partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet101": partial(ImageNetResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ImageNetResNet, Bottleneck, (3, 8, 36, 3)),
}


def imagenet_weights(network: str) -> dict[str, Tensor]:
    """torchvision's weights of its first ImageNet training (IMAGENET1K_V1) for a network of ``IMAGENET``, downloaded.

    Raises:
        UsageError: there are none for this network, or they could not be had.
    """
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
