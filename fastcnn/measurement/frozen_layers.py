"""Where a frozen model's time goes: the native plan run with a watch on its phases (``csrc/cpu/plan.h``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from fastcnn.graph.freezing import FrozenModel
from fastcnn.graph.freezing.recipe import Operand, Recipe, StepRecipe, dtype_of
from fastcnn.measurement.flops import conv_flops
from fastcnn.measurement.layers import LayerTime

BACKEND = "frozen"


@torch.no_grad()
def frozen_layer_times(frozen: FrozenModel, input: Tensor, *, rounds: int = 10) -> list[LayerTime]:
    """Time a frozen model's steps, in place. Medians over ``rounds`` runs.

    Steps that ran side by side have one row together: ``operator`` names each kind once, ``out_shape`` is the last's.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, is {rounds}")
    recipe = frozen._recipe
    frozen(input)  # prepares the plan, and checks the input
    shape, strides, _ = frozen._input_checks[0]
    given = torch.empty_strided(shape, strides, dtype=input.dtype).copy_(input)
    memory = [torch.empty(length, dtype=dtype_of(dtype)) for length, dtype in recipe.output_memory]
    plan, threads = frozen._plan, torch.get_num_threads()
    runs = [plan.profile([given], memory, threads) for _ in range(rounds + 1)][1:]
    rows: list[tuple[list[int], float]] = []
    for i, (steps, _) in enumerate(runs[0]):
        milliseconds = 1e3 * median(run[i][1] for run in runs)
        if rows and rows[-1][0] == steps:  # the next of one step's works
            rows[-1] = (steps, rows[-1][1] + milliseconds)
        else:
            rows.append((steps, milliseconds))
    return [_row(recipe, steps, milliseconds) for steps, milliseconds in rows]


def named_after(frozen: Sequence[LayerTime], eager: Sequence[LayerTime]) -> list[LayerTime]:
    """The rows of a frozen model with the names that the same calls have in the eager one.

    A plan knows no modules, but keeps the order of what it was captured from: a row takes the name of the next eager
    call of its operator and shape, and keeps its own where there is none.
    """
    waiting = list(eager)
    result = []
    for row in frozen:
        kind = row.operator.removesuffix("_winograd")
        match = next((call for call in waiting if (call.operator, call.out_shape) == (kind, row.out_shape)), None)
        if match is not None:
            waiting.remove(match)
            row = replace(row, name=match.name)
        result.append(row)
    return result


def _row(recipe: Recipe, indices: Sequence[int], milliseconds: float) -> LayerTime:
    steps = [recipe.steps[i] for i in indices]
    name = f"step {indices[0]}" if len(indices) == 1 else f"steps {', '.join(map(str, indices))}"
    algorithms = [_algorithm(recipe, step) for step in steps]
    return LayerTime(
        name=name,
        operator="+".join(dict.fromkeys(step.operator for step in steps)),
        backend=BACKEND,
        algorithm="+".join(dict.fromkeys(a for a in algorithms if a is not None)) or None,
        out_shape=tuple(steps[-1].out.shape),
        median_ms=milliseconds,
        flops=sum(_flops(recipe, step) for step in steps),
        bytes=sum(_bytes(recipe, step) for step in steps),
    )


def _algorithm(recipe: Recipe, step: StepRecipe) -> str | None:
    return None if step.weight is None else recipe.weights[step.weight][2]


def _flops(recipe: Recipe, step: StepRecipe) -> int:
    if step.weight is not None:
        return conv_flops(step.out.shape, recipe.weights[step.weight][0])
    if step.operator == "linear":
        weight = step.inputs[1]
        assert weight is not None
        return 2 * math.prod(step.out.shape) * weight.shape[-1]
    return 0


def _bytes(recipe: Recipe, step: StepRecipe) -> int:
    def size(operand: Operand) -> int:
        return math.prod(operand.shape) * dtype_of(operand.dtype).itemsize

    weight = 0
    if step.weight is not None:
        weight = math.prod(recipe.weights[step.weight][0]) * dtype_of(step.out.dtype).itemsize
    return weight + size(step.out) + sum(size(o) for o in step.inputs if o is not None)
