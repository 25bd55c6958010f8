"""A fast way to take a step is used once it was seen to do what the plain one does; else the plain one is."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UsageError

#: Tensors -> tensors.
Function = Callable[..., tuple[Tensor, ...]]
#: Every tensor that a step changes and the next one depends on, by kind: weights, momentum and so on.
State = Callable[[], Mapping[str, Iterable[Tensor]]]

#: Steps that the check takes each way, on inputs that differ.
STEPS = 3
#: How far apart two roundings of the same step may be, by arithmetic. The step's change of a tensor (its root mean
#: square) is the unit, the figure the root mean square over a kind's tensors. A ReLU passes or stops a whole gradient,
#: so rounding u shows as about sqrt(u): ResNet-32 and ResNet-18 in two memory formats on a CPU, or with noise of size
#: u behind every convolution, are up to 0.014 apart in float32, 0.12 at TF32's and float16's u, 0.35 in bfloat16. A
#: step that is lost, or that sees old inputs, is 1 or more apart.
BOUNDS = {"float32": 0.05, "tf32": 0.3, "float16": 0.3, "bfloat16": 0.7}
#: The loss, without a derivative in it, is that much nearer (0.003 at most above), as a share of itself or of 1 nat.
LOSS_IS_NEARER = 20
#: Tensors that change by less than this share of their kind's largest change are measured by it: a bias before a
#: BatchNorm has no gradient but rounding.
SMALL = 0.01
#: Rounding of a stored float32, as a share of it.
STORED = 1.2e-7


def bound(amp: torch.dtype | None, device: torch.device) -> float:
    """The entry of :data:`BOUNDS` of a step with this autocast type on a device."""
    if amp is not None:
        return BOUNDS[str(amp).removeprefix("torch.")]
    return BOUNDS["tf32" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"]


class Proven:
    """Takes steps a fast way that has proved itself, and the plain way where it has not.

    Before the first step with each combination of input shapes, :data:`STEPS` steps are taken the plain way and, each
    from the same state and the same random numbers, the fast way. Their outputs and the tensors they change are
    compared; then state and random numbers are put back, so that the check changes no number. Where the fast way
    raises or computes something else, one line says why and all further steps are plain.

    The check holds three copies of the state, a recording in it one more. A step that draws random numbers (dropout) is
    compared only where ``same_draws``; of others it is checked that they run.

    Args:
        flag: the option that chooses the way, for messages.
        must: raise instead of falling back.
        bound: see :data:`BOUNDS`.
        same_draws: whether the fast way draws the plain one's random numbers.
        say: gets the line.

    Attributes:
        failed: why the fast way is not used; empty where it is.
    """

    def __init__(
        self,
        flag: str,
        must: bool = False,
        bound: float = BOUNDS["float32"],
        same_draws: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.flag, self.must, self.bound, self.same_draws, self.say = flag, must, bound, same_draws, say
        self.failed = ""
        self._proven: set[tuple[torch.Size, ...]] = set()

    def __call__(self, fast: Function, plain: Function, state: State, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step; outputs as ``plain`` returns them: floats are losses, integers count among the first input's rows.

        Raises:
            UsageError: the fast way ``must`` be taken and has not proved itself.
        """
        shapes = tuple(tensor.shape for tensor in inputs)
        if not self.failed and shapes not in self._proven:
            self.failed = self._check(fast, plain, state, inputs)
            if self.failed and self.must:
                raise UsageError(f"{self.flag} on: {self.failed}", "auto, off")
            if self.failed:
                self.say(f"{self.flag} auto: not used, {self.failed}")
            self._proven.add(shapes)
        return (plain if self.failed else fast)(*inputs)

    def forget(self) -> None:
        """Has the fast way prove itself anew: it has changed."""
        self._proven.clear()

    @torch.no_grad()
    def _check(self, fast: Function, plain: Function, state: State, inputs: tuple[Tensor, ...]) -> str:
        """Why the fast way must not be taken; empty where it may."""
        kinds = {kind: list(tensors) for kind, tensors in state().items()}
        live, device = [tensor for tensors in kinds.values() for tensor in tensors], inputs[0].device
        with put_back(live, device):
            for number in range(STEPS):
                batch = [_turned(tensor, number * (place + 1)) for place, tensor in enumerate(inputs)]
                with put_back(live, device) as before, torch.enable_grad():
                    draws, expected = _draws(device), plain(*batch)
                    after, is_random = _copies(live), not torch.equal(draws, _draws(device))
                try:
                    with torch.enable_grad():
                        found = fast(*batch)
                except Exception as error:  # a compiler and a capture raise what they like
                    words = next(iter(str(error).splitlines()), "")
                    return f"it raises {type(error).__name__}: {words[:200]}"
                if is_random and not self.same_draws:
                    return ""
                why = self._outputs(expected, found, len(inputs[0]))
                place = 0
                for kind, tensors in kinds.items():
                    part = slice(place, place := place + len(tensors))
                    why = why or self._changes(kind, before[part], after[part], tensors)
                if why:
                    return f"{why} in step {number + 1}"
                _put(live, after)
        return ""

    def _outputs(self, expected: Iterable[Tensor], found: Iterable[Tensor], rows: int) -> str:
        for plain, fast in zip(expected, found):
            name, near = "number of hits", torch.full_like(plain, 1 + self.bound * rows, dtype=torch.float64)
            if plain.is_floating_point():
                name, near = "loss", plain.double().abs().clamp(min=1) * (self.bound / LOSS_IS_NEARER)
            if not bool((((plain.double() - fast.double()).abs() <= near) | ~plain.isfinite()).all()):
                return f"its {name} is {_numbers(fast)}, plainly {_numbers(plain)}"
        return ""

    def _changes(self, kind: str, before: list[Tensor], after: list[Tensor], fast: list[Tensor]) -> str:
        sizes, errors = [], []
        for old, plain, new in zip(before, after, fast):
            if not plain.is_floating_point():
                if not torch.equal(plain, new):
                    return f"its {kind} count otherwise"
            elif not (torch.equal(old, plain) and torch.equal(old, new)):  # not of what is frozen
                sizes.append(float(_size(plain - old)))
                errors.append(float((_size(plain - new) - STORED * _size(plain)).clamp(min=0)))
        if not sizes or not math.isfinite(sum(sizes)):  # divergence is raised at the end of the epoch
            return ""
        unit = max(SMALL * max(sizes), 1e-30)
        apart = math.sqrt(sum((error / max(size, unit)) ** 2 for error, size in zip(errors, sizes)) / len(sizes))
        return "" if apart <= self.bound else f"its {kind} differ by {apart:.2g} of a step, more than {self.bound}"


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """torch.compile, once for every input shape, with kernels cached apart for every instruction set of a CPU.

    PyTorch's cache takes kernels written for AVX2 (ATEN_CPU_CAPABILITY) as AVX-512's, which write beyond their arrays.
    """
    folder = f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), folder)))
    network: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return network


@contextmanager
def put_back(tensors: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """Gives copies of tensors, and takes these and the random numbers of a step on the device back to them at the end.

    Random numbers only where they were drawn: on a GPU all threads share a generator.
    """
    values, draws = _copies(tensors), _draws(device)
    try:
        yield values
    finally:
        _put(tensors, values)
        if not torch.equal(draws, _draws(device)):
            _set_draws(device, draws)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _put(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


def _turned(tensor: Tensor, by: int) -> Tensor:
    """Other inputs in the same memory format: rows (B, ...) in another order, half of a number () for every step."""
    if by == 0:
        return tensor
    return torch.empty_like(tensor).copy_(tensor.roll(by, 0) if tensor.dim() else tensor * 0.5**by)


def _size(tensor: Tensor) -> Tensor:
    """Root mean square ()."""
    size: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64) / tensor.numel() ** 0.5
    return size


def _numbers(tensor: Tensor) -> str:
    return " ".join(f"{value:.6g}" for value in tensor.flatten()[:3].tolist())


def _draws(device: torch.device) -> Tensor:
    """The state of the generator that a step on the device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_draws(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
