"""Where the real checkpoint and images are: FASTCNN_DATA, or ../shared/data beside the project's root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_file(name: str) -> Path:
    """The file's path; skips the test when it is absent."""
    folder = Path(os.environ.get("FASTCNN_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder} (set FASTCNN_DATA to the folder that holds it)")
    return folder / name


def cifar10_test_images() -> tuple[Tensor, Tensor]:
    """The first 400 test images, normalised as the checkpoint expects, (400, 3, 32, 32), and their labels (400,)."""
    import numpy as np

    with np.load(data_file("cifar10_test_400.npz")) as archive:
        images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std, labels.long()
