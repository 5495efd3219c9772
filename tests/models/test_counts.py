"""Parameters and multiply-adds of the residual and dense networks, as the papers and torchvision have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcnn

# name: parameters, multiply-adds of convolutions and linear layers (rounded to the digits that are written)
EXPECTED = {
    "resnet18": (11_689_512, "1.814e9"),
    "resnet34": (21_797_672, "3.664e9"),
    "resnet50": (25_557_032, "4.089e9"),
    "resnet101": (44_549_160, "7.801e9"),
    "resnet152": (60_192_808, "11.514e9"),
    "wide_resnet50_2": (68_883_240, "11.398e9"),
    "wide_resnet101_2": (126_886_696, "22.753e9"),
    "resnext50_32x4d": (25_028_904, "4.230e9"),
    "resnext101_32x4d": (44_177_704, "7.970e9"),
    "resnext101_32x8d": (88_791_336, "16.414e9"),
    "resnext101_64x4d": (83_455_272, "15.460e9"),
    "plain18": (11_515_688, "1.795e9"),
    "plain34": (21_623_848, "3.644e9"),
    "resnet20_cifar": (269_722, "40.55e6"),
    "resnet32_cifar": (464_154, None),
    "resnet44_cifar": (658_586, None),
    "resnet56_cifar": (853_018, "125.5e6"),
    "resnet110_cifar": (1_727_962, "252.9e6"),
    "resnet1202_cifar": (19_421_274, "2.829e9"),
    "plain20_cifar": (269_722, "40.55e6"),
    "plain56_cifar": (853_018, "125.5e6"),
    "resnet110_sd_cifar": (1_727_962, "252.9e6"),
    "resnet1202_sd_cifar": (19_421_274, "2.829e9"),
    "preresnet18": (11_687_720, None),
    "preresnet34": (21_795_880, None),
    "preresnet50": (25_549_352, None),
    "preresnet101": (44_541_480, None),
    "preresnet152": (60_185_128, None),
    "preresnet200": (64_666_152, "15.007e9"),
    "preresnet164_cifar": (1_703_258, "0.245e9"),
    "preresnet1001_cifar": (10_327_706, "1.488e9"),
    "wrn16_8_cifar": (10_961_370, "1.548e9"),
    "wrn40_4_cifar": (8_949_210, "1.299e9"),
    "wrn28_10_cifar": (36_479_194, "5.243e9"),
    "resnext29_8x64d_cifar": (34_426_698, "5.387e9"),
    "resnext29_16x64d_cifar": (68_155_210, "10.689e9"),
    "densenet121": (7_978_856, "2.834e9"),
    "densenet169": (14_149_480, "3.360e9"),
    "densenet201": (20_013_928, "4.291e9"),
    "densenet161": (28_681_000, "7.728e9"),
    "densenet40_k12_cifar": (1_019_722, None),
    "densenet100_k12_cifar": (6_979_642, None),
    "densenet100_k24_cifar": (27_249_082, None),
    "densenet_bc100_k12_cifar": (769_162, "0.288e9"),
    "densenet_bc250_k24_cifar": (15_324_406, "5.419e9"),
    "densenet_bc190_k40_cifar": (25_624_430, "9.302e9"),
}
VARIANTS = [
    ("wrn28_10_cifar", {"num_classes": 100}, 36_536_884),
    ("resnet18", {"shortcut": "A"}, 11_515_688),
    ("resnet34", {"shortcut": "A"}, 21_623_848),
    ("resnet18", {"shortcut": "C"}, 12_043_816),
    ("resnet34", {"shortcut": "C"}, 22_716_840),
    ("resnet20_cifar", {"shortcut": "B"}, 272_474),
    ("resnet50", {"stride_in_1x1": True}, 25_557_032),
    ("resnet18", {"num_classes": 10}, 11_689_512 - 513 * 990),
    ("resnet18", {"in_channels": 1}, 11_689_512 - 64 * 49 * 2),
    ("resnet20_cifar", {"num_classes": 100, "in_channels": 1}, 269_722 + 65 * 90 - 16 * 9 * 2),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Counted by hooks, on tensors without memory."""
    total = 0

    def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return total


@pytest.mark.parametrize("name", EXPECTED)
def test_counts(name: str) -> None:
    with torch.device("meta"):
        model = fastcnn.create_model(name)
    count, macs = EXPECTED[name]
    assert parameters(model) == count
    if macs is not None:
        mantissa, exponent = macs.split("e")
        digits = len(mantissa.split(".")[1])
        actual = multiply_adds(model, fastcnn.models.model_info(name).input_size)
        assert f"{actual / 10 ** int(exponent):.{digits}f}" == mantissa


@pytest.mark.parametrize(("name", "options", "count"), VARIANTS)
def test_counts_of_options(name: str, options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        assert parameters(fastcnn.create_model(name, **options)) == count


def test_v1_has_fewer_multiply_adds_than_v1_5() -> None:
    with torch.device("meta"):
        model = fastcnn.create_model("resnet50", stride_in_1x1=True)
    assert f"{multiply_adds(model, (3, 224, 224)) / 1e9:.3f}" == "3.858"
