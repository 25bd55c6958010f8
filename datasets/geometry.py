"""What of an image networks see: the squares that images of any shape become, and crops cut out of them.

``FITS`` are the names of --fit, for images that are not square: ``crop`` shows the centre, ``squash`` all of it with
other proportions, ``pad`` all of it between black bars.
"""

from __future__ import annotations

import torch
from torch import Tensor

FITS = ("crop", "squash", "pad")
#: Lengths over widths beyond which the ends of an image are left away by ``crop``.
LONGEST = 16


def resized(size: int) -> int:
    """The length that a photo's shorter side is scaled to before its centre is cut out: 256 for 224."""
    return round(size * 256 / 224)


def centre(image: Tensor, size: int, fit: str = "crop", resize: int = 0, mode: str = "bilinear") -> Tensor:
    """A photo as networks see it in a test: (3, H, W) uint8 -> (3, size, size).

    Its shorter side becomes ``resize`` first, 0 for :func:`resized`, by an interpolation of torchvision's.
    """
    if fit == "crop":
        return cropped(scaled(shortened(image), [resize or resized(size)], mode), size, size)
    return whole(image, size, fit, mode)


def square(images: Tensor, side: int, fit: str = "crop") -> Tensor:
    """Small images (..., H, W) uint8 as squares (..., side, side), of ``crop`` with nothing of the shorter side cut."""
    if images.shape[-2:] == (side, side):
        return images
    if fit == "crop":
        return cropped(scaled(shortened(images), [side]), side, side)
    return whole(images, side, fit)


def whole(images: Tensor, side: int, fit: str, mode: str = "bilinear") -> Tensor:
    """All of images (..., H, W), squashed or padded to (..., side, side)."""
    sizes = torch.tensor([images.shape[-2:]])
    boxes, places = placed(whole_boxes(sizes, fit), sizes, side)
    return cut(images, boxes[0].tolist(), side, places[0].tolist(), mode)


def whole_boxes(sizes: Tensor, fit: str) -> Tensor:
    """The boxes (B, 4) int64, top, left, height, width, that show all of images of ``sizes`` (B, 2)."""
    sizes = sizes.long()
    if fit == "squash":
        return torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    sides = sizes.amax(dim=1, keepdim=True).expand(-1, 2)
    return torch.cat([-((sides - sizes) // 2), sides], dim=1)


def as_seen(sizes: Tensor, fit: str) -> Tensor:
    """The sizes (B, 2) that crops are drawn from: of ``squash`` and ``pad`` squares on the longer side."""
    return sizes if fit == "crop" else sizes.amax(dim=1, keepdim=True).expand(-1, 2)


def in_image(boxes: Tensor, sizes: Tensor, fit: str) -> Tensor:
    """Boxes (B, 4) that were drawn from :func:`as_seen` sizes, in the images' own pixels.

    Those of ``pad`` may reach beyond the image, where all is black, but are moved so that they do no more than they
    must: a crop of black alone would teach nothing.
    """
    if fit == "crop":
        return boxes
    if fit == "squash":
        return rescaled(boxes, as_seen(sizes, fit), sizes)
    start, length = boxes.split(2, dim=1)
    room = sizes.long() - length  # negative where the box is larger than the image
    start = start - (as_seen(sizes, fit) - sizes).long() // 2
    return torch.cat([start.clamp(min=room.clamp(max=0), max=room.clamp(min=0)), length], dim=1)


def rescaled(boxes: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
    """Boxes (B, 4) in images of ``sizes`` as whole-numbered boxes (B, 4) int64 in the same images of other sizes."""
    scale = others / sizes.double()
    start = (boxes[:, :2] * scale).round().minimum(others - 1)
    stop = ((boxes[:, :2] + boxes[:, 2:]) * scale).round().maximum(start + 1)
    return torch.cat([start, stop - start], dim=1).long()


def placed(boxes: Tensor, sizes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What of boxes (B, 4) lies inside images of ``sizes`` (B, 2), and where that is in a view of ``size`` pixels.

    Both are boxes (B, 4) int64; the rest of the view is black.
    """
    start, length = boxes.split(2, dim=1)
    stop = (start + length).minimum(sizes.long())
    inside = start.clamp(min=0)
    first = ((inside - start) * size / length).round().clamp(max=size - 1)
    last = ((stop - start) * size / length).round().maximum(first + 1)
    return torch.cat([inside, stop - inside], dim=1), torch.cat([first, last - first], dim=1).long()


def shortened(images: Tensor) -> Tensor:
    """Images (..., H, W) without what is far from their centre: at most ``LONGEST`` times as long as they are wide.

    Scaled by its shorter side, a line of 65,500 pixels would take gigabytes, of which the centre alone is seen.
    """
    height, width = images.shape[-2:]
    side = LONGEST * min(height, width)
    if max(height, width) <= side:
        return images
    return cropped(images, min(height, side), min(width, side))


def cropped(images: Tensor, height: int, width: int) -> Tensor:
    """The centre of images (..., H, W)."""
    from torchvision.transforms.v2 import functional as F  # here, since it is slow to import

    centre: Tensor = F.center_crop(images, [height, width])
    return centre


def scaled(images: Tensor, size: list[int], mode: str = "bilinear") -> Tensor:
    """torchvision's antialiased resize of (..., H, W), on channels-last memory, where it is twice as fast or more."""
    from torchvision.transforms.v2 import functional as F

    how = F.InterpolationMode(mode)
    if images.dim() == 4:
        return F.resize(images, size, how, antialias=True)  # type: ignore[no-any-return]
    small: Tensor = F.resize(images[None].contiguous(memory_format=torch.channels_last), size, how, antialias=True)[0]
    return small


def cut(image: Tensor, box: list[int], size: int, place: list[int] | None = None, mode: str = "bilinear") -> Tensor:
    """A crop of an image (..., H, W), on any device, as (..., size, size).

    ``box`` is top, left, height, width; ``place`` the same in the view, where it is not all of it.
    """
    top, left, height, width = box
    inside = image[..., top : top + height, left : left + width]
    if place is None or place == [0, 0, size, size]:
        return scaled(inside, [size, size], mode)
    view = image.new_zeros(*image.shape[:-2], size, size)
    top, left, height, width = place
    view[..., top : top + height, left : left + width] = scaled(inside, [height, width], mode)
    return view


def resample(images: Tensor, boxes: Tensor, flip: Tensor | None, size: int, places: Tensor | None = None) -> Tensor:
    """Crops of many images at once, on any device: antialiased bilinear scaling as two matrix products.

    images (B, S, T, 3) uint8, boxes (B, 4) top, left, height, width, flip (B,) bool, places (B, 4) as in :func:`cut`
    -> (B, size, size, 3) uint8. With whole-numbered boxes it is torchvision's resized_crop up to rounding.
    """
    device = images.device
    top, left, height, width = boxes.to(device, torch.float32, non_blocking=True).T[:, :, None, None]
    if places is None:
        places = torch.tensor([[0, 0, size, size]]).expand(len(images), 4)
    above, beside, rows, columns = places.to(device, torch.float32, non_blocking=True).T[:, :, None, None]
    down = _weights(top, height, images.shape[1], size, above, rows)
    across = _weights(left, width, images.shape[2], size, beside, columns)
    if flip is not None:
        across = torch.where(flip.to(device, non_blocking=True)[:, None, None], across.flip(1), across)
    lines = torch.bmm(down, images.float().flatten(2)).unflatten(2, images.shape[2:])  # (B, size, T, 3)
    cells = torch.einsum("bowc,bpw->bopc", lines, across)
    return cells.round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, pixels: int, size: int, first: Tensor, number: Tensor) -> Tensor:
    """How much each of ``pixels`` counts in each of ``size`` outputs: (B, size, pixels).

    Of the ``number`` (B, 1, 1) outputs from ``first`` (B, 1, 1) on, rows sum to 1; the others are black. A triangle
    around the output's centre, as wide as the outputs are apart but at least one pixel; pixels outside of the crop,
    which begins at ``start`` (B, 1, 1), do not count.
    """
    step, output = length / number, torch.arange(size, device=start.device)[:, None] - first
    centre = start + (output + 0.5) * step
    place = torch.arange(pixels, device=start.device) + 0.5
    weights = (1 - (place - centre).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (place > start.floor()) & (place < (start + length).ceil()) & (output >= 0) & (output < number)
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-12)
