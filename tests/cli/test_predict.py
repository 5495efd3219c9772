"""fastcnn predict: on the real checkpoint and real images, and on input that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import data_file

import fastcnn
from fastcnn.commands._images import CIFAR10, MEAN, STD, fitted, normalised


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(fastcnn.create_model("resnet20_cifar").state_dict(), path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def real_images(count):
    with np.load(data_file("cifar10_test_400.npz")) as archive:
        return archive["images"][:count], archive["labels"][:count]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_trained_network_names_365_of_400(cli, dtype):
    archive, checkpoint = data_file("cifar10_test_400.npz"), data_file("resnet20-12fca82f.th")
    result = cli("predict", "resnet20_cifar", archive, "--weights", checkpoint, "--dtype", dtype)
    assert result.code == 0, result
    if dtype == "fp32":
        assert "365 of 400 right (91.25%)" in result.out
    else:
        right = int(result.out.split(": ")[1].split()[0])
        assert abs(right - 365) <= 4


def test_it_in_a_process_of_its_own_with_json(command):
    archive, checkpoint = data_file("cifar10_test_400.npz"), data_file("resnet20-12fca82f.th")
    result = command("predict", "resnet20_cifar", archive, "--weights", checkpoint, "--topk", 2, "--json")
    assert result.code == 0, result.err
    document = result.json["files"][0]
    assert (document["right"], document["count"], document["accuracy"]) == (365, 400, 0.9125)
    first = document["predictions"][0]
    assert len(first) == 2
    assert first[0]["label"] == CIFAR10[first[0]["class"]] == "cat"
    assert first[0]["probability"] > first[1]["probability"]


def test_image_files(cli, tmp_path):
    images, labels = real_images(8)
    paths = []
    for i, pixels in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels.transpose(1, 2, 0)).save(paths[-1])
    checkpoint = data_file("resnet20-12fca82f.th")
    result = cli("predict", "resnet20_cifar", *paths, "--weights", checkpoint, "--json")
    named = [f["predictions"][0][0]["label"] for f in result.json["files"]]
    assert sum(name == CIFAR10[label] for name, label in zip(named, labels, strict=True)) >= 7
    text = cli("predict", "resnet20_cifar", *paths, "--weights", checkpoint, "--topk", 3).out
    assert len(text.splitlines()) == 2 + 3 * 8
    assert str(paths[0]) in text


def test_real_data_verifies(cli):
    result = cli(
        "verify", "resnet20_cifar", "--weights", data_file("resnet20-12fca82f.th"),
        "--data", data_file("cifar10_test_400.npz"), "--batch", 64,
    )  # fmt: skip
    assert result.code == 0, result
    assert "same top class as the reference: 64 of 64" in result.out


def test_archives_without_labels_and_in_other_forms(cli, tmp_path, weights):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", images=images)
    result = cli("predict", "resnet20_cifar", tmp_path / "plain.npz", "--weights", weights)
    assert result.code == 0, result
    assert "plain.npz[2]" in result.out
    assert "right" not in result.out


def test_own_labels(cli, tmp_path, weights, picture):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(10)))
    assert "kind " in cli("predict", "resnet20_cifar", picture, "--weights", weights, "--labels", names).out
    names.write_text("one\ntwo\n")
    result = cli("predict", "resnet20_cifar", picture, "--weights", weights, "--labels", names)
    assert result.code == 2
    assert "has 2 lines, the network has 10 classes" in result.err


def test_other_numbers_of_classes_are_numbered(cli, tmp_path, picture):
    path = tmp_path / "seven.pt"
    torch.save(fastcnn.create_model("resnet20_cifar", num_classes=7).state_dict(), path)
    result = cli("predict", "resnet20_cifar", picture, "--weights", path, "--num-classes", 7, "--topk", 99)
    assert result.code == 0, result
    assert result.out.count("class ") == 7


def test_imagenet_networks_have_imagenet_labels(cli, tmp_path, picture):
    pytest.importorskip("torchvision")
    path = tmp_path / "resnet18.pt"
    torch.save(fastcnn.create_model("resnet18").state_dict(), path)
    result = cli("predict", "resnet18", picture, "--weights", path, "--json")
    assert result.code == 0, result
    guess = result.json["files"][0]["predictions"][0][0]
    assert guess["label"]
    assert 0 <= guess["class"] < 1000


def broken_files(folder):
    (folder / "text.png").write_text("no picture")
    (folder / "text.npz").write_text("no archive")
    (folder / "truncated.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x00" * 20)
    np.savez(folder / "empty.npz")
    np.savez(folder / "floats.npz", images=np.zeros((2, 3, 32, 32), np.float32))
    np.savez(folder / "none.npz", images=np.zeros((0, 3, 32, 32), np.uint8))
    np.savez(folder / "grey.npz", images=np.zeros((2, 1, 32, 32), np.uint8))
    np.savez(folder / "labels.npz", images=np.zeros((2, 3, 32, 32), np.uint8), labels=np.zeros(3, np.uint8))
    np.savez(folder / "pickle.npz", images=np.array([{}], dtype=object))


@pytest.mark.parametrize(
    "name",
    ["missing.png", "missing.npz", "text.png", "text.npz", "truncated.png", "empty.npz", "floats.npz", "none.npz",
     "grey.npz", "labels.npz", "pickle.npz"],
)  # fmt: skip
def test_files_that_cannot_be_used(cli, tmp_path, weights, name):
    broken_files(tmp_path)
    result = cli("predict", "resnet20_cifar", tmp_path / name, "--weights", weights)
    assert result.code == 2, result
    assert name in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert result.out == ""


def test_weights_are_needed_and_must_be_weights(cli, tmp_path, picture):
    result = cli("predict", "resnet20_cifar", picture)
    assert result.code == 2
    assert "needs --weights" in result.err
    (tmp_path / "bad.pt").write_text("no weights")
    for name in ("bad.pt", "missing.pt"):
        result = cli("predict", "resnet20_cifar", picture, "--weights", tmp_path / name)
        assert result.code == 2, result
        assert name in result.err
        assert len(result.err.strip().splitlines()) == 1


def test_normalisation():
    pixels = torch.arange(3 * 4, dtype=torch.uint8).view(1, 3, 2, 2) * 20
    expected = (pixels[0, 1, 0, 1].item() / 255 - MEAN[1]) / STD[1]
    assert normalised(pixels)[0, 1, 0, 1].item() == pytest.approx(expected, rel=1e-5)
    assert normalised(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).eq(1).all()


def test_imagenet_preprocessing_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)
    ])(image)  # fmt: skip
    ours = normalised(fitted(image, (3, 224, 224)).unsqueeze(0))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_grey_networks_get_grey_images():
    assert fitted(Image.new("RGB", (50, 40), "red"), (1, 32, 32)).shape == (1, 32, 32)
    assert fitted(Image.new("RGBA", (20, 400)), (3, 227, 227)).shape == (3, 227, 227)
