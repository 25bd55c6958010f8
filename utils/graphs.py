"""CUDA graphs: a function of tensors is recorded once per combination of input shapes and then replayed as a whole.

A step of a small network is hundreds of kernels of a few microseconds; launched one by one they keep the host busy for
longer than the GPU. A replay is one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.proof import BOUNDS, Function, Proven, State, put_back

#: A function on inputs that stay where they are.
Call = Callable[[], tuple[Tensor, ...]]

#: Runs before a recording: libraries choose their algorithms and allocate their workspaces in them.
WARM_UP = 3
#: Recordings of several threads take turns.
_RECORDING = threading.Lock()


@dataclass
class _Recorded:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


def record_cuda(function: Call) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Warms a function up on a side stream and captures it; returns what replays it, and its outputs' places."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = function()
    finally:  # also where a capture fails and plain steps go on
        torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, outputs


class Graphed:
    """Calls a function as a CUDA graph, one for each combination of input shapes: whole batches and the last one.

    The function must not wait for the GPU, must read its inputs from the tensors that it is given and may change others
    in place. Those are what ``state`` returns: the runs before a recording are taken back there, and in the random
    numbers, so that the calls compute what plain calls would. Neither is kept, so that a graph and its memory go with
    their owner. A graph that does not prove itself (:class:`utils.proof.Proven`) is dropped, and calls are plain.

    Args:
        record: runs a function a few times and returns (replay, outputs); :func:`record_cuda` but for tests.
        must, bound, say: see :class:`utils.proof.Proven`.
    """

    def __init__(
        self,
        record: Callable[[Call], tuple[Callable[[], None], tuple[Tensor, ...]]] = record_cuda,
        must: bool = False,
        bound: float = BOUNDS["float32"],
        say: Callable[[str], None] = print,
    ) -> None:
        self.record = record
        self.proven = Proven("--graph", must, bound, say=say)
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    def __call__(self, function: Function, state: State, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.proven(partial(self._replayed, function, state), function, state, *inputs)
        if self.proven.failed:
            self._recorded.clear()
        return outputs

    def forget(self) -> None:
        """Drops all recordings: the function has changed."""
        self._recorded.clear()
        self.proven.forget()

    def _replayed(self, function: Function, state: State, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._make(function, state, inputs)
        recorded = self._recorded[shapes]
        for place, tensor in zip(recorded.inputs, inputs):
            place.copy_(tensor)
        recorded.replay()
        return tuple(tensor.clone() for tensor in recorded.outputs)

    def _make(self, function: Function, state: State, inputs: tuple[Tensor, ...]) -> _Recorded:
        places = tuple(tensor.clone() for tensor in inputs)
        changing = [tensor for tensors in state().values() for tensor in tensors]
        with _RECORDING, put_back(changing, inputs[0].device), torch.enable_grad():
            replay, outputs = self.record(lambda: function(*places))
        return _Recorded(places, outputs, replay)
