"""Residual blocks and shortcuts against their torch.nn twins, and the paper's options."""

from __future__ import annotations

import copy

import pytest
import torch
from support.accuracy import assert_accurate
from support.plain_twin import plain_twin, randomise_batch_norms
from torch import nn

import fastcnn.nn as fnn
from fastcnn.nn import BasicBlock, Bottleneck, PlainBlock, Projection, ZeroPadShortcut, make_shortcut


def make_block(kind: type[nn.Module], option: str | None, stride: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    out_channels = 8 * kind.expansion
    shortcut = make_shortcut(option, 8, out_channels, stride)
    return randomise_batch_norms(kind(8, 8, stride, shortcut, **options))


BLOCKS = {
    "plain": (PlainBlock, None, 2, {}),
    "basic-identity": (BasicBlock, "B", 1, {}),
    "basic-A": (BasicBlock, "A", 2, {}),
    "basic-B": (BasicBlock, "B", 2, {}),
    "basic-C": (BasicBlock, "C", 1, {}),
    "bottleneck-A": (Bottleneck, "A", 2, {}),
    "bottleneck-B": (Bottleneck, "B", 2, {}),
    "bottleneck-v1": (Bottleneck, "B", 2, {"stride_in_1x1": True}),
    "bottleneck-wide": (Bottleneck, "B", 1, {"base_width": 128}),
    "bottleneck-resnext": (Bottleneck, "B", 2, {"groups": 4, "base_width": 32}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", BLOCKS)
def test_equals_twin(case: str, training: bool) -> None:
    kind, option, stride, options = BLOCKS[case]
    ours = make_block(kind, option, stride, **options).train(training)
    models = [ours, plain_twin(ours), plain_twin(ours).double()]
    x = torch.randn(2, 8, 7, 6)
    results = []
    grad = None
    for model in models:
        dtype = next(model.parameters()).dtype
        input = x.to(dtype, copy=True).requires_grad_()
        y = model(input)
        grad = torch.randn(y.shape) if grad is None else grad
        y.backward(grad.to(dtype))
        floating = [b for b in model.buffers() if b.is_floating_point()]
        results.append([y, input.grad, *(p.grad for p in model.parameters()), *floating])
    for values in zip(*results, strict=True):
        assert_accurate(*values)


def test_shortcut_options() -> None:
    assert make_shortcut("A", 8, 8, 1) is None
    assert make_shortcut("B", 8, 8, 1) is None
    assert make_shortcut(None, 8, 16, 2) is None
    assert isinstance(make_shortcut("A", 8, 16, 2), ZeroPadShortcut)
    assert isinstance(make_shortcut("B", 8, 8, 2), Projection)
    assert isinstance(make_shortcut("C", 8, 8, 1), Projection)
    with pytest.raises(ValueError, match="shortcut must be"):
        make_shortcut("D", 8, 8, 1)
    with pytest.raises(ValueError, match="at least in_channels"):
        ZeroPadShortcut(16, 8)


def test_zero_pad_puts_the_input_in_the_middle() -> None:
    x = torch.randn(2, 16, 5, 4).contiguous(memory_format=torch.channels_last)
    y = ZeroPadShortcut(16, 32, 2)(x)
    assert y.shape == (2, 32, 3, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_stride_moves_to_the_first_1x1() -> None:
    v1 = make_block(Bottleneck, "B", 2, stride_in_1x1=True)
    v15 = make_block(Bottleneck, "B", 2)
    assert (v1.conv1.stride, v1.conv2.stride) == ((2, 2), (1, 1))
    assert (v15.conv1.stride, v15.conv2.stride) == ((1, 1), (2, 2))
    assert list(v1.state_dict()) == list(v15.state_dict())


def test_basic_blocks_refuse_groups_and_widths() -> None:
    with pytest.raises(ValueError, match="BasicBlock has groups=1"):
        BasicBlock(8, 8, groups=2)


def test_projection_is_a_sequential_that_may_be_edited_and_hooked() -> None:
    projection = randomise_batch_norms(Projection(8, 16, 2)).eval()
    x, calls = torch.randn(2, 8, 6, 6), []
    twin = plain_twin(projection)
    projection[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(projection(x), twin(x), rtol=1e-4, atol=1e-5)
        assert calls == [1]
        longer = copy.deepcopy(projection)
        longer.append(nn.ReLU())
        torch.testing.assert_close(longer(x), twin(x).relu(), rtol=1e-4, atol=1e-5)


def test_hooked_block_children_run_and_results_stay() -> None:
    block = make_block(Bottleneck, "B", 2).eval()
    x, seen = torch.randn(2, 8, 6, 6), []
    with torch.no_grad():
        expected = block(x)
        for name, module in block.named_modules():
            module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    convolutions = ["conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3", "relu"]
    assert seen == ["downsample.0", "downsample.1", "downsample", *convolutions, ""]


def test_torch_modules_are_fused_too() -> None:
    """Children replaced by plain torch.nn modules still run in one call each."""
    block = make_block(BasicBlock, "B", 1).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = block(x)
        for name, module in list(block.named_children()):
            if isinstance(module, (fnn.Conv2d, fnn.BatchNorm2d)):
                module.__class__ = type(module).__base__
                setattr(block, name, module)
        assert torch.equal(block(x), expected)
