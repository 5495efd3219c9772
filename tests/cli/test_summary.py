"""fastcnn summary: text, JSON, sizes, torchvision's networks, refusals."""

from __future__ import annotations

import pytest


def test_a_network_of_ours(cli):
    result = cli("summary", "resnet20_cifar")
    assert result.code == 0, result
    assert result.out.startswith("resnet20_cifar, input 1x3x32x32")
    assert "layer3.2.conv2" in result.out
    assert "269,722" in result.out
    assert result.err == ""


def test_json_size_and_batch(cli):
    result = cli("summary", "resnet18", "--size", 64, 96, "--batch", 3, "--dtype", "bf16", "--json")
    assert result.code == 0, result
    assert result.json["model"] == "resnet18"
    assert result.json["input_shapes"] == [[3, 3, 64, 96]]
    assert result.json["layers"][0]["output_shapes"] == [[3, 64, 32, 48]]
    assert result.json["parameters"] == 11_689_512
    assert result.json["dtype"] == "bfloat16"


def test_torchvisions(cli):
    pytest.importorskip("torchvision")
    result = cli("summary", "torchvision:mobilenet_v2", "--json")
    assert result.code == 0, result
    assert result.json["macs"] == 300_774_272
    assert cli("summary", "torchvision:inception_v3", "--json").json["input_shapes"] == [[1, 3, 299, 299]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["resnet21_cifar"], "resnet21_cifar"), (["torchvision:nonet"], "nonet"), (["resnet18", "--size", "0", "8"], "0"),
     (["torchvision:densenet121", "--size", "20", "20"], "20x20")],
)  # fmt: skip
def test_refusals(cli, arguments, word):
    result = cli("summary", *arguments)
    assert result.code == 2, result
    assert result.out == ""
    assert word in result.err
    assert "Traceback" not in result.err
