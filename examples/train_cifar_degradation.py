"""The degradation experiment of He et al. (arXiv:1512.03385, figure 6), small: does a deeper network train worse?

Trains ResNet-20, plain-56 (the same 56 layers without shortcuts) and ResNet-56 alike, on fused modules, on 4,660
CIFAR-10 images, and follows training loss, training accuracy and the accuracy on 400 test images. A deeper network
holds the shallower one, so a higher *training* loss is not overfitting: it is a failure to optimise. Only the last
epoch counts; the test images choose nothing.

    python examples/train_cifar_degradation.py                             # a quarter of an hour or more on two cores
    python examples/train_cifar_degradation.py --images 2000 --epochs 5    # about seven minutes
    python examples/train_cifar_degradation.py --short                     # seconds: only shows that it runs

Reads cifar10_train_4660.npz and cifar10_test_400.npz (`images` uint8 (N, 3, 32, 32), `labels`) from FASTCNN_DATA, else
from ../shared/data beside the project's root. Exit status: 0 it ran to its end, 1 a loss was not finite, 2 bad input.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import numpy
import torch
from _training import History, plot, print_fallbacks, random_shift, train
from torch import Tensor

import fastcnn

MODELS = ("resnet20_cifar", "plain56_cifar", "resnet56_cifar")
COMPARISONS = [(MODELS[1], MODELS[0]), (MODELS[1], MODELS[2]), (MODELS[2], MODELS[0])]
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def data_folder() -> Path:
    return Path(os.environ.get("FASTCNN_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def load(file: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, normalised, and their labels."""
    with numpy.load(file) as data:
        images, labels = data["images"][:count], data["labels"][:count]
    return (torch.from_numpy(images).float().div(255) - MEAN) / STD, torch.from_numpy(labels).long()


def shift_and_mirror(images: Tensor) -> Tensor:
    """Up to 4 pixels each way, every second image mirrored: the paper's augmentation."""
    images = random_shift(images, 4)
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


def compare(histories: dict[str, History], worse: str, better: str) -> None:
    """Say which of two networks has the higher training loss, if both were trained."""
    if worse in histories and better in histories:
        first, second = (histories[name].last_epoch()[0] for name in (worse, better))
        relation = "higher than" if first > second else "not higher than"
        print(f"result: {worse}'s training loss, {first:.3f}, is {relation} {better}'s, {second:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train plain and residual networks alike on a part of CIFAR-10.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=" ".join(MODELS))
    parser.add_argument("--short", action="store_true", help="two batches of 16 images, twice; 40 test images")
    parser.add_argument("--epochs", type=int, help="default 5, with --short 2")
    parser.add_argument("--images", type=int, help="training images; default all 4660, with --short 32")
    parser.add_argument("--output", type=Path, default=Path("cifar_degradation.png"), help="plot (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (%(default)s)")
    options = parser.parse_args()
    epochs = options.epochs if options.epochs is not None else 2 if options.short else 5
    count = options.images if options.images is not None else 32 if options.short else 4660
    batch_size = 16 if options.short else 32
    if epochs < 1:
        parser.error(f"--epochs must be at least 1, is {epochs}")
    if count < 2:
        parser.error(f"--images must be at least 2, is {count}")
    if unknown := set(options.models) - set(fastcnn.list_models()):
        parser.error(f"--models must be names that `fastcnn list` shows, not {', '.join(sorted(unknown))}")
    folder = data_folder()
    files = folder / "cifar10_train_4660.npz", folder / "cifar10_test_400.npz"
    if missing := [file.name for file in files if not file.exists()]:
        print(f"{' and '.join(missing)} not in {folder}: set FASTCNN_DATA to the folder with them", file=sys.stderr)
        return 2

    training, test = load(files[0], count), load(files[1], 40 if options.short else 400)
    threads = torch.get_num_threads()
    print(f"{len(training[0])} images to train on, {len(test[0])} to test on, {threads} threads", flush=True)
    histories = {}
    for name in options.models:
        torch.manual_seed(options.seed)
        model = fastcnn.create_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        histories[name] = train(
            model,
            optimizer,
            training,
            test,
            epochs=epochs,
            batch_size=batch_size,
            augment=shift_and_mirror,
            name=name,
        )
    plot(histories, options.output, f"{len(training[0])} CIFAR-10 images, {epochs} epochs")
    print_fallbacks()

    print(f"\n{'model':<16} {'training loss':>13} {'training acc.':>13} {'test acc.':>9} {'seconds':>8}   (last epoch)")
    for name, history in histories.items():
        loss, accuracy = history.last_epoch()
        tested = history.test_accuracies[-1]
        print(f"{name:<16} {loss:>13.3f} {accuracy:>13.1%} {tested:>9.1%} {history.seconds:>8.0f}")
    if options.short:
        print("result: it runs; a short run says nothing about which network trains better")
    else:
        for worse, better in COMPARISONS:
            compare(histories, worse, better)
        error = math.sqrt(0.25 / len(test[0]))
        print(f"one seed, {epochs} epochs; standard error of the {len(test[0])} images' accuracy: up to {error:.1%}")
    finite = all(math.isfinite(loss) for history in histories.values() for loss in history.losses)
    if not finite:
        print("FAILED: a training loss was not finite")
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
