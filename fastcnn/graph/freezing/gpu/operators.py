"""The operators that a saved model may consist of: a fixed list, in which names of a file are looked up.

They compute tensors from tensors and numbers, launch kernels that check their arguments, and draw no random numbers.
Those that read at addresses from tensors (`index`, `gather`, `embedding`) are not among them: on a GPU nothing checks
such addresses but the kernel itself, whose failure ends the process's use of the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_FASTCNN = (
    "adaptive_avg_pool2d avg_pool2d batch_norm batch_statistics channel_affine conv2d conv2d_1x1_pair "
    "conv2d_max_pool2d linear local_response_norm max_pool2d residual_add"
)

# With the form that writes its first argument (relu and relu_), each overload below that exists.
_ELEMENTWISE = (
    "abs add addcdiv addcmul atan bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min cos div "
    "elu eq erf exp exp2 expm1 floor ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu lerp log log1p log2 "
    "logical_and logical_not logical_or lt mish mul ne neg pow reciprocal relu relu6 round rsqrt sigmoid sign silu "
    "sin sqrt square sub tanh threshold"
)
_ELEMENTWISE_OVERLOADS = ("default", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor", "Tensor_mode")

_OTHERS = (
    # values and memory
    "_to_copy.default _unsafe_view.default alias.default arange.default arange.start arange.start_step cat.default "
    "clone.default constant_pad_nd.default copy.default copy_.default detach.default empty.memory_format "
    "empty_like.default empty_strided.default expand.default eye.default eye.m fill.Scalar fill_.Scalar flip.default "
    "full.default full_like.default lift_fresh_copy.default linspace.default masked_fill.Scalar masked_fill_.Scalar "
    "new_empty.default new_empty_strided.default new_full.default new_ones.default new_zeros.default ones.default "
    "ones_like.default permute.default repeat.default roll.default scalar_tensor.default select.int slice.Tensor "
    "split.Tensor split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default t.default "
    "transpose.int tril.default triu.default unbind.int unfold.default unsafe_split.Tensor unsqueeze.default "
    "view.default where.ScalarOther where.ScalarSelf where.self zero_.default zeros.default zeros_like.default "
    # images
    "channel_shuffle.default im2col.default native_channel_shuffle.default pixel_shuffle.default "
    "pixel_unshuffle.default reflection_pad1d.default reflection_pad2d.default replication_pad2d.default "
    "upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec "
    "upsample_nearest2d.default upsample_nearest2d.vec "
    # layers
    "_adaptive_avg_pool2d.default _log_softmax.default _native_batch_norm_legit.no_stats "
    "_native_batch_norm_legit_no_training.default _prelu_kernel.default _softmax.default "
    "adaptive_max_pool2d.default addmm.default avg_pool2d.default baddbmm.default bmm.default convolution.default "
    "cudnn_batch_norm.default glu.default max_pool2d_with_indices.default mm.default native_batch_norm.default "
    "native_group_norm.default native_layer_norm.default prelu.default "
    # reductions
    "amax.default amin.default argmax.default argmin.default cumsum.default linalg_vector_norm.default "
    "logsumexp.default max.default max.dim maximum.default mean.default mean.dim min.default min.dim "
    "minimum.default prod.dim_int rsub.Scalar rsub.Tensor std.correction sum.default sum.dim_IntList var.correction "
    "var_mean.correction"
)


@functools.cache
def allowed() -> dict[str, Any]:
    """The operators by name, ``"aten.relu.default"`` for example; those that this PyTorch has."""
    names = [f"fastcnn.{name}{form}.default" for name in _FASTCNN.split() for form in ("", "_into")]
    names += [
        f"aten.{name}{form}.{overload}"
        for name in _ELEMENTWISE.split()
        for form in ("", "_")
        for overload in _ELEMENTWISE_OVERLOADS
    ]
    names += [f"aten.{name}" for name in _OTHERS.split()]
    found: dict[str, Any] = {}
    for name in names:
        namespace, operator, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None and overload in packet.overloads():
            found[name] = getattr(packet, overload)
    return found


@functools.cache
def _names() -> dict[Any, str]:
    return {operator: name for name, operator in allowed().items()}


def name_of(operator: Any) -> str | None:
    """An operator's name in a file, or None for one that no file may hold."""
    return _names().get(operator)


def operator_named(name: object) -> Any:
    """Raises ValueError for a name that is not on the list."""
    found = allowed().get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown operator {name!r}")
    return found
