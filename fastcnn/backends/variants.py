"""Configurations of a backend's kernels, as backends of their own that the tuner can time and choose by name.

``"triton:128x64x32w4s3g8"`` is the Triton backend with its conv2d forced to that tile. A backend module offers variants
by defining

    variants(operator, *args) -> sequence of str    # worth timing for this call of the kernel contract
    variant(text) -> object                         # with the contract's functions and `unsupported`

A backend or variant whose kernels are compiled when first used may define

    compilation(operator, *args) -> function | None # compiles what the call needs, in any thread
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from fastcnn.backends import backend_module


def names(backend: str, operator: str, args: tuple[object, ...]) -> list[str]:
    """The variants of a backend that are worth timing for a call, as ``"backend:variant"``."""
    module = importlib.import_module(f"fastcnn.backends.{backend}")
    offered: Sequence[str] = ()
    if hasattr(module, "variants"):
        offered = module.variants(operator, *args)
    elif backend == "triton" and operator == "conv2d":
        offered = _triton_tiles(args)
    return [f"{backend}:{text}" for text in offered]


def variant(name: str) -> ModuleType:
    """The backend that ``"backend:variant"`` names.

    Raises:
        ValueError: there is no such variant.
    """
    backend, _, text = name.partition(":")
    module = importlib.import_module(f"fastcnn.backends.{backend}")
    if hasattr(module, "variant"):
        return module.variant(text)
    if backend == "triton":
        return _TritonConv2d(text)  # type: ignore[return-value]
    raise ValueError(f"backend {backend!r} has no variants, so not {name!r}")


def compilation(name: str, operator: str, args: tuple[object, ...]) -> Callable[[], object] | None:
    """What compiles the kernels that a backend or variant needs for a call, or None where there is nothing to do."""
    module = backend_module(name)
    return module.compilation(operator, *args) if hasattr(module, "compilation") else None


_TILE = re.compile(r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)g(\d+)")


def _triton_tiles(args: tuple[Any, ...]) -> list[str]:
    kernels = importlib.import_module("fastcnn.triton_kernels.conv2d")
    if not hasattr(kernels, "conv2d_configs"):
        return []
    out, input, weight, stride, padding, dilation, groups = *args[:3], *args[10:14]
    tiles = kernels.conv2d_configs(out, input, weight, stride, padding, dilation, groups)
    # The first is the static choice, which the plain backend uses.
    return [f"{t.block_m}x{t.block_n}x{t.block_k}w{t.num_warps}s{t.num_stages}g{t.group_m}" for t in tiles[1:]]


class _TritonConv2d:
    """The Triton backend's conv2d with one tile."""

    def __init__(self, text: str) -> None:
        match = _TILE.fullmatch(text)
        if match is None:
            raise ValueError(f"a Triton tile looks like '128x64x32w4s3g8', not {text!r}")
        block_m, block_n, block_k, warps, stages, group = map(int, match.groups())
        self._tile_arguments = (block_m, block_n, block_k, warps, stages)
        self._group = group
        self._backend = importlib.import_module("fastcnn.backends.triton")

    def unsupported(self, operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
        if operator != "conv2d":
            return f"no tile for {operator}"
        return self._backend.unsupported(operator, device, dtype, **facts)

    def compilation(self, operator: str, *args: Any) -> Callable[[], object] | None:
        return self._backend.compilation(operator, *args, config=self._tile())

    def _tile(self) -> Any:
        tile_type = importlib.import_module("fastcnn.triton_kernels.configs").Tile
        return tile_type(*self._tile_arguments, group_m=self._group)

    def conv2d(self, out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
        importlib.import_module("fastcnn.triton_kernels.conv2d").conv2d(
            out, input, weight, *rest,
            prepared_weight=self._backend.prepared_weight(weight, rest[-1]),  # the last argument is groups
            config=self._tile(),
        )  # fmt: skip
