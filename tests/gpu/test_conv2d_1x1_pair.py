"""conv2d_1x1_pair's kernel on a GPU, against float64 and PyTorch, with guard bands and poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import gpu_record
from support.accuracy import assert_accurate
from support.gpu import BF16, FP16, Precision, Random
from support.layout import GuardedSlice, sliced
from torch import Tensor

from fastcnn import backends, ops
from fastcnn.backends import cuda


@dataclass(frozen=True)
class Case:
    channels: tuple[int, int, int]  # of the input, wide, narrow
    image: tuple[int, int, int]  # N, H, W

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.channels))}-{'x'.join(map(str, self.image))}"


CASES = [
    # ResNet-50's, WideResNet-50-2's and ResNeXt-50's: several tiles for every block, and few.
    Case((64, 256, 64), (16, 56, 56)),
    Case((64, 256, 128), (16, 56, 56)),
    Case((128, 512, 128), (33, 28, 28)),
    Case((128, 512, 256), (33, 28, 28)),
    Case((128, 256, 128), (16, 56, 56)),
    Case((128, 256, 256), (16, 56, 56)),
    Case((64, 256, 64), (1, 56, 56)),
    Case((128, 512, 128), (1, 28, 28)),
    # Channels that fill no blocks, images that fill no tiles; one pixel.
    Case((72, 200, 40), (3, 29, 31)),
    Case((136, 328, 136), (5, 61, 67)),
    Case((8, 8, 8), (1, 1, 1)),
    Case((16, 1024, 72), (2, 33, 35)),
    Case((256, 64, 248), (7, 13, 17)),
]


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backend "cuda", where a GPU has the kernel. (Interceptors, as other tests have, see two convolutions.)"""
    reason = backends.unavailable("cuda")
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        reason = "the kernel needs compute capability 9.0"
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    with backends.use_backend("cuda", strict=True):
        yield


def note(request: pytest.FixtureRequest, precision: Precision) -> None:
    request.node.user_properties.append((gpu_record.PROPERTY, f"cuda|conv2d_1x1_pair|{precision}"))


def layer(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    factors = [v.to(x.dtype)[:, None, None] for v in (scale, bias)]
    sums = F.conv2d(x, weight.to(x.dtype)) * factors[0] + factors[1]
    return (sums if residual is None else sums + residual.to(x.dtype)).relu()


@pytest.mark.parametrize("precision", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_results(kernel, request, device, case: Case, precision: Precision, monkeypatch) -> None:
    (c, j, k), (n, h, w), dtype = case.channels, case.image, precision.dtype
    random = Random(case, device)
    x, residual = random(n, c, h, w, dtype=dtype), random(n, j, h, w, dtype=dtype)
    expand, reduce = (random(*shape, 1, 1).div(shape[1] ** 0.5).to(dtype) for shape in ((j, c), (k, j)))
    vectors = {
        "expand_scale": random.factors(j), "expand_bias": random(j), "reduce_scale": random.factors(k),
        "reduce_bias": random(k),
    }  # fmt: skip
    runs: list[Any] = []
    run = cuda.conv2d_1x1_pair
    monkeypatch.setattr(cuda, "conv2d_1x1_pair", lambda *args: (runs.append(args), run(*args)))
    note(request, precision)

    # Slices of wider tensors; 8 values are the 16 bytes that copies are aligned to.
    outs = [GuardedSlice((n, channels, h, w), dtype, device, before=8, after=16) for channels in (j, k)]
    wide, narrow = ops.conv2d_1x1_pair(
        sliced(x, 8, 8), sliced(residual, 16, 8), expand, reduce, **vectors, out=(outs[0].view, outs[1].view)
    )
    assert len(runs) == 1, "the kernel must serve the case"
    expand_factors, reduce_factors = vectors["expand_scale"], vectors["reduce_scale"]
    first = (expand, expand_factors, vectors["expand_bias"])
    assert_accurate(wide, layer(x, *first, residual), layer(x.double(), *first, residual.double()))
    second = (reduce, reduce_factors, vectors["reduce_bias"])
    assert_accurate(narrow, layer(wide, *second), layer(wide.double(), *second))
    for out in outs:
        out.assert_guards_intact()

    dense = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    for _ in range(3):
        again = ops.conv2d_1x1_pair(*dense, expand, reduce, **vectors)
        assert torch.equal(again[0], wide), "the same call must give the same bits"
        assert torch.equal(again[1], narrow), "the same call must give the same bits"


def test_nan_passes_both_relus(kernel, device) -> None:
    x, residual = torch.ones(1, 64, 8, 8, device=device).bfloat16(), torch.ones(1, 256, 8, 8, device=device).bfloat16()
    residual[0, 3, 1, 2] = float("nan")
    ones = torch.ones(256, 64, 1, 1, device=device).bfloat16()
    wide, narrow = ops.conv2d_1x1_pair(x, residual, ones, ones.view(64, 256, 1, 1))
    assert wide.isnan().sum() == 1
    assert narrow[0, :, 1, 2].isnan().all()
    assert narrow.isnan().sum() == 64


def test_what_the_kernel_does_not_serve_takes_two_calls(kernel, device) -> None:
    random = Random("two calls", device)
    for (c, j, k), dtype in (((64, 60, 64), torch.bfloat16), ((64, 128, 64), torch.float32)):
        x, residual = random(2, c, 9, 9, dtype=dtype), random(2, j, 9, 9, dtype=dtype)
        expand, reduce = random(j, c, 1, 1, dtype=dtype), random(k, j, 1, 1, dtype=dtype)
        wide, narrow = ops.conv2d_1x1_pair(x, residual, expand, reduce)
        assert torch.equal(wide, ops.conv2d(x, expand, residual=residual, activation="relu"))
        assert torch.equal(narrow, ops.conv2d(wide, reduce, activation="relu"))


def test_in_a_cuda_graph(kernel, device) -> None:
    if device.type != "cuda":
        pytest.skip("no CUDA graphs in a rehearsal")
    random = Random("graph", device)
    x, residual = (random(4, c, 56, 56).bfloat16().contiguous(memory_format=torch.channels_last) for c in (64, 256))
    expand, reduce = random(256, 64, 1, 1).bfloat16(), random(64, 256, 1, 1).bfloat16()
    expected = ops.conv2d_1x1_pair(x, residual, expand, reduce)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.conv2d_1x1_pair(x, residual, expand, reduce)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
