"""Steps of a program that one operator can do in one kernel: how a rule finds them, and how it takes their place.

A rule (:mod:`.fusions` lists them) is asked about each step in turn whether it begins such a group. It answers with a
:class:`Fusion`: which steps go, which step takes their place, and which values its results are. What it need not ask is
whether the group may be pulled together: :func:`fused` sees to it, by the order of reads and writes. A program that
nothing can be done to is None, and ``freeze`` goes on without it; one that can is captured, compared and timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastcnn.graph.freezing.gpu.program import Program, Spec, Step, Value


class Fusion(NamedTuple):
    """One step in the place of several: it stands where the last of them stood.

    ``values`` keep their readers. Other values that the steps made must have none but these steps.
    """

    steps: tuple[int, ...]  # that go, by their numbers in the program, in order
    step: Step  # its arguments are values of the program as it was
    values: tuple[int, ...]  # of the program as it was, one for each of its results


class View:
    """A program as rules look at it. Steps and values are numbers."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.steps = program.steps
        specs = [*program.inputs, *(constant.spec for constant in program.constants)]
        self.results: list[tuple[int, ...]] = []  # of each step
        self._readers: dict[int, list[int]] = {}
        for i, step in enumerate(program.steps):
            for number in step.reads():
                self._readers.setdefault(number, []).append(i)
            self.results.append(tuple(range(len(specs), len(specs) + len(step.results))))
            specs += step.results
        self._specs = specs

    def spec(self, value: Value) -> Spec:
        """Shape, strides and dtype."""
        return self._specs[value.number]

    def readers(self, number: int) -> list[int]:
        """The steps that read a value, views of it included."""
        return self._readers.get(number, [])

    def is_result(self, number: int) -> bool:
        """Whether the program returns it."""
        return number in self.program.outputs

    def only_reader(self, step: int) -> int | None:
        """The step that alone reads the one value that a step makes; None where there is no such."""
        if len(self.results[step]) != 1 or self.is_result(self.results[step][0]):
            return None
        readers = self.readers(self.results[step][0])
        return readers[0] if len(readers) == 1 else None


class Rule(NamedTuple):
    name: str
    possible: Callable[[torch.device], bool]  # whether it may find anything on a device
    find: Callable[[View, int], Fusion | None]  # the group that a step begins


def fused(program: Program, device: torch.device, rule: Rule) -> tuple[Program, list[Fusion]] | None:
    """The program with all groups that a rule finds in one kernel each, and the groups; None where there are none."""
    view = View(program, device)
    taken: dict[int, Fusion] = {}
    fusions: list[Fusion] = []
    for i in range(len(view.steps)):
        found = None if i in taken else rule.find(view, i)
        if found is not None and taken.keys().isdisjoint(found.steps) and _may_wait(view, found):
            fusions.append(found)
            taken.update(dict.fromkeys(found.steps, found))
    return (_rewritten(view, taken), fusions) if fusions else None


def _may_wait(view: View, fusion: Fusion) -> bool:
    """Whether the group's steps may all run where the last one stands: what it makes is not read before or, if it goes,
    at all, and nobody writes any memory meanwhile, which might be what it reads.
    """
    first, last = fusion.steps[0], fusion.steps[-1]
    for i in fusion.steps:
        for number in view.results[i]:
            others = [reader for reader in view.readers(number) if reader not in fusion.steps]
            if number not in fusion.values and (others or view.is_result(number)):
                return False
            if any(reader < last for reader in others):
                return False
    between = [step for i, step in enumerate(view.steps[first:last], first) if i not in fusion.steps]
    return not any(_writes(step.operator) for step in between)


def _writes(operator: Any) -> bool:
    return bool(operator._schema.is_mutable)


def _rewritten(view: View, taken: dict[int, Fusion]) -> Program:
    program = view.program
    given = len(program.inputs) + len(program.constants)
    new = {number: number for number in range(given)}  # by the old number
    steps: list[Step] = []
    known = given
    for i, step in enumerate(view.steps):
        fusion, values = taken.get(i), view.results[i]
        if fusion is not None:
            if i != fusion.steps[-1]:
                continue
            step, values = fusion.step, fusion.values
        args = tuple(_renumbered(arg, new) for arg in step.args)
        kwargs = {key: _renumbered(arg, new) for key, arg in step.kwargs.items()}
        steps.append(step._replace(args=args, kwargs=kwargs))
        new.update((number, known + at) for at, number in enumerate(values))
        known += len(step.results)
    return dataclasses.replace(program, steps=steps, outputs=[new[number] for number in program.outputs])


def _renumbered(argument: Any, new: dict[int, int]) -> Any:
    if isinstance(argument, Value):
        return Value(new[argument.number])
    if isinstance(argument, list):
        return [_renumbered(each, new) for each in argument]
    return argument


def argument(step: Step, name: str) -> Any:
    """A step's argument by its name in the operator's schema; its default where it was left out."""
    for i, described in enumerate(step.operator._schema.arguments):
        if described.name == name:
            return step.args[i] if i < len(step.args) else step.kwargs.get(name, described.default_value)
    raise KeyError(name)


def arguments(step: Step, names: str) -> list[Any]:
    """Several, by their names with spaces between."""
    return [argument(step, name) for name in names.split()]
