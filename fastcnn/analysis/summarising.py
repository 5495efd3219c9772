"""Runs a model once without computing anything, and sums up what was seen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from fastcnn.analysis.result import Summary

if TYPE_CHECKING:
    from fastcnn.analysis.tracing import Trace

Size = Sequence[int]


def summary(
    model: nn.Module,
    input_size: Size | Sequence[Size],
    *,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Summary:
    """Output volumes, parameters, multiply-accumulates, activation memory and receptive fields of a model's layers.

    The model runs once in eval mode on tensors that have shapes but no values (fake tensors), which take the place of
    its parameters for that time: nothing is computed, and the model is left as it was. Where a model asks for values
    (``item()``, branches on data), it runs in earnest instead, on zeros, with copies of its buffers. Its hooks run, as
    they belong to what it computes.

    Args:
        model: any module; its parameters may be on any device, also on ``meta``.
        input_size: (N, C, H, W), or (C, H, W) for a batch of one. For several inputs, or one such as (N, C, L), a
            sequence of complete sizes: ``[(1, 3, 100)]``.
        dtype: of the input. A floating-point one is also the parameters' and buffers': the summary is that of
            ``model.to(dtype)``.
        name: what the summary calls the model, instead of its class.

    Returns:
        A :class:`Summary`; printing it shows a table.

    Raises:
        ValueError, TypeError: ``input_size`` is no size, or the model has parameters that are not yet initialised.
        Exception: whatever the model raises for inputs of this size.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, is {type(model).__name__}")
    shapes = _shapes(input_size)
    if any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise ValueError("model has lazy parameters that are not initialised: run it once on an input first")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    try:
        with _quiet():
            trace = _run(model, shapes, dtype, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception:
        # It may be the model's own refusal of the size, which the second run repeats in PyTorch's words.
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise
        trace = _run(model, shapes, dtype, None)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    return Summary(
        model=name or type(model).__name__,
        input_shapes=shapes,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(trace.layers),
        blocks=tuple(trace.blocks),
        parameters=count,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        unused_parameters=count - sum(layer.parameters for layer in trace.layers),
        macs=sum(layer.macs for layer in trace.layers),
        activation_bytes=sum(layer.activation_bytes for layer in trace.layers),
        input_bytes=sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize,
        parameter_bytes=sum(p.numel() * _cast(p, dtype).itemsize for p in parameters),
    )


def _shapes(input_size: Size | Sequence[Size]) -> tuple[tuple[int, ...], ...]:
    sizes = input_size if isinstance(input_size, Sequence) and not isinstance(input_size, str) else None
    if sizes is None:
        raise TypeError(f"input_size must be a size such as (N, C, H, W), is {input_size!r}")
    several = bool(sizes) and all(isinstance(size, Sequence) for size in sizes)
    shapes: list[tuple[Any, ...]] = [tuple(size) for size in sizes] if several else [tuple(sizes)]  # type: ignore
    for shape in shapes:
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"input_size must have positive whole numbers such as (N, C, H, W), is {input_size!r}")
    if not several and len(shapes[0]) == 3:
        return ((1, *shapes[0]),)
    return tuple(shapes)


def _cast(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point and tensor.is_floating_point() else tensor.dtype


def _run(
    model: nn.Module, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, fake: FakeTensorMode | None
) -> Trace:  # fmt: skip
    """One forward pass: on fake tensors, or in earnest without a mode for them."""
    from fastcnn.analysis.tracing import Trace  # what it imports takes longer than all of fastcnn

    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(_restored(model))
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if fake is not None:
            stack.enter_context(fake)
        scripted = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        if scripted:  # its tensors cannot be replaced: they stay, and are only read
            parameters: dict[str, Tensor] = dict(model.named_parameters())
            buffers: dict[str, Tensor] = {}
        else:
            parameters = {name: _stand_in(p, dtype, fake) for name, p in model.named_parameters()}
            buffers = {name: _stand_in(b, dtype, fake) for name, b in model.named_buffers()}
        device = _real_device(tensors[0]) if tensors else torch.device("cpu")
        inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        trace = Trace(model, parameters)
        with trace.watching(inputs):
            if scripted:
                model(*inputs)
            else:
                torch.func.functional_call(model, {**parameters, **buffers}, tuple(inputs))
    return trace


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's log of what failed on fake tensors: the exception says it, or the second run settles it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _real_device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _stand_in(tensor: Tensor, dtype: torch.dtype, fake: FakeTensorMode | None) -> Tensor:
    """What takes a parameter's or buffer's place in the pass."""
    cast = _cast(tensor, dtype)
    is_parameter = isinstance(tensor, nn.Parameter)
    if fake is None:
        twin = tensor.detach().to(cast, copy=not is_parameter)
    else:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=cast, device=_real_device(tensor))
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin


_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module has the attributes that it had, whatever the pass set."""
    before: list[tuple[nn.Module, bool, dict[str, Any], dict[str, dict[str, Any]]]] = []
    for module in model.modules():
        tables = {name: dict(table) for name in _TABLES if isinstance(table := module.__dict__.get(name), dict)}
        before.append((module, module.training, dict(module.__dict__), tables))
    try:
        for module, *_ in before:
            module.training = False  # not eval(), which a class may have overridden
        yield
    finally:
        for module, training, attributes, tables in before:
            for name in [name for name in module.__dict__ if name not in attributes]:
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, entries in tables.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)
            module.training = training
