"""Where PyTorch's fake results have other strides than the real ones, and capturing a graph with the real ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map


class WrongStrides(Interpreter):
    """Runs a captured graph on zeros and compares strides.

    Attributes:
        found: operators with a fake result of other strides. Those of dimensions of size 1 count too: they say nothing
            about where values lie, but by them the next operator may take its input for channels-last.
    """

    def __init__(self, module: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(module)
        self.found: set[Any] = set()
        device = inputs[0].device if inputs else torch.device("cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False):
            self.run(*map(_zeros_like, inputs))

    def run_node(self, n: Node) -> Any:
        fake = n.meta.get("val")
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        if n.target.namespace == "fastcnn":  # fake and real results come from one function, and these take longest
            return None if fake is None else _zeros_like(fake)
        result = super().run_node(n)
        if isinstance(fake, (tuple, list)):
            return [self._compared(n, *three) for three in zip(result, fake, _copied_to(n), strict=True)]
        return self._compared(n, result, fake, _only_copy(n))

    def _compared(self, n: Node, real: Any, fake: Any, copy: Tensor | None) -> Any:
        if not isinstance(real, Tensor) or real.numel() == 0 or real.stride() == fake.stride():
            return real
        if copy is not None and real.stride() == copy.stride():
            return real
        self.found.add(n.target)
        # What follows is judged on its own: it gets the strides that the graph was made for.
        if _lie_alike(real, fake.stride()):
            return real.as_strided(fake.shape, fake.stride(), real.storage_offset())
        return torch.empty_strided(fake.shape, fake.stride(), dtype=real.dtype, device=real.device).copy_(real)


def _copied_to(n: Node) -> list[Tensor | None]:
    """For each of a node's results, what :class:`RealStrides` has made of a wrong one: its only reader."""
    targets: list[Tensor | None] = [None] * len(n.meta["val"])
    for user in n.users:
        if user.target is operator.getitem:
            targets[user.args[1]] = _only_copy(user)  # type: ignore[index]
    return targets


def _only_copy(n: Node) -> Tensor | None:
    readers = list(n.users)
    if len(readers) != 1:
        return None
    copied = readers[0].target is torch.ops.aten.copy_.default and readers[0].args[1] is n
    if copied or readers[0].target is torch.ops.aten.as_strided.default:
        return readers[0].meta["val"]  # type: ignore[no-any-return]
    return None


class RealStrides(TorchDispatchMode):
    """While a graph is captured: results of ``suspects`` get the real results' strides, where need be by a copy."""

    def __init__(self, suspects: set[Any]) -> None:
        super().__init__()
        self._suspects = suspects

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in self._suspects:
            return result
        is_view = any(value.alias_info for value in func._schema.returns)  # and stays one
        strides = iter([real.stride() for real in _tensors(_real_result(func, args, kwargs))])
        return tree_map(
            lambda fake: _restrided(fake, next(strides), is_view) if isinstance(fake, Tensor) else fake, result
        )


def _real_result(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _disable_current_modes(), torch.no_grad():
        real_args, real_kwargs = tree_map(
            lambda a: _zeros_like(a) if isinstance(a, FakeTensor) else a, (args, kwargs)
        )
        return func(*real_args, **real_kwargs)


def _restrided(fake: Tensor, stride: tuple[int, ...], is_view: bool) -> Tensor:
    if fake.stride() == stride:
        return fake
    if _lie_alike(fake, stride):
        return fake.as_strided(fake.shape, stride)
    if is_view:
        return fake
    return torch.empty_strided(fake.shape, stride, dtype=fake.dtype, device=fake.device).copy_(fake)


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _lie_alike(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether other strides differ in dimensions of size 1 alone: the same values in the same places."""
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True))
