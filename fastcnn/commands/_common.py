"""What the subcommands share: options, building networks and inputs, progress, JSON."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.backends import BACKENDS, unavailable
from fastcnn.models import create_model, list_models, model_info
from fastcnn.verification import calibrate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UsageError(Exception):
    """Something the user gave cannot be used: one line on standard error, exit code 2."""


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, is {text!r}")
    return value


def batches(text: str) -> tuple[int, ...]:
    """``"1,32,256"``: positive whole numbers, each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def add_command(
    commands: Any, name: str, run: Any, summary: str, description: str | None = None
) -> argparse.ArgumentParser:  # fmt: skip
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description or summary)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="a network, or a pattern such as 'resnet*'")


def add_network_options(parser: argparse.ArgumentParser, *, batch: int, several_batches: bool = False) -> None:
    if several_batches:
        parser.add_argument(
            "--batch", type=batches, default=(batch,), metavar="N[,N...]", help=f"images at a time ({batch})"
        )
    else:
        parser.add_argument("--batch", type=positive, default=batch, help="images at a time (%(default)s)")
    parser.add_argument("--size", type=positive, help="image height and width (the network's own)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (a GPU where there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--weights", metavar="PATH", help="a checkpoint; otherwise weights are random")
    parser.add_argument("--num-classes", type=positive, help="the network's classes (its own number)")


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help="force fastcnn's kernels of one kind")


def check_backend(name: str | None) -> None:
    reason = None if name is None else unavailable(name)
    if reason is not None:
        raise UsageError(f"backend {name!r} cannot be used here: {reason}")


def chosen_names(patterns: list[str], everything: bool = False) -> list[str]:
    """The networks that names and patterns stand for, in the registry's order of each."""
    if everything:
        return list_models()
    if not patterns:
        raise UsageError("name at least one network (`fastcnn list` shows them)")
    names: list[str] = []
    for pattern in patterns:
        if any(c in pattern for c in "*?["):
            found = fnmatch.filter(list_models(), pattern)
            if not found:
                raise UsageError(f"no network's name matches {pattern!r} (`fastcnn list` shows them)")
        else:
            found = [known_name(pattern)]
        names += [name for name in found if name not in names]
    return names


def known_name(name: str) -> str:
    try:
        return model_info(name).name
    except ValueError as error:
        raise UsageError(str(error)) from None


def chosen_device(options: argparse.Namespace) -> torch.device:
    """The device that was asked for, after setting the number of threads."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, is {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, is {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"--device {text}: PyTorch sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
    return device


def input_shape(name: str, batch: int, size: int | None) -> tuple[int, int, int, int]:
    channels, height, width = model_info(name).input_size
    return (batch, channels, size or height, size or width)


def build(
    name: str, options: argparse.Namespace, device: torch.device, *, shape: tuple[int, int, int, int] | None
) -> nn.Module:
    """The network in eval mode. Without a checkpoint its random weights are calibrated on inputs of ``shape``."""
    keywords = {} if options.num_classes is None else {"num_classes": options.num_classes}
    if options.weights is not None:
        try:
            return create_model(name, weights=options.weights, **keywords).eval().to(device, DTYPES[options.dtype])
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from None
    torch.manual_seed(0)
    model = create_model(name, **keywords).eval().to(device)
    if shape is not None:
        with refusing_sizes(name, options):
            calibrate(model, random_images((max(2, shape[0]), *shape[1:]), device, torch.float32))
    return model.to(DTYPES[options.dtype])


@contextlib.contextmanager
def refusing_sizes(name: str, options: argparse.Namespace) -> Iterator[None]:
    """Where a size was asked for, what the network says against it is the user's error, not a failed check."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if options.size is None:
            raise
        raise UsageError(f"{name} does not take images of {options.size}x{options.size}: {error}") from None


def random_images(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normally distributed, as normalised photographs roughly are; the same for a shape everywhere."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape) % 997)
    return torch.randn(shape, generator=generator).to(device, dtype)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def print_json(document: object) -> None:
    # Infinite and undefined numbers have no form in JSON: they become strings.
    print(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Progress:
    """What is being done, on standard error: one line that changes on a terminal, one line a stage elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage = ""
        self._shown = 0.0
        self._width = 0

    def stage(self, text: str) -> None:
        """A part of the work begins."""
        self._stage = text
        if self._terminal:
            self._show(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """A step within the stage."""
        if self._terminal and time.monotonic() - self._shown > 0.1:
            self._show(f"{self._stage}: {text}")

    def clear(self) -> None:
        if self._terminal and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0

    def _show(self, text: str) -> None:
        self._shown = time.monotonic()
        text = text[:118]
        print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
        self._width = len(text)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    shown = Progress()
    try:
        yield shown
    finally:
        shown.clear()
