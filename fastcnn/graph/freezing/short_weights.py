"""Stores large fully connected weights short: without loss, 28 bits for an fp32 value and 12 for a bf16 one.

Few rows against a large weight take as long as the weight takes to come from memory. ``linear`` with such a weight
becomes ``linear_short``, with the same bits in its result (csrc/cpu/isa/linear_short.h).

Behind ReLU a third of the input and more is zeros. For one row of fp32 the weights of an input value then lie together,
and those that would be multiplied by a zero are not read (csrc/cpu/isa/linear_by_input.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.program import Buffer, PackedWeight, Program, Step, View

MOST_ROWS = 8  # beyond, the weight is no longer what takes the time
# AVX2 decodes at a cost that several rows' multiplications leave no time for.
FEWER_ROWS = {"avx2": 1}
LEAST_BYTES = 1 << 20  # a core's share of cache: what fits is not waited for

# Where the attributes say whether a step ends in ReLU.
_RELU = {
    "linear": 0, "linear_short": 0, "channel_affine": 0, "conv2d": 1, "conv2d_winograd": 1, "conv2d_strassen": 1,
}  # fmt: skip


def shorten_weights(program: Program) -> None:
    """Give ``linear`` steps short weights where that saves time; a weight that several share is stored once."""
    users: dict[tuple[Buffer, int, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for at, step in enumerate(program.steps):
        weight = _large_weight(step)
        if weight is not None:
            users.setdefault((weight.buffer, weight.offset, weight.shape, weight.strides), []).append(at)
    zeros = {at: _has_zeros(program.steps, at) for of_weight in users.values() for at in of_weight}
    for (buffer, offset, shape, strides), of_weight in users.items():
        assert buffer.data is not None
        values = buffer.data.reshape(-1).as_strided(shape, strides, offset)
        by_input = values.dtype == torch.float32 and all(
            zeros[at] and program.steps[at].out.shape[0] == 1 for at in of_weight
        )
        # A zero times an infinity or NaN is to be NaN.
        algorithm = cpp.SHORT_BY_INPUT if by_input and bool(values.isfinite().all()) else cpp.SHORT
        for at in of_weight:
            step = program.steps[at]
            step.operator, step.weight = "linear_short", len(program.weights)
            step.inputs = (step.inputs[0], *step.inputs[2:])
        program.weights.append(PackedWeight(cpp.pack_linear(values, algorithm), shape, 1, algorithm, values.dtype))


def _has_zeros(steps: Sequence[Step], at: int) -> bool:
    """Whether the first input of step ``at`` comes from ReLU, perhaps by way of steps that leave zeros."""
    source = steps[at].inputs[0]
    if source is None:
        return False
    before = next((i for i in reversed(range(at)) if steps[i].out.buffer is source.buffer), None)
    if before is None:
        return False
    writer = steps[before]
    if writer.operator in ("copy", "max_pool2d") or _is_identity(writer):
        return _has_zeros(steps, before)
    if writer.operator == "map":
        return writer.attributes[:2] == ("clamp", 0.0)
    place = _RELU.get(writer.operator)
    return place is not None and writer.attributes[place] is True


def _is_identity(step: Step) -> bool:
    """AlexNet's and VGG's average over windows of one value, with pictures of the usual size."""
    source = step.inputs[0]
    return step.operator == "adaptive_avg_pool2d" and source is not None and step.out.shape == source.shape


def _large_weight(step: Step) -> View | None:
    """The weight of a ``linear`` step that is better stored short."""
    weight = step.inputs[1] if step.operator == "linear" else None
    if weight is None or weight.buffer.kind != "constant" or len(weight.shape) != 2 or weight.strides[1] != 1:
        return None
    few = step.out.shape[0] <= FEWER_ROWS.get(_native.cpu_instruction_set(), MOST_ROWS)
    large = weight.values * weight.dtype.itemsize >= LEAST_BYTES
    name = str(weight.dtype).removeprefix("torch.")
    return weight if few and large and _native.cpu_reads_short_weights(name) else None
