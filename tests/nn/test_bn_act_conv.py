"""bn_act_conv: the results of its modules called one by one, in one convolution where possible; and branch_scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

from fastcnn.backends import Call, intercept
from fastcnn.nn import bn_act_conv, conv_bn

SHAPE = (2, 8, 7, 6)


class Unit(nn.Module):
    """BN-ReLU-convolution(-BN-ReLU), fused or one by one."""

    def __init__(self, fused: bool = True, next_bn: bool = True, **conv: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, **{"padding": 1, "bias": False, **conv})
        self.next_bn = nn.BatchNorm2d(8) if next_bn else None
        self.last = nn.ReLU(inplace=True) if next_bn else None
        self.fused = fused

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.fused:
            return bn_act_conv(
                x, self.bn, self.conv, preactivation=self.relu, next_bn=self.next_bn, residual=residual,
                activation=self.last or "none", out=out,
            )  # fmt: skip
        y = self.conv(self.relu(self.bn(x)))
        y = y if self.next_bn is None else self.next_bn(y)
        y = y if residual is None else y + residual
        return y if self.last is None else self.last(y)


def make(**options: Any) -> Unit:
    torch.manual_seed(0)
    return randomise_batch_norms(Unit(**options)).eval()


def unfused(unit: Unit) -> Unit:
    other = copy.deepcopy(unit)
    other.fused = False
    return other


VARIANTS = {
    "plain": {},
    "no-next": {"next_bn": False},
    "no-next-bias": {"next_bn": False, "bias": True},
    "bias-reflect": {"bias": True, "padding_mode": "reflect"},
    "strided-1x1": {"kernel_size": 1, "stride": 2, "padding": 0},
}


def build(variant: str) -> Unit:
    options = dict(VARIANTS[variant])
    size = options.pop("kernel_size", None)
    unit = make(**options)
    if size is not None:
        unit.conv = nn.Conv2d(8, 8, size, stride=2, bias=False)
    return unit


def operators(function: Any) -> list[str]:
    seen: list[str] = []

    def note(call: Call) -> None:
        seen.append(call.operator)
        call.run()

    with torch.no_grad(), intercept(note):
        function()
    return seen


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("mode", ["eval", "train", "bn-eval", "next-eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_statistics(variant: str, mode: str, with_residual: bool) -> None:
    ours = build(variant).train(mode != "eval")
    if mode == "bn-eval":
        ours.bn.eval()
    if mode == "next-eval" and ours.next_bn is not None:
        ours.next_bn.eval()
    models = [ours, unfused(ours), unfused(ours).double()]
    x = torch.randn(SHAPE)
    with torch.no_grad():
        r = torch.randn(unfused(ours)(x).shape)
    models[1:] = [unfused(ours), unfused(ours).double()]  # without the statistics of that call
    grad, results = torch.randn(r.shape), []
    for model in models:
        dtype = model.conv.weight.dtype
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in ((x, r) if with_residual else (x,))]
        y = model(*inputs)
        y.backward(grad.to(dtype))
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        results.append([y, *(i.grad for i in inputs), *(p.grad for p in model.parameters()), *buffers])
    for mine, theirs, exact in zip(*results, strict=True):
        if exact.norm() > 1e-10:  # a bias before batch statistics changes nothing: its gradient is rounding alone
            assert_accurate(mine, theirs, exact)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_is_one_convolution(variant: str) -> None:
    unit, x = build(variant), torch.randn(SHAPE)
    assert operators(lambda: unit(x)) == ["conv2d"]
    wide = torch.randn(2, 20, 7, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(unit(wide[:, 4:12]), unfused(unit)(wide[:, 4:12])) <= 1e-6


@torch.no_grad()
def test_reads_one_slice_of_a_buffer_and_writes_another() -> None:
    unit = make()
    wide = torch.randn(2, 20, 7, 6).contiguous(memory_format=torch.channels_last)
    expected, before = unfused(unit)(wide[:, :8]), wide.clone()
    for hooked in (False, True):
        if hooked:
            unit.next_bn.register_forward_hook(lambda *_: None)
        wide.copy_(before)
        out = wide[:, 8:16]
        assert unit(wide[:, :8], out=out) is out
        assert relative_error(out, expected) <= 1e-6
        assert torch.equal(wide[:, :8], before[:, :8])
        assert torch.equal(wide[:, 16:], before[:, 16:])


@pytest.mark.parametrize("name", ["bn", "relu", "conv", "next_bn", "last"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run(name: str, kind: str) -> None:
    unit, x, calls = make(), torch.randn(SHAPE, requires_grad=True), []
    unit.relu.inplace = unit.last.inplace = False
    getattr(getattr(unit, name), f"register_{kind}_hook")(lambda module, *_: calls.append(name))
    y = unit(x, x)
    y.sum().backward()
    assert calls == [name]
    assert relative_error(y, unfused(unit)(x, x)) <= 1e-6


def test_other_activations_types_and_parametrizations() -> None:
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for name in ("relu", "last"):
            unit = make()
            setattr(unit, name, nn.Tanh())
            assert relative_error(unit(x, x), unfused(unit)(x, x)) <= 1e-6
        unit = make()
        nn.utils.parametrizations.weight_norm(unit.conv)
        assert relative_error(unit(x), unfused(unit)(x)) <= 1e-6
        unit = make()
        unit.bn.forward = lambda input: input + 1  # type: ignore[method-assign]
        expected = F.relu(unit.next_bn(unit.conv(F.relu(x + 1))))
        assert relative_error(unit(x), expected) <= 1e-6
    for argument in ("preactivation", "activation"):
        with pytest.raises(ValueError, match="activation must be"):
            bn_act_conv(x, unit.next_bn, unit.conv, **{argument: "gelu"})


@pytest.mark.parametrize("name", ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "next_bn.weight"])
@torch.no_grad()
def test_every_change_is_noticed(name: str) -> None:
    unit, x = make(), torch.randn(SHAPE)
    before = unit(x)
    {**dict(unit.named_parameters()), **dict(unit.named_buffers())}[name].mul_(1.5)
    after = unit(x)
    assert not torch.allclose(before, after)
    assert relative_error(after, unfused(unit)(x)) <= 1e-6
    unit.bn.eps = 0.7
    assert relative_error(unit(x), unfused(unit)(x)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours = make(bias=True).to(dtype)
    x = torch.randn(SHAPE, dtype=dtype)
    assert_accurate(ours(x, x), unfused(ours)(x, x), unfused(ours).double()(x.double(), x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("next_bn", [False, True])
@torch.no_grad()
def test_autocast(next_bn: bool, dtype: torch.dtype) -> None:
    ours, x = make(next_bn=next_bn), torch.randn(SHAPE).to(dtype)
    residual = torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x, residual), unfused(ours)(x, residual)
    assert y.dtype == expected.dtype
    assert_accurate(y, expected, unfused(ours).double()(x.double(), residual.double()))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    unit, x = make().train(mode == "train"), torch.randn(SHAPE)
    eager = copy.deepcopy(unit)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), eager(x)) <= 1e-6


# ---- branch_scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ["relu", nn.Tanh()], ids=str)
def test_branch_scale(activation: str | nn.Module, training: bool, hooked: bool) -> None:
    conv, bn = nn.Conv2d(8, 8, 3, padding=1), randomise_batch_norms(nn.BatchNorm2d(8))
    bn.train(training)
    other = copy.deepcopy(bn)
    if hooked:
        bn.register_forward_hook(lambda *_: None)
    x, r = torch.randn(SHAPE), torch.randn(SHAPE)
    act = F.relu if activation == "relu" else torch.tanh
    y = conv_bn(x, conv, bn, residual=r, branch_scale=0.3, activation=activation)
    expected = act(0.3 * other(conv(x)) + r)
    assert relative_error(y, expected) <= 1e-6
    assert relative_error(conv_bn(x, conv, bn, activation="none"), other(conv(x))) <= 1e-6  # the cache tells them apart
    y.sum().backward()
    mine = [p.grad.clone() for p in (*conv.parameters(), *bn.parameters())]
    conv.zero_grad()
    expected.sum().backward()
    for ours, theirs in zip(mine, (p.grad for p in (*conv.parameters(), *other.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_branch_scale_is_one_convolution() -> None:
    conv, bn = nn.Conv2d(8, 8, 3, padding=1), randomise_batch_norms(nn.BatchNorm2d(8)).eval()
    x = torch.randn(SHAPE)
    assert operators(lambda: conv_bn(x, conv, bn, residual=x, branch_scale=0.3)) == ["conv2d"]
