"""A GPU without one: tensors on "cuda" are PyTorch's fake ones (shape, type and device, no numbers); those on the CPU
are real. What would wait for the GPU, or mix devices, raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
#: Operations that take a tensor from one device to another.
COPIES = {"aten::_to_copy", "aten::copy_"}


class Wrong(AssertionError):
    """Something that must not happen in an epoch on a GPU."""


class FakeGPU(FakeTensorMode):
    """PyTorch's FakeTensorMode for operations with a tensor on the GPU, or that make one; others run as they are.

    It raises where a number of the GPU's is asked for (.item(), bool(), nonzero, a mask as an index), and here where
    an operation mixes devices, but for numbers () of the CPU's, and where a tensor is fetched from the GPU, unless
    ``may_fetch``.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.may_fetch, self.fetched = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        makes_one = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not makes_one and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        name = func._schema.name
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu and name in COPIES:
            target = args[0].device if name == "aten::copy_" else kwargs.get("device") or GPU
            to_cpu = torch.device(target).type == "cpu"
            self.fetched += to_cpu
            if to_cpu and not self.may_fetch:
                raise Wrong(f"{name} waits for the GPU and fetches a tensor")
        elif on_gpu and any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors):
            raise Wrong(f"{name} of tensors on {[str(tensor.device) for tensor in tensors]}")
        if name == "aten::_fused_sgd_":  # in place, and without a fake implementation
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Within it tensors may be made on :data:`GPU`. backward, which needs a driver, only makes gradients' places."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == GPU and loss.dim() == 0 and loss.requires_grad
        for parameter in reached(loss):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeGPU() as mode:
        yield mode


def reached(loss: torch.Tensor) -> list[nn.Parameter]:
    """The leaves of a loss's graph, and a check that the graph lies on the GPU."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    assert all(parameter.device == GPU for parameter in found)
    return found


def on_gpu(module: nn.Module) -> nn.Module:
    """The module with fake tensors on the GPU; nn.Module.to cannot exchange parameters for fake ones."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            each._parameters[name] = nn.Parameter(parameter.detach().to(GPU), parameter.requires_grad)
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = buffer.to(GPU)
    return module
