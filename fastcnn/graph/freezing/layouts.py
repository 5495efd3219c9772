"""Channels-last memory for activations that the captured graph has contiguous, and copies that are then for nothing.

Kernels read and write channels-last pixels; what a model's own code makes in contiguous memory (a channel shuffle, a
value between two modules that were optimized apart) would be copied to and fro. The plan may lay its own buffers as it
likes: only the strides of results are seen from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastcnn.graph.freezing.program import Buffer, Program, Step, View, contiguous_strides

_ANY_STRIDES = frozenset({"copy", "fill", "map", "reduce_last"})
_MATRICES = frozenset({"linear", "linear_short", "layer_norm", "softmax"})

Shape = tuple[int, int, int]  # images, channels, pixels


def choose_layouts(program: Program) -> None:
    """Make contiguous buffers channels-last where that spares copies and every step can go on with it."""
    shapes = {buffer: shape for buffer, shape in _contiguous(program).items() if _can_change(program, buffer, shape)}
    while True:
        mixed = {b for step in program.steps if step.operator == "map" for b in _torn_by(step, shapes)}
        if not mixed:
            break
        shapes = {buffer: shape for buffer, shape in shapes.items() if buffer not in mixed}
    chosen: set[Buffer] = set()
    grew = True
    while grew:  # from those that are copied from or to pixels, to those that work is shared with
        found = {b for step in program.steps for b in _drawn_in_by(step, shapes, chosen)} - chosen
        chosen |= found
        grew = bool(found)

    def changed(view: View | None) -> View | None:
        return _mapped(view, shapes[view.buffer]) if view is not None and view.buffer in chosen else view

    for step in program.steps:
        out = changed(step.out)
        assert out is not None
        step.out, step.inputs = out, tuple(changed(view) for view in step.inputs)


def _contiguous(program: Program) -> dict[Buffer, Shape]:
    """Activations that are seen as a whole as (N, ..., H, W) in contiguous memory."""
    found: dict[Buffer, Shape] = {}
    for view in _views(program):
        whole = view.offset == 0 and view.values == view.buffer.length and len(view.shape) >= 4
        if view.buffer.kind != "activation" or not whole or view.buffer in found:
            continue
        n, channels, pixels = view.shape[0], 1, view.shape[-2] * view.shape[-1]
        for size in view.shape[1:-2]:
            channels *= size
        if channels > 1 and pixels > 1 and view.merged(0, len(view.shape)) is not None and _is_ordered(view):
            found[view.buffer] = (n, channels, pixels)
    return found


def _is_ordered(view: View) -> bool:
    expected = contiguous_strides(view.shape)
    return all(size == 1 or have == want for size, have, want in zip(view.shape, view.strides, expected, strict=True))


def _views(program: Program) -> Iterator[View]:
    for step in program.steps:
        yield from step.views()


def _can_change(program: Program, buffer: Buffer, shape: Shape) -> bool:
    for step in program.steps:
        for view in step.views():
            if view.buffer is buffer:
                mapped = _mapped(view, shape)
                if mapped is None or not _accepts(step.operator, mapped):
                    return False
    return True


def _mapped(view: View, shape: Shape) -> View | None:
    """The same values once the buffer is channels-last; None where no strides reach them.

    Value (n, c, p) moves from place ``(n C + c) P + p`` to ``(n P + p) C + c``. A dimension that stays within one of
    the three moves by a constant in both.
    """
    images, channels, pixels = shape
    units = (channels * pixels, pixels, 1)
    moved = (channels * pixels, 1, channels)
    last = [view.offset // units[0], view.offset % units[0] // pixels, view.offset % pixels]
    offset = sum(count * unit for count, unit in zip(last, moved, strict=True))
    strides = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1 or stride == 0:
            strides.append(0)
            continue
        digit = 0 if stride % units[0] == 0 else 1 if stride % pixels == 0 else 2
        steps = stride // units[digit]
        last[digit] += (size - 1) * steps
        strides.append(steps * moved[digit])
    if any(end >= size for end, size in zip(last, (images, channels, pixels), strict=True)):
        return None
    return replace(view, offset=offset, strides=tuple(strides))


def _accepts(operator: str, view: View) -> bool:
    """Whether a step can have a view as an operand."""
    if operator in _ANY_STRIDES:
        return True
    if operator in _MATRICES:
        if len(view.shape) != 2 or (view.shape[1] > 1 and view.strides[1] != 1):
            return False
        return view.shape[0] == 1 or view.strides[0] >= view.shape[1]
    return view.pixel_stride() is not None


def _torn_by(step: Step, shapes: dict[Buffer, Shape]) -> list[Buffer]:
    """Buffers that a map would meet in another order than its other operands."""
    whole = [v for v in step.views() if len(v.shape) >= 3 and not v.is_broadcast]
    if all(v.buffer in shapes or v.pixel_stride() is not None for v in whole):
        return []
    return [v.buffer for v in whole if v.buffer in shapes]


def _drawn_in_by(step: Step, shapes: dict[Buffer, Shape], chosen: set[Buffer]) -> list[Buffer]:
    if step.operator not in _ANY_STRIDES:
        return []
    views = step.views()
    pixels = [v for v in views if v.buffer in chosen or (v.buffer not in shapes and _is_image(v))]
    return [v.buffer for v in views if v.buffer in shapes] if pixels else []


def _is_image(view: View) -> bool:
    """Channels-last, and not contiguous at the same time."""
    return view.pixel_stride() is not None and view.shape[1] > 1 and view.shape[2] * view.shape[3] > 1


def forward_copies(program: Program) -> None:
    """Let steps read the source of a copy where it is as good, and drop the copy."""
    at = 0
    while at < len(program.steps):
        step = program.steps[at]
        if step.operator == "copy" and _can_read_source(program, at, step):
            source, target = step.inputs[0], step.out
            for other in program.steps[at + 1 :]:
                other.inputs = tuple(source if view == target else view for view in other.inputs)
            del program.steps[at]
        else:
            at += 1


def _can_read_source(program: Program, at: int, step: Step) -> bool:
    source, target = step.inputs[0], step.out
    assert source is not None
    if target.buffer.kind != "activation" or source.dtype != target.dtype or source.buffer is target.buffer:
        return False
    if source.strides != target.strides and (source.pixel_stride() is None or target.pixel_stride() is None):
        return False
    if any(view.buffer is target.buffer for other in program.steps[:at] for view in other.views()):
        return False
    last = at
    for index, other in enumerate(program.steps[at + 1 :], at + 1):
        if other.out.buffer is target.buffer:
            return False
        for view in other.inputs:
            if view is not None and view.buffer is target.buffer:
                if view != target or not _accepts(other.operator, source):
                    return False
                last = index
    return not any(other.out.buffer is source.buffer for other in program.steps[at + 1 : last + 1])


def drop_unread(program: Program) -> None:
    """Remove steps whose results nothing reads."""
    read = {view.buffer for view in program.outputs}
    kept: list[Step] = []
    for step in reversed(program.steps):
        if step.out.buffer in read:
            kept.append(step)
            read.update(view.buffer for view in step.inputs if view is not None)
    program.steps = kept[::-1]
