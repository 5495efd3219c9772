"""Calls that go straight to their kernel because the same modules were called before: used when they may be, and only
then; whatever changed, the result is that of modules called for the first time."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from fastcnn import backends
from fastcnn.backends import derived, intercept
from fastcnn.nn import _sites, fusing
from fastcnn.ops import _registration

SHAPE = (2, 8, 6, 6)


class Net(nn.Module):
    """Each kind of fused convolution, the last with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.input_bn, self.next_bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 8, 3, padding="same")
        for bn in (self.bn, self.input_bn, self.next_bn):
            nn.init.uniform_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2)
            nn.init.uniform_(bn.weight, 0.5, 2)
            nn.init.uniform_(bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = fusing.conv_bn(x, self.first, self.bn)
        y = fusing.conv_act(y, self.second)
        return fusing.bn_act_conv(y, self.input_bn, self.third, next_bn=self.next_bn, residual=x, activation="relu")

    def by_torch(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.bn(self.first(x)))).relu()
        return F.relu(self.next_bn(self.third(F.relu(self.input_bn(y)))) + x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each fused call since the list was cleared, whether it went straight to its kernel."""
    seen: list[bool] = []

    def repeat(*args: object) -> Tensor | None:
        found = _sites.repeat(*args)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(fusing, "repeat", repeat)
    return seen


def picture(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE).contiguous(memory_format=torch.channels_last)


def agrees(net: Net, x: Tensor) -> None:
    torch.testing.assert_close(net(x), copy.deepcopy(net).by_torch(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_second_call_goes_straight_to_its_kernel(net: Net, repeated: list[bool]) -> None:
    for x in (picture(), picture(), picture(1, 8, 5, 7), picture(), picture(1, 8, 5, 7)):
        y = net(x)
        torch.testing.assert_close(y, net.by_torch(x), rtol=1e-4, atol=1e-4)
        assert y.stride() == net.by_torch(x).stride()
    assert repeated == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 6


@pytest.mark.parametrize("memory", [_sites, _registration], ids=["site", "operator"])
@torch.no_grad()
def test_a_full_memory_begins_anew(net: Net, repeated: list[bool], memory: object, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_MOST_FORMS", 2)
    for size in range(4, 10):
        x = picture(1, 8, size, size)
        agrees(net, x)
        repeated.clear()
        agrees(net, x)
        assert all(repeated)


def _written(net: Net) -> None:
    net.first.weight.mul_(2)


def _written_through_data(net: Net) -> None:
    net.first.weight.data.mul_(2)
    net.input_bn.running_mean.data.add_(1)


def _replaced(net: Net) -> None:
    net.second.weight = nn.Parameter(torch.randn_like(net.second.weight))


def _loaded(net: Net) -> None:
    net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()})


def _moved(net: Net) -> None:
    net.third.weight.data = torch.randn_like(net.third.weight)


def _set_eps(net: Net) -> None:
    net.next_bn.eps = 0.5


def _set_stride(net: Net) -> None:
    net.third.dilation = (2, 2)


def _set_padding_mode(net: Net) -> None:
    net.third.padding_mode, net.third._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


CHANGES = [
    _written, _written_through_data, _replaced, _loaded, _moved, _set_eps, _set_stride, _set_padding_mode
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_noticed(net: Net, change: Callable[[Net], None]) -> None:
    x = picture()
    for _ in range(2):
        net(x)
    change(net)
    for _ in range(3):
        agrees(net, x)


@torch.no_grad()
def test_hooks_and_modes_are_noticed(net: Net, repeated: list[bool]) -> None:
    x = picture()
    for _ in range(2):
        net(x)
    seen: list[Tensor] = []
    handle = net.bn.register_forward_hook(lambda module, args, result: seen.append(result))
    agrees(net, x)
    assert seen
    handle.remove()
    repeated.clear()
    net.train()
    net(x)
    assert repeated == [True]  # the convolution without a batch norm
    net.eval()
    agrees(net, x)


def test_gradients_are_recorded(net: Net) -> None:
    x = picture()
    with torch.no_grad():
        for _ in range(2):
            net(x)
    net(x).sum().backward()
    assert net.first.weight.grad is not None
    net.requires_grad_(False)
    assert not net(x).requires_grad
    assert net(x.clone().requires_grad_()).requires_grad


@torch.no_grad()
def test_calls_that_somebody_watches_take_the_long_way(net: Net, repeated: list[bool]) -> None:
    x = picture()
    for _ in range(2):
        net(x)
    expected = net(x)
    repeated.clear()
    calls: list[backends.Call] = []
    with intercept(lambda call: (calls.append(call), call.run())[1]):
        net(x)
    assert len(calls) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert fusing.conv_act(x, net.second).dtype == torch.bfloat16
    with derived.keeping() as kept:
        net(x)
    assert kept.values
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(x)
    assert any("fastcnn::conv2d" in event.key for event in profile.key_averages())
    with backends.use_backend("reference"):
        net(x)
    assert not any(repeated)
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_settings_are_noticed(net: Net, repeated: list[bool]) -> None:
    x = picture(4, 8, 24, 24)
    for _ in range(2):
        net(x)
    repeated.clear()
    with fastcnn.exact():
        for _ in range(2):
            agrees(net, x)
    assert repeated == [False] * 3 + [True] * 3
    repeated.clear()
    net(x)
    assert not any(repeated)


@torch.no_grad()
def test_outputs(net: Net, repeated: list[bool]) -> None:
    x, wide = picture(), picture(2, 20, 6, 6)
    before = wide.clone()
    expected = fusing.conv_bn(x, net.first, net.bn)
    for _ in range(3):
        wide.copy_(before)
        version = wide._version
        out = wide[:, 4:12]
        assert fusing.conv_bn(x, net.first, net.bn, out=out) is out
        assert torch.equal(out, expected)
        assert torch.equal(wide[:, :4], before[:, :4])
        assert torch.equal(wide[:, 12:], before[:, 12:])
        assert wide._version > version
    assert repeated == [False, False, True, True]
    # Its own input as output: the convolution must not read what it has written.
    same = x.clone(memory_format=torch.preserve_format)
    for _ in range(2):
        same.copy_(x)
        fusing.conv_bn(same, net.first, net.bn, out=same)
        assert torch.equal(same, expected)
    with pytest.raises(ValueError, match="out must have shape"):
        fusing.conv_bn(x, net.first, net.bn, out=wide[:, :3])


@torch.no_grad()
def test_contiguous_pictures_give_contiguous_results(net: Net) -> None:
    x = torch.randn(SHAPE)
    for _ in range(3):
        assert net(x).is_contiguous()
        agrees(net, x)


@torch.no_grad()
def test_inference_tensors(net: Net, repeated: list[bool]) -> None:
    with torch.inference_mode():
        x = picture()
        results = [net(x) for _ in range(3)]
    assert repeated == [False] * 3 + [True] * 6
    assert torch.equal(results[0], results[2])
    assert results[2].is_inference()
    assert not net(picture()).is_inference()


@torch.no_grad()
def test_sites_go_with_their_modules(net: Net) -> None:
    gc.collect()
    before = len(_sites._sites)
    other = copy.deepcopy(net)
    other(picture())
    assert len(_sites._sites) == before + 3
    del other
    gc.collect()
    assert len(_sites._sites) == before
    net(picture())
    net.first.weight = nn.Parameter(torch.randn_like(net.first.weight))
    gc.collect()
    assert len(_sites._sites) == before + 2
