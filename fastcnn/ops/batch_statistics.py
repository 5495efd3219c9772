"""batch_statistics: mean and biased variance of each channel over a batch.

mean[c] = sum(x[:, c]) / M,  var[c] = sum((x[:, c] - mean[c])^2) / M,  M = N * H * W

Inside fastcnn a CPU's statistics are float64: a mean rounded to fp32 moves every normalised value of its channel by up
to 6e-8 * mean / deviation. A GPU's are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.backends.reference import per_channel
from fastcnn.ops._arguments import require_floating, require_tensor
from fastcnn.ops._layout import to_kernel_layout
from fastcnn.ops._registration import Operator


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as batch norm needs them in training.

    Args:
        input: (N, C, H, W); fp32, bf16 or fp16 run on fastcnn's kernels.

    Returns:
        mean, var: (C,) each, fp32 (float64 for a float64 input); NaN where there is nothing to average.

    Raises:
        ValueError, TypeError: the input has a wrong shape or dtype.
    """
    require_tensor(input, "input")
    statistics = OPERATOR(input)
    if input.dtype != torch.float64:
        statistics = statistics.float()
    mean, var = statistics.unbind(0)
    return mean, var


def _allocate(input: Tensor) -> Tensor:
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), has {tuple(input.shape)}")
    require_floating(input, "input")
    dtype = torch.float64 if input.dtype == torch.float64 or input.device.type == "cpu" else torch.float32
    return torch.empty((2, input.shape[1]), dtype=dtype, device=input.device)


def _fill(out: Tensor, input: Tensor) -> None:
    if input.numel() == 0:
        out.fill_(float("nan"))
        return
    backends.run("batch_statistics", input.device, input.dtype, out[0], out[1], to_kernel_layout(input))


def _backward(grad: Tensor, out: Tensor, needs: Sequence[bool], input: Tensor) -> list[Tensor | None]:
    count = max(input.shape[0] * input.shape[2] * input.shape[3], 1)
    wide = input if input.dtype == torch.float64 else input.float()
    centred = wide - per_channel(out[0], wide)
    return [((per_channel(grad[0], wide) + 2 * per_channel(grad[1], wide) * centred) / count).to(input.dtype)]


OPERATOR = Operator(
    "batch_statistics",
    "Tensor input",
    allocate=_allocate,
    finish=lambda out, *args: out,
    fill=_fill,
    backward=_backward,
    needs_output=lambda input: True,
    writable=lambda out: out.is_contiguous(),
)
