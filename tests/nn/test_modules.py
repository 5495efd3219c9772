"""Each drop-in module computes what its torch.nn parent computes, forward and backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.accuracy import assert_accurate
from support.plain_twin import randomise_batch_norms
from torch import nn

import fastcnn
import fastcnn.nn as fnn

IMAGE = (2, 8, 11, 9)
CASES = {
    "conv": (fnn.Conv2d, nn.Conv2d, (8, 12, 3), {"padding": 1}, IMAGE),
    "conv-stride-dilation": (fnn.Conv2d, nn.Conv2d, (8, 12, 3), {"stride": 2, "dilation": 2, "padding": 2}, IMAGE),
    "conv-groups-no-bias": (fnn.Conv2d, nn.Conv2d, (8, 12, 3), {"groups": 4, "bias": False}, IMAGE),
    "conv-same": (fnn.Conv2d, nn.Conv2d, (8, 12, (4, 3)), {"padding": "same"}, IMAGE),
    "conv-reflect": (fnn.Conv2d, nn.Conv2d, (8, 12, 3), {"padding": 1, "padding_mode": "reflect"}, IMAGE),
    "conv-circular-same": (fnn.Conv2d, nn.Conv2d, (8, 4, 4), {"padding": "same", "padding_mode": "circular"}, IMAGE),
    "conv-unbatched": (fnn.Conv2d, nn.Conv2d, (8, 12, 3), {"padding": 1}, IMAGE[1:]),
    "linear": (fnn.Linear, nn.Linear, (9, 5), {}, (4, 9)),
    "linear-3d-no-bias": (fnn.Linear, nn.Linear, (9, 5), {"bias": False}, (2, 3, 9)),
    "bn": (fnn.BatchNorm2d, nn.BatchNorm2d, (8,), {}, IMAGE),
    "bn-eps-momentum": (fnn.BatchNorm2d, nn.BatchNorm2d, (8,), {"eps": 1e-3, "momentum": 0.3}, IMAGE),
    "bn-cumulative": (fnn.BatchNorm2d, nn.BatchNorm2d, (8,), {"momentum": None}, IMAGE),
    "bn-no-affine": (fnn.BatchNorm2d, nn.BatchNorm2d, (8,), {"affine": False}, IMAGE),
    "bn-no-running": (fnn.BatchNorm2d, nn.BatchNorm2d, (8,), {"track_running_stats": False}, IMAGE),
    "max": (fnn.MaxPool2d, nn.MaxPool2d, (3, 2), {"padding": 1}, IMAGE),
    "max-ceil-dilation": (fnn.MaxPool2d, nn.MaxPool2d, (2, 3), {"dilation": 2, "ceil_mode": True}, IMAGE),
    "avg": (fnn.AvgPool2d, nn.AvgPool2d, (3, 2), {"padding": 1, "ceil_mode": True}, IMAGE),
    "avg-options": (fnn.AvgPool2d, nn.AvgPool2d, (3,), {"padding": 1, "count_include_pad": False}, IMAGE),
    "avg-divisor": (fnn.AvgPool2d, nn.AvgPool2d, (3,), {"divisor_override": 5}, IMAGE),
    "adaptive": (fnn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, ((4, 3),), {}, IMAGE),
    "adaptive-global": (fnn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, (1,), {}, IMAGE),
    "adaptive-none": (fnn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, ((None, 2),), {}, IMAGE),
    "lrn": (fnn.LocalResponseNorm, nn.LocalResponseNorm, (5,), {"alpha": 5e-2, "k": 2.0}, IMAGE),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_parent(case: str, training: bool) -> None:
    ours_type, torch_type, args, kwargs, shape = CASES[case]
    torch.manual_seed(1)
    ours = randomise_batch_norms(ours_type(*args, **kwargs)) if "no-running" not in case else ours_type(*args, **kwargs)
    theirs = torch_type(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    assert isinstance(ours, torch_type)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    modules = [m.train(training) for m in (ours, theirs, exact)]
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
    for _ in range(2):  # twice, for running statistics
        outputs = [m(i) for m, i in zip(modules, inputs, strict=True)]
    assert_accurate(*outputs)
    assert outputs[0].stride() == outputs[1].stride()
    grad = torch.randn(outputs[0].shape)
    for output in outputs:
        output.backward(grad.to(output.dtype))
    assert_accurate(*[i.grad for i in inputs])
    for parameters in zip(*(m.parameters() for m in modules), strict=True):
        assert_accurate(*[p.grad for p in parameters])
    for buffers in zip(*(m.buffers() for m in modules), strict=True):
        if buffers[0].dtype == torch.int64:
            assert torch.equal(buffers[0], buffers[1])
        else:
            assert_accurate(*buffers)


def test_max_pool_returns_indices() -> None:
    x = torch.randn(IMAGE)
    ours, theirs = fnn.MaxPool2d(2, return_indices=True)(x), nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_batch_norm_refuses_other_dimensions_as_torch_does() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        fnn.BatchNorm2d(8)(torch.randn(8, 3))


def test_pickle_and_deepcopy() -> None:
    conv = fnn.Conv2d(8, 4, 3).eval()
    x = torch.randn(IMAGE)
    expected = conv(x)
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(copied) is fnn.Conv2d
        assert torch.equal(copied(x), expected)


def test_eval_needs_no_fallback() -> None:
    layers = [fnn.Conv2d(8, 8, 3, padding=1), fnn.BatchNorm2d(8), fnn.MaxPool2d(3, 2, 1), fnn.AvgPool2d(2, 1)]
    net = nn.Sequential(*layers, fnn.LocalResponseNorm(5), fnn.AdaptiveAvgPool2d(1), nn.Flatten(), fnn.Linear(8, 3))
    with torch.no_grad(), fastcnn.use_backend("cpp", strict=True):
        assert net.eval()(torch.randn(IMAGE)).shape == (2, 3)
