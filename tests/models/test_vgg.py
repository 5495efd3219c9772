"""VGG against torchvision's: counts, state dicts both ways, results, one step of training."""

from __future__ import annotations

import pytest
import torch
from support.counting import multiply_adds, on_meta, parameters, volumes
from support.plain_twin import randomise_batch_norms
from support.steps import assert_bf16_accurate, assert_eval_equal, assert_step_equal
from torch import Tensor, nn

import fastcnn
from fastcnn.models import VGG

torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of these tests")

COUNTS = {
    "vgg11": (132_863_336, "7.609"),
    "vgg13": (133_047_848, "11.308"),
    "vgg16": (138_357_544, "15.470"),
    "vgg19": (143_667_240, "19.632"),
    "vgg11_bn": (132_868_840, "7.609"),
    "vgg13_bn": (133_053_736, "11.308"),
    "vgg16_bn": (138_365_992, "15.470"),
    "vgg19_bn": (143_678_248, "19.632"),
}


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    model = on_meta(name)
    count, macs = COUNTS[name]
    assert parameters(model) == count
    assert f"{multiply_adds(model, (3, 224, 224)) / 1e9:.3f}" == macs


def test_volumes_of_the_slide() -> None:
    """Input, convolutions, pools, and linear layers of VGG-16: 15,237,608 values, 61 MB in fp32."""
    model = on_meta("vgg16")
    found = volumes(model, (3, 224, 224))
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.Linear)
    listed = [found[name] for name, module in model.named_modules() if isinstance(module, kinds)]
    assert sum(torch.Size(volume).numel() for volume in [(3, 224, 224), *listed]) == 15_237_608
    assert [v[1] for v in listed if len(v) == 3][-1] == 7


# ---- torchvision -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """Random linear layers, which all eight networks share: 124 million values."""
    generator = torch.Generator().manual_seed(0)

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return {
        "classifier.0.weight": uniform(0.015, 4096, 25088),
        "classifier.0.bias": uniform(0.1, 4096),
        "classifier.3.weight": uniform(0.03, 4096, 4096),
        "classifier.3.bias": uniform(0.1, 4096),
        "classifier.6.weight": uniform(0.03, 1000, 4096),
        "classifier.6.bias": uniform(0.1, 1000),
    }


@pytest.mark.parametrize("name", COUNTS)
def test_state_dicts_and_results_both_ways(name: str, classifier: dict[str, Tensor]) -> None:
    theirs = on_meta(lambda: getattr(torchvision.models, name)(init_weights=False)).eval()
    theirs.features.to_empty(device="cpu")
    for module in theirs.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    theirs.load_state_dict(classifier, strict=False, assign=True)
    randomise_batch_norms(theirs)
    ours = on_meta(name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)  # assigned: a copy would take half a gigabyte
    x = torch.randn(1, 3, 64, 64)
    assert_eval_equal(ours, theirs, x)
    back = on_meta(getattr(torchvision.models, name)).eval()
    changed = {key: value * 1.1 if "features" in key else value for key, value in ours.state_dict().items()}
    ours.load_state_dict(changed, strict=True, assign=True)
    back.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert_eval_equal(ours, back, x)


def test_same_seed_same_initial_weights() -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.vgg11_bn(num_classes=2)
    torch.manual_seed(3)
    ours = fastcnn.create_model("vgg11_bn", num_classes=2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# ---- small ones ------------------------------------------------------------------------------------------------------


def small_pair(batch_norm: bool, **options: int) -> tuple[nn.Module, nn.Module]:
    """A small VGG, and torchvision's class with the same layers."""
    torch.manual_seed(0)
    ours = VGG(((8, 8), (16,), (24, 24)), batch_norm, num_classes=7, hidden=40, **options)
    randomise_batch_norms(ours)
    features = torchvision.models.vgg.make_layers([8, 8, "M", 16, "M", 24, 24, "M"], batch_norm)
    if "in_channels" in options:
        features[0] = nn.Conv2d(options["in_channels"], 8, 3, padding=1)
    theirs = on_meta(lambda: torchvision.models.VGG(nn.Identity(), num_classes=7))
    theirs.features = features
    theirs.classifier = nn.Sequential(
        nn.Linear(24 * 49, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 7)
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        for linear in (ours.classifier[0], ours.classifier[3], ours.classifier[6]):
            linear.weight.mul_(10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "bn"])
def test_small_equals_torchvisions_class(batch_norm: bool) -> None:
    ours, theirs = small_pair(batch_norm)
    x, target = torch.randn(3, 3, 48, 56), torch.tensor([0, 6, 2])
    assert_eval_equal(ours, theirs, x)
    assert_bf16_accurate(ours, theirs, x)
    assert_step_equal(ours, theirs, x, target)


def test_one_input_channel_becomes_channels_last() -> None:
    """With one channel, contiguous memory is channels-last memory too: the network must say which one it means."""
    ours, theirs = small_pair(True, in_channels=1)
    x = torch.randn(2, 1, 32, 32)
    assert_eval_equal(ours, theirs, x)
    with torch.no_grad():
        features = ours.forward_features(x)
    assert features.shape == (2, 24, 4, 4)
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_eval_is_one_call_a_layer() -> None:
    """Convolution, batch norm and ReLU are one call; so are linear and ReLU."""
    ours, _ = small_pair(True)
    ours.eval()
    calls: list[str] = []

    def record(call: fastcnn.backends.Call) -> None:
        calls.append(call.operator)
        call.run()

    with torch.no_grad(), fastcnn.backends.intercept(record):
        ours(torch.randn(1, 3, 56, 56))
    assert calls == [
        "conv2d", "conv2d", "max_pool2d", "conv2d", "max_pool2d", "conv2d", "conv2d", "max_pool2d",
        "adaptive_avg_pool2d", "linear", "linear", "linear",
    ]  # fmt: skip


def test_hooks_are_honoured() -> None:
    ours, _ = small_pair(True)
    ours.eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = ours(x)
        for name, module in ours.named_modules():
            module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        assert torch.allclose(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert set(seen) == {name for name, _ in ours.named_modules()}


def test_replaced_layers_run() -> None:
    ours, _ = small_pair(False)
    ours.eval()
    ours.features[1] = nn.Tanh()
    ours.classifier[6] = nn.Identity()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert ours(x).shape == (1, 40)
        assert torch.allclose(ours.features[:2](x), torch.tanh(nn.functional.conv2d(
            x, ours.features[0].weight, ours.features[0].bias, padding=1)), atol=1e-5)  # fmt: skip
