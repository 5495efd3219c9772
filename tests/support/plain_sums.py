"""For tests of convolution's plain sums on the CPU: importing :func:`plain_sums` into a module serves all its tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastcnn


@pytest.fixture(autouse=True)
def plain_sums() -> Iterator[None]:
    """The C++ kernels, no fast algorithms, nothing recorded."""
    with fastcnn.use_backend("cpp"), fastcnn.exact(), torch.no_grad():
        yield


def random(*shape: int, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
