"""conv2d_max_pool2d is conv2d and max_pool2d, in every layout, dtype and form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.layout import GuardedSlice
from torch import Tensor, nn

import fastcnn
from fastcnn import backends, ops
from fastcnn.backends import cuda
from fastcnn.measurement.flops import count_flops

POOL: dict[str, Any] = {"kernel_size": 3, "pool_stride": 2, "pool_padding": 1}


def operands(dtype: torch.dtype = torch.float32, k: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 17, 22), (k, 3, 5, 3), (k,), (k,)
    x, weight, bias, scale = (torch.randn(shape, generator=g) for shape in shapes)
    return x.to(dtype), weight.to(dtype), bias, scale


def apart(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, **pool: Any) -> Tensor:
    y = ops.conv2d(x, weight, bias, (2, 1), (1, 2), scale=scale, activation="relu")
    return ops.max_pool2d(
        y, pool["kernel_size"], pool.get("pool_stride"), pool.get("pool_padding", 0), pool.get("pool_dilation", 1),
        pool.get("ceil_mode", False),
    )  # type: ignore[return-value]  # fmt: skip


def together(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, **options: Any) -> Tensor:
    return ops.conv2d_max_pool2d(x, weight, bias, (2, 1), (1, 2), scale=scale, activation="relu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("pool", [POOL, {"kernel_size": (2, 3), "pool_dilation": 2, "ceil_mode": True}], ids=str)
def test_is_the_two_operators(dtype: torch.dtype, backend: str | None, layout: str, pool: dict[str, Any]) -> None:
    x, weight, bias, scale = operands(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 1:4]
    with backends.use_backend(backend):
        expected = apart(x, weight, bias, scale, **pool)
        ours = together(x, weight, bias, scale, **pool)
        out = GuardedSlice(tuple(expected.shape), dtype)
        assert together(x, weight, bias, scale, **pool, out=out.view) is out.view
    for result in (ours, out.view):
        assert torch.equal(result, expected)
    assert ours.stride() == expected.stride()
    out.assert_guards_intact()
    assert torch.equal(together(x, weight, None, None, **POOL), apart(x, weight, None, None, **POOL))


def test_gradients_are_those_of_the_two() -> None:
    tensors = operands()
    results = []
    for function in (together, apart):
        leaves = [t.clone().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(function(*leaves, **POOL).square().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    sum_of_raw = raw(tensors[0].requires_grad_(), tensors[1]).sum()
    with pytest.raises(RuntimeError, match="has no gradient"):
        sum_of_raw.backward()


def raw(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.fastcnn.conv2d_max_pool2d(
        x, weight, None, [2, 2], [1, 1, 1, 1], [1, 1], 1, None, "relu", [3, 3], [2, 2], [1, 1], [1, 1], False
    )


def test_empty_batch_and_autocast() -> None:
    x, weight, bias, scale = operands()
    assert together(x[:0], weight, bias, scale, **POOL).shape == (0, 40, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = together(x, weight, bias, scale, **POOL), apart(x, weight, bias, scale, **POOL)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": torch.ones(3, 17, 22)}, ValueError, "input and weight must have 4 dimensions"),
        ({"input": torch.ones(2, 4, 17, 22)}, ValueError, "weight has shape"),
        ({"input": [1]}, TypeError, "input must be a torch.Tensor"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"scale": 1.0}, TypeError, "scale"),
        ({"stride": 0}, ValueError, "^stride must"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": "3"}, TypeError, "kernel_size must be"),
        ({"pool_stride": 0}, ValueError, "pool_stride must be at least 1"),
        ({"pool_stride": 1.5}, TypeError, "pool_stride must be"),
        ({"pool_padding": 2}, ValueError, "pool_padding must be at most half of kernel_size"),
        ({"pool_dilation": 0}, ValueError, "pool_dilation must be at least 1"),
        ({"kernel_size": 99}, ValueError, "is larger than the padded convolution's output"),
        ({"out": torch.ones(2, 40, 3, 3)}, ValueError, "out must have shape"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    x, weight, bias, scale = operands()
    arguments = {"input": x, "weight": weight, "bias": bias, "scale": scale, **POOL, **change}
    with pytest.raises(error, match=words):
        ops.conv2d_max_pool2d(**arguments)


def test_opcheck() -> None:
    x, weight, bias, scale = operands()
    rest = [[2, 1], [1, 2, 1, 2], [1, 1], 1, scale, "relu", [3, 3], [2, 2], [1, 1], [1, 1], True]
    for sample in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (sample, weight, bias, *rest)
        torch.library.opcheck(torch.ops.fastcnn.conv2d_max_pool2d.default, arguments)
        out = torch.zeros_like(torch.ops.fastcnn.conv2d_max_pool2d(*arguments))
        torch.library.opcheck(torch.ops.fastcnn.conv2d_max_pool2d_into.default, (out, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    x, weight, bias, scale = operands()
    compiled = torch.compile(together, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (17, 15):
        assert torch.equal(
            compiled(x[:, :, :size], weight, bias, scale, **POOL), together(x[:, :, :size], weight, bias, scale, **POOL)
        )


# ---- which cases the kernel serves -----------------------------------------------------------------------------------

STEM = {
    "weight": (64, 3, 7, 7), "stride": (2, 2), "dilation": (1, 1), "groups": 1,
    "pooling": ((3, 3), (2, 2), (1, 1), (1, 1)),
}  # fmt: skip


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda._native, "cuda_architectures", lambda: ["80", "90a"], raising=False)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"weight": (40, 4, 11, 11), "stride": (4, 4), "pooling": ((3, 3), (2, 2), (0, 0), (1, 1))}, None),
        ({"groups": 3}, "groups"),
        ({"dilation": (1, 2)}, "dilation"),
        ({"weight": (64, 5, 7, 7)}, "4 input channels"),
        ({"dense": False}, "between pixels"),
        ({"weight": (64, 3, 12, 7)}, "11x11"),
        ({"stride": (2, 5)}, "strides above 4"),
        ({"weight": (32, 3, 7, 7)}, "few filters"),
        ({"weight": (44, 3, 7, 7)}, "whole vectors"),
        ({"aligned": False}, "whole vectors"),
        ({"pooling": ((2, 2), (2, 2), (0, 0), (1, 1))}, "windows"),
        ({"pooling": ((3, 3), (2, 2), (1, 1), (2, 1))}, "windows"),
    ],
)
def test_cases_of_the_kernel(change: dict[str, Any], words: str | None) -> None:
    device = torch.device("cuda", 0)
    reason = cuda.no_stem_pool(device, torch.bfloat16, **{**STEM, **change})
    assert (reason is None) if words is None else (reason is not None and words in reason)
    assert cuda.no_stem_pool(device, torch.float32, **STEM) == "dtype torch.float32"


@pytest.mark.usefixtures("h100")
def test_older_gpus_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert cuda.no_stem_pool(torch.device("cuda", 0), torch.bfloat16, **STEM) == "no wgmma"


def test_float64_of_the_pair_is_the_reference() -> None:
    x, weight, bias, scale = operands(torch.float64)
    y = F.conv2d(x, weight, None, (2, 1), (1, 2)) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(together(x, weight, bias, scale, **POOL), F.max_pool2d(F.relu(y), 3, 2, 1))


@torch.no_grad()
def test_models_that_call_it_freeze_on_the_cpu_and_are_summarised() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 40, 7, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return ops.conv2d_max_pool2d(x, self.conv.weight, self.conv.bias, 2, 3, activation="relu", **POOL)

    model, x = Stem().eval(), torch.randn(1, 3, 40, 36)
    assert torch.equal(fastcnn.freeze(model, x)(x), model(x))
    summary = fastcnn.summary(model, (3, 40, 36))
    assert summary.macs == 40 * 3 * 49 * 20 * 18
    assert count_flops(model, x) == 2 * summary.macs
