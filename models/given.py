"""The networks of features that nobody trained here: what is done to a row before the classifier, and what makes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.imagenet import TimmNetwork
from models.network import Network
from utils.errors import UsageError

#: --standardize: what is done to rows before all are scaled alike.
STANDARDIZE = ("none", "l2", "zscore")
#: torchvision's names of the interpolations that timm's configs have.
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")

#: The root mean square norm that rows have after it: about that of a ResNet-34's features on CIFAR-100-LT (12.4 with
#: weight decay 5e-3), which the methods' learning rates are for.
REFERENCE_NORM = 12.0


class GivenFeatures(Network):
    """Rows f (B, D) -> logits (B, C): f' = scale (f - center) / spread, or with ``unit`` scale f / |f|; then ``fc``.

    ``in_channels`` is D.
    """

    center: Tensor
    spread: Tensor
    unit: Tensor
    scale: Tensor

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.num_features = in_channels
        self.register_buffer("center", torch.zeros(in_channels))
        self.register_buffer("spread", torch.ones(in_channels))
        self.register_buffer("unit", torch.tensor(False))
        self.register_buffer("scale", torch.tensor(1.0))
        self.fc: nn.Module = nn.Linear(in_channels, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.standardized(images)

    def standardized(self, rows: Tensor) -> Tensor:
        """Rows f (B, D) -> f' (B, D)."""
        rows = (rows - self.center) / self.spread
        if torch.compiler.is_exporting():  # a graph cannot ask a tensor which way to go
            return self.scale * torch.where(self.unit, F.normalize(rows), rows)
        return self.scale * (F.normalize(rows) if self.unit else rows)

    def fit(self, blocks: Iterable[Tensor], standardize: str) -> None:
        """Takes the statistics of the training rows, blocks (n, D) float32 that make up (N, D).

        Their root mean square norm becomes :data:`REFERENCE_NORM`. UsageError where all are zero.
        """
        number, width = 0, len(self.center)
        sums, squares = torch.zeros(2, width, dtype=torch.float64)
        for block in blocks:
            values = block.double()
            number += len(block)
            sums += values.sum(dim=0).cpu()
            squares += values.square().sum(dim=0).cpu()
        mean, second = sums / number, squares / number
        if float(second.sum()) == 0:
            raise UsageError("all training rows are zero", "features of some network")
        scale = REFERENCE_NORM / float(second.sum()) ** 0.5
        if standardize == "zscore":
            spread = (second - mean.square()).clamp(min=0).sqrt()
            varies = spread > 1e-6 * second.sqrt()
            self.center.copy_(mean)
            self.spread.copy_(spread.where(varies, torch.ones_like(spread)))
            scale = REFERENCE_NORM / max(1, int(varies.sum())) ** 0.5
        elif standardize == "l2":
            self.unit.fill_(True)
            scale = REFERENCE_NORM
        self.scale.fill_(scale)


@dataclass(frozen=True)
class Preprocessing:
    """How images become a network's: their shorter side ``resize`` pixels, of which the centre ``size``; constants."""

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def enlarged(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) held in memory in another size, normalised -> (B, c, size, size)."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        from torchvision.transforms.v2 import functional as T  # here, since it is slow to import

        larger = T.resize(images, [self.resize], interpolation=T.InterpolationMode(self.interpolation), antialias=True)
        shown: Tensor = T.center_crop(larger, [self.size, self.size])
        return shown

    def describe(self) -> str:
        """The same in words."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.size} pixels of {self.resize}, {self.interpolation}, mean {mean}, std {std}"


class PretrainedNetwork(GivenFeatures):
    """A frozen network of timm's that somebody trained, whose features are given: images -> rows -> logits (B, C).

    ``shown`` is how images are to be shown to it; those of another size are resized here.
    """

    def __init__(self, backbone: TimmNetwork, num_classes: int, shown: Preprocessing | None = None) -> None:
        super().__init__(num_classes, backbone.num_features)
        backbone.fc = nn.Identity()
        self.backbone, self.shown = backbone, shown

    @property
    def last_block(self) -> nn.Module:
        return self.backbone.last_block

    def raw_features(self, images: Tensor) -> Tensor:
        return self.backbone.features(images if self.shown is None else self.shown.enlarged(images))

    def features(self, images: Tensor) -> Tensor:
        return self.standardized(self.raw_features(images))
