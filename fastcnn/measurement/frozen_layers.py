"""Where a frozen model's time goes: the native plan run with a watch on its phases (``csrc/cpu/plan.h``)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from fastcnn.graph.freezing import FrozenModel
from fastcnn.graph.freezing.recipe import Operand, Recipe, StepRecipe, dtype_of
from fastcnn.measurement.flops import conv_flops
from fastcnn.measurement.layers import LayerTime

BACKEND = "frozen"


@torch.no_grad()
def frozen_layer_times(
    frozen: FrozenModel, input: Tensor, *, rounds: int = 10, eager: Sequence[LayerTime] = ()
) -> list[LayerTime]:
    """Time a frozen model's steps, in place. Medians over ``rounds`` runs.

    Steps that ran side by side have one row together: ``name`` names them all, ``operator`` counts them by kind, and
    ``out_shape`` is the last one's. Where the batch runs in lanes, a row is one step of all of them, the whole batch's.

    Args:
        eager: the calls of the model that was frozen (:func:`fastcnn.measurement.layers.layer_times`), to name steps
            after. A plan knows no modules, but roughly keeps the order of what it was captured from: a step is called
            as the next eager call of its operator, shape and FLOPs, and by its number where there is none.

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
    names = _step_names(recipe, eager)
    return [_row(recipe, names, steps, milliseconds) for steps, milliseconds in rows]


def _step_names(recipe: Recipe, eager: Sequence[LayerTime]) -> list[str]:
    waiting = list(eager)
    names = []
    length = len(recipe.steps) // recipe.lanes
    for index, step in enumerate(recipe.steps[:length]):
        operator = re.sub("_(winograd|strassen|short)$", "", step.operator)
        alike = recipe.steps[index::length]
        facts = (operator, _shape(alike), sum(_flops(recipe, lane) for lane in alike))
        match = next((call for call in waiting if (call.operator, call.out_shape, call.flops) == facts), None)
        if match is not None:
            waiting.remove(match)
        names.append(f"step {index}" if match is None else match.name)
    return names


def _row(recipe: Recipe, names: Sequence[str], indices: Sequence[int], milliseconds: float) -> LayerTime:
    everything = [recipe.steps[i] for i in indices]
    if recipe.lanes > 1:  # the same step of all lanes
        indices = indices[:1]
    steps = [recipe.steps[i] for i in indices]
    kinds = Counter(step.operator for step in steps)
    algorithms = [_algorithm(recipe, step) for step in steps]
    return LayerTime(
        name=" + ".join(names[i] for i in indices),
        operator=" + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items()),
        backend=BACKEND,
        algorithm=" + ".join(dict.fromkeys(a for a in algorithms if a is not None)) or None,
        out_shape=_shape(everything) if recipe.lanes > 1 else tuple(steps[-1].out.shape),
        median_ms=milliseconds,
        flops=sum(_flops(recipe, step) for step in everything),
        bytes=sum(_bytes(recipe, step) for step in everything),
    )


def _shape(lanes: Sequence[StepRecipe]) -> tuple[int, ...]:
    """The shape of all lanes' outputs together."""
    return (sum(step.out.shape[0] for step in lanes), *lanes[0].out.shape[1:])


def _algorithm(recipe: Recipe, step: StepRecipe) -> str | None:
    return None if step.weight is None else recipe.weights[step.weight][2]


def _flops(recipe: Recipe, step: StepRecipe) -> int:
    if step.operator == "linear_short":
        assert step.weight is not None
        return 2 * math.prod(step.out.shape) * recipe.weights[step.weight][0][1]
    if step.weight is not None:
        n, c, h, w = step.out.shape
        pooled = step.attributes[-1:] == (True,) and step.operator != "conv2d_strassen"
        return conv_flops((n, c, 2 * h, 2 * w) if pooled else step.out.shape, recipe.weights[step.weight][0])
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
