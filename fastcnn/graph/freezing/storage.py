"""Files of frozen models: a JSON header and raw values, read without running anything that the file says.

    8 bytes  magic "FASTCNNF"
    8 bytes  length of the header, little-endian
    header   JSON: format, fastcnn's version, instruction set, SHA-256 and length of the payload, the recipe
    payload  constants, then each packed weight

Packed weights fit one instruction set and one version of the kernels; a file of another is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.frozen import FrozenModel
from fastcnn.graph.freezing.recipe import Recipe

MAGIC = b"FASTCNNF"
FORMAT = 2


def save_frozen(
    path: str | os.PathLike[str], recipe: Recipe, constants: Tensor, weights: Sequence[cpp.PackedWeight]
) -> None:
    parts = [constants.numpy().tobytes(), *(weight.packed() for weight in weights)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    header = {
        "format": FORMAT,
        "fastcnn": _native.build_info()["version"],
        "instruction_set": _native.cpu_instruction_set(),
        "lengths": [len(part) for part in parts],
        "sha256": digest.hexdigest(),
        "recipe": recipe.to_dict(),
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part)


def load_frozen(path: str | os.PathLike[str]) -> FrozenModel:
    """A frozen model from a file that :meth:`FrozenModel.save` wrote.

    Nothing in the file is executed: steps are looked up in a fixed list, and every address is checked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, is damaged, or was written for another format, version or instruction set.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        content = file.read()
    if content[:8] != MAGIC:
        raise ValueError(f"{name} is not a frozen fastcnn model")
    end = 16 + int.from_bytes(content[8:16], "little")
    try:
        header = json.loads(content[16:end])
        _require_compatible(header, name)
        payload = memoryview(content)[end:]
        if sum(header["lengths"]) != len(payload) or hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise ValueError("its values are not those that were written")
        return _rebuilt(header, payload)
    except _Incompatible as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


class _Incompatible(Exception):
    """A sound file that this fastcnn, or this processor, cannot run."""


def _require_compatible(header: dict[str, Any], name: str) -> None:
    here = {
        "format": FORMAT,
        "fastcnn": _native.build_info()["version"],
        "instruction_set": _native.cpu_instruction_set(),
    }
    for key, ours in here.items():
        if header[key] != ours:
            raise _Incompatible(
                f"{name} was written for {key} {header[key]}, here it is {ours}: freeze the model again"
            )


def _rebuilt(header: dict[str, Any], payload: memoryview) -> FrozenModel:
    recipe = Recipe.from_dict(header["recipe"])
    lengths = [int(length) for length in header["lengths"]]
    if len(lengths) != 1 + len(recipe.weights) or any(length < 0 for length in lengths):
        raise ValueError("it does not hold one part for each weight")
    constants = torch.empty(lengths[0], dtype=torch.uint8)  # aligned, unlike the file's own bytes
    if lengths[0]:
        constants.copy_(torch.frombuffer(bytearray(payload[: lengths[0]]), dtype=torch.uint8))
    at = lengths[0]
    weights = []
    for length, (shape, groups, algorithm) in zip(lengths[1:], recipe.weights, strict=True):
        weights.append(cpp.packed_weight_from(payload[at : at + length], shape, groups, algorithm))
        at += length
    return FrozenModel(recipe, constants, weights)
