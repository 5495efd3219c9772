"""Concatenations whose parts are written where they belong, and those where that would be seen."""

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

C = 4


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 2 * C, 1)
        self.strided = nn.Conv2d(C, C, 3, 2)
        self.bn, self.relu = nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        self.grow = nn.ModuleList(nn.Conv2d(i * C, C, 3, padding=1) for i in (1, 2, 3))
        self.body = body
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def image(batch: int = 2, channels_last: bool = True) -> Tensor:
    return small_image(batch, C, channels_last)


class Written:
    """How many convolutions write into a slice of something wider."""

    def __init__(self) -> None:
        self.slices = 0

    def __call__(self, call: Call) -> None:
        out = call.args[0]
        assert isinstance(out, Tensor)
        self.slices += call.operator == "conv2d" and out.stride(3) > out.shape[1]
        call.run()


@torch.no_grad()
def slices_written(model: nn.Module, x: Tensor) -> int:
    watcher = Written()
    with intercept(watcher):
        model(x.clone())
    return watcher.slices


def check(net: Net, x: Tensor) -> nn.Module:
    """Optimize, and compare both modes with the original, what is written into the input included."""
    optimized = fastcnn.optimize(net)
    for training in (False, True, False):
        found = []
        for model in (optimized, net, copy.deepcopy(net).double()):
            given = x.to(model.a.weight.dtype, copy=True)
            with torch.no_grad():
                found.append([*tensors(model.train(training)(given)), given, model.bn.running_mean])
        for ours, theirs, exact in zip(*found, strict=True):
            assert_accurate(ours, theirs, exact)
            assert ours.stride() == theirs.stride() or ours.dim() != 4 or not ours.is_contiguous()
    return optimized


def dense(m: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in m.grow:
        features.append(layer(F.relu(torch.cat(features, 1))))
    return torch.cat(features, 1)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.a(x)))


SAFE: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "branches": (lambda m, x: torch.cat([chain(m, x), m.b(x)], 1), 2),
    "keywords": (lambda m, x: torch.concat(tensors=(chain(m, x), m.b(x)), dim=1), 2),
    "the input as a part": (lambda m, x: torch.cat([x, m.b(x)], 1), 1),
    "a pooling as a part": (lambda m, x: torch.cat([m.b(x), F.max_pool2d(x, 3, 1, 1)], 1), 1),
    "one inside the other": (lambda m, x: torch.cat([m.a(x), torch.cat([m.b(x), chain(m, x)], 1)], 1), 3),
    "one after the other": (lambda m, x: torch.cat([m.b(x), m.grow[2](torch.cat([m.a(x), m.b(x)], 1))], 1), 4),
    "dense": (dense, 3),
    "a part that is read again": (lambda m, x: (lambda y: torch.cat([y, m.b(y)], 1))(m.a(x)), 2),
    "the same part twice": (lambda m, x: (lambda y: torch.cat([y, m.b(x), y], 1))(m.a(x)), 1),
    "changed after its parts were read": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1).relu_(), 2),
    "in place into the input": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + x.mul_(2).repeat(1, 3, 1, 1), 2),
}


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "contiguous"])
def test_written_into_slices(name: str, channels_last: bool) -> None:
    body, count = SAFE[name]
    model = check(Net(body).eval(), image(channels_last=channels_last))
    if name == "in place into the input" and not channels_last:
        count = 0  # the input is not converted at the border, as it is written to
    assert slices_written(model, image(channels_last=channels_last)) == count


@pytest.mark.parametrize("batch", [0, 1, 5])
@torch.no_grad()
def test_batches(batch: int) -> None:
    net, x = Net(dense).eval(), image(batch)
    assert_accurate(fastcnn.optimize(net)(x), net(x), copy.deepcopy(net).double()(x.double()))


def part_changed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = torch.cat([y, m.b(x)], 1)
    y.mul_(2)
    return z + torch.cat([y, y, y], 1)


def changed_then_part_read(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = torch.cat([y, m.b(x)], 1).mul_(2)
    return z + torch.cat([y, y, y], 1)


def dense_changed(m: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in m.grow:
        features.append(layer(torch.cat(features, 1).relu_()))
    return torch.cat(features, 1)


def first_part_changed(m: Any, x: Tensor) -> Any:
    y = m.a(torch.cat([x, m.b(x)], 1)[:, :C])
    short = torch.cat([x, y], 1)
    x.mul_(3)
    return short, torch.cat([x, y, m.a(y)], 1)


UNSAFE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "part-changed": (part_changed, "changed in place"),
    "changed-then-part-read": (changed_then_part_read, "changed in place"),
    "dense-changed": (dense_changed, "changed in place"),
    "first-part-changed": (first_part_changed, "changed in place"),
    "part-returned": (lambda m, x: (lambda y: (torch.cat([y, m.b(x)], 1), y))(m.a(x)), "returned as well"),
    "two-returned": (
        lambda m, x: (lambda y: (torch.cat([x, y], 1), torch.cat([x, y, m.b(y)], 1)))(m.a(x)),
        "several that share",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_left_as_it_is(name: str) -> None:
    body, reason = UNSAFE[name]
    model = check(Net(body).eval(), image())
    assert reason in {entry.kind: entry.reason for entry in fastcnn.report(model).left}["cat"]


def test_writing_into_what_is_returned_changes_nothing_else() -> None:
    model = fastcnn.optimize(Net(lambda m, x: torch.cat([x, m.b(x)], 1)).eval())
    x = image()
    with torch.no_grad():
        first = model(x)
        kept = first.clone()
        model(x * 2).zero_()
    assert torch.equal(first, kept)


def test_sizes_that_do_not_fit_raise_as_before() -> None:
    net = Net(lambda m, x: torch.cat([m.a(x), m.strided(x)], 1)).eval()
    model = fastcnn.optimize(net)
    for candidate in (net, model):
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"), torch.no_grad():
            candidate(image())


def test_parts_of_several_dtypes() -> None:
    net = Net(lambda m, x: torch.cat([m.a(x), m.b(x), x.bfloat16()], 1)).eval()
    with torch.no_grad():
        assert_accurate(fastcnn.optimize(net)(image()), net(image()), copy.deepcopy(net).double()(image().double()))


def test_a_hook_that_changes_the_shape() -> None:
    net = Net(lambda m, x: torch.cat([m.a(x), m.b(x)], 1)).eval()
    model = fastcnn.optimize(net)
    for each in (net, model):
        each.a.register_forward_hook(lambda module, args, output: output.mean(1, keepdim=True))
    with torch.no_grad():
        assert_accurate(model(image()), net(image()), copy.deepcopy(net).double()(image().double()))


def test_not_where_gradients_are_recorded_nor_under_autocast() -> None:
    net = Net(SAFE["branches"][0]).eval()
    model = fastcnn.optimize(net)
    watcher = Written()
    with intercept(watcher):
        ours = torch.autograd.grad(model(image()).square().sum(), model.a.weight)[0]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(image())
    assert watcher.slices == 0
    theirs = torch.autograd.grad(net(image()).square().sum(), net.a.weight)[0]
    double = copy.deepcopy(net).double()
    exact = torch.autograd.grad(double(image().double()).square().sum(), double.a.weight)[0]
    assert_accurate(ours, theirs, exact)


@pytest.mark.parametrize("name", ["branches", "dense", "one inside the other"])
@torch.no_grad()
def test_by_the_compile_backend(name: str) -> None:
    torch._dynamo.reset()
    dynamo.register()
    body, count = SAFE[name]
    net = Net(body).eval()
    compiled = torch.compile(net, backend="fastcnn", dynamic=True)
    for batch in (2, 3):
        x = image(batch)
        assert_accurate(compiled(x), net(x), copy.deepcopy(net).double()(x.double()))
    assert slices_written(compiled, image()) == count
    torch._dynamo.reset()


def test_the_report_says_so() -> None:
    model = fastcnn.optimize(Net(SAFE["branches"][0]).eval())
    report = fastcnn.report(model, (2, C, 7, 5))
    assert [site.pattern for site in report.sites] == ["conv+bn+relu+into slice", "conv+into slice"]
    assert report.left == ()
