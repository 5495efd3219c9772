"""The cuDNN backend's logic, with equals on the CPU in place of cuDNN's calls. tests/gpu/test_cudnn.py has those."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.cudnn_on_cpu import substitute_cudnn
from support.layout import LAYOUTS, GuardedSlice
from torch import Tensor, nn

import fastcnn
from fastcnn import backends, ops
from fastcnn.backends import cudnn, derived


@pytest.fixture
def calls(monkeypatch):
    calls = substitute_cudnn(monkeypatch)
    with backends.use_backend("cudnn", strict=True):
        yield calls


def nhwc(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def problem(dtype: torch.dtype = torch.float32):
    x, weight = nhwc(2, 6, 9, 7, dtype=dtype), torch.randn(8, 3, 3, 3).to(dtype)
    return x, weight, torch.randn(8), torch.randn(8), nhwc(2, 8, 5, 4, dtype=dtype)


GEOMETRY = (2, 1, 1, 2)


def reference(x, weight, scale, bias, residual, activation, dtype) -> Tensor:
    y = F.conv2d(x.to(dtype), weight.to(dtype), None, *GEOMETRY)
    if scale is not None:
        y = y * scale.to(dtype).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    if residual is not None:
        y = y + residual.to(dtype)
    return F.relu(y) if activation == "relu" else y


@pytest.mark.parametrize("dtype", cudnn.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("scaled", "biased", "added", "activation", "kind"),
    [
        (True, True, True, "relu", "add_relu"),
        (True, True, False, "relu", "relu"),
        (False, True, False, "relu", "relu"),
        (False, False, False, "relu", "relu"),
        (True, True, False, "none", "plain"),
        (False, False, False, "none", "plain"),
    ],
)
@torch.no_grad()
def test_computes_the_convolution(calls, dtype, layout, scaled, biased, added, activation, kind):
    x, weight, scale, bias, residual = problem(dtype)
    scale, bias = scale if scaled else None, bias if biased else None
    residual = residual if added else None
    options = {"scale": scale, "activation": activation}
    given = None if residual is None else LAYOUTS[layout](residual)
    expected = [reference(x, weight, scale, bias, residual, activation, kind) for kind in (dtype, torch.float64)]
    ours = ops.conv2d(LAYOUTS[layout](x), weight, bias, *GEOMETRY, residual=given, **options)
    assert_accurate(ours, *expected)
    assert calls.kinds == [kind]
    out = GuardedSlice(tuple(ours.shape), dtype)
    ops.conv2d(LAYOUTS[layout](x), weight, bias, *GEOMETRY, residual=given, **options, out=out.view)
    assert_accurate(out.view, *expected)
    out.assert_guards_intact()
    dense = torch.full_like(nhwc(*ours.shape, dtype=dtype), float("nan"))
    ops.conv2d(LAYOUTS[layout](x), weight, bias, *GEOMETRY, residual=given, **options, out=dense)
    assert_accurate(dense, *expected)


@torch.no_grad()
def test_a_new_output_takes_the_result_over_and_a_given_one_keeps_its_memory(calls):
    x, weight, scale, bias, _ = problem()
    ours = ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, activation="relu")
    assert ours.data_ptr() == calls.results[-1].data_ptr(), "no copy"
    out = torch.empty_like(ours)
    address = out.data_ptr()
    assert ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, activation="relu", out=out) is out
    assert out.data_ptr() == address != calls.results[-1].data_ptr()
    assert torch.equal(out, ours)


@torch.no_grad()
def test_a_concatenation_slice_is_written_in_place(calls):
    x = nhwc(1, 4, 5, 5)
    weights = [torch.randn(k, 4, 1, 1) for k in (3, 5)]
    joined = ops.inception_concat([x, x], weights)
    assert calls.kinds == ["relu", "relu"]
    torch.testing.assert_close(joined, torch.cat([F.relu(F.conv2d(x, w)) for w in weights], 1))


@torch.no_grad()
def test_an_output_that_overlaps_an_input_is_right(calls):
    """The operator computes into memory of its own first, which is fresh, and copies it."""
    x, weight = nhwc(1, 4, 5, 5), torch.randn(4, 4, 1, 1)
    expected = F.relu(F.conv2d(x, weight))
    ops.conv2d(x, weight, activation="relu", out=x)
    torch.testing.assert_close(x, expected)


@torch.no_grad()
def test_strides_of_size_one_dimensions_are_those_the_operator_promises(calls, monkeypatch):
    """cuDNN may return (N, K, 1, 1) with other strides: the same memory, but not as the fake kernel says."""
    inner = torch.cudnn_convolution_relu
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *args: inner(*args).contiguous().view(2, 8, 1, 1))
    x, weight = nhwc(2, 3, 1, 1), torch.randn(8, 3, 1, 1)
    ours = ops.conv2d(x, weight, activation="relu")
    with backends.use_backend("cpp"):
        theirs = ops.conv2d(x, weight, activation="relu")
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_the_folded_weight_is_kept_until_something_changes(calls):
    x, weight, scale, bias, _ = problem(torch.bfloat16)

    def run() -> Tensor:
        return ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, activation="relu")

    run(), run()
    assert calls.weights[0] is calls.weights[1]
    assert calls.biases[0] is calls.biases[1]
    scale.mul_(2)
    doubled = run()
    assert calls.weights[2] is not calls.weights[1]
    assert_accurate(doubled, *(reference(x, weight, scale, bias, None, "relu", d) for d in (x.dtype, torch.float64)))
    bias.add_(1)
    weight.neg_()
    assert_accurate(run(), *(reference(x, weight, scale, bias, None, "relu", d) for d in (x.dtype, torch.float64)))
    derived.clear()


@torch.no_grad()
def test_the_weight_itself_is_used_where_it_lies_right(calls):
    x, weight = nhwc(1, 4, 5, 5), nhwc(8, 4, 3, 3)
    ops.conv2d(x, weight, activation="relu")
    assert calls.weights[0].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"input_activation": "relu"}, "on the input"),
        ({"input_scale": torch.ones(6)}, "on the input"),
        ({"residual": torch.zeros(2, 8, 9, 7)}, "without ReLU"),
        ({"weight": torch.zeros(8, 6, 2, 2), "padding": "same"}, "padding that differs"),
    ],
)
@torch.no_grad()
def test_what_cudnn_does_not_express_is_named(calls, options, reason):
    x = nhwc(2, 6, 9, 7)
    arguments = {"weight": torch.zeros(8, 6, 3, 3), "padding": 1, **options}
    with pytest.raises(backends.UnsupportedError, match=reason):
        ops.conv2d(x, **arguments)
    backends.reset_fallbacks()
    with backends.use_backend("cudnn"):
        ops.conv2d(x, **arguments)
    (fallback,) = backends.fallbacks()
    assert fallback.operator == "conv2d"
    assert reason in fallback.reason


@pytest.fixture
def set_flag():
    """Set torch.backends.cudnn's flags, also after PyTorch's test helpers forbade to do so by assignment."""
    before = {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")}

    def set_one(name: str, value: bool) -> None:
        getattr(torch._C, f"_set_cudnn_{name}")(value)

    yield set_one
    for name, value in before.items():
        set_one(name, value)


def test_other_operators_devices_and_dtypes_are_refused(monkeypatch, set_flag):
    device = torch.device("cpu")
    assert "no cuDNN call" in cudnn.unsupported("linear", device, torch.float32)
    assert "device cpu" in cudnn.unsupported("conv2d", device, torch.float32)
    monkeypatch.setattr(cudnn, "_DEVICE", "cpu")
    assert "dtype" in cudnn.unsupported("conv2d", device, torch.float64)
    set_flag("enabled", False)
    assert "enabled" in cudnn.unsupported("conv2d", device, torch.float32)


@torch.no_grad()
def test_without_a_fused_engine_the_calls_are_separate_and_remembered(calls):
    x, weight, scale, bias, residual = problem()
    calls.no_engine = True
    for _ in range(2):
        for added in (residual, None):
            ours = ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, residual=added, activation="relu")
            expected = [reference(x, weight, scale, bias, added, "relu", d) for d in (x.dtype, torch.float64)]
            assert_accurate(ours, *expected)
    assert calls.kinds == ["add_relu", "relu"], "each form asks once"


@torch.no_grad()
def test_other_errors_are_not_swallowed(calls, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fails)
    with pytest.raises(torch.OutOfMemoryError):
        ops.conv2d(nhwc(1, 4, 5, 5), torch.randn(8, 4, 3, 3), activation="relu")


@torch.no_grad()
def test_the_flags_of_pytorch_hold(calls, set_flag):
    x, weight = nhwc(1, 4, 5, 5), torch.randn(8, 4, 3, 3)
    set_flag("benchmark", True)
    ops.conv2d(x, weight)
    assert calls.flags[:2] == (True, False)
    set_flag("deterministic", True)
    ops.conv2d(x, weight)
    assert calls.flags[:2] == (True, True)
    ours = ops.conv2d(x, weight, activation="relu")
    assert calls.kinds == ["plain", "plain"], "PyTorch's fused calls know no deterministic"
    torch.testing.assert_close(ours, F.relu(F.conv2d(x, weight)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def test_the_variant_that_times_algorithms(calls, set_flag, monkeypatch):
    x, weight, scale, bias, residual = problem()
    seen = []
    fused = torch.cudnn_convolution_add_relu
    monkeypatch.setattr(
        torch, "cudnn_convolution_add_relu",
        lambda *args: (seen.append(torch.backends.cudnn.benchmark), fused(*args))[1],
    )  # fmt: skip

    def fails(*args):
        raise RuntimeError("broken")

    def run(call):
        call._replace(backend="cudnn:benchmark").run()

    set_flag("benchmark", False)
    assert cudnn.variants("conv2d") == ["benchmark"]
    assert cudnn.variants("linear") == []
    expected = ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, residual=residual, activation="relu")
    with backends.intercept(run):
        ours = ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, residual=residual, activation="relu")
        assert torch.equal(ours, expected)
        assert seen == [False, True]
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fails)
        with pytest.raises(RuntimeError, match="broken"):
            ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, residual=residual, activation="relu")
    assert not torch.backends.cudnn.benchmark
    set_flag("benchmark", True)
    assert cudnn.variants("conv2d") == []
    with pytest.raises(ValueError, match="has the variant 'benchmark', not 'fast'"):
        backends.backend_module("cudnn:fast")


def test_a_network_verifies(calls):
    model = Block().eval()
    result = fastcnn.verify(fastcnn.optimize(model), nhwc(2, 4, 6, 6), backend="cudnn", reference=model, strict=True)
    assert result.passed, str(result)
    assert {layer.backend for layer in result.layers} == {"cudnn"}
    assert set(calls.kinds) == {"relu", "add_relu"}


def test_gradients_flow(calls):
    model = fastcnn.optimize(Block().eval())
    x = nhwc(2, 4, 6, 6)
    model(x).sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with backends.use_backend("reference"):
        model(x).sum().backward()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4)
    assert "add_relu" in calls.kinds


@torch.no_grad()
def test_under_torch_compile_and_inference_mode(calls):
    x, weight, scale, bias, residual = problem()

    def run(x: Tensor) -> Tensor:
        return ops.conv2d(x, weight, bias, *GEOMETRY, scale=scale, residual=residual, activation="relu") + 1

    expected = reference(x, weight, scale, bias, residual, "relu", torch.float32) + 1
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), expected)
    torch.library.opcheck(
        torch.ops.fastcnn.conv2d.default,
        (x, weight, bias, (2, 2), (1, 1, 1, 1), (1, 1), 2, scale, residual, "relu", None, None, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(calls.kinds) == {"add_relu"}
