"""Moves pixels apart that would lie a multiple of 4 KiB from each other: 1024 channels of fp32, 2048 of bf16.

Addresses a multiple of 4 KiB apart share a set of L1, which holds fewer lines than the kernels have pixels in
registers: what is read in place, the residual and the output then push each other out. A cache line between two pixels
is enough. Only activations that no caller sees can be spaced so, and only where each step that touches them is told of
a pixel stride.
"""

from __future__ import annotations

from dataclasses import replace

from fastcnn.graph.freezing.placing import PIXEL_STEPS
from fastcnn.graph.freezing.program import Buffer, Program, View

_SET_BYTES, _LINE_BYTES = 4096, 64
_FEW_PIXELS = 8  # that one set holds


def space_pixels(program: Program) -> None:
    """Give such buffers a cache line more for each pixel; views of them follow."""
    seen: dict[Buffer, list[View]] = {}
    refused = {view.buffer for view in program.outputs}
    for step in program.steps:
        for view in step.views():
            seen.setdefault(view.buffer, []).append(view)
            if step.operator not in PIXEL_STEPS:
                refused.add(view.buffer)
    strides = {b: _spaced(b, views) for b, views in seen.items() if b.kind == "activation" and b not in refused}

    def moved(view: View) -> View:
        stride = strides.get(view.buffer)
        if stride is None:
            return view
        _, _, h, w = view.shape
        return replace(view, strides=(h * w * stride, 1, w * stride, stride))

    for step in program.steps:
        step.out, step.inputs = moved(step.out), tuple(None if v is None else moved(v) for v in step.inputs)
    for buffer, stride in strides.items():
        if stride is not None:
            n, _, h, w = seen[buffer][0].shape
            buffer.length = n * h * w * stride


def _spaced(buffer: Buffer, views: list[View]) -> int | None:
    """The pixel stride to give a buffer; None: it stays as it is.

    It must hold the same pixels for all its views, each of which is all their channels or a slice of them.
    """
    if len(views[0].shape) != 4:
        return None
    n, _, h, w = views[0].shape
    pixels, item = n * h * w, buffer.dtype.itemsize
    channels = buffer.length // pixels
    if pixels <= _FEW_PIXELS or channels * item % _SET_BYTES or pixels * channels != buffer.length:
        return None
    for view in views:
        if len(view.shape) != 4 or (view.shape[0], *view.shape[2:]) != (n, h, w):
            return None
        if view.pixel_stride() != channels or view.offset + view.shape[1] > channels:
            return None
    return channels + _LINE_BYTES // item
