"""Networks: ``BACKBONES`` maps a --network name to its constructor; parameter names are the published ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.heads import HEADS
from models.resnet import BACKBONES, ResNet

__all__ = ["BACKBONES", "HEADS", "ResNet", "build_model", "recognise"]


def build_model(network: str, num_classes: int, in_channels: int = 3, head: str = "linear") -> ResNet:
    """A freshly initialised network of the tables: images (B, in_channels, H, W) -> logits (B, C)."""
    model = BACKBONES[network](num_classes=num_classes, in_channels=in_channels)
    if head != "linear":
        model.fc = HEADS[head](model.num_features, num_classes)
    return model


def recognise(state_dict: Mapping[str, Tensor], head: str = "linear") -> tuple[str, int, int] | None:
    """(network, number of classes, input channels) of the network whose names and shapes these are, or None."""
    try:
        num_classes, in_channels = len(state_dict["fc.weight"]), state_dict["conv1.weight"].shape[1]
    except (KeyError, TypeError, IndexError):
        return None
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    for network in BACKBONES:
        with torch.device("meta"):
            candidate = build_model(network, num_classes, in_channels, head).state_dict()
        if {name: tensor.shape for name, tensor in candidate.items()} == shapes:
            return network, num_classes, in_channels
    return None
