"""torch.nn's layers, computed by fastcnn's operators.

Each is a subclass of its torch.nn namesake with the same constructor, parameters, state-dict keys, hooks and results:
``isinstance(layer, torch.nn.Conv2d)`` stays true, and checkpoints and optimizers do not notice.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import forget
from fastcnn.nn._calls import call_batch_norm, call_conv2d

_Self = TypeVar("_Self", bound=nn.Module)


def _forget_derived(module: nn.Module) -> None:
    """Drop packed and folded values: on a GPU a write through ``.data`` leaves no other trace."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            forget(tensor)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`. (N, C, H, W) or (C, H, W) -> (N, K, P, Q); channels-last input is fastest."""

    def forward(self, input: Tensor) -> Tensor:
        return call_conv2d(input, self, self.bias)

    def train(self: _Self, mode: bool = True) -> _Self:
        _forget_derived(self)
        return super().train(mode)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`. (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)

    def train(self: _Self, mode: bool = True) -> _Self:
        _forget_derived(self)
        return super().train(mode)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`: batch statistics in train mode, one multiply-add a value in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return call_batch_norm(input, self)

    def train(self: _Self, mode: bool = True) -> _Self:
        _forget_derived(self)
        return super().train(mode)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return ops.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d`. (N, C, H, W) -> (N, C, *output_size)."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm`: alpha is divided by size, as in PyTorch and Caffe, not as in the paper."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
