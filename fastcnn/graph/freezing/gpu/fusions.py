"""The groups of steps that are tried as one kernel, each a :class:`~.fusing.Rule`; `freeze` keeps what is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcnn import backends
from fastcnn.graph.freezing.gpu.fusing import Fusion, Rule, View, argument, arguments
from fastcnn.graph.freezing.gpu.program import Step

_ops = torch.ops.fastcnn

# ---- a first convolution and the max pooling behind it --------------------------------------------------------------


def _has_stem_pools(device: torch.device) -> bool:
    """Whether some convolution with max pooling is one kernel on a device: the commonest is."""
    return _is_one_kernel(device, torch.bfloat16, (64, 3, 7, 7), [2, 2], [1, 1], 1, [[3, 3], [2, 2], [1, 1], [1, 1]])


def _is_one_kernel(
    device: torch.device,
    dtype: torch.dtype,
    weight: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pooling: Sequence[Sequence[int]],  # kernel, stride, padding, dilation
) -> bool:
    facts = {
        "weight": tuple(weight), "stride": tuple(stride), "dilation": tuple(dilation), "groups": groups,
        "pooling": tuple(map(tuple, pooling)),
    }  # fmt: skip
    return backends.resolve("conv2d_max_pool2d", device, dtype, (), facts)[0] != "reference"


def _stem_pool(view: View, i: int) -> Fusion | None:
    convolution = view.steps[i]
    follows = view.only_reader(i) if convolution.operator is _ops.conv2d.default else None
    if follows is None or view.steps[follows].operator not in (_ops.max_pool2d.default, _ops.max_pool2d_into.default):
        return None
    pooling = view.steps[follows]
    others = arguments(convolution, "residual input_scale input_shift")
    if any(each is not None for each in others) or argument(convolution, "input_relu"):
        return None
    first = arguments(convolution, "input weight bias stride padding dilation groups scale activation")
    second = arguments(pooling, "kernel_size stride padding dilation ceil_mode")
    weight = view.spec(first[1])
    if not _is_one_kernel(view.device, weight.torch_dtype, weight.shape, first[3], first[5], first[6], second[:4]):
        return None
    if pooling.operator is _ops.max_pool2d.default:
        step = Step(_ops.conv2d_max_pool2d.default, (*first, *second), {}, pooling.results)
    else:
        out = argument(pooling, "out")
        step = Step(_ops.conv2d_max_pool2d_into.default, (out, *first, *second), {}, pooling.results)
    return Fusion((i, follows), step, view.results[follows])


RULES = (Rule("conv2d and max_pool2d", _has_stem_pools, _stem_pool),)
