"""Removes copies whose source could have been computed in its destination: a concatenation's branches, mostly.

``copy(slice of p, b)`` goes when ``b`` can live in that slice of ``p`` from its first step on: every step that touches
``b`` uses all of it as channels-last pixels, it was complete before the copy, and nothing else writes the slice until
``b`` was last read.
"""

from __future__ import annotations

from dataclasses import replace

from fastcnn.graph.freezing.program import Buffer, Program, Step, View


def place_in_slices(program: Program) -> None:
    """Drop such copies from the program's steps; views of their sources become views of slices."""
    at = 0
    while at < len(program.steps):
        step = program.steps[at]
        if step.operator == "copy" and _can_live_in(program, at, step):
            _move(program, step)
            del program.steps[at]
        else:
            at += 1


def _can_live_in(program: Program, at: int, step: Step) -> bool:
    source, target = step.inputs[0], step.out
    assert source is not None
    b, p = source.buffer, target.buffer
    if b.kind != "activation" or p.kind == "input" or b is p or b.dtype != p.dtype:
        return False
    if target.pixel_stride() is None or not _is_whole(source):
        return False
    if any(view.buffer is b for view in program.outputs):
        return False
    last = max(i for i, other in enumerate(program.steps) if any(view.buffer is b for view in other.views()))
    for index, other in enumerate(program.steps):
        if index == at:
            continue
        if other.out.buffer is b and index > at:
            return False
        if index <= last and other.out.buffer is p and _may_share_channels(other.out, target):
            return False
        # A step that does not know pixels, only rows or single values, cannot be told of a pixel stride.
        touches = [view for view in other.views() if view.buffer is b]
        if touches and not (other.operator in PIXEL_STEPS and all(v == source for v in touches)):
            return False
    return True


PIXEL_STEPS = frozenset(
    {
        "conv2d", "conv2d_winograd", "conv2d_strassen", "channel_affine", "max_pool2d", "avg_pool2d",
        "adaptive_avg_pool2d", "local_response_norm", "copy", "fill", "map",
    }
)  # fmt: skip


def _is_whole(view: View) -> bool:
    """Whether a view is all of its buffer, as channels-last pixels without gaps."""
    return (
        view.offset == 0
        and view.values == view.buffer.length
        and view.is_dense
        and len(view.shape) == 4
        and view.pixel_stride() == view.shape[1]
    )


def _may_share_channels(a: View, b: View) -> bool:
    """Whether two views of one buffer may share memory: not where they are different channels of the same pixels."""
    pixels, others = (b.pixel_stride(), a.pixel_stride()) if len(a.shape) == 4 else (None, None)
    if pixels is None or pixels != others or a.shape[2:] != b.shape[2:] or a.shape[0] != b.shape[0]:
        return a.offset < b.offset + b.extent and b.offset < a.offset + a.extent
    distance = (b.offset - a.offset) % pixels
    return distance < a.shape[1] or distance + b.shape[1] > pixels


def _move(program: Program, copy: Step) -> None:
    source, target = copy.inputs[0], copy.out
    assert source is not None

    def moved(view: View | None) -> View | None:
        return target if view is not None and view.buffer is source.buffer else view

    for step in program.steps:
        out = moved(step.out)
        assert out is not None
        step.out, step.inputs = out, tuple(moved(view) for view in step.inputs)


def outputs_of_their_own(program: Program) -> list[Buffer]:
    """Give every output memory that leaves the plan: the buffer it was computed in, or a copy of it.

    A copy where the output is an input's or a constant's memory: results are fresh tensors. Returns the buffers.
    """
    buffers: list[Buffer] = []
    for index, view in enumerate(program.outputs):
        if view.buffer.kind in ("input", "constant"):
            fresh = replace(view, buffer=Buffer(view.offset + view.extent, view.dtype))
            program.steps.append(Step("copy", fresh, (view,)))
            program.outputs[index] = view = fresh
        if view.buffer.kind == "activation":
            view.buffer.kind = "output"
            buffers.append(view.buffer)
    return buffers
