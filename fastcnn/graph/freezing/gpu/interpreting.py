"""Runs a program: a module that calls its operators in order, and frees each value behind the last that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastcnn.graph.freezing.gpu.fusing import Fusion, argument
from fastcnn.graph.freezing.gpu.program import DEVICE, Program, Spec, Step, Value, values_in
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


def _last_reads(program: Program, also: Mapping[int, Iterable[int]] = MappingProxyType({})) -> list[list[int]]:
    """For each step the values that nothing reads after it. ``also``: what else is to be read behind steps."""
    first = len(program.inputs) + len(program.constants)
    last: dict[int, int] = {}
    for i, step in enumerate(program.steps):
        for number in range(first, first + len(step.results)):
            last[number] = i
        first += len(step.results)
        last.update(dict.fromkeys([*step.reads(), *also.get(i, ())], i))
    dying: list[list[int]] = [[] for _ in program.steps]
    for number, i in last.items():
        if number not in program.outputs:
            dying[i].append(number)
    return dying


def run_substituted(
    program: Program,
    given: Sequence[Tensor],
    device: torch.device,
    fusions: Sequence[Fusion],
    same: Callable[[Tensor, Tensor], bool],
) -> tuple[list[Tensor], bool]:
    """The program's results when each group's own step takes the steps' place, and whether that gave the same as they.

    Each group is judged on the values that it has here: a deep network makes much of the last bit of a value, and its
    results say little of a step. What is behind a group reads the results of the group's own step.
    """
    groups = {fusion.steps[-1]: fusion for fusion in fusions}
    reads = {i: [*fusion.step.reads(), *fusion.values] for i, fusion in groups.items()}
    verdicts: list[bool] = []

    def substitute(i: int, values: dict[int, Tensor]) -> None:
        if i in groups:
            step, numbers = groups[i].step, groups[i].values
            written = _written_by(step)  # by the group's steps before, so that it holds what they gave
            expected = [values[number].clone() for number in (*numbers, *written)]
            values.update(zip(numbers, _called(step, values, device), strict=True))
            verdicts.extend(map(same, [values[number] for number in (*numbers, *written)], expected))

    values = _run(program, given, device, _last_reads(program, reads), substitute)
    return [values[number] for number in program.outputs], all(verdicts)


def _written_by(step: Step) -> list[int]:
    """The values that its operator writes into."""
    return [
        number for one in step.operator._schema.arguments if one.alias_info is not None and one.alias_info.is_write
        for number in values_in(argument(step, one.name))
    ]  # fmt: skip


def _called(step: Step, values: Mapping[int, Tensor], device: torch.device) -> list[Tensor]:
    args = [_with(values, arg, device) for arg in step.args]
    result = step.operator(*args, **{key: _with(values, arg, device) for key, arg in step.kwargs.items()})
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if len(leaves) != len(step.results):
        raise ValueError(f"{step.operator} gives {len(leaves)} tensors, not {len(step.results)}")
    return leaves


def _run(
    program: Program,
    given: Sequence[Tensor],
    device: torch.device,
    last_reads: Sequence[Sequence[int]] = (),
    behind: Callable[[int, dict[int, Tensor]], None] = lambda i, values: None,
) -> dict[int, Tensor]:
    """The values that live at the end, by number. ``behind`` is called behind each step, before any value is freed."""
    values = dict(enumerate(given))
    first = len(values)
    for i, step in enumerate(program.steps):
        values.update(enumerate(_called(step, values, device), first))
        first += len(step.results)
        behind(i, values)
        if last_reads:
            for number in last_reads[i]:
                del values[number]
    return values


def _with(values: Mapping[int, Tensor], argument: Any, device: torch.device) -> Any:
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
