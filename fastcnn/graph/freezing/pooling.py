"""Takes the maximum of 2x2 windows where a convolution's output is still in registers.

A Winograd tile of 6x6, 4x4 or 2x2 outputs holds whole windows, one of 1x4 does not; so do two rows of a plain sum into
few channels. So ``max_pool2d(conv2d(x))`` becomes one step, and the picture before pooling is never written.
"""

from __future__ import annotations

from typing import cast

from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing.program import Program, Step

_WINDOW = ((2, 2), (2, 2), (0, 0), (1, 1))  # kernel, stride, padding, dilation
_RESIDUAL = 3  # of a convolution's inputs


def fuse_max_pooling(program: Program) -> None:
    """Join such steps. A convolution's last attribute then is whether it pools."""
    at = 0
    while at < len(program.steps):
        step = program.steps[at]
        if step.operator == "max_pool2d" and step.attributes == _WINDOW:
            source = step.inputs[0]
            made_at = next((i for i in range(at - 1, -1, -1) if program.steps[i].out == source), None)
            if made_at is not None and _may_pool(program, made_at, at):
                convolution = program.steps[made_at]
                convolution.out = step.out
                convolution.attributes = (*convolution.attributes, True)
                del program.steps[at]
                continue
        at += 1


def _may_pool(program: Program, made_at: int, at: int) -> bool:
    convolution, pooling = program.steps[made_at], program.steps[at]
    if convolution.inputs[_RESIDUAL:][:1] != (None,) or not _can_pool(program, convolution, pooling):
        return False
    picture, out = convolution.out.buffer, pooling.out.buffer
    if picture.kind != "activation" or picture is out or any(view.buffer is picture for view in program.outputs):
        return False
    # Nothing else touches the picture, and nothing touches the pooled one's memory before it is pooled.
    others = [step for step in program.steps if step is not convolution and step is not pooling]
    if any(view.buffer is picture for step in others for view in step.views()):
        return False
    before = [convolution, *program.steps[made_at + 1 : at]]
    return not any(view.buffer is out for step in before for view in step.views())


def _can_pool(program: Program, convolution: Step, pooling: Step) -> bool:
    """Whether the convolution's kernel can."""
    if convolution.operator not in ("conv2d", "conv2d_winograd"):
        return False
    assert convolution.weight is not None
    packed = program.weights[convolution.weight]
    if convolution.operator == "conv2d_winograd":
        height, width = convolution.out.shape[2:]
        return cpp.may_pool(packed.packed, packed.algorithm, (height, width))
    weight, input, out = packed.packed, convolution.inputs[0], pooling.out
    stride, padding, dilation = cast("tuple[tuple[int, int], ...]", convolution.attributes[-3:])
    assert isinstance(weight, _native.PackedConv2dWeight)
    assert input is not None
    pixels = out.pixel_stride()
    return pixels is not None and _native.cpu_conv2d_may_pool(
        weight, out.shape, pixels, input.shape, str(out.dtype).removeprefix("torch."), stride, padding, dilation
    )
