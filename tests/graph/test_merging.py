"""1x1 convolutions of one input as one call, and those where that would be seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.dropin import small_image, tensors
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
from fastcnn.backends import Call, intercept
from fastcnn.graph import dynamo

C = 6


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, width: int, kernel: int = 1, *, source: int = C, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, width, kernel, **settings)
        self.bn, self.relu = nn.BatchNorm2d(width, eps=0.01), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = Unit(5), Unit(8, bias=False), Unit(19)
        self.after_a, self.after_b = Unit(4, 3, source=5, padding=1), Unit(7, 3, source=8, padding=1)
        self.after_c = Unit(3, source=19)
        self.wide, self.strided = Unit(5, 3, padding=1), Unit(5, stride=2)
        self.plain, self.unbiased = nn.Conv2d(C, 5, 1), nn.Conv2d(C, 8, 1, bias=False)
        self.grouped = nn.Conv2d(C, 8, 1, groups=2)
        self.body = body
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def image(batch: int = 2, channels_last: bool = True) -> Tensor:
    return small_image(batch, C, channels_last)


def inception(m: Net, x: Tensor) -> Tensor:
    return torch.cat([m.c(x), m.after_a(m.a(x)), m.after_b(m.b(x))], 1)


def changed_between(m: Net, x: Tensor) -> Tensor:
    x = F.gelu(x)
    first = m.a(x)
    x.mul_(2)
    return torch.cat([m.after_a(first), m.after_b(m.b(x))], 1)


def functional(m: Net, x: Tensor) -> Tensor:
    a = F.relu(F.conv2d(x, m.plain.weight, m.plain.bias))
    b = F.relu(F.conv2d(x, m.unbiased.weight))
    return torch.cat([m.after_a(a), m.after_b(b)], 1)


def functional_norm(m: Net, x: Tensor) -> Tensor:
    def unit(u: Unit) -> Tensor:
        bn = u.bn
        return F.relu(F.batch_norm(u.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))

    return torch.cat([m.after_a(unit(m.a)), m.after_b(unit(m.b))], 1)


# A forward, and how many convolutions it runs, merged.
MERGED: dict[str, tuple[Callable[[Net, Tensor], Any], int]] = {
    "two, and one that writes into a slice": (inception, 4),
    "three": (lambda m, x: (m.after_a(m.a(x)), m.after_b(m.b(x)), m.after_c(m.c(x))), 4),
    "without norms, one without bias": (
        lambda m, x: (m.after_a(F.relu(m.plain(x))), m.after_b(F.relu(m.unbiased(x)))), 3,
    ),
    "without activations": (lambda m, x: (m.after_a(m.plain(x)), m.after_b(m.unbiased(x))), 3),
    "a part that is read twice": (lambda m, x: (lambda y: (m.after_a(y), m.after_a(y), m.after_b(m.b(x))))(m.a(x)), 4),
    "one layer used twice": (lambda m, x: (m.after_a(m.plain(x)), F.max_pool2d(m.plain(x), 3, 1, 1)), 2),
    "a layer that reads another value too": (
        lambda m, x: (m.after_a(m.plain(x)), m.after_b(m.unbiased(x)), m.unbiased(x * 2)), 4,
    ),
    "pooled": (lambda m, x: (F.max_pool2d(m.a(x), 3, 1, 1), F.avg_pool2d(m.b(x), 2)), 1),
    "of a part": (lambda m, x: (m.after_a(m.a(x)), m.after_b(m.b(x)), m.after_c(m.c(F.gelu(x)))), 5),
    "functions": (functional, 3),
    "norms by function": (functional_norm, 3),
    "before a later change of the input": (
        lambda m, x: (lambda z: (m.after_a(m.a(z)), m.after_b(m.b(z)), z.mul_(2)))(F.gelu(x)), 3,
    ),
}  # fmt: skip
APART: dict[str, tuple[Callable[[Net, Tensor], Any], int]] = {
    "other inputs": (lambda m, x: (m.after_a(m.a(x)), m.after_b(m.b(x * 2))), 4),
    "another filter": (lambda m, x: (m.after_a(m.a(x)), m.after_a(m.wide(x))), 4),
    "another stride": (lambda m, x: (m.after_a(m.a(x)), m.after_a(m.strided(x))), 4),
    "groups": (lambda m, x: (m.after_a(m.plain(x)), m.after_b(m.grouped(x))), 4),
    "another chain": (lambda m, x: (m.after_a(m.a(x)), m.after_b(m.unbiased(x))), 4),
    "returned": (lambda m, x: (m.a(x), m.after_b(m.b(x))), 3),
    "read by something else": (lambda m, x: (m.after_a(m.a(x)), m.b(x).sigmoid()), 3),
    "changed in place": (lambda m, x: (m.after_a(m.plain(x)), m.unbiased(x).mul_(2)), 3),
    "a residual": (lambda m, x: (m.after_b(m.b(x)), m.wide.conv(x) + m.a(x)), 4),
    "the input is changed between them": (changed_between, 4),
}


class Counted:
    def __init__(self) -> None:
        self.convolutions = 0

    def __call__(self, call: Call) -> None:
        self.convolutions += call.operator == "conv2d"
        call.run()


def convolutions(model: nn.Module, x: Tensor) -> int:
    counted = Counted()
    with intercept(counted):
        model(x.clone())
    return counted.convolutions


@torch.no_grad()
def check(net: Net, x: Tensor) -> nn.Module:
    """Optimize, and compare both modes with the original."""
    optimized = fastcnn.optimize(net)
    for training in (False, True, False):
        found = []
        for model in (optimized, net, copy.deepcopy(net).double()):
            found.append([*tensors(model.train(training)(x.to(model.plain.weight.dtype, copy=True))), *model.buffers()])
        for ours, theirs, exact in zip(*found, strict=True):
            if ours.is_floating_point():
                assert_accurate(ours, theirs, exact)
                assert ours.stride() == theirs.stride()
            else:
                assert torch.equal(ours, theirs)
    return optimized


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("name", [*MERGED, *APART])
@torch.no_grad()
def test_merged_or_not(name: str, channels_last: bool) -> None:
    body, count = (MERGED | APART)[name]
    x = image(channels_last=channels_last)
    if name == "before a later change of the input" and not channels_last:
        count += 1  # a value that is written to is not converted at the border
    assert convolutions(check(Net(body).eval(), x), x) == count


@pytest.mark.parametrize("name", ["two, and one that writes into a slice", "functions", "one layer used twice"])
@torch.no_grad()
def test_by_the_compile_backend(name: str) -> None:
    torch._dynamo.reset()
    dynamo.register()
    body, count = MERGED[name]
    net = Net(body).eval()
    compiled = torch.compile(net, backend="fastcnn", dynamic=True)
    for batch in (2, 3):
        x = image(batch)
        for ours, theirs, exact in zip(
            *(tensors(f(x.to(f.plain.weight.dtype))) for f in (compiled, net, copy.deepcopy(net).double())), strict=True
        ):
            assert_accurate(ours, theirs, exact)
    assert convolutions(compiled, image()) == count
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = Net(inception).eval().to(dtype)
    x = image().to(dtype)
    model = fastcnn.optimize(net)
    assert_accurate(model(x), net(x), copy.deepcopy(net).double()(x.double()))


@pytest.mark.parametrize("batch", [0, 1, 5])
@torch.no_grad()
def test_batches(batch: int) -> None:
    net, x = Net(inception).eval(), image(batch)
    assert_accurate(fastcnn.optimize(net)(x), net(x), copy.deepcopy(net).double()(x.double()))


@torch.no_grad()
def test_hooks_run_and_may_change_the_result() -> None:
    model = fastcnn.optimize(Net(inception).eval())
    x = image()
    assert convolutions(model, x) == 4
    for module, hooked in ((model.a.conv, 4), (model.b.relu, 5)):  # PyTorch runs a convolution that has hooks
        before = model(x)
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, given, y, seen=seen: seen.append(y) or y * 0)
        assert convolutions(model, x) == hooked
        assert len(seen) == 1
        assert not torch.equal(model(x), before)
        handle.remove()
        assert convolutions(model, x) == 4
        assert torch.equal(model(x), before)


def test_gradients_and_autocast_go_apart() -> None:
    net = Net(inception).eval()
    model = fastcnn.optimize(net)
    assert convolutions(model, image()) == 5
    ours = torch.autograd.grad(model(image()).square().sum(), [model.a.conv.weight, model.b.bn.bias])
    theirs = torch.autograd.grad(net(image()).square().sum(), [net.a.conv.weight, net.b.bn.bias])
    double = copy.deepcopy(net).double()
    exact = torch.autograd.grad(double(image().double()).square().sum(), [double.a.conv.weight, double.b.bn.bias])
    for each in zip(ours, theirs, exact, strict=True):
        assert_accurate(*each)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert convolutions(model, image()) == 5


def test_train_mode_and_a_step_then_evaluation() -> None:
    net = Net(inception)
    model = fastcnn.optimize(net)
    keys, x = list(net.state_dict()), image(4)
    assert list(model.state_dict()) == keys
    results = []
    for each in (model, net, copy.deepcopy(net).double()):
        given = x.to(each.plain.weight.dtype)
        with torch.no_grad():
            each.eval()(given)  # what is kept from here must not be used after the step
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        each.train()(given).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            results.append(each.eval()(given))
    assert_accurate(*results)


@pytest.mark.parametrize("name", ["a.conv.weight", "b.conv.weight", "a.conv.bias", "b.bn.running_var", "a.bn.weight"])
@torch.no_grad()
def test_a_change_of_any_tensor_counts(name: str) -> None:
    net = Net(inception).eval()
    model, x = fastcnn.optimize(net), image()
    before = model(x)
    for each in (model, net):
        each.get_parameter(name).mul_(1.5) if "running" not in name else each.get_buffer(name).mul_(1.5)
    after = model(x)
    assert not torch.equal(after, before)
    assert_accurate(after, net(x), copy.deepcopy(net).double()(x.double()))
    model.load_state_dict(fastcnn.restore(copy.deepcopy(model)).state_dict())
    assert torch.equal(model(x), after)


def test_the_report_shows_merged_sites() -> None:
    model = fastcnn.optimize(Net(inception).eval())
    report = fastcnn.report(model, (2, C, 7, 5))
    sites = [site for site in report.sites if site.call == "pointwise"]
    layers = ("a.conv", "a.bn", "a.relu", "b.conv", "b.bn", "b.relu")
    assert [(site.modules, site.pattern) for site in sites] == [(layers, "2 x conv+bn+relu")]
    assert sites[0].operators == ("conv2d",)
    assert sites[0].macs == 2 * 35 * C * (5 + 8)
    assert sum(site.macs or 0 for site in report.sites) == report.macs
    assert not any("a.conv" in site.modules or "b.conv" in site.modules for site in report.sites if site not in sites)
    assert report.left == ()
    planned = [site.modules for site in fastcnn.report(model).sites]
    assert planned.count(layers) == 1
    assert len(planned) == 4
    handle = model.a.conv.register_forward_hook(lambda *_: None)
    apart = fastcnn.report(model, (2, C, 7, 5))
    assert not any(site.call == "pointwise" for site in apart.sites)
    assert any(site.modules == layers[3:] and site.operators for site in apart.sites)
    handle.remove()
