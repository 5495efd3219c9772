"""timm's networks, as timm makes them: the reference's results by the accuracy rule, on fastcnn's kernels."""

from __future__ import annotations

import pytest
import torch
from support.dropin import assert_frozen_well, check_network
from support.plain_twin import randomise_batch_norms
from torch import nn

timm = pytest.importorskip("timm")

# One or two of a family: image size, and the least fraction of the multiply-accumulates on fastcnn's kernels.
LECTURE = {
    "vgg11": (64, 0.99),
    "inception_v3": (96, 0.99),
    "resnet18": (64, 0.99),
    "resnext50_32x4d": (64, 0.99),
    "wide_resnet50_2": (64, 0.99),
    "resnetv2_50": (64, 0.99),
    "densenet121": (64, 0.99),
    "legacy_seresnet18": (64, 0.99),
}
OTHERS = {
    "convnext_atto": (64, 0.99),
    "cspdarknet53": (64, 0.99),
    "cspresnet50": (64, 0.99),
    "dla46_c": (64, 0.99),
    "dpn68": (64, 0.99),
    "ecaresnet26t": (64, 0.99),
    "efficientnet_b0": (64, 0.99),
    "ese_vovnet19b_dw": (64, 0.99),
    "fasternet_t0": (64, 0.99),
    "fbnetc_100": (64, 0.99),
    "gernet_s": (64, 0.99),
    "ghostnet_050": (64, 0.99),
    "hardcorenas_a": (64, 0.99),
    "hgnetv2_b0": (64, 0.99),
    "hrnet_w18_small": (64, 0.99),
    "inception_next_atto": (64, 0.99),
    "lcnet_050": (64, 0.99),
    "legacy_xception": (64, 0.99),
    "mixnet_s": (64, 0.99),
    "mnasnet_small": (64, 0.99),
    "mobilenetv2_050": (64, 0.99),
    "mobilenetv3_small_050": (64, 0.99),
    "mobilenetv4_conv_small": (64, 0.99),
    "nf_regnet_b0": (64, 0.99),
    "regnetx_002": (64, 0.99),
    "regnety_002": (64, 0.99),
    "repghostnet_050": (64, 0.99),
    "repvgg_a0": (64, 0.99),
    "resnest14d": (64, 0.99),
    "rexnet_100": (64, 0.99),
    "selecsls42": (64, 0.99),
    "skresnet18": (64, 0.99),
    "starnet_s1": (64, 0.99),
    "tf_efficientnetv2_b0": (64, 0.85),  # some convolutions pad by the size of the image
    "tinynet_e": (64, 0.99),
    "xception41": (64, 0.99),
}
NETWORKS = LECTURE | OTHERS

# Frozen as well: networks whose code decides more by sizes, or computes more between convolutions. Attention in blocks
# needs images that its blocks divide at every stage.
FROZEN = {name: size for name, (size, _) in NETWORKS.items()} | {
    "tf_efficientnet_b0": 65,  # padding by the size of the image
    "dm_nfnet_f0": 64,
    "nasnetalarge": 65,
    "halonet26t": 256,
    "botnet26t_256": 256,
    "bat_resnext26ts": 256,
    "resnetrs50": 64,
    "gcresnet33ts": 64,
    "res2net50_26w_4s": 64,
    "vovnet39a": 64,
    "mobileone_s0": 64,
    "fastvit_t8": 64,
    "convnextv2_atto": 64,
    "convmixer_768_32": 64,
    "edgenext_xx_small": 64,
    "focalnet_tiny_srf": 64,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(timm.create_model(name, pretrained=False, num_classes=10)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_eval(name: str) -> None:
    size, fraction = NETWORKS[name]
    check_network(build(name), torch.randn(2, 3, size, size), fraction)


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_frozen(name: str) -> None:
    size = FROZEN[name]
    assert_frozen_well(build(name), torch.randn(2 if size < 128 else 1, 3, size, size))
