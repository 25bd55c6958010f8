"""CUDA graphs: a function of tensors is recorded once per combination of input shapes and then replayed as a whole.

A step of a small network is hundreds of kernels of a few microseconds; launched one by one they keep the host busy for
longer than the GPU. A replay is one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tensors -> tensors, and the same on inputs that stay where they are.
Function = Callable[..., tuple[Tensor, ...]]
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
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, outputs


class Graphed:
    """Calls a function as a CUDA graph, one for each combination of input shapes: whole batches and the last one.

    The function must not wait for the GPU, must read its inputs from the tensors that it is given and may change others
    in place. Those are what ``state`` returns: the runs before a recording are taken back there, so that the calls
    compute what plain calls would. Neither is kept, so that a graph and its memory go with their owner.

    Args:
        record: runs a function a few times and returns (replay, outputs); :func:`record_cuda` but for tests.
    """

    def __init__(self, record: Callable[[Call], tuple[Callable[[], None], tuple[Tensor, ...]]] = record_cuda) -> None:
        self.record = record
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    def __call__(
        self, function: Function, state: Callable[[], Iterable[Tensor]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._make(function, state, inputs)
        recorded = self._recorded[shapes]
        for place, tensor in zip(recorded.inputs, inputs):
            place.copy_(tensor)
        recorded.replay()
        return tuple(tensor.clone() for tensor in recorded.outputs)

    def forget(self) -> None:
        """Drops all recordings: the function has changed."""
        self._recorded.clear()

    def _make(self, function: Function, state: Callable[[], Iterable[Tensor]], inputs: tuple[Tensor, ...]) -> _Recorded:
        places = tuple(tensor.clone() for tensor in inputs)
        with _RECORDING, torch.no_grad():
            before = [(tensor, tensor.detach().clone()) for tensor in state()]
            with torch.enable_grad():
                replay, outputs = self.record(lambda: function(*places))
            for tensor, value in before:
                tensor.copy_(value)
        return _Recorded(places, outputs, replay)
