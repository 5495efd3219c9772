"""What is not fused: the reason is reported, and the result stays the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastcnn
from fastcnn.graph.rewriting import Left

C = 4


class Net(nn.Module):
    """conv-bn-relu and a fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.bn = nn.BatchNorm2d(C)
        self.relu: nn.Module = nn.ReLU()
        self.fc = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def image() -> Tensor:
    return torch.randn(2, C, 6, 5, generator=torch.Generator().manual_seed(3))


def left_of(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    """Optimize, require the plain results in both modes, and return what was left, with reasons."""
    x = image() if x is None else x
    optimized = fastcnn.optimize(model)
    with torch.no_grad():
        for training in (False, True, False):
            outputs = []
            for candidate in (optimized, model, copy.deepcopy(model).double()):
                random.seed(0)
                torch.manual_seed(0)
                dtype = next(candidate.parameters()).dtype
                outputs.append(copy.deepcopy(candidate).train(training)(x.to(dtype)))
            assert_accurate(*outputs)
    return {entry.module: entry.reason for entry in fastcnn.report(optimized).left}


def patterns(model: nn.Module) -> list[str]:
    return [site.pattern for site in fastcnn.report(fastcnn.optimize(model)).sites]


def _hooked(net: Net) -> None:
    net.conv.register_forward_hook(lambda module, args, output: output * 2)


def _own_forward(net: Net) -> None:
    plain = net.bn.forward
    net.bn.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]


def _weight_norm(net: Net) -> None:
    parametrizations.weight_norm(net.conv)


def _spectral_norm(net: Net) -> None:
    parametrizations.spectral_norm(net.conv)


def _no_statistics(net: Net) -> None:
    net.bn = nn.BatchNorm2d(C, track_running_stats=False)


class MyConv(nn.Conv2d):
    pass


def _subclass(net: Net) -> None:
    net.conv = MyConv(C, C, 3, padding=1)


def _activation(net: Net) -> None:
    net.relu = nn.SiLU()


LAYERS: dict[str, tuple[Callable[[Net], None], str, str]] = {
    "hooks": (_hooked, "conv", "hooks"),
    "own-forward": (_own_forward, "bn", "forward of its own"),
    "weight_norm": (_weight_norm, "conv", "parametrized"),
    "no-running-statistics": (_no_statistics, "bn", "no running statistics"),
    "subclass": (_subclass, "conv", "MyConv is a class of its own"),
    "activation": (_activation, "relu", "of the activations only ReLU is fused"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    change, where, reason = LAYERS[name]
    net = Net().eval()
    change(net)
    if name == "own-forward":  # a copy's forward would still be the first module's
        optimized = fastcnn.optimize(net, inplace=True)
        x = image()
        with torch.no_grad():
            expected = net.fc(F.relu(net.bn(net.conv(x))).mean((2, 3)))
            torch.testing.assert_close(optimized(x), expected)
        left = {entry.module: entry.reason for entry in fastcnn.report(optimized).left}
    else:
        left = left_of(net)
    assert reason in left[where]
    assert "conv+bn+relu" not in patterns(net)


def test_spectral_norm() -> None:
    net = Net().eval()
    _spectral_norm(net)
    optimized = fastcnn.optimize(net)
    with torch.no_grad():
        torch.testing.assert_close(optimized(image()), net(image()))
    assert "parametrized" in {e.module: e.reason for e in fastcnn.report(optimized).left}["conv"]


def test_sync_batch_norm() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net()).eval()
    optimized = fastcnn.optimize(net)
    left = {entry.module: entry.reason for entry in fastcnn.report(optimized).left}
    assert "SyncBatchNorm" in left["bn"]
    with torch.no_grad():
        torch.testing.assert_close(optimized(image()), net(image()))


def test_lazy_layers_are_fused_once_they_have_parameters() -> None:
    net = Net()
    net.conv = nn.LazyConv2d(C, 3, padding=1)
    net.eval()
    optimized = fastcnn.optimize(net, inplace=True)
    assert "lazy" in {e.module: e.reason for e in fastcnn.report(optimized).left}["conv"]
    x = image()
    with torch.no_grad():
        optimized(x)
        optimized(x)
    report = fastcnn.report(optimized, x.shape)
    assert [site.pattern for site in report.sites] == ["conv+bn+relu", "linear"]


def test_quantized() -> None:
    net = Net().eval()
    net.fc.__class__ = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.qat.modules.linear"})
    left = {e.module: e.reason for e in fastcnn.report(fastcnn.optimize(net)).left}
    assert left["fc"] == "quantized"


def test_hooks_added_later_run() -> None:
    optimized = fastcnn.optimize(Net().eval())
    seen: list[str] = []
    optimized.bn.register_forward_hook(lambda *_: seen.append("bn"))
    optimized.register_forward_hook(lambda *_: seen.append("net"))
    with torch.no_grad():
        optimized(image())
    assert seen == ["bn", "net"]


class Around(nn.Module):
    """A block that is to be refused, between layers that are fused."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.block, self.bn = nn.Conv2d(C, C, 1), block, nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.block(F.relu(self.conv(x)))))


class Block(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.register_buffer("calls", torch.zeros(1))
        self.seen = 0
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def by_value(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if x.sum() > 0 else x


def by_shape(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if x.shape[2] > 3 else x


def drops_in_python(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if random.random() < 0.5 else x


def drops_by_torch(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if torch.rand(1).item() < 0.5 else x


def counts(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return m.inner(x) * m.seen


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x * 2
    with torch.enable_grad():
        return m.inner(x)


def autocast_inside(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.inner(x).to(x.dtype)


def constant_tensor(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) + torch.ones(1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 100


def own_gradient(m: Any, x: Tensor) -> Tensor:
    return m.inner(Doubled.apply(x))


def by_type(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if isinstance(x.shape[2], int) else x


def pads_by_size(m: Any, x: Tensor) -> Tensor:
    return m.inner(F.pad(x, (0, max(0, 8 - x.shape[3]))))[:, :, :, : x.shape[3]]


BLOCKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "values": (by_value, "control flow"),
    "shapes": (by_shape, "control flow"),
    "types": (by_type, "the type of a value"),
    "sizes": (pads_by_size, "control flow"),
    "python-random": (drops_in_python, "random"),
    "torch-random": (drops_by_torch, "random"),
    "attributes": (counts, "changes attributes"),
    "no_grad": (without_gradient, "no_grad"),
    "autocast": (autocast_inside, "autocast"),
    "constant": (constant_tensor, "makes a tensor"),
    "autograd-function": (own_gradient, "autograd Function"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_called_as_it_is_and_its_inside_fused(name: str) -> None:
    body, reason = BLOCKS[name]
    model = Around(Block(body)).eval()
    left = left_of(model)
    assert reason in left["block"]
    assert [s for s in patterns(model) if "+" in s] == ["conv+relu", "bn+relu", "conv+bn+relu"]
    assert model.block.seen == 0  # tracing left nothing behind


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_as_a_whole_model(name: str) -> None:
    body, reason = BLOCKS[name]
    model = Block(body).eval()
    left = left_of(model)
    assert reason in left["(model)"]
    assert patterns(model) == ["conv+bn+relu"]


def test_single_layers_of_what_cannot_be_traced() -> None:
    class ByShape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.fc = nn.Conv2d(C, C, 3, padding=1), nn.MaxPool2d(2), nn.Linear(C, 3)
            self.bn, self.watched = nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)
            self.watched.register_forward_hook(lambda module, args, output: output * 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.watched(self.bn(self.conv(x)))
            return self.fc((self.pool(x) if x.shape[2] > 3 else x).mean((2, 3)))

    model = ByShape().eval()
    assert "control flow" in left_of(model)["(model)"]
    optimized = fastcnn.optimize(model)
    report = fastcnn.report(optimized, (2, C, 6, 5))
    assert [site.pattern for site in report.sites] == ["conv", "conv", "max_pool", "linear"]
    assert all(site.on_kernels for site in report.sites)
    optimized.train()(image()).sum().backward()
    assert optimized.conv.weight.grad is not None
    restored = fastcnn.restore(copy.deepcopy(optimized))
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]


def test_a_forward_set_on_the_instance() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)
            self.forward = self.forward_twice

        def forward_twice(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model = Around(Chosen()).eval()
    assert "forward of its own" in left_of(model)["block"]
    assert fastcnn.report(fastcnn.optimize(model), (2, C, 6, 5)).fused_fraction == 1


def test_custom_gradient_is_kept() -> None:
    model = Around(Block(own_gradient)).eval()
    x = image().requires_grad_()
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    (ours,) = torch.autograd.grad(fastcnn.optimize(model)(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_hooked_block_is_called_with_its_hooks() -> None:
    model = Around(nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU())).eval()
    model.block.register_forward_hook(lambda module, args, output: output * 3)
    assert "hooks" in left_of(model)["block"]


def test_hook_on_a_block_added_later() -> None:
    model = Around(nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU())).eval()
    optimized = fastcnn.optimize(model)
    x = image()
    with torch.no_grad():
        before = optimized(x)
        for m in (model, optimized):
            m.block.register_forward_hook(lambda module, args, output: output * 3)
        torch.testing.assert_close(optimized(x), model(x))
        assert not torch.equal(optimized(x), before)


def test_strict_lists_what_was_not_fused() -> None:
    net = Net()
    net.relu = nn.SiLU()
    with pytest.raises(fastcnn.NotFusedError, match=r"relu \(SiLU\): of the activations only ReLU") as caught:
        fastcnn.optimize(net, strict=True, inplace=True)
    assert Left("relu", "SiLU", "of the activations only ReLU is fused") in caught.value.left
    assert type(net) is Net
    assert "_fastcnn" not in net.__dict__


ACTIVATIONS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "ReLU6": nn.ReLU6(), "SiLU": nn.SiLU(), "GELU": nn.GELU(), "Hardswish": nn.Hardswish(), "Sigmoid": nn.Sigmoid(),
    "LeakyReLU": nn.LeakyReLU(0.1), "Hardsigmoid": nn.Hardsigmoid(), "Mish": nn.Mish(), "Tanh": nn.Tanh(),
    "SiLU in place": nn.SiLU(inplace=True), "ReLU6 in place": nn.ReLU6(inplace=True),
    "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "silu in place": lambda x: F.silu(x, inplace=True), "sigmoid_": lambda x: x.sigmoid_(),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_no_epilogue_has(name: str) -> None:
    """The convolution and its batch norm are one call; the activation is left, named, and listed by `strict`."""
    activation = ACTIVATIONS[name]
    kind = name.split()[0]
    net = Net()
    if isinstance(activation, nn.Module):
        net.relu = activation
        where = "relu"
    else:
        del net.relu
        net.relu = activation  # type: ignore[assignment]
        where = kind
    assert left_of(net)[where] == "of the activations only ReLU is fused"
    assert patterns(net) == ["conv+bn", "linear"]
    report = fastcnn.report(fastcnn.optimize(net), (2, C, 6, 5))
    assert Left(where, kind, "of the activations only ReLU is fused") in report.left
    assert {entry.module for entry in report.left} == {where, "mean"}
    assert report.fused_fraction == 1
    assert "of the activations only ReLU is fused" in str(report)
    with pytest.raises(fastcnn.NotFusedError, match=rf"{where} \({kind}\): of the activations only ReLU") as caught:
        fastcnn.optimize(net, strict=True)
    assert caught.value.left == report.left


def test_strict_is_content_with_a_fused_model() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(), nn.Flatten())
    assert patterns(fastcnn.optimize(model, strict=True)) == ["conv+bn+relu"]


def test_wrong_types() -> None:
    for function in (fastcnn.optimize, fastcnn.report):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, is int"):
            function(3)  # type: ignore[operator]


def test_dropout_by_function_follows_the_mode() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=self.training)

    model = fastcnn.optimize(Dropping())
    x = torch.ones(64, 64)
    assert (model(x) == 0).any()
    assert torch.equal(model.eval()(x), x)
    assert (model.train()(x) == 0).any()


def test_frozen_batch_norm_inside_a_training_network() -> None:
    net = Net()
    optimized = fastcnn.optimize(net)
    for model in (net, optimized):
        model.train()
        model.bn.eval()
    torch.testing.assert_close(optimized(image()), net(image()))
    assert int(optimized.bn.num_batches_tracked) == 0
