"""What the training examples share: one loop, an evaluation, a random shift, a plot of the learning curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn

PROGRESS_SECONDS = 10.0


@dataclass
class History:
    """Of every step the training loss and accuracy; of every epoch the accuracy on images not trained on."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    """Steps done at the end of each epoch."""
    test_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def last_epoch(self) -> tuple[float, float]:
        """Mean training loss and accuracy of the last epoch, as it went: in train mode, augmented."""
        start = self.epoch_ends[-2] if len(self.epoch_ends) > 1 else 0
        losses, accuracies = self.losses[start:], self.accuracies[start:]
        return sum(losses) / len(losses), sum(accuracies) / len(accuracies)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to ``pixels`` in each direction, on a border of zeros: (N, C, H, W), channels last."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    offsets = torch.randint(2 * pixels + 1, (2, n, 1))
    rows, columns = offsets[0] + torch.arange(h), offsets[1] + torch.arange(w)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 200) -> float:
    """The share of images that the model, in eval mode, gets right."""
    model.eval()
    device = next(model.parameters()).device
    predictions = [model(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)]
    return (torch.cat(predictions) == labels).float().mean().item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    augment: Callable[[Tensor], Tensor],
    name: str,
) -> History:
    """Train with a one-cycle schedule that peaks at the optimizer's learning rate; the last epoch's weights stay."""
    images, labels = training
    device = next(model.parameters()).device
    batches = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=epochs * batches
    )
    history, start = History(), time.perf_counter()
    spoken = start
    for epoch in range(1, epochs + 1):
        model.train()
        for step, chosen in enumerate(torch.randperm(len(images)).split(batch_size), 1):
            x, y = augment(images[chosen]).to(device), labels[chosen].to(device)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.losses.append(loss.item())
            history.accuracies.append((logits.argmax(1) == y).float().mean().item())
            if time.perf_counter() - spoken > PROGRESS_SECONDS:
                spoken = time.perf_counter()
                print(f"{name}: epoch {epoch}/{epochs}, batch {step}/{batches}, loss {loss.item():.3f}", flush=True)
        history.epoch_ends.append(len(history.losses))
        history.test_accuracies.append(evaluate(model, *test))
        history.seconds = time.perf_counter() - start
        spoken = time.perf_counter()
        loss_mean, accuracy = history.last_epoch()
        print(
            f"{name}: epoch {epoch}/{epochs}: training loss {loss_mean:.3f}, training accuracy {accuracy:.1%}, "
            f"test accuracy {history.test_accuracies[-1]:.1%}, {history.seconds:.1f} s",
            flush=True,
        )
    return history


def plot(histories: Mapping[str, History], path: Path, title: str) -> None:
    """Learning curves as an image at ``path``; where matplotlib is missing, a line that says so."""
    try:
        import matplotlib
    except ImportError:
        print("no learning-curve plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, history in histories.items():
        steps = len(history.losses)
        for axis, values in zip(axes, (history.losses, history.accuracies), strict=False):
            smooth = _moving_average(values, max(1, steps // 20))
            axis.plot(range(steps - len(smooth) + 1, steps + 1), smooth, label=name)
        axes[2].plot(history.epoch_ends, history.test_accuracies, marker="o", label=name)
    for axis, label in zip(axes, ("training loss", "training accuracy", "test accuracy"), strict=True):
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"learning curves: {path}")


def _moving_average(values: list[float], width: int) -> list[float]:
    return torch.tensor(values).unfold(0, width, 1).mean(1).tolist()


def print_fallbacks() -> None:
    """Say which calls no fused kernel covered."""
    fallbacks = fastcnn.fallbacks()
    print(f"calls that no kernel of fastcnn covered: {fallbacks or 'none'}")
