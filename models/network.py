"""What every network is: features by a backbone, logits by the classifier ``fc``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Network(nn.Module):
    """Images (B, c, H, W) -> logits (B, C); a subclass has ``fc``, ``num_features`` D and :meth:`features`.

    ``fc`` may be any head of :mod:`models.heads`.

    Attributes:
        folds: each of its convolutions ``convN`` is seen by ``bnN`` alone, where there is one beside it.
    """

    folds: ClassVar[bool] = False
    fc: nn.Module
    num_features: int

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees: images (B, c, H, W) -> features (B, D)."""
        raise NotImplementedError

    def raw_features(self, images: Tensor) -> Tensor:
        """The same before anything that follows from the training set is done to them."""
        return self.features(images)

    @property
    def last_block(self) -> nn.Module:
        """The last residual block."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):  # the classifier stays in the precision of its weights
            logits: Tensor = self.fc(features)
        return logits


def trained_part(model: Network, scope: str) -> nn.Module:
    """What is trained, all or the last block with the classifier; the rest of the model is frozen."""
    if scope == "all":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    return nn.ModuleList([model.last_block, model.fc]).requires_grad_(True)


def fold(model: Network) -> None:
    """Puts every BatchNorm of a network in eval mode into the convolution before it, where it ``folds``."""
    for module in model.modules() if model.folds else ():
        children = dict(module.named_children())
        pairs = [(name, f"bn{name.removeprefix('conv')}") for name in children]
        if isinstance(module, nn.Sequential):
            pairs = [*zip(children, list(children)[1:])]
        for name, following in pairs:
            conv, norm = children[name], children.get(following)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, following, nn.Identity())


def pooled(maps: Tensor) -> Tensor:
    """Global average pooling, in float32 also where the maps are of a lower precision: (B, D, H, W) -> (B, D)."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32)).mean(dim=(2, 3))
