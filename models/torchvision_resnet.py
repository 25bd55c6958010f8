"""torchvision's residual networks, for photos: in a file of its own, since torchvision is slow to import."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision.models
from torch import Tensor, nn
from torchvision.models import resnet

from models.network import Network, pooled


class ImageNetResNet(Network, torchvision.models.ResNet):  # type: ignore[misc]
    """torchvision's ResNet (He et al., CVPR 2016; ResNeXt: Xie et al., CVPR 2017) as a :class:`Network`."""

    folds = True
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        block: str,
        depths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__(
            getattr(resnet, block),
            list(depths),
            num_classes=num_classes,
            groups=groups,
            width_per_group=width_per_group,
        )
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
