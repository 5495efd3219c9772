"""linear, channel_affine, batch_statistics, pooling, local response norm and residual add against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from fastcnn.backends import triton as backend  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 17, 5, 7), (1, 64, 9, 3), (3, 300, 2, 2)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 37, 19), (70, 64, 130), (3, 200, 16)], ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_linear(tools, sizes, pad, dtype) -> None:
    m, c, k = sizes
    x = torch.randn(m, c + pad).to(dtype)[:, :c]
    wide = torch.full((m, k + pad), 7.0, dtype=dtype)
    out = wide[:, :k]
    weight, bias = torch.randn(k, c).to(dtype), torch.randn(k)
    out.fill_(float("nan"))
    backend.linear(out, x, weight, bias, "relu")
    exact = F.relu(F.linear(x.double(), weight.double(), bias.double()))
    tools.assert_accurate(out, F.relu(F.linear(x, weight, bias.to(dtype))), exact)
    assert (wide[:, k:] == 7.0).all()
    backend.linear(out, x, weight, None, "none")
    tools.assert_accurate(out, F.linear(x, weight), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("slices", [(0, 0), (8, 16), (1, 2)], ids=str)
def test_channel_affine(tools, shape, with_residual, slices, dtype) -> None:
    x = tools.nhwc(*shape, dtype=dtype, before=slices[0])
    out = tools.nhwc(*shape, dtype=dtype, after=slices[1], fill=float("nan"))
    residual = tools.nhwc(*shape, dtype=dtype, after=slices[0]) if with_residual else None
    scale, shift = torch.randn(shape[1]), torch.randn(shape[1])
    backend.channel_affine(out, x, scale, shift, residual, "relu")

    def compute(x, scale, shift, residual):
        y = x * scale.to(x.dtype).view(-1, 1, 1) + shift.to(x.dtype).view(-1, 1, 1)
        return F.relu(y if residual is None else y + residual)

    tools.check(out, compute, x, scale, shift, residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_affine_about_a_centre(tools, shape) -> None:
    centre = 1000 + torch.randn(shape[1])
    x = tools.nhwc(*shape, dtype=torch.float32).add_(centre.view(-1, 1, 1))
    out = tools.nhwc(*shape, dtype=torch.float32, fill=float("nan"))
    scale, shift = torch.randn(2, shape[1])
    backend.channel_affine(out, x, scale, shift, None, "none", centre)

    def compute(x, centre, scale, shift):
        return (x - centre.view(-1, 1, 1)) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    tools.check(out, compute, x, centre, scale, shift)


def test_channel_affine_in_place_and_without_vectors(tools) -> None:
    x = tools.nhwc(2, 5, 3, 3, dtype=torch.float32)
    expected = F.relu(x * 2 + x).clone()
    backend.channel_affine(x, x, torch.full((5,), 2.0), None, x, "relu")
    torch.testing.assert_close(x, expected)
    x[0, 0, 0, 0] = float("nan")
    backend.channel_affine(x, x, None, None, None, "relu")
    assert x[0, 0, 0, 0].isnan()


def assert_statistics(mean, var, x) -> None:
    """Errors as batch norm feels them: the mean's in units of the deviation. (PyTorch sums in float64 on a CPU, so its
    own error is no yardstick.)"""
    exact_var, exact_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    rounding = 2**-23
    assert ((mean - exact_mean).abs() <= 16 * rounding * exact_var.sqrt() + rounding * exact_mean.abs()).all()
    assert ((var - exact_var).abs() <= 16 * rounding * exact_var).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 5, 7), (3, 70, 40, 20), (1, 8, 1, 3)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_batch_statistics(tools, shape, offset) -> None:
    x = tools.nhwc(*shape, dtype=torch.float32, after=3).add_(offset)
    mean, var = torch.full((2, shape[1]), float("nan"))
    backend.batch_statistics(mean, var, x)
    assert_statistics(mean, var, x)
    again = torch.empty_like(mean), torch.empty_like(var)
    backend.batch_statistics(*again, x)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], var)


def test_batch_statistics_of_half_precision(tools, dtype) -> None:
    x = tools.nhwc(2, 24, 9, 8, dtype=dtype)
    mean, var = torch.empty(2, 24)
    backend.batch_statistics(mean, var, x)
    assert_statistics(mean, var, x)


#   kernel, stride, padding, dilation
WINDOWS = [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1)), ((3, 2), (1, 3), (1, 0), (2, 1)),
           ((5, 4), (2, 1), (2, 2), (1, 1))]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("slices", [(0, 0), (3, 5)], ids=str)
def test_max_pool2d(tools, window, slices, dtype) -> None:
    x = tools.nhwc(2, 19, 9, 7, dtype=dtype, before=slices[0])
    x[0, 3, 4, 4] = float("nan")
    x[1, :, 0] = float("-inf")
    expected = F.max_pool2d(x, *window)
    out = tools.nhwc(*expected.shape, dtype=dtype, before=slices[1], fill=7.0)
    backend.max_pool2d(out, x, *window)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    tools.guards(out)


@pytest.mark.parametrize("window", [w for w in WINDOWS if w[3] == (1, 1)], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("count_include_pad", "divisor"), [(True, 0), (False, 0), (True, 3)])
def test_avg_pool2d(tools, window, ceil_mode, count_include_pad, divisor) -> None:
    kernel, stride, padding, _ = window
    x = tools.nhwc(2, 10, 9, 8, dtype=torch.float32, after=3)

    def compute(x):
        return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor or None)

    out = tools.nhwc(*compute(x).shape, dtype=torch.float32, before=2, fill=float("nan"))
    backend.avg_pool2d(out, x, kernel, stride, padding, padding, count_include_pad, divisor)
    tools.check(out, compute, x)


def test_avg_pool2d_types(tools, dtype) -> None:
    x = tools.nhwc(1, 33, 6, 6, dtype=dtype)
    out = tools.nhwc(1, 33, 3, 3, dtype=dtype, fill=float("nan"))
    backend.avg_pool2d(out, x, (2, 2), (2, 2), (0, 0), (0, 0), True, 0)
    tools.check(out, lambda x: F.avg_pool2d(x, 2), x)


@pytest.mark.parametrize("sizes", [((7, 7), (1, 1)), ((10, 7), (3, 4)), ((3, 3), (5, 7)), ((14, 9), (14, 9))], ids=str)
def test_adaptive_avg_pool2d(tools, sizes, dtype) -> None:
    x = tools.nhwc(2, 70, *sizes[0], dtype=dtype, before=5)
    out = tools.nhwc(2, 70, *sizes[1], dtype=dtype, after=1, fill=float("nan"))
    backend.adaptive_avg_pool2d(out, x)
    tools.check(out, lambda x: F.adaptive_avg_pool2d(x, sizes[1]), x)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize("channels", [1, 19, 300])
def test_local_response_norm(tools, size, beta, channels) -> None:
    x = tools.nhwc(2, channels, 3, 2, dtype=torch.float32, before=3).mul_(3)
    out = tools.nhwc(2, channels, 3, 2, dtype=torch.float32, after=2, fill=float("nan"))
    backend.local_response_norm(out, x, size, 0.3, beta, 2.0)
    tools.check(out, lambda x: F.local_response_norm(x, size, 0.3, beta, 2.0), x)


def test_local_response_norm_types(tools, dtype) -> None:
    x = tools.nhwc(1, 96, 3, 3, dtype=dtype)
    out = tools.nhwc(1, 96, 3, 3, dtype=dtype, fill=float("nan"))
    # A large alpha: the interpreter cuts bf16 results off where the GPU rounds them, which shows where y is nearly x.
    backend.local_response_norm(out, x, 5, 0.3, 0.75, 1.0)

    def compute(x):  # PyTorch has no 16-bit kernel on the CPU
        wide = x if x.dtype == torch.float64 else x.float()
        return F.local_response_norm(wide, 5, 0.3, 0.75, 1.0).to(x.dtype)

    tools.check(out, compute, x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slices", [(0, 0), (8, 16), (1, 2)], ids=str)
def test_residual_add(tools, shape, slices, dtype) -> None:
    x = tools.nhwc(*shape, dtype=dtype, before=slices[0])
    residual = tools.nhwc(*shape, dtype=dtype, after=slices[1])
    out = tools.nhwc(*shape, dtype=dtype, before=slices[1], fill=float("nan"))
    backend.residual_add(out, x, residual, 0.8, "relu")
    tools.check(out, lambda x, residual: F.relu(x * 0.8 + residual), x, residual)


def test_residual_add_in_place_keeps_nan(tools) -> None:
    x, residual = tools.nhwc(1, 5, 3, 3, dtype=torch.float32), tools.nhwc(1, 5, 3, 3, dtype=torch.float32)
    x[0, 1, 1, 1] = float("nan")
    expected = F.relu(x + residual)
    backend.residual_add(x, x, residual, 1.0, "relu")
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_cpu_tensors_are_served_in_interpreter_mode() -> None:
    assert backend.unavailable() is None
    assert backend.unsupported("conv2d", torch.device("cpu"), torch.float32) is None
    assert "dtype" in backend.unsupported("conv2d", torch.device("cpu"), torch.float64)
    assert "no Triton kernel" in backend.unsupported("nothing", torch.device("cpu"), torch.float32)
