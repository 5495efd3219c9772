"""Checks of a user's network made fast: by ``fastcnn.optimize``, by the compile backend, and by ``fastcnn.freeze``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.graph import dynamo
from support.accuracy import assert_accurate


def small_image(batch: int, channels: int, channels_last: bool) -> Tensor:
    """Always the same values, 7 x 5 pixels."""
    x = torch.randn(batch, channels, 7, 5, generator=torch.Generator().manual_seed(3))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def tensors(output: Any) -> list[Tensor]:
    """What a model returned: a tensor, or a tuple of them."""
    return list(output) if isinstance(output, tuple) else [output]


@torch.no_grad()
def check_network(model: nn.Module, x: Tensor, fraction: float) -> fastcnn.Report:
    """In eval mode both give the reference's outputs, and ``optimize`` leaves what it must leave alone.

    Args:
        model: as its library makes it; it is optimized in place, and restored.
        x: its input.
        fraction: of the multiply-accumulates, at least to be on fastcnn's kernels.

    Returns:
        The report.
    """
    plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert exact.isfinite().all()
    torch._dynamo.reset()
    dynamo.register()
    assert_accurate(torch.compile(model, backend="fastcnn")(x), plain, exact)
    torch._dynamo.reset()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    optimized = fastcnn.optimize(model, x, inplace=True)
    assert optimized is model
    assert list(optimized.state_dict()) == keys
    assert [id(p) for p in optimized.parameters()] == parameters
    assert_accurate(optimized(x), plain, exact)
    report = fastcnn.report(optimized)
    assert report.fused_fraction is not None
    assert fraction <= report.fused_fraction <= 1
    fastcnn.restore(optimized)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), plain)
    return report


@torch.no_grad()
def assert_frozen_well(model: nn.Module, x: Tensor) -> None:
    """Frozen, a model in eval mode gives the reference's results, whatever the arena held before."""
    plain = model(x)
    with fastcnn.exact():
        frozen = fastcnn.freeze(model, torch.zeros_like(x))
    frozen._plan.fill_arena(0xFF)
    ours = frozen(x)
    assert ours.stride() == plain.stride()
    exact = model.double()(x.double())
    assert exact.isfinite().all()
    assert_accurate(ours, plain, exact)
