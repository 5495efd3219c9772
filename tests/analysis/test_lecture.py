"""The lecture's questions, answered by fastcnn.summary: on plain torch.nn networks and on fastcnn's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import lecture
from torch import nn

import fastcnn
from fastcnn.analysis import Summary
from fastcnn.measurement import count_flops

VOLUMES = {
    "conv1": (96, 55, 55), "pool1": (96, 27, 27), "norm1": (96, 27, 27), "conv2": (256, 27, 27),
    "pool2": (256, 13, 13), "norm2": (256, 13, 13), "conv3": (384, 13, 13), "conv4": (384, 13, 13),
    "conv5": (256, 13, 13), "pool3": (256, 6, 6), "fc6": (4096,), "fc7": (4096,), "fc8": (1000,),
}  # fmt: skip
FIELDS = {
    "conv1": (11, 4), "pool1": (19, 8), "norm1": (19, 8), "conv2": (51, 8), "pool2": (67, 16), "conv3": (99, 16),
    "conv4": (131, 16), "conv5": (163, 16), "pool3": (195, 32),
}  # fmt: skip
# Multiply-adds of every registered ResNet. The papers give none for 32 and 44 layers, which PyTorch counts.
RESNETS = {
    "resnet18": "1.814e9", "resnet34": "3.664e9", "resnet50": "4.089e9", "resnet101": "7.801e9",
    "resnet152": "11.514e9", "wide_resnet50_2": "11.398e9", "wide_resnet101_2": "22.753e9",
    "resnext50_32x4d": "4.230e9", "resnext101_32x4d": "7.970e9", "resnext101_32x8d": "16.414e9",
    "resnext101_64x4d": "15.460e9", "plain18": "1.795e9", "plain34": "3.644e9", "resnet20_cifar": "40.55e6",
    "plain20_cifar": "40.55e6", "plain56_cifar": "125.5e6", "resnet56_cifar": "125.5e6", "resnet110_cifar": "252.9e6",
    "resnet1202_cifar": "2.829e9",
}  # fmt: skip


def ours(name: str, **options: object) -> Summary:
    with torch.device("meta"):
        model = fastcnn.create_model(name, **options)
    return fastcnn.summary(model, fastcnn.models.model_info(name).input_size)


@pytest.fixture(scope="module", params=["torch.nn", "fastcnn"])
def alexnet(request) -> Summary:
    return plain(lecture.alexnet, 3, 227, 227) if request.param == "torch.nn" else ours("alexnet")


def plain(build: Callable[[], nn.Module], *size: int) -> Summary:
    with torch.device("meta"):
        model = build()
    return fastcnn.summary(model, size)


def layers_of(found: Summary, kinds: tuple[str, ...]) -> list:
    return [layer for layer in found.layers if any(kind in layer.type for kind in kinds)]


def test_alexnets_volumes(alexnet):
    rows = layers_of(alexnet, ("Conv2d", "MaxPool2d", "LocalResponseNorm", "Linear"))
    assert [row.output_shape[1:] for row in rows] == list(VOLUMES.values())
    assert alexnet.parameters == 62_378_344
    assert alexnet.macs == 1_135_256_096


def test_alexnets_receptive_fields(alexnet):
    rows = layers_of(alexnet, ("Conv2d", "MaxPool2d", "LocalResponseNorm", "Linear"))
    for name, row in zip(VOLUMES, rows, strict=True):
        if name in FIELDS:
            size, stride = FIELDS[name]
            assert row.receptive_field.size == (size, size), name
            assert row.receptive_field.stride == (stride, stride), name
        elif name.startswith("fc"):
            assert row.receptive_field is None
            assert row.sees_whole_input
    assert rows[0].receptive_field.offset == (5.0, 5.0)


def test_alexnets_first_layer_has_35k_parameters(alexnet):
    conv1, pool1 = layers_of(alexnet, ("Conv2d", "MaxPool2d"))[:2]
    assert conv1.parameters == 34_848 + 96
    assert conv1.macs == 34_848 * 55 * 55
    assert conv1.activation_bytes == 4 * 96 * 55 * 55
    assert pool1.parameters == pool1.macs == 0


def test_three_3x3_see_as_much_as_one_7x7():
    channels = 8
    three = fastcnn.summary(nn.Sequential(*(nn.Conv2d(8, 8, 3, bias=False) for _ in range(3))), (channels, 32, 32))
    one = fastcnn.summary(nn.Conv2d(8, 8, 7, bias=False), (channels, 32, 32))
    assert [layer.receptive_field.size for layer in three.layers] == [(3, 3), (5, 5), (7, 7)]
    assert three.layers[-1].receptive_field == one.layers[0].receptive_field
    assert three.layers[-1].output_shape == one.layers[0].output_shape
    assert (three.parameters, one.parameters) == (27 * channels**2, 49 * channels**2)


@pytest.mark.parametrize("source", ["torch.nn", "fastcnn"])
def test_vgg16s_totals(source):
    found = plain(lecture.vgg16, 3, 224, 224) if source == "torch.nn" else ours("vgg16")
    assert found.parameters == 138_357_544
    assert found.macs == 15_470_264_320
    listed = layers_of(found, ("Conv2d", "MaxPool2d", "Linear"))
    values = sum(layer.activation_bytes for layer in listed) // 4 + 3 * 224 * 224
    assert values == 15_237_608
    if source == "torch.nn":
        assert found.input_bytes + found.activation_bytes == 4 * values  # 61 MB


@pytest.mark.parametrize(
    ("model", "channels", "macs"),
    [(lecture.NaiveInception, 672, 854_196_224), (lecture.BottleneckInception, 480, 271_351_808)],
)
def test_inception_with_and_without_bottlenecks(model, channels, macs):
    found = plain(model, 256, 28, 28)
    assert found["cat"].output_shape == (1, channels, 28, 28)
    assert found.blocks[0].output_shape == (1, channels, 28, 28)
    assert found.macs == found.blocks[0].macs == macs
    assert found["conv3"].receptive_field.size == (3, 3)
    assert found["cat"].receptive_field.size == (5, 5)


def test_googlenets_five_million_are_seven():
    found = plain(lecture.googlenet_lrn, 3, 224, 224)
    assert found.parameters == 6_998_552
    assert found.macs == 1_582_671_872
    channels = [block.output_shape[1] for block in found.blocks if block.type == "Inception"]
    assert channels == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def test_our_googlenet_is_the_papers():
    found = ours("googlenet_lrn")
    assert found.parameters - found.unused_parameters == 6_998_552  # without the heads that only training uses
    assert found.macs == 1_582_671_872


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_multiply_adds(name):
    mantissa, exponent = RESNETS[name].split("e")
    macs = ours(name).macs / 10 ** int(exponent)
    assert f"{macs:.{len(mantissa.split('.')[1])}f}" == mantissa


@pytest.mark.parametrize("name", ["resnet32_cifar", "resnet44_cifar"])
def test_resnets_that_only_a_counter_knows(name):
    assert ours(name).macs == count_flops(fastcnn.create_model(name).eval(), torch.randn(1, 3, 32, 32)) // 2
