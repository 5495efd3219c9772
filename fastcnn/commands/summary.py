"""``fastcnn summary``: a network's layers, their volumes, counts and receptive fields."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import torch
from torch import nn

from fastcnn.analysis import summary
from fastcnn.commands import _common as common
from fastcnn.models import create_model, model_info

DESCRIPTION = """Show every layer's output volume, parameters, multiply-accumulates, activation memory and receptive
field, and their totals. Nothing is computed, and no weights are needed."""

_PREFIX = "torchvision:"


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "summary", run, "show a network's layers, counts and volumes", DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="a network (`fastcnn list` shows them), or torchvision:NAME")
    parser.add_argument("--size", type=common.positive, nargs=2, metavar=("H", "W"), help="image (the network's own)")
    parser.add_argument("--batch", type=common.positive, default=1, help="images at a time (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(common.DTYPES), default="fp32", help="(%(default)s)")


def run(options: argparse.Namespace) -> int:
    if options.name.startswith(_PREFIX):
        model, size = _torchvision(options.name.removeprefix(_PREFIX))
        name = options.name
    else:
        name = common.known_name(options.name)
        size = model_info(name).input_size
        with torch.device("meta"):  # shapes are enough
            model = create_model(name)
    size = (size[0], *(options.size or size[1:]))
    try:
        found = summary(model, (options.batch, *size), dtype=common.DTYPES[options.dtype], name=name)
    except (ValueError, RuntimeError) as error:
        if options.size is None:
            raise
        reason = str(error).splitlines()[0]
        raise common.UsageError(f"{name} does not take images of {size[1]}x{size[2]}: {reason}") from None
    if options.json:
        common.print_json(found.to_dict())
    else:
        print(found)
    return 0


def _torchvision(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A classifier of torchvision, untrained, and the input size of its weights."""
    if importlib.util.find_spec("torchvision") is None:
        raise common.UsageError(f"{_PREFIX}{name} needs torchvision: pip install torchvision")
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise common.UsageError(f"torchvision has no classification network named {name!r}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    side = weights.transforms().crop_size[0]
    builder = torchvision.models.get_model_builder(name)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # theirs takes minutes
    try:
        with torch.device("meta"):
            model = builder(weights=None, **options)
    except RuntimeError:  # its constructor reads values
        model = builder(weights=None, **options)
    return model, (3, side, side)
