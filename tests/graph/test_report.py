"""fastcnn.report: on optimized models, on fastcnn's own, and on models it knows nothing of."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.extra = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.deconv = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        y = F.silu(self.extra(y) + y)
        return self.fc(self.deconv(y).mean((2, 3)))


SIZE = (2, 3, 8, 8)
CONV, DEPTHWISE, DECONV, FC = 2 * 64 * 8 * 27, 2 * 64 * 8 * 9, 2 * 64 * 8 * 8 * 4, 2 * 8 * 5


def test_sites_kernels_and_multiply_accumulates() -> None:
    model = fastcnn.optimize(Net(), torch.zeros(SIZE))
    report = fastcnn.report(model)
    assert model.training
    assert report.optimized
    assert report.input_shapes == (SIZE,)
    assert [(s.modules, s.pattern, s.operators, s.backends, s.macs) for s in report.sites] == [
        (("conv", "bn", "relu"), "conv+bn+relu", ("conv2d",), ("cpp",), CONV),
        (("extra", "add"), "conv+add", ("conv2d",), ("cpp",), DEPTHWISE),
        (("fc",), "linear", ("linear",), ("cpp",), FC),
    ]
    assert {(e.module, e.kind) for e in report.left} == {
        ("silu", "silu"), ("deconv", "ConvTranspose2d"), ("mean", "mean"),
    }  # fmt: skip
    assert report.fused_macs == CONV + DEPTHWISE + FC
    assert report.macs == CONV + DEPTHWISE + FC + DECONV
    assert report.fused_fraction == pytest.approx(report.fused_macs / report.macs)


def test_the_table_and_the_dictionary() -> None:
    report = fastcnn.report(fastcnn.optimize(Net()), SIZE)
    text = str(report)
    assert "conv bn relu  conv+bn+relu" in text
    assert "of the activations only ReLU is fused" in text
    assert "MACs (" in text
    given = json.loads(json.dumps(report.to_dict()))
    assert given["fused_macs"] == report.fused_macs
    assert given["sites"][0]["modules"] == ["conv", "bn", "relu"]
    assert given["left"][0]["reason"]


def test_reference_kernels_do_not_count() -> None:
    model = fastcnn.optimize(Net())
    with fastcnn.use_backend("reference"):
        report = fastcnn.report(model, SIZE)
    assert report.fused_macs == 0
    assert report.macs
    assert not any(site.on_kernels for site in report.sites)


def test_float64_is_named_as_a_fallback() -> None:
    report = fastcnn.report(fastcnn.optimize(Net().double()), SIZE)
    assert report.fused_macs == 0
    assert report.sites[0].fallback
    assert report.sites[0].fallback in str(report)


def test_without_an_input_nothing_is_run() -> None:
    report = fastcnn.report(fastcnn.optimize(Net()))
    assert report.input_shapes is None
    assert report.macs is None
    assert report.fused_fraction is None
    assert [site.pattern for site in report.sites] == ["conv+bn+relu", "conv+add", "linear"]
    assert "give input_size" in str(report)


def test_a_model_that_is_not_optimized() -> None:
    report = fastcnn.report(Net(), SIZE)
    assert not report.optimized
    assert report.sites == ()
    assert report.fused_macs == 0
    assert "not optimized" in report.left[0].reason


def test_fastcnns_own_model_at_its_default_size() -> None:
    report = fastcnn.report(fastcnn.create_model("lenet5"))
    assert report.input_shapes == ((1, 1, 32, 32),)
    assert [site.modules for site in report.sites] == [
        ("c1",),
        ("s2",),
        ("c3",),
        ("s4",),
        ("c5",),
        ("f6",),
        ("output",),
    ]
    assert report.sites[0].pattern == "conv2d+bias+relu"
    assert report.fused_fraction == 1
    assert report.left == ()


def test_fastcnns_own_model_shows_residuals_prologues_and_slices() -> None:
    patterns = {s.pattern for s in fastcnn.report(fastcnn.create_model("resnet18"), (1, 3, 32, 32)).sites}
    assert "conv2d+scale+bias+residual+relu" in patterns
    patterns = {s.pattern for s in fastcnn.report(fastcnn.create_model("densenet121"), (1, 3, 32, 32)).sites}
    assert any(p.startswith("affine+relu+conv2d") for p in patterns)
    assert any("into slice" in p for p in patterns)


def test_a_model_of_fastcnn_stays_as_it_is() -> None:
    model = fastcnn.create_model("lenet5")
    optimized = fastcnn.optimize(model, inplace=True, strict=True)
    assert type(optimized).__module__.startswith("fastcnn.models")
    assert "_fastcnn" not in optimized.__dict__


def test_the_report_leaves_statistics_and_random_numbers_alone() -> None:
    model = fastcnn.optimize(Net().train())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    fastcnn.report(model, SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
