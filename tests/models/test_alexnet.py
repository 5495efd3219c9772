"""AlexNet in its three forms and ZFNet: counts, volumes, torchvision's twin and plain functions of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.counting import multiply_adds, on_meta, parameters, volumes
from support.steps import FunctionTwin, assert_bf16_accurate, assert_eval_equal, assert_step_equal
from torch import Tensor, nn

import fastcnn

COUNTS = {
    "alexnet": (62_378_344, 1_135_256_096),
    "alexnet_2gpu": (60_965_224, 724_406_816),
    "alexnet_owt": (61_100_840, 714_188_480),
    "zfnet": (62_357_608, 1_168_032_896),
}
Tensors = dict[str, Tensor]


def norm(x: Tensor, alpha: float, k: float) -> Tensor:
    """PyTorch's, which has no bf16 on a CPU."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return F.local_response_norm(wide, 5, alpha, 0.75, k).to(x.dtype)


def plain(name: str) -> object:
    """The network as its paper (or the lecture) has it."""
    groups = 2 if name == "alexnet_2gpu" else 1

    def forward(p: Tensors, x: Tensor, training: bool) -> Tensor:
        def conv(layer: int, x: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
            return F.relu(F.conv2d(x, p[f"conv{layer}.weight"], p[f"conv{layer}.bias"], stride, padding, groups=groups))

        def pool(x: Tensor) -> Tensor:
            return F.max_pool2d(x, 3, 2, ceil_mode=name == "zfnet")

        def reduce(x: Tensor) -> Tensor:
            return pool(norm(x, 5e-4, 2.0)) if name == "alexnet_2gpu" else norm(pool(x), 1e-4, 1.0)

        if name == "zfnet":
            x = reduce(conv(2, reduce(conv(1, x, 2, 1)), 2, 0))
        else:
            x = reduce(conv(2, reduce(conv(1, x, 4, 0)), 1, 2, groups))
        x = pool(conv(5, conv(4, conv(3, x, 1, 1), 1, 1, groups), 1, 1, groups)).flatten(1)
        for layer in ("fc6", "fc7"):
            x = F.dropout(F.relu(F.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"])), 0.5, training)
        return F.linear(x, p["fc8.weight"], p["fc8.bias"])

    return forward


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


def make(name: str, **options: object) -> nn.Module:
    """The network with few hidden units, and weights large enough for its normalisation to matter."""
    torch.manual_seed(0)
    model = fastcnn.create_model(name, hidden=48, num_classes=10, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    model = on_meta(name)
    assert (parameters(model), multiply_adds(model, fastcnn.models.model_info(name).input_size)) == COUNTS[name]


def test_parameters_of_the_layers() -> None:
    model = on_meta("alexnet")
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
    assert [parameters(getattr(model, layer)) for layer in layers] == [
        34_944, 614_656, 885_120, 1_327_488, 884_992, 37_752_832, 16_781_312, 4_097_000,
    ]  # fmt: skip
    assert model.conv1.weight.numel() == 34_848


ALEXNET_SIZES = (55, 27, 27, 13, 13, 6)
VOLUMES = {"alexnet": ALEXNET_SIZES, "alexnet_2gpu": ALEXNET_SIZES, "zfnet": (110, 55, 26, 13, 13, 6)}


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes(name: str) -> None:
    found = volumes(on_meta(name), fastcnn.models.model_info(name).input_size)
    conv1, pool1, conv2, pool2, conv3, pool5 = VOLUMES[name]
    expected = {
        "conv1": (96, conv1), "pool1": (96, pool1), "conv2": (256, conv2), "pool2": (256, pool2),
        "conv3": (384, conv3), "conv4": (384, conv3), "conv5": (256, conv3), "pool5": (256, pool5),
    }  # fmt: skip
    assert {layer: found[layer] for layer in expected} == {layer: (c, s, s) for layer, (c, s) in expected.items()}
    assert [found[layer] for layer in ("fc6", "fc7", "fc8")] == [(4096,), (4096,), (1000,)]
    before_pool = name == "alexnet_2gpu"
    assert found["norm1"] == found["conv1" if before_pool else "pool1"]
    assert found["norm2"] == found["conv2" if before_pool else "pool2"]


@pytest.mark.parametrize("name", VOLUMES)
def test_equals_twin(name: str) -> None:
    model = make(name)
    twin = FunctionTwin(model, plain(name))
    x = torch.randn(2, *fastcnn.models.model_info(name).input_size)
    assert_eval_equal(model, twin, x)
    assert_bf16_accurate(model, twin, x[:1])


@pytest.mark.parametrize("name", VOLUMES)
def test_one_training_step_equals_twin(name: str) -> None:
    model = make(name)
    x = torch.randn(1, *fastcnn.models.model_info(name).input_size)
    assert_step_equal(model, FunctionTwin(model, plain(name)), x, torch.tensor([3]))


def torchvision_alexnet(**options: object) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    return torchvision.models.alexnet(**options)


def test_one_weird_trick_is_torchvisions() -> None:
    torch.manual_seed(5)
    theirs = torchvision_alexnet(num_classes=100)
    torch.manual_seed(5)
    ours = fastcnn.create_model("alexnet_owt", num_classes=100)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(2, 3, 224, 224)
    assert_eval_equal(ours, theirs, x)
    with torch.no_grad():
        for parameter in ours.features.parameters():
            parameter.mul_(1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_eval_equal(ours, theirs, x[:, :, :97, :130])
    other = on_meta("alexnet_owt", num_classes=100).to_empty(device="cpu")
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert_eval_equal(other, theirs, x[:, :, :97, :130])


def test_one_weird_trick_trains() -> None:
    model = make("alexnet_owt")
    twin = torchvision_alexnet(num_classes=10)
    twin.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(9216, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert_bf16_accurate(model, twin, x)
    assert_step_equal(model, twin, x, torch.tensor([3, 9]))


def test_options() -> None:
    model = on_meta("alexnet", num_classes=7, in_channels=1, dropout=0.1)
    assert parameters(model) == 62_378_344 - 4097 * 993 - 96 * 121 * 2
    assert model.drop6.p == 0.1
    model = make("alexnet_owt", in_channels=1)
    one, three = torch.randn(2, 1, 80, 80), make("alexnet_owt")
    three.load_state_dict({**model.state_dict(), "features.0.weight": model.features[0].weight.repeat(1, 3, 1, 1) / 3})
    three.eval()
    assert_eval_equal(model, FunctionTwin(nn.Identity(), lambda p, x, training: three(x.repeat(1, 3, 1, 1))), one)


def test_wrong_sizes_are_named() -> None:
    for name, size in (("alexnet", "227x227"), ("zfnet", "224x224")):
        with pytest.raises(ValueError, match=size):
            make(name)(torch.randn(1, 3, 150, 150))
