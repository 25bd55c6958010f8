"""The published stage 1, restated to be compared with: what Label Over-Smooth's and Weight Balancing's loops do.

Images are decoded one by one through PIL (crop, flip, ToTensor, Normalize) by a DataLoader, the network runs in float32
and PyTorch's default memory layout, SGD is PyTorch's default, loss and top-1/top-5 are read back at every step, and
every epoch ends in an evaluation of the test set with mirror images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datasets import Augment, DatasetSpec, ImageSet


class PilImages(Dataset[Sequence[Tensor]]):
    """An image set as PIL images, each through a transform when it is asked for."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]) -> None:
        assert isinstance(images.images, Tensor)
        self.pixels = images.images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def make_loader(
    images: ImageSet, spec: DatasetSpec, batch_size: int, train: bool, workers: int = 0
) -> DataLoader[Sequence[Tensor]]:
    """The published loader; workers start anew at every epoch, as theirs do."""
    steps: list[Callable[[Image.Image], Image.Image | Tensor]] = []
    if train:
        assert isinstance(spec.augment, Augment)
        steps.append(transforms.RandomCrop(images.side, padding=spec.augment.pad))
        steps += [transforms.RandomHorizontalFlip()] if spec.augment.flip else []
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    data = PilImages(images, transforms.Compose(steps))
    pin = torch.cuda.is_available()
    return DataLoader(data, batch_size, shuffle=train, num_workers=workers, pin_memory=pin)


def top1_top5(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracies of a batch, read back to the host."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return hits[:, 0].float().mean().item(), hits.any(dim=1).float().mean().item()


def train_step(
    model: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> float:
    """One step; the loss, read back to the host."""
    logits = model(images)
    loss = criterion(logits, labels)
    value = float(loss.item())
    top1_top5(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value


def train_epoch(
    model: nn.Module, loader: Iterable[Sequence[Tensor]], criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> list[float]:
    """One epoch in train mode; the losses of its steps."""
    device = next(model.parameters()).device
    model.train()
    steps = ((images.to(device), labels.to(device)) for images, labels in loader)
    return [train_step(model, images, labels, criterion, optimizer) for images, labels in steps]


@torch.no_grad()
def validate_step(model: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module, flip: bool = True) -> Tensor:
    """Logits (B, C) of a batch, averaged over mirror images where ``flip``; loss and accuracies read back."""
    logits: Tensor = model(images)
    if flip:
        logits = (logits + model(images.flip(3))) / 2
    criterion(logits, labels).item()
    top1_top5(logits, labels)
    return logits


def validate(model: nn.Module, loader: Iterable[Sequence[Tensor]], criterion: nn.Module, flip: bool = True) -> Tensor:
    """Logits (N, C) of a test set in eval mode, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    steps = ((images.to(device), labels.to(device)) for images, labels in loader)
    return torch.cat([validate_step(model, images, labels, criterion, flip).cpu() for images, labels in steps])
