"""The real checkpoint on real images, every operator of the network on Triton's kernels."""

import pytest
import torch
from support.data import cifar10_test_images, data_file

import fastcnn


@pytest.mark.parametrize("count", [4])
def test_same_predictions_as_pytorch(count: int) -> None:
    model = fastcnn.create_model("resnet20_cifar", weights=data_file("resnet20-12fca82f.th")).eval()
    batch, labels = (t[:count] for t in cifar10_test_images())
    fastcnn.reset_fallbacks()
    with torch.inference_mode():
        with fastcnn.use_backend("triton", strict=True):
            ours = model(batch)
        with fastcnn.use_backend("reference"):
            theirs = model(batch)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert (ours.argmax(1) == labels).sum() >= count - 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not fastcnn.fallbacks()
