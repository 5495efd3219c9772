"""Gradient and registration checks shared by the operator tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastcnn


def leaf(*shape: int, positive: bool = False) -> Tensor:
    """A float64 leaf for gradcheck, none of its values near the corner of a ReLU."""
    values = torch.randn(*shape, dtype=torch.float64)
    values = values + 0.1 * values.sign()
    return (values.abs() + 0.1 if positive else values).requires_grad_()


def assert_gradients(function: Callable[..., Tensor], *leaves: Tensor, fast: bool = False) -> None:
    """First and second derivatives against finite differences, in float64 (which only the reference covers).

    ``fast`` checks random combinations of the derivatives where checking each takes long.
    """
    with fastcnn.use_backend("reference"):
        assert gradcheck(function, leaves, fast_mode=fast)
        assert gradgradcheck(function, leaves, fast_mode=fast)


def assert_registered(operator: Any, *args: Any) -> None:
    """Schema, fake kernel, autograd registration and tracing of a torch.library operator, forward and backward."""
    recorded = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    opcheck(operator, args)
    opcheck(operator, recorded)
