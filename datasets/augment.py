"""What may be done to training images beyond crop and flip. ``AUGMENTATIONS`` maps an --aug name to a policy.

Policies change many uint8 images at once, on their device; random numbers come from a generator on the CPU, so that
they are the same on every device. The operations and their tables are torchvision's; pixels that come in from outside
are black, where some long-tail code has them grey.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Policy(Protocol):
    """images (n, c, H, W) uint8 -> as many, each changed on its own."""

    def __call__(self, images: Tensor, generator: Generator) -> Tensor: ...


#: An operation of torchvision's policies with its magnitude, for every image of a group.
Operation = tuple[str, float]


class _Drawn:
    """Runs torchvision's per-image policies on many images: those with the same operation go through it together."""

    @cached_property
    def library(self) -> v2.AutoAugment | v2.RandAugment:
        """torchvision's own policy, made when it is first needed: importing it takes as long as importing torch."""
        raise NotImplementedError

    def draw(self, n: int, size: tuple[int, int], generator: Generator) -> list[list[Operation | None]]:
        """What is done to each of n images in each round; None for nothing."""
        raise NotImplementedError

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        images = images.clone(memory_format=torch.contiguous_format)
        height, width = images.shape[2:]
        for drawn in self.draw(len(images), (height, width), generator):
            groups: dict[Operation, list[int]] = {}
            for i, operation in enumerate(drawn):
                if operation is not None:
                    groups.setdefault(operation, []).append(i)
            for (name, magnitude), members in groups.items():
                index = torch.tensor(members).to(images.device, non_blocking=True)
                images[index] = self.apply(images[index], name, magnitude)
        return images

    def apply(self, images: Tensor, name: str, magnitude: float) -> Tensor:
        """torchvision's operation on images (n, c, H, W) uint8."""
        library = self.library
        changed: Tensor = library._apply_image_or_video_transform(
            images, name, magnitude, interpolation=library.interpolation, fill=library._fill
        )
        return changed

    def magnitude(self, name: str, level: int | None, bins: int, size: tuple[int, int], negate: bool) -> float:
        """The magnitude of a level of torchvision's table, with its sign where it has one."""
        values, signed = self.library._AUGMENTATION_SPACE[name]
        table = values(bins, *size)
        if table is None or level is None:
            return 0.0
        return float(table[level]) * (-1 if signed and negate else 1)


class AutoAugment(_Drawn):
    """AutoAugment (Cubuk et al., CVPR 2019): one of the 25 policies found on CIFAR-10, two operations each."""

    @cached_property
    def library(self) -> v2.AutoAugment:
        from torchvision.transforms import AutoAugmentPolicy, v2

        return v2.AutoAugment(AutoAugmentPolicy.CIFAR10)

    def draw(self, n: int, size: tuple[int, int], generator: Generator) -> list[list[Operation | None]]:
        policies = self.library._policies
        chosen = torch.randint(len(policies), (n,), generator=generator).tolist()
        chances = torch.rand(2, n, generator=generator).tolist()
        negative = (torch.rand(2, n, generator=generator) < 0.5).tolist()
        rounds: list[list[Operation | None]] = []
        for place in range(2):
            drawn: list[Operation | None] = []
            for which, chance, negate in zip(chosen, chances[place], negative[place]):
                name, probability, level = policies[which][place]
                is_done = chance <= probability
                drawn.append((name, self.magnitude(name, level, 10, size, negate)) if is_done else None)
            rounds.append(drawn)
        return rounds


class RandAugment(_Drawn):
    """RandAugment (Cubuk et al., NeurIPS 2020): two operations at magnitude 9 of 30, torchvision's defaults."""

    @cached_property
    def library(self) -> v2.RandAugment:
        from torchvision.transforms import v2

        return v2.RandAugment()

    def draw(self, n: int, size: tuple[int, int], generator: Generator) -> list[list[Operation | None]]:
        library = self.library
        names = list(library._AUGMENTATION_SPACE)
        shape = (library.num_ops, n)
        chosen = torch.randint(len(names), shape, generator=generator).tolist()
        negative = (torch.rand(shape, generator=generator) < 0.5).tolist()
        bins, level = library.num_magnitude_bins, library.magnitude
        return [
            [(names[i], self.magnitude(names[i], level, bins, size, negate)) for i, negate in zip(*row)]
            for row in zip(chosen, negative)
        ]


class Cutout:
    """Cutout (DeVries and Taylor, 2017): a square of half the image's width set to 0, centred on any pixel.

    Half the width is 16 pixels of 32, the paper's for CIFAR-10 and what long-tailed recognition takes for both CIFARs;
    the square may stick out. It is black, as where it is cut before normalisation; the paper's code cuts after it.
    """

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        n, _, height, width = images.shape
        inside = []
        for extent, dim in ((height, -1), (width, -2)):
            start = torch.randint(extent, (n, 1), generator=generator).to(images.device) - width // 4
            places = torch.arange(extent, device=images.device)
            inside.append(((places >= start) & (places < start + width // 2)).unsqueeze(dim))
        hole = (inside[0] & inside[1])[:, None]
        return images.masked_fill(hole, 0)


class Chain:
    """Policies one after the other."""

    def __init__(self, *policies: Policy) -> None:
        self.policies = policies

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        for policy in self.policies:
            images = policy(images, generator)
        return images


AUGMENTATIONS: dict[str, Policy | None] = {
    "crop_flip": None,
    "autoaugment": AutoAugment(),
    "randaugment": RandAugment(),
    "cutout": Cutout(),
    "autoaugment+cutout": Chain(AutoAugment(), Cutout()),
}


@dataclass(frozen=True)
class Mix:
    """mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019), one of them a batch where both are on.

    A batch (images (B, c, H, W), labels (B,)) is blended with itself in a random order: it becomes images, labels,
    partners (B,) and share, a scalar, such that the loss is share * loss(labels) + (1 - share) * loss(partners).

    mixup: share ~ Beta(mixup, mixup), images share * x + (1 - share) * partner. CutMix: lambda ~ Beta(cutmix, cutmix),
    a box of the area 1 - lambda, centred anywhere and clipped, comes from the partner; share is what is left of x.
    Every batch is mixed; CutMix's code for CIFAR mixes every second one.

    Attributes:
        mixup, cutmix: the Beta distributions' parameters; 0 for off.
    """

    mixup: float
    cutmix: float

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, ...]:
        draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        order = torch.from_numpy(draw.permutation(len(images))).to(images.device, non_blocking=True)
        cuts = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        kept = draw.beta(alpha, alpha)
        if cuts:
            images, kept = _cut(images, order, kept, draw)
        else:
            images = torch.lerp(images[order], images, kept)
        return images, labels, labels[order], torch.full((), kept, device=images.device)


def _cut(images: Tensor, order: Tensor, kept: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    """CutMix with a box of the area 1 - kept; the images, and the share that is really left of them."""
    height, width = images.shape[2:]
    side = (1 - kept) ** 0.5
    edges = []
    for extent in (height, width):
        centre, half = int(draw.integers(extent)), int(extent * side) // 2
        edges.append((max(centre - half, 0), min(centre + half, extent)))
    (top, bottom), (left, right) = edges
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
