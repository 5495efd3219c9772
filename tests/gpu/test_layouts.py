"""The public operators and modules on a GPU with the memory that users bring: NCHW, channels-last, views, no images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.gpu import Random
from support.gpu_operators import CHANNELS, OPERATORS, SHAPE, operands
from support.layout import LAYOUTS
from torch import nn

import fastcnn.nn as fnn
from fastcnn import ops


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_layout(backend, device, name: str, layout: str):
    """The values of the rule, and for operators of torch.nn.functional its strides too."""
    x, p = Random(name, device)(*SHAPE), operands(device, torch.float32)
    theirs = OPERATORS[name].theirs
    laid = LAYOUTS[layout](x)
    ours = OPERATORS[name].ours(laid, p)
    reference = theirs(x, p)
    assert_accurate(ours, reference, theirs(x.double(), {key: value.double() for key, value in p.items()}))
    if ours.dim() == 4 and layout in ("contiguous", "channels_last"):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert ours.is_contiguous(memory_format=memory_format)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "batch_statistics"])
def test_no_images(backend, device, name: str):
    p = operands(device, torch.float32)
    p["residual"] = p["residual"][:0]
    x = torch.empty(0, *SHAPE[1:], device=device)
    if name == "linear":  # PyTorch's own indexing of no rows is fine, and so is ours
        x = x.contiguous()
    ours = OPERATORS[name].ours(x, p)
    assert ours.shape[0] == 0
    assert ours.shape == OPERATORS[name].theirs(x, p).shape


MODULES = {
    "conv": (fnn.Conv2d, nn.Conv2d, (CHANNELS, 24, 3, 2, 1)),
    "batch_norm": (fnn.BatchNorm2d, nn.BatchNorm2d, (CHANNELS,)),
    "max_pool": (fnn.MaxPool2d, nn.MaxPool2d, (3, 2, 1)),
    "avg_pool": (fnn.AvgPool2d, nn.AvgPool2d, (3, 2)),
    "adaptive_avg_pool": (fnn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, (3,)),
    "lrn": (fnn.LocalResponseNorm, nn.LocalResponseNorm, (5,)),
}


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(backend, device, name: str, channels_last: bool):
    make, make_theirs, arguments = MODULES[name]
    ours, theirs = make(*arguments).to(device).eval(), make_theirs(*arguments).to(device).eval()
    theirs.load_state_dict(ours.state_dict())
    x = Random(name, device)(*SHAPE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    actual, expected = ours(x), theirs(x)
    assert_accurate(actual, expected, theirs.double()(x.double()))
    assert actual.stride() == expected.stride()


@torch.no_grad()
def test_writes_into_a_slice_of_contiguous_memory(backend, device):
    """An out that no kernel can write in place is filled through a temporary."""
    x, p = Random("slice", device)(*SHAPE), operands(device, torch.float32)
    wide = torch.full((SHAPE[0], 30, *SHAPE[2:]), float("nan"), device=device)
    ops.conv2d(x, p["weight"], padding=1, out=wide[:, 2:26])
    expected = F.conv2d(x, p["weight"], padding=1)
    assert_accurate(wide[:, 2:26], expected, F.conv2d(x.double(), p["weight"].double(), padding=1))
    assert wide[:, :2].isnan().all()
    assert wide[:, 26:].isnan().all()
