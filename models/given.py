"""The network of features that are given: no backbone, but what is done to a row before the classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.network import Network

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
        rows = (images - self.center) / self.spread
        return self.scale * (F.normalize(rows) if self.unit else rows)
