"""Runs a small network's batch in *lanes*: some images each, from the first step to the last on one thread.

A step of a small network takes microseconds. Shared among threads, a good part of that is waiting: for the others
behind every step, and for what another core has written. A lane's activations stay in one core's caches, and threads
meet once a run. In exchange every core reads all weights, so this is for networks whose weights are fewer bytes than
their activations, and fit a last-level cache.

All of a program is in lanes or none. There are as many as threads are set when the model is frozen; the plan may run on
any number of threads. An image's values do not depend on which images are beside it, so lanes change no bits.
"""

from __future__ import annotations

import torch

from fastcnn.graph.freezing.chunks import Chunk, activations_of, batch_of, splittable_steps
from fastcnn.graph.freezing.program import Program, Step
from fastcnn.graph.freezing.short_weights import MOST_ROWS

CORE_BYTES = 1 << 20  # of activations that a step touches in a lane: they stay in a core's cache
WEIGHT_BYTES = 8 << 20  # that all cores read: half of a usual last-level cache
STEP_BYTES = 64 << 10  # what meeting behind a step costs, in bytes from another core's cache


def run_in_lanes(program: Program) -> bool:
    """Replace the program's steps by those of its lanes, one lane's after the other's, where that saves time."""
    batch = batch_of(program)
    lanes = min(batch, torch.get_num_threads())
    if lanes < 2 or not all(splittable_steps(program, batch)) or not _pays(program, batch, lanes):
        return False
    if batch > MOST_ROWS and any(step.operator == "linear" for step in program.steps):
        return False  # many rows are multiplied in another order than few, in memory that steps share
    inside = {v.buffer for step in program.steps for v in step.views() if v.buffer.kind == "activation"}
    steps: list[Step] = []
    for lane in range(lanes):
        start, end = batch * lane // lanes, batch * (lane + 1) // lanes
        chunk = Chunk(batch, start, end - start, inside)
        steps += [chunk.step(step) for step in program.steps]
    program.steps, program.lanes = steps, lanes
    return True


def _pays(program: Program, batch: int, lanes: int) -> bool:
    activations = [sum(v.values * v.dtype.itemsize for v in activations_of(step)) for step in program.steps]
    constants = {v.buffer for step in program.steps for v in step.views() if v.buffer.kind == "constant"}
    weights = sum(buffer.bytes for buffer in constants) + sum(weight.packed.bytes for weight in program.weights)
    images = -(-batch // lanes)
    return (
        max(activations, default=0) // batch * images <= CORE_BYTES
        and weights <= WEIGHT_BYTES
        and weights <= sum(activations) + len(activations) * STEP_BYTES
    )
