"""Runs a program: a module that calls its operators in order, and frees each value behind the last that reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastcnn.graph.freezing.gpu.program import DEVICE, Program, Spec, Value, values_in
from fastcnn.graph.freezing.structures import filled


class Interpreted(nn.Module):
    """A program with its constants, which are parameters where they are floating, as in the model they come from:
    kernels keep what they derive from those.
    """

    def __init__(self, program: Program, constants: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self.program, self._device = program, device
        self.constants = tuple(constants)
        for i, tensor in enumerate(self.constants):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"constant{i}", tensor)
            else:
                self.register_buffer(f"constant{i}", tensor)
        self._last_reads = _last_reads(program)

    def forward(self, *inputs: Tensor) -> Any:
        values = _run(self.program, (*inputs, *self.constants), self._device, self._last_reads)
        return filled(self.program.structure, [values[number] for number in self.program.outputs])


def _last_reads(program: Program) -> list[list[int]]:
    """For each step the values that nothing reads after it."""
    first = len(program.inputs) + len(program.constants)
    last: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        for number in range(first, first + len(step.results)):
            last[number] = i
        first += len(step.results)
        last.update(dict.fromkeys(values_in([step.args, list(step.kwargs.values())]), i))
    dying: list[list[int]] = [[] for _ in program.steps]
    for number, i in last.items():
        if number not in program.outputs:
            dying[i].append(number)
    return dying


def _run(
    program: Program, given: Sequence[Tensor], device: torch.device, last_reads: Sequence[Sequence[int]] = ()
) -> dict[int, Tensor]:
    """The values that live at the end, by number."""
    values = dict(enumerate(given))
    first = len(values)
    for i, step in enumerate(program.steps):
        args = [_with(values, arg, device) for arg in step.args]
        result = step.operator(*args, **{key: _with(values, arg, device) for key, arg in step.kwargs.items()})
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if len(leaves) != len(step.results):
            raise ValueError(f"{step.operator} gives {len(leaves)} tensors, not {len(step.results)}")
        for leaf in leaves:
            values[first] = leaf
            first += 1
        del args, result, leaves
        if last_reads:
            for number in last_reads[i]:
                del values[number]
    return values


def _with(values: dict[int, Tensor], argument: Any, device: torch.device) -> Any:
    if isinstance(argument, Value):
        return values[argument.number]
    if isinstance(argument, list):
        return [_with(values, each, device) for each in argument]
    return device if argument is DEVICE else argument


def require_sound(program: Program, device: torch.device, memory: int) -> None:
    """Run a program on fake tensors, which have sizes and no memory.

    Raises:
        ValueError, TypeError, RuntimeError and others: an operator refuses its arguments, gives other tensors than the
            program says, or one of more bytes than ``memory``.
    """
    with FakeTensorMode() as mode, torch.no_grad():
        specs = [*program.inputs, *(constant.spec for constant in program.constants)]
        given = [torch.empty_strided(s.shape, s.strides, dtype=s.torch_dtype, device=device) for s in specs]
        for step in program.steps:
            specs += step.results
        del mode
        values = _run(program, given, device)
    for number, spec in enumerate(specs):
        tensor = values[number]
        if Spec.of(tensor) != spec or tensor.device != given[0].device:
            raise ValueError(f"value {number} is {Spec.of(tensor)} on {tensor.device}, not {spec} on {given[0].device}")
        if max(math.prod(spec.shape), spec.reach) * spec.torch_dtype.itemsize > memory:
            raise ValueError(f"value {number} of shape {spec.shape} needs more than the memory that there is")
