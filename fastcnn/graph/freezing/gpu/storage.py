"""Files of models frozen on a GPU, also within pickles: a header and raw values, read without running what they say.

    8 bytes   magic "FASTCNNG"
    8 bytes   length of the header, little-endian
    header    JSON: format, versions, the GPU, the settings, lengths of the parts, the program
    payload   the parts: the storages in which the program's constants lie
    32 bytes  SHA-256 of everything before

A CUDA graph holds addresses, so what it was captured from is stored, and captured again by whoever loads it. Which
kernels there are and how ATen lays out results depends on versions and the GPU's architecture; a file of others is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn import _native
from fastcnn.graph.freezing.gpu.interpreting import Interpreted, require_sound
from fastcnn.graph.freezing.gpu.program import Constant, Program, Spec
from fastcnn.graph.freezing.gpu.settings import Settings
from fastcnn.graph.freezing.storage import Incompatible, reading

MAGIC = b"FASTCNNG"
FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs
_DIGEST = hashlib.sha256().digest_size


class Gpu(NamedTuple):
    """What a file was made on. ``capability`` is None for the CPU that tests use in a GPU's place."""

    name: str
    capability: tuple[int, int] | None

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        if device.type != "cuda":
            return cls(device.type, None)
        return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    def __str__(self) -> str:
        if self.capability is None:
            return self.name
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def _versions() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fastcnn": _native.build_info()["version"],
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def as_bytes(program: Program, parts: Sequence[Tensor], settings: Settings, device: torch.device) -> bytes:
    """A file's content."""
    values = [part.cpu().numpy().tobytes() for part in parts]
    gpu = Gpu.of(device)
    header = {
        **_versions(),
        "gpu": {"name": gpu.name, "capability": gpu.capability},
        "settings": settings.to_dict(),
        "lengths": [len(part) for part in values],
        "program": program.to_dict(),
    }
    text = json.dumps(header).encode()
    content = b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *values])
    return content + hashlib.sha256(content).digest()


def from_bytes(content: bytes, name: str, device: torch.device | None) -> tuple[Interpreted, Settings]:
    """The model of a file, on a device, for inputs as its program says.

    Nothing in it is executed: operators are looked up in a fixed list, and the sizes of all tensors are checked before
    there is memory for any. ``device`` is None where there is no GPU.

    Raises:
        ValueError: it is not such a file, is damaged, or was written for another format, version or kind of GPU.
    """
    if content[:8] != MAGIC:
        raise ValueError(f"{name} is not a model that was frozen on a GPU")
    with reading(name):
        if hashlib.sha256(memoryview(content)[:-_DIGEST]).digest() != content[-_DIGEST:]:
            raise ValueError("its content is not what was written")
        end = 16 + int.from_bytes(content[8:16], "little")
        header = json.loads(content[16:end])
        payload = memoryview(content)[end:-_DIGEST]
        device = _require_compatible(header, name, device)
        settings, program = Settings.from_dict(header["settings"]), Program.from_dict(header["program"])
        _require_inputs(program)
        lengths = [int(length) for length in header["lengths"]]
        if any(length < 0 for length in lengths) or sum(lengths) != len(payload):
            raise ValueError("its values are not as long as they should be")
        for constant in program.constants:
            _require_within(constant, lengths)
        require_sound(program, device, _memory_of(device))
    return Interpreted(program, _constants(program, payload, lengths, device), device), settings


def as_loaded(program: Program, parts: Sequence[Tensor], device: torch.device) -> Interpreted:
    """What a file would give, with constants that stay where they are."""
    again = Program.from_dict(json.loads(json.dumps(program.to_dict())))
    constants = [_view(parts[constant.part], constant.offset, constant.spec) for constant in again.constants]
    return Interpreted(again, constants, device)


def with_parameters(program: Program, parts: Sequence[Tensor], device: torch.device) -> Interpreted:
    """A program to be captured: its constants stay where they are, and what kernels derive from them is kept."""
    constants = [
        _parameter(_view(parts[constant.part], constant.offset, constant.spec)) for constant in program.constants
    ]
    return Interpreted(program, constants, device)


def _parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _require_compatible(header: dict[str, Any], name: str, device: torch.device | None) -> torch.device:
    for key, ours in _versions().items():
        if header[key] != ours:
            raise Incompatible(f"{name} was written for {key} {header[key]}, here it is {ours}: freeze the model again")
    capability = header["gpu"]["capability"]
    gpu = Gpu(str(header["gpu"]["name"]), None if capability is None else (int(capability[0]), int(capability[1])))
    if device is None:
        raise Incompatible(f"{name} was frozen on a GPU, {gpu}, and here is none: freeze the model again for the CPU")
    here = Gpu.of(device)
    if here.capability != gpu.capability:
        raise Incompatible(
            f"{name} was frozen on {gpu}, and this is {here}, of another architecture: freeze the model again"
        )
    return device


def _require_inputs(program: Program) -> None:
    if not program.inputs:
        raise ValueError("it takes no input")
    for spec in program.inputs:
        if spec.torch_dtype not in DTYPES or 0 in spec.shape:
            raise ValueError(f"an input of {spec}")


def _require_within(constant: Constant, lengths: Sequence[int]) -> None:
    if constant.part >= len(lengths):
        raise ValueError("a constant lies in no part")
    if (constant.offset + constant.spec.reach) * constant.spec.torch_dtype.itemsize > lengths[constant.part]:
        raise ValueError("a constant reaches beyond its part")


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _constants(program: Program, payload: memoryview, lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    parts, at = [], 0
    for length in lengths:
        part = torch.empty(length, dtype=torch.uint8)  # aligned, unlike the file's own bytes
        if length:
            part.copy_(torch.frombuffer(bytearray(payload[at : at + length]), dtype=torch.uint8))
        parts.append(part.to(device))
        at += length
    constants = []
    for constant in program.constants:
        constants.append(_parameter(_view(parts[constant.part], constant.offset, constant.spec)))
    return constants


def _view(part: Tensor, offset: int, spec: Spec) -> Tensor:
    item = spec.torch_dtype.itemsize
    return part[: part.numel() // item * item].view(spec.torch_dtype).as_strided(spec.shape, spec.strides, offset)
