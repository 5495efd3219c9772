"""fastcnn.verify: right networks pass, planted faults are found and named."""

from __future__ import annotations

import json

import pytest
import torch
from support.networks import Block, Conv, small_input, small_network
from torch import nn

import fastcnn
from fastcnn.backends import UnsupportedError, cpp
from fastcnn.verification import Verification

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_network_passes(dtype):
    found = fastcnn.verify(small_network(dtype), small_input(dtype))
    assert isinstance(found, Verification)
    assert found.passed, str(found)
    assert found.first_off is None
    assert [layer.name for layer in found.layers] == ["0", "1.conv1", "1.conv2", "2"]
    assert {layer.backend for layer in found.layers} == {"cpp"}
    assert found.agreement == (4, 4)
    assert found.dtype == str(dtype).removeprefix("torch.")
    for check in (*found.layers, *found.outputs):
        assert check.judgement.ours.norm < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_result_prints_as_a_table_and_goes_into_json():
    found = fastcnn.verify(small_network(), small_input())
    text = str(found)
    assert "PASSED" in text
    assert "4 operator calls checked" in text
    assert len(found.table().splitlines()) == 2 + 4 + 1
    document = json.loads(json.dumps(found.to_dict()))
    assert document["passed"] is True
    assert document["first_off"] is None
    assert [layer["name"] for layer in document["layers"]] == ["0", "1.conv1", "1.conv2", "2"]
    assert document["outputs"][0]["error"]["norm"] <= document["outputs"][0]["bound"]["norm"]


def spoil_1x1(change):
    """A conv2d that is wrong for 1x1 filters only: in the network, at 1.conv2."""
    right = cpp.conv2d

    def conv2d(out, input, weight, *rest):
        right(out, input, weight, *rest)
        if weight.shape[2] == 1:
            change(out, input, weight, rest)

    return conv2d


def one_element(out, input, weight, rest):
    out[1, 2, 3, 4] += 0.5 * out.abs().max()


def unwritten_pixel(out, input, weight, rest):
    out[0, :, 0, 0] = float("nan")


def slightly_off_everywhere(out, input, weight, rest):
    out.mul_(1 + 3e-6)


def without_residual(out, input, weight, rest):
    cpp_rest = list(rest)
    cpp_rest[2] = None
    RIGHT(out, input, weight, *cpp_rest)


RIGHT = cpp.conv2d


@pytest.mark.parametrize("change", [one_element, unwritten_pixel, slightly_off_everywhere, without_residual])
def test_a_wrong_kernel_is_caught_and_its_layer_named(monkeypatch, change):
    monkeypatch.setattr(cpp, "conv2d", spoil_1x1(change))
    found = fastcnn.verify(small_network(), small_input())
    assert not found.passed
    assert found.first_off is not None
    assert found.first_off.name == "1.conv2"
    assert [layer.name for layer in found.layers if not layer.passed] == ["1.conv2"]
    assert "FAILED, first at 1.conv2" in str(found)
    assert found.to_dict()["first_off"] == "1.conv2"


def test_elements_left_unwritten_are_caught_even_where_old_memory_held_the_right_values(monkeypatch):
    right = cpp.conv2d

    def lazy(out, *rest):
        before = out.clone()
        right(out, *rest)
        out[:, :, -1] = before[:, :, -1]

    monkeypatch.setattr(cpp, "conv2d", lazy)
    assert not fastcnn.verify(small_network(), small_input()).passed


def test_without_layers_the_output_still_tells(monkeypatch):
    monkeypatch.setattr(cpp, "conv2d", spoil_1x1(one_element))
    found = fastcnn.verify(small_network(), small_input(), per_layer=False)
    assert not found.passed
    assert found.layers == ()
    assert found.first_off is None


def test_the_reference_backend_agrees_with_itself():
    found = fastcnn.verify(small_network(), small_input(), backend="reference")
    assert found.passed
    assert {layer.backend for layer in found.layers} == {"reference"}
    assert found.outputs[0].judgement.ours == found.outputs[0].judgement.reference


class Plain(nn.Module):
    """small_network in PyTorch's own layers."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        for module in self.network:
            if isinstance(module, Conv):
                x = nn.functional.conv2d(x, module.weight, module.bias, module.stride, module.padding).relu()
            elif isinstance(module, Block):
                x = (module.conv2(module.conv1(x).relu()) + x).relu()
            else:
                x = module(x)
        return x


def test_a_given_reference_is_what_is_compared_with():
    model = small_network()
    assert fastcnn.verify(model, small_input(), reference=Plain(model)).passed
    other = small_network()
    with torch.no_grad():
        other[0].bias.add_(1e-3)
    found = fastcnn.verify(model, small_input(), reference=Plain(other))
    assert not found.passed
    assert found.first_off is None, "every operator is right; it is the networks that differ"


def test_modes_are_put_back():
    model = small_network().train()
    model[1].eval()
    fastcnn.verify(model, small_input())
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_fallbacks_are_named(monkeypatch):
    monkeypatch.setattr(cpp, "unsupported", lambda operator, device, dtype, **facts: "not today")
    found = fastcnn.verify(small_network(), small_input())
    assert found.passed
    assert len(found.fallbacks) == 4
    assert "not today" in str(found)
    with pytest.raises(UnsupportedError, match="not today"):
        fastcnn.verify(small_network(), small_input(), strict=True)


def test_a_network_without_our_operators_says_that_nothing_was_verified():
    found = fastcnn.verify(nn.Linear(4, 3), torch.randn(2, 4))
    assert found.passed
    assert "nothing of fastcnn was verified" in str(found)


def test_overflow_is_said_to_prevent_a_judgement():
    model = small_network(torch.float16)
    with torch.no_grad():
        model[0].weight.mul_(1000)
        model[1].conv1.weight.mul_(1000)
    found = fastcnn.verify(model, small_input(torch.float16))
    assert "cannot be judged" in str(found)


def test_fast_algorithms_get_their_stated_allowance_unless_exact(monkeypatch):
    monkeypatch.setattr(cpp, "conv2d", spoil_1x1(slightly_off_everywhere))
    monkeypatch.setattr(
        cpp, "fast_algorithm", lambda operator, *args: "winograd" if args[2].shape[2] == 1 else None, raising=False
    )
    found = fastcnn.verify(small_network(), small_input())
    assert found.passed, str(found)
    assert [layer.algorithm for layer in found.layers] == [None, None, "winograd", None]
    assert not fastcnn.verify(small_network(), small_input(), exact=True).passed


def test_outputs_in_containers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Conv(3, 4, 1), Conv(3, 5, 1)

        def forward(self, x):
            return {"a": self.a(x), "rest": (self.b(x), 3)}

    found = fastcnn.verify(Two(), (small_input(),))
    assert [check.shape[1] for check in found.outputs] == [4, 5]
    assert found.passed


def test_an_output_without_tensors_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return 3

    with pytest.raises(TypeError, match="floating-point tensor"):
        fastcnn.verify(Nothing(), torch.randn(1))


def test_shared_layers_get_numbered_names():
    conv = Conv(4, 4, 1)
    found = fastcnn.verify(nn.Sequential(conv, conv), torch.randn(1, 4, 5, 5))
    assert [layer.name for layer in found.layers] == ["0", "0#2"]
