"""Lets a convolution write its result over the residual that it adds, where nobody reads that afterwards.

A block's last convolution adds the block's input, which is read for the last time then. In memory of its own the result
would be one more tensor to go through the caches: its lines would be fetched only to be overwritten, and push out what
is needed next. Every kernel reads a value of the residual before it writes the result's there, and does both once.
"""

from __future__ import annotations

from dataclasses import replace

from fastcnn.graph.freezing.program import Buffer, Program, Step, View

_CONVOLUTIONS = frozenset({"conv2d", "conv2d_winograd", "conv2d_strassen"})
_RESIDUAL = 3  # of their inputs: input, scale, bias, residual, the prologue's scale and shift


def write_over_residuals(program: Program) -> None:
    """Give such results their residuals' buffers; views of them follow."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, step in enumerate(program.steps):
        for view in step.views():
            first.setdefault(view.buffer, index)
            last[view.buffer] = index
    over: dict[Buffer, Buffer] = {}

    def moved(view: View) -> View:
        return replace(view, buffer=over.get(view.buffer, view.buffer))

    for index, step in enumerate(program.steps):
        step.out, step.inputs = moved(step.out), tuple(None if v is None else moved(v) for v in step.inputs)
        residual = _residual_to_write_over(step)
        if residual is None or first[step.out.buffer] != index or last[residual.buffer] != index:
            continue
        over[step.out.buffer] = residual.buffer
        last[residual.buffer] = last[step.out.buffer]
        step.out = residual


def _residual_to_write_over(step: Step) -> View | None:
    """A convolution's residual that lies as its result does, in memory that no caller sees; else None."""
    residual = step.inputs[_RESIDUAL] if step.operator in _CONVOLUTIONS else None
    if residual is None or residual.buffer.kind != "activation" or step.out.buffer.kind != "activation":
        return None
    if residual.buffer.length != step.out.buffer.length or _place(residual) != _place(step.out):
        return None
    read_twice = sum(view is not None and view.buffer is residual.buffer for view in step.inputs) > 1
    return None if read_twice else residual


def _place(view: View) -> tuple[object, ...]:
    """Where a view lies in its buffer; strides of size-1 dimensions mean nothing."""
    return view.dtype, view.offset, view.shape, view.pixel_stride()
