"""A checkpoint as an ONNX file: normalisation, network, temperature and prior in one graph, checked against PyTorch.

The graph takes ``images`` (N, c, side, side) float32 in [0, 1], or of a network of rows ``features`` (N, D), of any N,
and gives ``logits`` (N, C), divided by the temperature, and ``probabilities`` (N, C), their softmax. What it cannot
hold stands in its metadata as text.

onnx, onnxscript and onnxruntime are needed for this alone.
"""

from __future__ import annotations

import importlib.util
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UsageError
from utils.files import Target, atomic

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: What files written here say made them.
PRODUCER = "long-tailed-recognition"
#: How far ONNX's results may be from PyTorch's.
CLOSE = 1e-4
#: Random images that the two are compared on, and of the user's own at most.
COMPARED = 7
#: Bytes of a file of ONNX, at most.
MOST_BYTES = 2**31 - 2**24


class Deployed(nn.Module):
    """What is exported: images (N, c, H, W) in [0, 1], or rows (N, D) -> logits z / T + shift, their softmax, (N, C).

    Args:
        model: images, normalised, or rows -> z (N, C).
        mean, std: of each channel, c numbers; none of rows.
        temperature: T.
        flip: z is the mean of an image's and its mirror image's.
        shift: (C,), re-weights classes, see :mod:`utils.priors`.
    """

    mean: Tensor
    std: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float,
        flip: bool,
        shift: Tensor,
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.flip = model, temperature, flip
        self.is_image = len(mean) > 0
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (images - self.mean) / self.std if self.is_image else images
        logits = self.model(pixels)
        if self.flip:
            logits = (logits + self.model(pixels.flip(dims=(3,)))) / 2
        logits = logits / self.temperature + self.shift
        return logits, logits.softmax(dim=1)


def version() -> str:
    """The version of this project."""
    text = Path(__file__).parent.with_name("pyproject.toml").read_text()
    return str(tomllib.loads(text)["project"]["version"])


def target(path: str) -> Target:
    """The file of --export.

    Raises:
        UsageError: it is no .onnx, or a package is not installed.
    """
    if Path(path).suffix.lower() != ".onnx":
        raise UsageError(f"--export {path}", "the path of an .onnx")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--export {path} needs {', '.join(missing)}", f"first: python -m pip install {' '.join(PACKAGES)}"
        )
    return Target("--export", path, b"\x08", PRODUCER.encode())


def export(path: str, deployed: Deployed, shape: tuple[int, ...], images: Tensor, metadata: Mapping[str, str]) -> float:
    """Writes an ONNX file, whole or not at all; returns the largest difference to PyTorch, see :func:`difference`.

    Args:
        path: the file.
        deployed: what is exported, on the CPU.
        shape: of one of its images (c, side, side), or rows (D,).
        images: (n, *shape) float, images in [0, 1], real ones to compare on beside random ones; there may be none.
        metadata: {name: text} to be kept in the file.

    Raises:
        UsageError: the network is larger than a file may be, PyTorch cannot export it, or the two differ.
    """
    deployed = deployed.eval().requires_grad_(False)
    size = sum(part.numel() * part.element_size() for part in deployed.state_dict().values())
    if size > MOST_BYTES:
        raise UsageError(f"--export {path}: {size / 1e6:,.0f} MB of weights", f"up to {MOST_BYTES / 1e6:,.0f} MB")
    noise = torch.rand(COMPARED, *shape, generator=torch.Generator().manual_seed(0))
    blob = graph(path, deployed, noise[:2], metadata)
    found = max(difference(blob, deployed, part) for part in (noise, images) if len(part))
    if not found <= CLOSE:
        raise UsageError(
            f"--export {path}: ONNX differs by {found:.2g} from PyTorch", f"up to {CLOSE:g}; another network"
        )
    with atomic(path) as temporary:
        temporary.write_bytes(blob)
    return found


def graph(path: str, deployed: Deployed, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """The content of an ONNX file; ``example`` (2, ...) are inputs to trace the network with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own parts
        import onnx

        try:
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["images" if deployed.is_image else "features"],
                output_names=["logits", "probabilities"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
        except torch.onnx.OnnxExporterError as error:
            words = str(error).strip().splitlines()[0]
            raise UsageError(f"--export {path}: PyTorch cannot export it ({words})", "another network") from None
    assert program is not None
    model = program.model_proto
    model.producer_name = PRODUCER
    onnx.helper.set_model_props(model, dict(metadata))
    return bytes(model.SerializeToString())


def difference(blob: bytes, deployed: Deployed, images: Tensor) -> float:
    """The largest difference between ONNX's results for inputs (N, ...) and PyTorch's, in batches of 1 and N.

    Of probabilities as they are, of logits as a share of the largest where that is above 1.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (images[:1], images):
        with torch.inference_mode():
            expected = deployed(batch)
        for ours, theirs in zip(expected, session.run(None, {session.get_inputs()[0].name: batch.numpy()})):
            gap = torch.where(ours == torch.from_numpy(theirs), 0.0, (ours - torch.from_numpy(theirs)).abs())
            scale = ours[ours.isfinite()].abs().max().clamp(min=1.0)
            largest = max(largest, float(gap.max() / scale))
    return largest
