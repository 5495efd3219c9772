"""A chain of layers, neighbours of which run as one operator."""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn.nn.fusing import conv_act, conv_bn, linear_act


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` with convolution (+ batch norm) (+ ReLU) and linear (+ ReLU) as one call each.

    Same constructor, children, state-dict keys and results: what is fused is found anew in each call, and layers that
    were given hooks, parametrizations or other types are called one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Conv2d):
                bn = layers.pop(0) if layers and isinstance(layers[0], nn.BatchNorm2d) else None
                activation = _take_relu(layers)
                if isinstance(bn, nn.BatchNorm2d):
                    input = conv_bn(input, layer, bn, activation=activation)
                else:
                    input = conv_act(input, layer, activation=activation)
            elif isinstance(layer, nn.Linear):
                input = linear_act(input, layer, activation=_take_relu(layers))
            else:
                input = layer(input)
        return input


def _take_relu(layers: list[nn.Module]) -> str | nn.Module:
    """The ReLU that comes next, taken off the list, or "none"."""
    relu = layers[0] if layers else None
    if not isinstance(relu, nn.ReLU):
        return "none"
    del layers[0]
    return relu
