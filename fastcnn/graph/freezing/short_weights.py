"""Stores large fully connected weights short: without loss, 28 bits for an fp32 value and 12 for a bf16 one.

Few rows against a large weight take as long as the weight takes to come from memory. ``linear`` with such a weight
becomes ``linear_short``, with the same bits in its result (csrc/cpu/isa/linear_short.h).
"""

from __future__ import annotations

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.program import Buffer, PackedWeight, Program, Step, View

MOST_ROWS = 8  # beyond, the weight is no longer what takes the time
LEAST_BYTES = 1 << 20  # a core's share of cache: what fits is not waited for


def shorten_weights(program: Program) -> None:
    """Give ``linear`` steps short weights where that saves time; a weight that several share is stored once."""
    places: dict[tuple[Buffer, int, tuple[int, ...], tuple[int, ...]], int] = {}
    for step in program.steps:
        weight = _large_weight(step)
        if weight is None:
            continue
        key = (weight.buffer, weight.offset, weight.shape, weight.strides)
        if key not in places:
            assert weight.buffer.data is not None
            values = weight.buffer.data.reshape(-1).as_strided(weight.shape, weight.strides, weight.offset)
            places[key] = len(program.weights)
            k, c = weight.shape
            program.weights.append(PackedWeight(cpp.pack_linear(values), (k, c), 1, cpp.SHORT, weight.dtype))
        step.operator, step.weight = "linear_short", places[key]
        step.inputs = (step.inputs[0], *step.inputs[2:])


def _large_weight(step: Step) -> View | None:
    """The weight of a ``linear`` step that is better stored short."""
    weight = step.inputs[1] if step.operator == "linear" else None
    if weight is None or weight.buffer.kind != "constant" or len(weight.shape) != 2 or weight.strides[1] != 1:
        return None
    few = step.out.shape[0] <= MOST_ROWS
    large = weight.values * weight.dtype.itemsize >= LEAST_BYTES
    name = str(weight.dtype).removeprefix("torch.")
    return weight if few and large and _native.cpu_reads_short_weights(name) else None
