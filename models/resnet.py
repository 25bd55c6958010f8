"""Residual networks for 32-pixel images (He et al., CVPR 2016), in the two families that the field uses.

* ``resnet18``, ``resnet34``, ``resnet50``: the ImageNet networks with a 3x3 stride-1 stem and no max-pool, widths 64 to
  512 and projection shortcuts. Label Over-Smooth and Weight Balancing report ``resnet34``.
* ``resnet20`` ... ``resnet56`` (6n + 2 layers): three stages of widths 16, 32, 64 and parameter-free shortcuts. This
  is the field's "ResNet-32" (0.46 M parameters); ``resnet32x4`` is four times as wide. Never compare across families.

Both end in global average pooling and a linear classifier ``fc``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.network import Network, pooled


class Shortcut(nn.Module):
    """Parameter-free shortcut (option A of He et al.): every second pixel, new channels zero, half on each side."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


def projection(in_planes: int, planes: int, stride: int) -> nn.Module:
    """Projection shortcut (option B of He et al.): 1x1 convolution and BatchNorm."""
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in_planes, H, W) -> (B, planes, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (B, in_planes, H, W) -> (B, 4 planes, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(Network):
    """Stem, stages ``layer1`` ... ``layerS``, global average pooling, ``fc``: images (B, c, H, W) -> logits (B, C).

    Args:
        block: the residual block.
        depths: blocks per stage; every stage but the first halves height and width.
        widths: planes per stage; the stem has ``widths[0]``.
        num_classes: C.
        in_channels: c, 3 for colour images.
        shortcut: used where a block changes shape, (in planes, out planes, stride) -> module.
        he_init: normal He initialisation of all weights, as the narrow networks are published; otherwise PyTorch's own,
            as Label Over-Smooth trains ResNet-34.
    """

    folds = True

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        shortcut: Callable[[int, int, int], nn.Module] = projection,
        he_init: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages: list[str] = []
        planes = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for i in range(depth):
                stride, out = (2 if stage > 1 and i == 0 else 1), width * block.expansion
                downsample = shortcut(planes, out, stride) if stride != 1 or planes != out else None
                blocks.append(block(planes, width, stride, downsample))
                planes = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.stages.append(f"layer{stage}")
        self.num_features = planes
        self.fc: nn.Module = nn.Linear(planes, num_classes)
        if he_init:
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight)

    @property
    def last_block(self) -> nn.Module:
        stage = self.get_submodule(self.stages[-1])
        assert isinstance(stage, nn.Sequential)
        return stage[-1]

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return pooled(x)


def _narrow(layers: int, widths: Sequence[int]) -> Callable[..., ResNet]:
    depths = [(layers - 2) // 6] * 3
    return partial(ResNet, BasicBlock, depths, widths, shortcut=Shortcut, he_init=True)


SMALL: dict[str, Callable[..., Network]] = {
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet8": _narrow(8, (16, 32, 64)),  # three blocks: suits the 8x8 digits
    "resnet20": _narrow(20, (16, 32, 64)),
    "resnet32": _narrow(32, (16, 32, 64)),
    "resnet44": _narrow(44, (16, 32, 64)),
    "resnet56": _narrow(56, (16, 32, 64)),
    "resnet32x4": _narrow(32, (64, 128, 256)),
}
