"""timm's networks, frozen in one call: the same results by the accuracy rule."""

from __future__ import annotations

import pytest
import torch
from support.plain_twin import randomise_batch_norms
from test_freezing_torchvision import assert_frozen_well
from test_timm import NETWORKS as OPTIMIZED

timm = pytest.importorskip("timm")

# What test_timm optimizes, and networks whose code decides more by sizes or computes more between convolutions: name,
# and image size. Attention in blocks needs images that its blocks divide at every stage.
NETWORKS = {name: size for name, (size, _) in OPTIMIZED.items()} | {
    "tf_efficientnet_b0": 65,  # padding by the size of the image
    "dm_nfnet_f0": 64,
    "nasnetalarge": 65,
    "pnasnet5large": 65,
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_results(name: str) -> None:
    torch.manual_seed(0)
    model = randomise_batch_norms(timm.create_model(name, pretrained=False, num_classes=10)).eval()
    size = NETWORKS[name]
    batch = 2 if size < 128 else 1
    assert_frozen_well(model, torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)))
