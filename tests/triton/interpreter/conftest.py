"""What the interpreter tests share. Collected under TRITON_INTERPRET=1 only: see test_interpreter.py."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.accuracy import assert_accurate
from support.layout import GUARD


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def nhwc(*shape: int, dtype: torch.dtype, before: int = 0, after: int = 0, fill: float | None = None) -> torch.Tensor:
    """A channels-last tensor (random, or `fill`ed) that is a channel slice of a wider buffer full of guard values."""
    n, c, h, w = shape
    buffer = torch.full((n, h, w, before + c + after), GUARD, dtype=dtype)
    view = buffer[..., before : before + c]
    view.copy_(torch.randn(n, h, w, c) if fill is None else torch.full((n, h, w, c), fill))
    return view.permute(0, 3, 1, 2)


def assert_guards_intact(tensor: torch.Tensor) -> None:
    """Nothing was written beside the slice that `nhwc` made."""
    c, buffer = tensor.shape[1], tensor._base
    beside = buffer.permute(0, 3, 1, 2)
    first = tensor.storage_offset()
    untouched = torch.cat([beside[:, :first], beside[:, first + c :]], dim=1)
    assert (untouched == GUARD).all(), "the kernel wrote outside its output"


@pytest.fixture
def tools() -> SimpleNamespace:
    """The functions above: importlib mode gives test files no way to import a neighbour."""

    def check(ours: torch.Tensor, compute: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> None:
        """`compute` (plain PyTorch) in float64 and in the inputs' own dtype against `ours`; guard values intact."""
        exact = compute(*(tensor if tensor is None else tensor.double() for tensor in inputs))
        assert_accurate(ours, compute(*inputs), exact)
        assert_guards_intact(ours)

    return SimpleNamespace(nhwc=nhwc, check=check, assert_accurate=assert_accurate, guards=assert_guards_intact)
