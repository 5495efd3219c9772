"""Where each activation lies in the arena: buffers that are never alive together share memory.

A buffer lives from the first step that touches it to the last. Placing intervals of given sizes at offsets so that the
highest end is lowest is NP-hard (dynamic storage allocation); the usual greedy answer is used: largest first, each into
the smallest gap that holds it between those already placed that live at the same time, else at the lowest end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastcnn.graph.freezing.program import Buffer, Program

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Lifetime(NamedTuple):
    """A buffer's size in bytes, and the first and last step that touch it."""

    size: int
    first: int
    last: int


def lifetimes(program: Program) -> dict[Buffer, Lifetime]:
    """Of each activation that a step touches, in the order of their first steps."""
    result: dict[Buffer, Lifetime] = {}
    for index, step in enumerate(program.steps):
        for view in step.views():
            if view.buffer.kind == "activation":
                known = result.get(view.buffer)
                first = index if known is None else known.first
                result[view.buffer] = Lifetime(view.buffer.bytes, first, index)
    return result


def plan_offsets(needs: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An offset in bytes for each, and the arena's size."""
    offsets = [0] * len(needs)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(needs)), key=lambda i: (-needs[i].size, needs[i].first)):
        need = needs[index]
        size = _aligned(need.size)
        beside = sorted(
            (offsets[i], offsets[i] + _aligned(needs[i].size))
            for i in placed
            if needs[i].first <= need.last and need.first <= needs[i].last
        )
        offsets[index] = _smallest_gap(beside, size)
        placed.append(index)
        total = max(total, offsets[index] + size)
    return offsets, total


def plan_lanes(alive: Mapping[Buffer, Lifetime], steps: int) -> tuple[dict[Buffer, int], int]:
    """Offsets, and the arena's size, where every ``steps`` steps are a lane: lanes share no memory with each other."""
    by_lane: dict[int, list[Buffer]] = {}
    for buffer, life in alive.items():
        by_lane.setdefault(life.first // max(steps, 1), []).append(buffer)
    result: dict[Buffer, int] = {}
    total = 0
    for buffers in by_lane.values():
        offsets, size = plan_offsets([alive[buffer] for buffer in buffers])
        result.update({buffer: total + offset for buffer, offset in zip(buffers, offsets, strict=True)})
        total += size
    return result, total


def _smallest_gap(taken: list[tuple[int, int]], size: int) -> int:
    best: tuple[int, int] | None = None  # (gap, offset)
    end = 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, end)
        end = max(end, stop)
    return end if best is None else best[1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
