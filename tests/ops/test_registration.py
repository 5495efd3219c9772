"""What every operator gets from its registration: autograd that saves no more than it reads, torch.func, out=."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastcnn.nn as fnn
from fastcnn import ops

WEIGHT = torch.linspace(-1, 1, 3 * 4 * 3 * 3).view(3, 4, 3, 3)

# Each beside PyTorch's own; (N, 4, 6, 6) inputs.
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "conv2d": (lambda x: ops.conv2d(x, WEIGHT), lambda x: F.conv2d(x, WEIGHT)),
    "conv2d_relu": (lambda x: ops.conv2d(x, WEIGHT, activation="relu"), lambda x: F.conv2d(x, WEIGHT).relu()),
    "linear": (lambda x: ops.linear(x, WEIGHT.view(18, 6)), lambda x: F.linear(x, WEIGHT.view(18, 6))),
    "max_pool2d": (lambda x: ops.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 2)),
    "local_response_norm": (lambda x: ops.local_response_norm(x, 3), lambda x: F.local_response_norm(x, 3)),
    "residual_add": (lambda x: ops.residual_add(x, 2 * x), lambda x: F.relu(3 * x)),
    "batch_norm": (
        lambda x: ops.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "layer",
    [
        fnn.Conv2d(4, 4, 3), fnn.BatchNorm2d(4), fnn.BatchNorm2d(4).eval(), fnn.Linear(6, 4), fnn.MaxPool2d(2),
        fnn.AvgPool2d(2), fnn.AdaptiveAvgPool2d(2), fnn.LocalResponseNorm(3),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{'train' if layer.training else 'eval'}",
)  # fmt: skip
def test_output_may_be_overwritten_before_backward(layer: nn.Module) -> None:
    """nn.ReLU(inplace=True) behind a layer: PyTorch's own layers save their inputs, never their outputs."""
    twin = getattr(nn, type(layer).__name__)
    x = torch.randn(2, 4, 6, 6)
    grads = []
    for forward in (layer.forward, lambda x: twin.forward(layer, x)):
        leaf = x.clone().requires_grad_()
        torch.relu_(forward(leaf)).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_added_tensors_may_be_overwritten_before_backward() -> None:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    scale, shift = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    for function in (
        lambda added, vector: ops.residual_add(x * 3, added),
        lambda added, vector: ops.channel_affine(x, scale, vector, residual=added, activation="relu"),
        lambda added, vector: ops.conv2d(x, weight, vector, padding=1, residual=added, activation="relu"),
        lambda added, vector: ops.batch_norm(x, None, None, scale, vector, True, residual=added, activation="relu"),
    ):
        expected = torch.autograd.grad(function(x * 2, shift * 2).square().sum(), (x, shift), allow_unused=True)
        added, vector = x * 2, shift * 2
        y = function(added, vector)
        added.zero_(), vector.zero_()
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, shift), allow_unused=True), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", PAIRS)
def test_torch_func(name: str) -> None:
    ours, theirs = PAIRS[name]
    x = torch.randn(2, 4, 6, 6)

    def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x).pow(3).sum()

    def per_sample(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: loss(function)(x[None])))(x)

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(loss(function))(x).square().sum())(x)

    for transform in (lambda function: torch.func.grad(loss(function))(x), per_sample, second):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-3, atol=1e-3)


def test_torch_func_under_autocast() -> None:
    layer, x = fnn.Conv2d(4, 3, 3), torch.randn(2, 4, 6, 6)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, x).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.func.grad(loss)(parameters)
        layer(x).float().square().sum().backward()
    torch.testing.assert_close(grads["weight"], layer.weight.grad)


def test_torch_func_on_the_raw_operator_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"use fastcnn\.ops"):
        torch.func.grad(lambda x: torch.ops.fastcnn.residual_add(x, x, 1.0, "relu").sum())(torch.randn(2, 4, 3, 3))


def test_out_refuses_forward_mode() -> None:
    x, out = torch.randn(2, 4, 6, 6), torch.empty(2, 3, 4, 4)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        ops.conv2d(forward_ad.make_dual(x, torch.ones_like(x)), WEIGHT, out=out)


def test_out_in_another_storage_of_the_same_memory() -> None:
    """Tensors made from one NumPy array share no storage, but memory."""
    size = 8 * 8 * 8
    memory = numpy.random.default_rng(0).standard_normal(size + 8, dtype=numpy.float32)
    x, out = (torch.from_numpy(memory[i : i + size]).view(1, 8, 8, 8).permute(0, 3, 1, 2) for i in (0, 8))
    weight = torch.randn(8, 8, 3, 3)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ops.conv2d(x, weight, padding=1, out=out), expected, rtol=1e-4, atol=1e-4)


def test_freed_storage_is_named() -> None:
    for name in ("input", "tensor"):
        x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        weight = WEIGHT.clone()
        (x if name == "input" else weight).untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} must have memory"):
            ops.conv2d(x, weight)


def test_meta_tensors() -> None:
    x, weight = torch.empty(1, 4, 3, 3, device="meta"), torch.empty(8, 4, 1, 1, device="meta")
    assert ops.inception_concat([x], [weight]).shape == (1, 8, 3, 3)
    assert fnn.BasicBlock(4, 4).to("meta").eval()(x).shape == x.shape


# ---- past the dispatcher ---------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def watched_calls(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Calls that PyTorch's dispatcher must see, each with the result of ``ops.max_pool2d(x, 2)``."""

    def under(context: Callable[[], object]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with context():  # type: ignore[attr-defined]
                return ops.max_pool2d(x, 2)

        return call

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class WatchingFunctions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    return {
        "profiler": under(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
        "dispatch mode": under(Watching),
        "function mode": under(WatchingFunctions),
        "gradient": lambda: ops.max_pool2d(x.clone().requires_grad_(), 2).detach(),
        "negated view": lambda: ops.max_pool2d(torch._neg_view(-x), 2),
        "subclass": lambda: ops.max_pool2d(x.as_subclass(Subclass), 2).as_subclass(Tensor),
        "dual number": lambda: forward_mode(x),
    }


def forward_mode(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return ops.max_pool2d(x, 2)


@pytest.fixture
def dispatched(monkeypatch) -> list[int]:
    """One entry for each call of the pooling operator that goes through the dispatcher."""
    from fastcnn.ops.pool2d import MAX

    seen: list[int] = []
    original = MAX.functional
    monkeypatch.setattr(MAX, "functional", lambda *args: (seen.append(1), original(*args))[1])
    return seen


def test_ordinary_calls_pass_the_dispatcher_by(dispatched):
    x = torch.randn(2, 4, 6, 6)
    expected = F.max_pool2d(x, 2)
    assert torch.equal(ops.max_pool2d(x, 2), expected)
    with torch.inference_mode():
        assert torch.equal(ops.max_pool2d(x, 2), expected)
        assert torch.equal(ops.max_pool2d(x.clone(), 2), expected)
    with torch.no_grad():
        assert torch.equal(ops.max_pool2d(nn.Parameter(x), 2), expected)
    assert not dispatched


@pytest.mark.parametrize("name", watched_calls(torch.empty(0)))
def test_the_dispatcher_sees_what_it_must(name: str, dispatched):
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(watched_calls(x)[name](), F.max_pool2d(x, 2))
    assert dispatched
