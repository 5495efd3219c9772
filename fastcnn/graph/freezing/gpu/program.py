"""A captured model as plain data: operators in order, with their arguments; what a file of a frozen model holds.

Values are numbered: first the inputs, then the constants, then each operator's results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.graph.freezing.gpu.operators import name_of, operator_named
from fastcnn.graph.freezing.structures import filled

DTYPES_BY_NAME = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip
FORMATS_BY_NAME = {
    str(form).removeprefix("torch."): form
    for form in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}
_MOST = 2**62  # bytes, elements and strides stay below it, so that sums of a few fit into 64 bits


class Value(NamedTuple):
    """An argument that is a tensor: its number."""

    number: int


class Spec(NamedTuple):
    """A tensor's shape, strides in elements, and dtype by name."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Raises ValueError for a dtype that no file holds."""
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES_BY_NAME:
            raise ValueError(f"it has a tensor of {tensor.dtype}")
        return cls(tuple(tensor.shape), tuple(tensor.stride()), name)

    @classmethod
    def from_data(cls, data: Any) -> Spec:
        """Raises TypeError or ValueError for what is no tensor's."""
        shape, strides, dtype = data
        if dtype not in DTYPES_BY_NAME or len(shape) != len(strides):
            raise ValueError("a tensor's shape, strides or dtype are none")
        if not all(type(number) is int and 0 <= number < _MOST for number in (*shape, *strides)):
            raise ValueError("a tensor's size or stride is no number of elements")
        spec = cls(tuple(shape), tuple(strides), dtype)
        if spec.reach * spec.torch_dtype.itemsize >= _MOST:
            raise ValueError("a tensor is larger than any memory")
        return spec

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES_BY_NAME[self.dtype]

    @property
    def reach(self) -> int:
        """Elements from the first to the end of the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class Constant(NamedTuple):
    """A tensor within a part of the file: ``offset`` is in elements."""

    part: int
    offset: int
    spec: Spec


class Step(NamedTuple):
    """One operator's call. Tensors among its arguments are :class:`Value`; ``device`` stands for the program's own."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Spec, ...]

    def reads(self) -> list[int]:
        """The numbers of the tensors among its arguments."""
        return list(values_in([self.args, list(self.kwargs.values())]))


class _Device:
    """Stands for the program's device among arguments."""


DEVICE = _Device()


@dataclass
class Program:
    inputs: list[Spec]
    constants: list[Constant]
    steps: list[Step]
    outputs: list[int]  # values' numbers
    structure: Any  # of the result: see structures.py

    def to_dict(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "constants": self.constants,
            "steps": [
                [
                    name_of(step.operator), _as_data(list(step.args)),
                    {key: _as_data(value) for key, value in step.kwargs.items()}, step.results,
                ]
                for step in self.steps
            ],
            "outputs": self.outputs,
            "structure": self.structure,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Program:
        """Raises KeyError, TypeError or ValueError for data that no program gave."""
        inputs = [Spec.from_data(spec) for spec in data["inputs"]]
        constants = [Constant(_count(part), _count(at), Spec.from_data(spec)) for part, at, spec in data["constants"]]
        known = len(inputs) + len(constants)
        steps = []
        for name, args, kwargs, results in data["steps"]:
            step = Step(
                operator_named(name),
                tuple(_from_data(arg, known) for arg in args),
                {str(key): _from_data(value, known) for key, value in kwargs.items()},
                tuple(Spec.from_data(spec) for spec in results),
            )
            known += len(step.results)
            steps.append(step)
        outputs = [_count(number) for number in data["outputs"]]
        if any(number >= known for number in outputs):
            raise ValueError("a result is no value")
        filled(data["structure"], outputs)
        return cls(inputs, constants, steps, outputs, data["structure"])


def values_in(argument: Any) -> Iterator[int]:
    """The numbers of the tensors in an argument."""
    if isinstance(argument, Value):
        yield argument.number
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from values_in(each)


# ---- arguments in JSON -----------------------------------------------------------------------------------------------


def _as_data(argument: Any) -> Any:
    if isinstance(argument, Value):
        return {"value": argument.number}
    if isinstance(argument, (list, tuple)):
        return [_as_data(each) for each in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.memory_format):
        return {"memory_format": str(argument).removeprefix("torch.")}
    if argument is DEVICE:
        return {"device": "own"}
    return argument


def _from_data(data: Any, known: int) -> Any:
    """An argument; ``known`` values precede its operator's."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [_from_data(each, known) for each in data]
    if type(data) is dict and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "value" and type(content) is int and 0 <= content < known:
            return Value(content)
        if kind == "device":
            return DEVICE
        if kind == "dtype":
            return DTYPES_BY_NAME[content]
        if kind == "memory_format":
            return FORMATS_BY_NAME[content]
    raise ValueError("an argument is none")


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < _MOST:
        raise ValueError("a number is none")
    return number
