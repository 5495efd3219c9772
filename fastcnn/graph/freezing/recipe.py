"""A frozen model as plain data: what builds the native plan, and what a saved file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.chunks import run_in_chunks
from fastcnn.graph.freezing.lanes import run_in_lanes
from fastcnn.graph.freezing.layouts import choose_layouts, drop_unread, forward_copies
from fastcnn.graph.freezing.memory import ALIGNMENT, lifetimes, plan_lanes
from fastcnn.graph.freezing.placing import outputs_of_their_own, place_in_slices
from fastcnn.graph.freezing.pooling import fuse_max_pooling
from fastcnn.graph.freezing.program import Buffer, PackedWeight, Program, View
from fastcnn.graph.freezing.residuals import write_over_residuals
from fastcnn.graph.freezing.short_weights import shorten_weights
from fastcnn.graph.freezing.spacing import space_pixels
from fastcnn.graph.freezing.structures import structure_as_data

ARENA, CONSTANTS, FIRST_INPUT = 0, 1, 2  # regions of the native plan; outputs follow the inputs

# What a step may call on the native plan.
OPERATORS = frozenset(
    {
        "conv2d", "conv2d_winograd", "conv2d_strassen", "linear", "linear_short", "channel_affine", "max_pool2d",
        "avg_pool2d", "adaptive_avg_pool2d", "local_response_norm", "copy", "fill", "map", "reduce_last",
        "layer_norm", "softmax",
    }
)  # fmt: skip


class TensorSpec(NamedTuple):
    """A tensor that enters or leaves; ``memory`` is which input or output memory it lies in, from ``offset`` on."""

    memory: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Operand(NamedTuple):
    """A tensor of a step: ``offset`` in bytes from the region's start, strides in elements."""

    region: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StepRecipe(NamedTuple):
    operator: str
    out: Operand
    inputs: tuple[Operand | None, ...]
    attributes: tuple[Any, ...]
    weight: int | None


@dataclass
class Recipe:
    """Everything about a frozen model but the values of its weights."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    input_bytes: list[int]
    output_memory: list[tuple[int, str]]  # elements and dtype of each
    arena_bytes: int
    activation_bytes: int  # of all activations side by side, as the captured graph allocates them
    steps: list[StepRecipe]
    # Shape, groups, algorithm and dtype of each packed weight.
    weights: list[tuple[tuple[int, ...], int, str, str]]
    structure: Any  # of the result: see structures.py; None if no file can hold it
    lanes: int = 1  # equal parts of the steps that run side by side

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Raises KeyError, TypeError or ValueError for data that no recipe gave."""

        def operand(value: Sequence[Any] | None) -> Operand | None:
            if value is None:
                return None
            region, offset, dtype, shape, strides = value
            return Operand(region, offset, dtype, tuple(shape), tuple(strides))

        def step(value: Sequence[Any]) -> StepRecipe:
            name, out, inputs, attributes, weight = value
            if name not in OPERATORS:
                raise ValueError(f"unknown step {name!r}")
            to = operand(out)
            if to is None:
                raise ValueError("a step without an output")
            attributes = tuple(tuple(a) if isinstance(a, list) else a for a in attributes)
            return StepRecipe(name, to, tuple(operand(v) for v in inputs), attributes, weight)

        def spec(value: Sequence[Any]) -> TensorSpec:
            memory, offset, dtype, shape, strides = value
            return TensorSpec(int(memory), int(offset), str(dtype), tuple(shape), tuple(strides))

        return cls(
            [spec(v) for v in data["inputs"]],
            [spec(v) for v in data["outputs"]],
            [int(v) for v in data["input_bytes"]],
            [(int(length), str(dtype)) for length, dtype in data["output_memory"]],
            int(data["arena_bytes"]),
            int(data["activation_bytes"]),
            [step(v) for v in data["steps"]],
            [(tuple(s), int(g), str(algorithm), str(dtype)) for s, g, algorithm, dtype in data["weights"]],
            data["structure"],
            int(data["lanes"]),
        )


def make_recipe(program: Program, structure: TreeSpec) -> tuple[Recipe, Tensor]:
    """Plan a program's memory. Returns its recipe and the bytes of its constants."""
    activation_bytes = sum(need.size for need in lifetimes(program).values())
    memories = outputs_of_their_own(program)
    choose_layouts(program)
    forward_copies(program)
    place_in_slices(program)
    drop_unread(program)
    fuse_max_pooling(program)
    space_pixels(program)
    if not run_in_lanes(program):
        run_in_chunks(program)
    write_over_residuals(program)
    shorten_weights(program)
    offsets, arena_bytes = plan_lanes(lifetimes(program), len(program.steps) // program.lanes)
    places: dict[Buffer, tuple[int, int]] = {buffer: (ARENA, offset) for buffer, offset in offsets.items()}
    for i, view in enumerate(program.inputs):
        places[view.buffer] = (FIRST_INPUT + i, 0)
    for i, buffer in enumerate(memories):
        places[buffer] = (FIRST_INPUT + len(program.inputs) + i, 0)
    constants = _gather_constants(program, places)

    def operand(view: View | None) -> Operand | None:
        if view is None:
            return None
        region, offset = places[view.buffer]
        return Operand(
            region, offset + view.offset * view.dtype.itemsize, dtype_name(view.dtype), view.shape, view.strides
        )

    steps = []
    for step in program.steps:
        out = operand(step.out)
        assert out is not None
        inputs = tuple(operand(v) for v in step.inputs)
        steps.append(StepRecipe(step.operator, out, inputs, step.attributes, step.weight))
    recipe = Recipe(
        [TensorSpec(i, 0, dtype_name(v.dtype), v.shape, v.strides) for i, v in enumerate(program.inputs)],
        [
            TensorSpec(memories.index(v.buffer), v.offset, dtype_name(v.dtype), v.shape, v.strides)
            for v in program.outputs
        ],
        [v.extent * v.dtype.itemsize for v in program.inputs],
        [(b.length, dtype_name(b.dtype)) for b in memories],
        arena_bytes,
        activation_bytes,
        steps,
        [(w.shape, w.groups, w.algorithm, dtype_name(w.dtype)) for w in program.weights],
        _data_of(structure),
        program.lanes,
    )
    return recipe, constants


def _data_of(structure: TreeSpec) -> Any:
    try:
        return structure_as_data(structure)
    except ValueError:  # saying so is for whoever writes a file
        return None


def _gather_constants(program: Program, places: dict[Buffer, tuple[int, int]]) -> Tensor:
    """All constants that steps read, one after the other; their places are noted."""
    used: list[Buffer] = []
    end = 0
    for step in program.steps:
        for view in step.views():
            if view.buffer.kind == "constant" and view.buffer not in places:
                places[view.buffer] = (CONSTANTS, end)
                used.append(view.buffer)
                end += -(-view.buffer.bytes // ALIGNMENT) * ALIGNMENT
    memory = torch.zeros(end, dtype=torch.uint8)
    for buffer in used:
        assert buffer.data is not None
        start = places[buffer][1]
        memory[start : start + buffer.bytes] = buffer.data.reshape(-1).view(torch.uint8)
    return memory


def build_plan(recipe: Recipe, constants: Tensor, weights: Sequence[cpp.PackedWeight]) -> _native.Plan:
    """The native plan. Raises ValueError or TypeError where a recipe (of a file) does not hold together."""
    output_bytes = [length * dtype_of(dtype).itemsize for length, dtype in recipe.output_memory]
    plan = _native.Plan(recipe.arena_bytes, constants, recipe.input_bytes, output_bytes)
    for step in recipe.steps:
        arguments: list[Any] = list(step.inputs)
        if step.weight is not None:
            arguments.insert(1, weights[step.weight])
        getattr(plan, step.operator)(step.out, *arguments, *step.attributes)
    if recipe.lanes != 1:
        plan.set_lanes(recipe.lanes)
    return plan


def packed(weights: Sequence[PackedWeight]) -> list[cpp.PackedWeight]:
    return [weight.packed for weight in weights]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, is {name!r}")
    return torch.float32 if name == "float32" else torch.bfloat16
