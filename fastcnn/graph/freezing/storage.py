"""Files of frozen models, also within pickles: a JSON header and raw values, read without running what they say.

    8 bytes  magic "FASTCNNF"
    8 bytes  length of the header, little-endian
    header   JSON: format, fastcnn's version, instruction set, SHA-256 and length of the payload, the recipe
    payload  constants, then each packed weight

Packed weights fit one instruction set and one version of the kernels; a file of another is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.recipe import Recipe

MAGIC = b"FASTCNNF"
FORMAT = 7


def as_bytes(recipe: Recipe, constants: Tensor, weights: Sequence[cpp.PackedWeight]) -> list[bytes]:
    """A file's content, in pieces."""
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
    return [MAGIC + len(text).to_bytes(8, "little") + text, *parts]


class Stored(NamedTuple):
    recipe: Recipe
    constants: Tensor
    weights: list[cpp.PackedWeight]


T = TypeVar("T")


def from_bytes(content: bytes, name: str, make: Callable[[Stored], T]) -> T:
    """What ``make`` makes of a file's content.

    Nothing in it is executed: steps are looked up in a fixed list, and every address is checked.

    Raises:
        ValueError: it is not such a file, is damaged, or was written for another format, version or instruction set.
    """
    if content[:8] != MAGIC:
        raise ValueError(f"{name} is not a frozen fastcnn model")
    end = 16 + int.from_bytes(content[8:16], "little")
    with reading(name):
        header = json.loads(content[16:end])
        _require_compatible(header, name)
        payload = memoryview(content)[end:]
        if sum(header["lengths"]) != len(payload) or hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise ValueError("its values are not those that were written")
        return make(_read(header, payload))


class Incompatible(Exception):
    """A sound file that this fastcnn, or this processor or GPU, cannot run."""


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Around the reading of a file's content: all that can go wrong in it is a ValueError."""
    try:
        yield
    except Incompatible as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _require_compatible(header: dict[str, Any], name: str) -> None:
    here = {
        "format": FORMAT,
        "fastcnn": _native.build_info()["version"],
        "instruction_set": _native.cpu_instruction_set(),
    }
    for key, ours in here.items():
        if header[key] != ours:
            raise Incompatible(f"{name} was written for {key} {header[key]}, here it is {ours}: freeze the model again")


def _read(header: dict[str, Any], payload: memoryview) -> Stored:
    recipe = Recipe.from_dict(header["recipe"])
    lengths = [int(length) for length in header["lengths"]]
    if len(lengths) != 1 + len(recipe.weights) or any(length < 0 for length in lengths):
        raise ValueError("it does not hold one part for each weight")
    constants = torch.empty(lengths[0], dtype=torch.uint8)  # aligned, unlike the file's own bytes
    if lengths[0]:
        constants.copy_(torch.frombuffer(bytearray(payload[: lengths[0]]), dtype=torch.uint8))
    at = lengths[0]
    weights = []
    for length, (shape, groups, algorithm, dtype) in zip(lengths[1:], recipe.weights, strict=True):
        weights.append(cpp.packed_weight_from(payload[at : at + length], shape, groups, algorithm, dtype))
        at += length
    return Stored(recipe, constants, weights)
