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
from fastcnn import _native, ops
from fastcnn.ops import _registration as registration
from fastcnn.ops.conv2d import OPERATOR

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
    for name in ("input", "weight"):
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


def test_what_is_ordinary_does_not_depend_on_the_first_call(dispatched):
    registration._ordinary_keys.cache_clear()
    x = torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        ops.max_pool2d(x, 2)
    ops.max_pool2d(x, 2)
    assert not dispatched


def test_outputs_pass_the_dispatcher_by(monkeypatch):
    from fastcnn.ops.pool2d import MAX

    monkeypatch.setattr(MAX, "into", None)
    x, out = torch.randn(2, 4, 6, 6), torch.empty(2, 4, 3, 3)
    version = out._version
    assert ops.max_pool2d(x, 2, out=out) is out
    assert torch.equal(out, F.max_pool2d(x, 2))
    assert out._version > version
    with pytest.raises(TypeError):  # the dispatcher is asked where a gradient would be recorded
        ops.max_pool2d(x.requires_grad_(), 2, out=out)


# ---- forms that were seen before ------------------------------------------------------------------------------------


def test_every_call_of_a_form_is_right():
    """The second call of a form is not checked again: it must differ from the first in values only."""
    for x in (torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)):
        for stride in (1, 2):
            for _ in range(3):
                x = x * 2 - 1
                expected = F.conv2d(x, WEIGHT, stride=stride)
                y = ops.conv2d(x, WEIGHT, stride=stride)
                assert y.stride() == expected.stride()
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    empty = torch.randn(0, 4, 6, 6)
    for _ in range(2):
        assert ops.conv2d(empty, WEIGHT).shape == (0, 3, 4, 4)


def test_wrong_arguments_are_refused_after_good_ones_and_again():
    x = torch.randn(2, 4, 6, 6)
    for _ in range(2):
        ops.conv2d(x, WEIGHT)
        with pytest.raises(ValueError, match="channels"):
            ops.conv2d(x[:, :3], WEIGHT)
        with pytest.raises(TypeError, match="weight"):
            ops.conv2d(x, WEIGHT.double())
        with pytest.raises(ValueError, match="bias"):
            ops.conv2d(x, WEIGHT, torch.zeros(4))


def test_wrong_outputs_are_refused_after_good_ones_and_again():
    x, out = torch.randn(2, 4, 6, 6), torch.empty(2, 3, 4, 4)
    for _ in range(2):
        ops.conv2d(x, WEIGHT, out=out)
        with pytest.raises(ValueError, match="out must have shape"):
            ops.conv2d(x, WEIGHT, out=torch.empty(2, 3, 4, 5))
        with pytest.raises(ValueError, match="overlap itself"):
            ops.conv2d(x, WEIGHT, out=torch.empty(1).expand(2, 3, 4, 4))
    torch.testing.assert_close(out, F.conv2d(x, WEIGHT), rtol=1e-4, atol=1e-4)


def test_a_full_memory_of_forms_begins_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registration, "_MOST_FORMS", 2)
    for size in range(4, 9):
        x = torch.randn(1, 4, size, size)
        out = torch.empty(1, 3, size - 2, size - 2)
        assert torch.equal(ops.conv2d(x, WEIGHT), ops.conv2d(x, WEIGHT, out=out))
        assert 1 <= len(OPERATOR._forms) <= 2
        assert 1 <= len(OPERATOR._good_outputs) <= 2


SIGNED = {
    "shape": (torch.empty(2, 3), torch.empty(3, 2)),
    "strides": (torch.empty(2, 2), torch.empty(2, 2).t()),
    "strides of size-1 dimensions": (torch.empty(1, 2, 1, 1), torch.empty_strided((1, 2, 1, 1), (2, 1, 2, 2))),
    "dtype": (torch.empty(2), torch.empty(2, dtype=torch.bfloat16)),
    "16-bit dtypes": (torch.empty(2, dtype=torch.float16), torch.empty(2, dtype=torch.bfloat16)),
    "alignment": (torch.empty(8)[:4], torch.empty(8)[1:5]),
    "none": (None, 0),
    "bool": (True, 1),
    "float": (1.0, 1),
    "nesting": ((1, (2, 3)), (1, 2, 3)),
    "string": ("relu", "none"),
    "size": ((1, 2), (1, 2, 0)),
}


@pytest.mark.parametrize("name", SIGNED)
def test_signatures_tell_forms_apart(name: str):
    one, other = (_native.signature((a,)) for a in SIGNED[name])
    assert one is not None
    assert other is not None
    assert one != other


def test_signatures_do_not_see_values():
    assert _native.signature((torch.zeros(2, 3), 1)) == _native.signature((nn.Parameter(torch.ones(2, 3)), 1))
    assert _native.signature((torch.zeros(1), object())) is None
    assert _native.signature((2**70,)) is None


# ---- overlap ---------------------------------------------------------------------------------------------------------


def views(buffer: Tensor) -> dict[str, Tensor]:
    """Views of (2, 6, 3, 4) channels-last memory."""
    return {
        "all": buffer, "first": buffer[:, :2], "middle": buffer[:, 2:4], "most": buffer[:, 1:], "image": buffer[1:],
        "row": buffer[:, :, 1:2], "row's middle": buffer[:, 2:4, 1:2], "column": buffer[..., 2:3],
        "vector": buffer[0, 0, 0], "empty": buffer[:0], "channel": buffer[:, 5:],
    }  # fmt: skip


def test_overlap_is_never_missed_and_slices_are_told_apart():
    buffer = torch.arange(144.0).view(2, 3, 4, 6).permute(0, 3, 1, 2)
    for one in views(buffer):
        for other in views(buffer):
            a, b = views(buffer)[one], views(buffer)[other]
            shared = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
            told = _native.may_overlap(a, (None, torch.empty(3), b))
            assert told or not shared, (one, other)
            whole_pixels = a.shape[2:] == b.shape[2:] == (3, 4) and a.shape[0] == b.shape[0] == 2
            if whole_pixels and not shared:
                assert not told, (one, other)
    assert not _native.may_overlap(buffer, (buffer.clone(),))


@pytest.mark.parametrize("name", watched_calls(torch.empty(0)))
def test_the_dispatcher_sees_what_it_must(name: str, dispatched):
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(watched_calls(x)[name](), F.max_pool2d(x, 2))
    assert dispatched
