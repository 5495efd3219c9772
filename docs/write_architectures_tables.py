"""Writes the tables of docs/architectures.md: every registered network's parameters and multiply-accumulates.

    python docs/write_architectures_tables.py            rewrites what is between <!-- table: NAME --> and <!-- end -->
    python docs/write_architectures_tables.py --check    exits 1 when the page has other numbers

The networks are built and run on the meta device: nothing is computed. Multiply-accumulates (MACs) are those of
convolutions and linear layers, for one image, as in fastcnn.summary.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.models import model_info

PAGE = Path(__file__).with_name("architectures.md")

# Table: the names in it, a regular expression. Every registered name must be in exactly one.
TABLES = {
    "lenet": r"lenet5.*",
    "alexnet": r"alexnet.*",
    "zfnet": r"zfnet",
    "vgg": r"vgg.*",
    "googlenet": r"googlenet.*",
    "plain": r"plain.*",
    "resnet": r"resnet\d+(_cifar)?",
    "preresnet": r"preresnet.*",
    "wide": r"wide_resnet.*|wrn.*",
    "resnext": r"resnext.*",
    "stochastic-depth": r"resnet\d+_sd_cifar",
    "densenet": r"densenet.*",
}


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and linear layers in evaluation, one image, ``model`` on the meta device."""
    macs = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        else:  # LeNet's table of filters runs, and counts, as a dense convolution
            filters: Any = module
            in_channels = filters.in_channels // getattr(filters, "groups", 1)
            macs += output.numel() * in_channels * filters.weight.shape[-2:].numel()

    for module in model.modules():
        if isinstance(module, nn.Linear) or "Conv2d" in type(module).__name__:
            module.register_forward_hook(add)
        elif isinstance(module, nn.BatchNorm2d):  # changes no shape: skipped, to save time
            module.forward = _same  # type: ignore[method-assign]
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return macs


def _same(input: Tensor) -> Tensor:
    return input


def row(name: str) -> str:
    channels, height, width = model_info(name).input_size
    with torch.device("meta"):
        model = fastcnn.create_model(name)
    every = sum(p.numel() for p in model.parameters())
    used = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("aux"))
    parameters = f"{used:,}" + (f" ({every:,} with the auxiliary classifiers)" if every != used else "")
    macs = float(count_macs(model, (channels, height, width)))
    rounded = f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M" if macs >= 1e6 else f"{macs / 1e3:.1f} k"
    return f"| `{name}` | {height}x{width}x{channels} | {parameters} | {rounded} |"


def table(names: list[str]) -> str:
    head = ["| name | input | parameters | MACs |", "|---|---|--:|--:|"]
    return "\n".join([*head, *map(row, names)])


def rewritten(page: str) -> str:
    """The page with fresh tables."""
    names = {key: [n for n in fastcnn.list_models() if re.fullmatch(pattern, n)] for key, pattern in TABLES.items()}
    listed = [name for group in names.values() for name in group]
    if sorted(listed) != sorted(fastcnn.list_models()):
        raise SystemExit("TABLES must hold every name once; look at " + ", ".join(_odd_ones(listed)))
    for key, group in names.items():
        found = list(re.finditer(rf"<!-- table: {re.escape(key)} -->\n(.*?)<!-- end -->", page, re.DOTALL))
        if len(found) != 1:
            raise SystemExit(f"{PAGE.name} has {len(found)} places for table {key!r}, not one")
        start, end = found[0].span(1)
        page = page[:start] + table(group) + "\n" + page[end:]
    return page


def _odd_ones(listed: list[str]) -> list[str]:
    return [name for name in fastcnn.list_models() if listed.count(name) != 1]


def main() -> int:
    old = PAGE.read_text("utf-8")
    new = rewritten(old)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new, "utf-8", newline="\n")
        return 0
    if old != new:
        print(f"{PAGE}: tables differ; run docs/write_architectures_tables.py", file=sys.stderr)
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
