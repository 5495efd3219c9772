"""Images into network inputs, class numbers into labels."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastcnn.commands._common import UsageError

# Per channel, of values in [0, 1]; the usual ImageNet figures, which the CIFAR checkpoints were trained with too.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = 256  # shorter side before the centre crop

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Archive:
    """The contents of an .npz file."""

    images: np.ndarray  # uint8 (N, C, H, W)
    labels: np.ndarray | None  # (N,)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (N, C, H, W) to what networks are trained on; one channel is only scaled to [0, 1]."""
    values = pixels.float() / 255
    if pixels.shape[1] != len(MEAN):
        return values
    return (values - torch.tensor(MEAN).view(1, -1, 1, 1)) / torch.tensor(STD).view(1, -1, 1, 1)


def read_image(path: Path, input_size: tuple[int, int, int]) -> Tensor:
    """An image file as uint8 (C, H, W) of the network's input size."""
    try:
        with Image.open(path) as image:
            return fitted(image, input_size)
    except FileNotFoundError:
        raise UsageError(f"there is no file {str(path)!r}") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def fitted(image: Image.Image, input_size: tuple[int, int, int]) -> Tensor:
    """Small inputs (CIFAR, MNIST): the whole image resized. Others: shorter side to 256, then the centre."""
    channels, height, width = input_size
    image = image.convert("L" if channels == 1 else "RGB")
    if max(height, width) <= 64:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        scale = max(RESIZE, height, width) / min(image.size)
        # Rounded as torchvision's Resize and CenterCrop do it.
        size = (max(width, int(image.width * scale)), max(height, int(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(image))
    return values.unsqueeze(0) if channels == 1 else values.permute(2, 0, 1).contiguous()


def read_archive(path: Path, input_size: tuple[int, int, int]) -> Archive:
    """An .npz file with ``images`` and perhaps ``labels``, fitted to the network's input size."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise UsageError(f"{path} must hold an array `images`, holds {', '.join(file.files) or 'nothing'}")
            images = file["images"]
            labels = file.get("labels")
    except FileNotFoundError:
        raise UsageError(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as an .npz archive: {error}") from None
    channels, height, width = input_size
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise UsageError(f"{path}: `images` must be uint8 (N, {channels}, H, W), is {images.dtype} {images.shape}")
    if images.shape[1] != channels and images.shape[3] == channels:
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.shape[1] != channels:
        raise UsageError(f"{path}: `images` must be uint8 (N, {channels}, H, W), has shape {images.shape}")
    if labels is not None and labels.shape != (len(images),):
        raise UsageError(f"{path}: `labels` must have shape ({len(images)},), has {labels.shape}")
    if images.shape[2:] != (height, width):
        images = np.stack([fitted(_as_image(i), input_size).numpy() for i in images])
    return Archive(images, labels)


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))


def normalised_archive(path: str, shape: tuple[int, int, int, int]) -> Tensor:
    """The first images of an archive as a batch of at most ``shape[0]``."""
    return normalised(torch.from_numpy(read_archive(Path(path), shape[1:]).images[: shape[0]]))


def labels_for(name: str, classes: int, file: str | None) -> list[str] | None:
    """The classes' names, from a file (one a line) or by the network's kind; None when they are not known."""
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--labels {file}: {error}") from None
        labels = [line.strip() for line in lines if line.strip()]
        if len(labels) != classes:
            raise UsageError(f"--labels {file} has {len(labels)} lines, the network has {classes} classes")
        return labels
    if "cifar" in name and classes == len(CIFAR10):
        return list(CIFAR10)
    if name.startswith("lenet") and classes == 10:
        return [str(digit) for digit in range(10)]
    if classes == 1000 and importlib.util.find_spec("torchvision") is not None:
        try:
            from torchvision.models._meta import _IMAGENET_CATEGORIES
        except ImportError:
            return None
        return list(_IMAGENET_CATEGORIES)
    return None
