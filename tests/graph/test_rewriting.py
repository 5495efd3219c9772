"""Which chains become which calls, in modules' and functions' styles, and that results never change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn

C = 8
Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Layers of every kind under names; ``body`` says what is computed with them."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Without biases: before a batch norm in train mode their gradients are zero but for rounding.
        self.conv, self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.Conv2d(C, C, 1, bias=False)
        self.biased = nn.Conv2d(C, C, 3, 2)
        self.bn, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.average, self.adaptive = nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(2)
        self.lrn = nn.LocalResponseNorm(5)
        self.linear = nn.Linear(C, C)
        self.identity = nn.Identity()
        self.body = body
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def make(body: Forward) -> Net:
    return Net(body).eval()


def image() -> Tensor:
    return torch.randn(2, C, 6, 5, generator=torch.Generator().manual_seed(3))


def tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def loss(outputs: list[Tensor]) -> Tensor:
    """A weighted sum: the gradient of a plain one through a batch norm would be zero but for rounding."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return sum(((o * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros(()))


def check(net: Net, x: Tensor | None = None, *, gradients: bool = True) -> fastcnn.Report:
    """Optimize, compare both modes with the original and float64, inputs' gradients and in-place writes included."""
    x = image() if x is None else x
    optimized = fastcnn.optimize(net)
    for training in (False, True, False):
        results = []
        for model in (optimized, net, copy.deepcopy(net).double()):
            model.train(training)
            dtype = model.conv.weight.dtype
            leaf = x.to(dtype, copy=True).requires_grad_(gradients)
            given = leaf * 1  # what forward may write to
            torch.manual_seed(1)
            with torch.set_grad_enabled(gradients):
                output = tensors(model(given))
            found = [*output, given, *(b for b in model.buffers() if b.dim())]
            if gradients:
                loss(output).backward()
                found += [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
            results.append(found)
            model.zero_grad()
        assert len({len(r) for r in results}) == 1
        for ours, theirs, exact in zip(*results, strict=True):
            assert_accurate(ours.detach(), theirs.detach(), exact.detach())
    return fastcnn.report(optimized, x.shape)


def identity_added(m: Any, x: Tensor) -> Tensor:
    identity = x
    out = m.bn(m.conv(x))
    out += identity
    return m.relu(out)


def added_into_new(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y += m.bn(m.conv(x))
    return m.relu(y)


def rank_checked(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch._assert(y.ndim == 4, "expected 4 dimensions")
    return F.relu(m.bn(y))


def rank_checked_after_a_sum(m: Any, x: Tensor) -> Tensor:
    y = m.conv2(F.relu(m.bn(m.conv(x)) + x))
    torch._assert(y.ndim == 4, "expected 4 dimensions")
    return m.bn2(y)


CHAINS: dict[str, tuple[Forward, list[str]]] = {
    "modules": (lambda m, x: m.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "functional": (lambda m, x: F.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "functional-inplace": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), ["conv+bn+relu"]),
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), ["conv+bn+relu"]),
    "method": (lambda m, x: m.bn(m.conv(x)).relu(), ["conv+bn+relu"]),
    "method_": (lambda m, x: m.bn(m.conv(x)).relu_(), ["conv+bn+relu"]),
    "iadd": (identity_added, ["conv+bn+add+relu"]),
    "torch.add": (lambda m, x: torch.relu(torch.add(x, m.bn(m.conv(x)))), ["conv+bn+add+relu"]),
    "add-method": (lambda m, x: m.bn(m.conv(x)).add(x), ["conv+bn+add"]),
    "conv-add-relu": (lambda m, x: F.relu(m.conv(x) + x), ["conv+add+relu"]),
    "conv-relu": (lambda m, x: F.relu(m.biased(x)), ["conv+relu"]),
    "conv": (lambda m, x: m.biased(x), ["conv"]),
    "bn": (lambda m, x: m.bn(x), ["bn"]),
    "bn-relu": (lambda m, x: m.relu(m.bn(x)), ["bn+relu"]),
    "bn-add-relu": (lambda m, x: F.relu(m.bn(x) + x), ["bn+add+relu"]),
    "preactivation": (lambda m, x: m.conv(F.relu(m.bn(x))), ["bn+relu+conv"]),
    "preactivation-next": (lambda m, x: F.relu(m.bn2(m.conv(F.relu(m.bn(x))))), ["bn+relu+conv+bn+relu"]),
    "preactivation-add": (lambda m, x: m.conv(F.relu(m.bn(x))) + x, ["bn+relu+conv+add"]),
    "linear-relu": (lambda m, x: torch.relu(m.linear(torch.flatten(m.adaptive(x)[:, :, :1, :1], 1))),
                    ["adaptive_pool", "linear+relu"]),
    "pools": (lambda m, x: m.lrn(m.average(m.pool(x))).flatten(1), ["max_pool", "avg_pool", "lrn"]),
    "functional-pools": (lambda m, x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2), 2), 1),
                         ["max_pool", "avg_pool", "adaptive_pool"]),
    "functional-layers": (lambda m, x: F.relu(F.conv2d(x, m.biased.weight, m.biased.bias, padding=1)), ["conv+relu"]),
    "add-relu": (lambda m, x: F.relu(x + x * 2), ["add+relu"]),
    "cat": (lambda m, x: torch.cat([F.relu(m.conv(x)), m.bn(m.conv2(x))], 1),
            ["conv+relu+into slice", "conv+bn+into slice"]),
    "functional-preactivation": (
        lambda m, x: F.conv2d(F.relu(F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias,
                                                  m.bn.training)), m.conv.weight, padding=1) + x, ["bn+relu+conv+add"]),
    "functional-norm": (
        lambda m, x: F.relu(F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias,
                                         m.bn.training)), ["conv+bn+relu"]),
    "iadd-into-new": (added_into_new, ["conv+bn+add+relu"]),
    "identity-between": (lambda m, x: m.relu(m.identity(m.bn(m.identity(m.conv(x))))), ["conv+bn+relu"]),
    "rank-checked": (rank_checked, ["conv+bn+relu"]),
    "rank-checked-after-a-sum": (rank_checked_after_a_sum, ["conv+bn+add+relu", "conv+bn"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name: str) -> None:
    body, wanted = CHAINS[name]
    report = check(make(body))
    assert [site.pattern for site in report.sites] == wanted
    assert all(site.on_kernels for site in report.sites)


def also_read(m: Any, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    return m.conv2(y), torch.relu(y)


def read_before_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    x.mul_(2)
    return m.bn(y) + x


def written_between(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    x.add_(1)
    return y + x


def residual_written(m: Any, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    x += y
    return torch.relu(x)


def relu_in_place_with_two_readers(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = y * 3
    m.relu(y)
    return y + z


def view_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2].mul_(3)
    return m.bn(y)


def reused(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(F.relu(m.bn(m.conv(x))))))


TRAPS: dict[str, Forward] = {
    "also-read": also_read,
    "read-before-written": read_before_written,
    "written-between": written_between,
    "residual-written": residual_written,
    "relu-in-place-two-readers": relu_in_place_with_two_readers,
    "view-written": view_written,
    "reused": reused,
    "added-to-itself": lambda m, x: (lambda y: F.relu(y + y))(m.bn(m.conv(x))),
    "broadcast-residual": lambda m, x: F.relu(m.bn(m.conv(x)) + m.adaptive(x)[:, :, :1, :1]),
    "broadcast-result": lambda m, x: F.relu(m.bn(m.conv(m.adaptive(x)[:, :, :1, :1])) + x),
    "scalar-add": lambda m, x: F.relu(m.bn(m.conv(x)) + 1.0),
    "alpha": lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2),
    "double-residual": lambda m, x: F.relu(m.conv(x) + m.conv2(x)),
    "dropout": lambda m, x: F.dropout(F.relu(m.conv(x)), 0.5, m.training),
    "return-indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "dict": lambda m, x: {"a": m.conv(x), "b": [m.bn(x), None, 3]},
}


@pytest.mark.parametrize("name", TRAPS)
def test_result_is_unchanged(name: str) -> None:
    # Where forward writes to what a convolution saved, PyTorch has no gradient either.
    check(make(TRAPS[name]), gradients=name not in ("read-before-written", "written-between", "residual-written"))


def test_reused_batch_norm_is_reported() -> None:
    report = check(make(reused))
    assert "its batch norm is used more than once" in " ".join(entry.reason for entry in report.left)
    assert "conv+bn+relu" not in [site.pattern for site in report.sites]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


class Flexible(nn.Module):
    """Arguments and results of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.scale = 1

    def forward(self, x: Tensor, *more: Tensor, other: Tensor | None = None, twice: bool = False) -> Pair:
        y = F.relu(self.conv(x)) * self.scale
        for tensor in more:
            y = y + tensor
        if twice:
            y = y * 2
        return Pair(y, other if other is None else self.conv(other))


def test_arguments_and_results_of_every_kind() -> None:
    model = Flexible().eval()
    optimized = fastcnn.optimize(model)
    x = image()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((x, x), {}), ((x, x, x), {"twice": True}), ((x,), {"other": x}), ((), {"x": x, "twice": True}),
    ]  # fmt: skip
    with torch.no_grad():
        for args, kwargs in calls:
            ours, theirs = optimized(*args, **kwargs), model(*args, **kwargs)
            assert type(ours) is Pair
            assert (ours.right is None) == (theirs.right is None)
            torch.testing.assert_close(ours.left, theirs.left)


def test_attributes_that_forward_reads_may_change() -> None:
    optimized = fastcnn.optimize(Flexible().eval())
    x = image()
    with torch.no_grad():
        once = optimized(x).left
        optimized.scale = 3
        torch.testing.assert_close(optimized(x).left, once * 3)


def test_children_may_be_replaced() -> None:
    net = make(lambda m, x: F.relu(m.bn(m.conv(x))))
    optimized = fastcnn.optimize(net)
    x = image()
    for model in (net, optimized):
        torch.manual_seed(5)
        model.conv = nn.Conv2d(C, C, 1).eval()
        model.bn = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), net(x))


def _conv_chain(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)))


@pytest.mark.parametrize(
    "remake", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()],
    ids=["deepcopy", "pickle", "to"],
)  # fmt: skip
def test_copies(remake: Callable[[nn.Module], nn.Module]) -> None:
    optimized = fastcnn.optimize(make(_conv_chain))
    copied = remake(optimized)
    x = image()
    with torch.no_grad():
        assert torch.equal(copied(x), optimized(x))
        copied.conv.weight.zero_()
        assert [s.pattern for s in fastcnn.report(copied, x.shape).sites] == ["conv+bn+relu"]
        assert copied(x).std() < 10
        assert not torch.equal(copied(x), copied.bn(copied.conv2(x)))
    assert list(copied.state_dict()) == list(optimized.state_dict())


def test_restore() -> None:
    net = make(_conv_chain)
    optimized = fastcnn.optimize(net)
    with torch.no_grad():
        optimized.conv.weight.mul_(2)
    restored = fastcnn.restore(optimized)
    assert restored is optimized
    assert type(restored) is Net
    assert "_fastcnn" not in restored.__dict__
    net.conv.weight.data.mul_(2)
    assert torch.equal(restored(image()), net(image()))


def test_optimizing_twice_is_optimizing_once() -> None:
    optimized = fastcnn.optimize(fastcnn.optimize(make(_conv_chain)))
    assert [s.pattern for s in fastcnn.report(optimized, image().shape).sites] == ["conv+bn+relu"]
    assert type(fastcnn.restore(optimized)) is Net


def test_autocast_and_bfloat16() -> None:
    net = make(identity_added)
    optimized = fastcnn.optimize(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = optimized(image()), net(image())
    exact = copy.deepcopy(net).double()(image().double())
    assert_accurate(ours, theirs, exact)
