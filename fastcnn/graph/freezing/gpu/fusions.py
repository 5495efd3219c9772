"""The groups of steps that are tried as one kernel, each a :class:`~.fusing.Rule`; `freeze` keeps what is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcnn import backends
from fastcnn.backends import cuda
from fastcnn.graph.freezing.gpu.fusing import Fusion, Rule, View, argument, arguments
from fastcnn.graph.freezing.gpu.program import Step, Value

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


# ---- a block's last 1x1 convolution and the next block's first ------------------------------------------------------


def _pairs(weights: str) -> Rule:
    """Pairs for which the kernel has the weights there, "resident" or "streamed".

    Each is a rule of its own: streaming depends on L2 as well, so that one kind may be faster and the other not.
    """

    def possible(device: torch.device) -> bool:
        return any(
            _weights_of_pair(device, torch.bfloat16, channels) == weights
            for channels in ((64, 256, 64), (128, 512, 128))
        )

    def find(view: View, i: int) -> Fusion | None:
        expansion = view.steps[i]
        if not _is_pointwise(view, expansion) or not isinstance(argument(expansion, "residual"), Value):
            return None
        (wide,) = view.results[i]
        for j in view.readers(wide):
            reduction = view.steps[j]
            if (
                j > i
                and _is_pointwise(view, reduction)
                and argument(reduction, "input") == Value(wide)
                and argument(reduction, "residual") is None
            ):
                break
        else:
            return None
        first = arguments(expansion, "input residual weight scale bias")
        second = arguments(reduction, "weight scale bias")
        matrix = view.spec(first[2])
        channels = (matrix.shape[1], matrix.shape[0], view.spec(second[0]).shape[0])
        if _weights_of_pair(view.device, matrix.torch_dtype, channels) != weights:
            return None
        step = Step(_ops.conv2d_1x1_pair.default, (*first, *second), {}, (*expansion.results, *reduction.results))
        return Fusion((i, j), step, (*view.results[i], *view.results[j]))

    return Rule(f"pairs of 1x1 conv2d ({weights} weights)", possible, find)


def _is_pointwise(view: View, step: Step) -> bool:
    """A 1x1 convolution with ReLU, of values as they are."""
    if step.operator is not _ops.conv2d.default:
        return False
    absent = arguments(step, "input_scale input_shift")
    numbers = [list(each) for each in arguments(step, "stride padding")]
    return (
        tuple(view.spec(argument(step, "weight")).shape[2:]) == (1, 1)
        and numbers == [[1, 1], [0, 0, 0, 0]]
        and argument(step, "groups") == 1
        and argument(step, "activation") == "relu"
        and all(each is None for each in absent)
        and not argument(step, "input_relu")
    )


def _weights_of_pair(device: torch.device, dtype: torch.dtype, channels: tuple[int, int, int]) -> str:
    return cuda.conv2d_1x1_pair_weights(device, dtype, channels)


RULES = (
    Rule("conv2d and max_pool2d", _has_stem_pools, _stem_pool),
    _pairs("resident"),
    _pairs("streamed"),
)
