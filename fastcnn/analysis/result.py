"""What a summary found: typed fields, a dictionary for JSON, and a table to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastcnn._table import text_table


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels of the network's input that one value of an output depends on; one number a spatial axis (H, W).

    Along an axis, output value ``i`` sees the ``size`` pixels whose middle is ``offset + i * stride``, where pixel 0
    has its centre at 0. Padding is counted as pixels, so that a field may be larger than the input.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"size": list(self.size), "stride": list(self.stride), "offset": list(self.offset)}


@dataclass(frozen=True)
class Layer:
    """One call of a module, or of an operator outside of any layer's module.

    Attributes:
        name: the module's name; ``#2`` follows when it runs a second time. An operator called by function has the name
            of the module that owns its weight, else that of the innermost module and its own (``block.max_pool2d``).
        type: the module's class, or the operator.
        output_shapes: of every output tensor.
        parameters: those of the module, counted where they are first used.
        macs: multiply-accumulates of convolutions and matrix products, as direct convolution. What an operator does
            inside, such as an LSTM's products, is not seen.
        activation_bytes: memory that the outputs need when the layer runs by itself; 0 when it works in place or
            returns a view. Fused kernels need less: they do not write what batch norm and ReLU read.
        receptive_field: None where it is not a window of fixed size, or not known.
        sees_whole_input: every value depends on the whole input (global pooling, flattening, and all that follows).
    """

    name: str
    type: str
    output_shapes: tuple[tuple[int, ...], ...]
    parameters: int
    macs: int
    activation_bytes: int
    receptive_field: ReceptiveField | None
    sees_whole_input: bool

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the first output; () when there is none."""
        return self.output_shapes[0] if self.output_shapes else ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "output_shapes": [list(shape) for shape in self.output_shapes],
            "parameters": self.parameters,
            "macs": self.macs,
            "activation_bytes": self.activation_bytes,
            "receptive_field": None if self.receptive_field is None else self.receptive_field.to_dict(),
            "sees_whole_input": self.sees_whole_input,
        }

    def _row(self) -> tuple[str, ...]:
        field = self.receptive_field
        if field is None:
            seen = ("all", "", "") if self.sees_whole_input else ("-", "", "")
        else:
            seen = (_per_axis(field.size), _per_axis(field.stride), _per_axis(field.offset))
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.output_shapes)
        counts = (_count(self.parameters), _count(self.macs), _bytes(self.activation_bytes))
        return (self.name, self.type, shapes, *counts, *seen)


_HEADINGS = ("layer", "type", "output", "parameters", "MACs", "memory", "sees", "stride", "offset")


@dataclass(frozen=True)
class Summary:
    """The layers of a network in the order of execution, and their totals; ``summary["conv1"]`` is one layer.

    Attributes:
        model: the network's class, or the name it is known by.
        input_shapes, dtype: of the inputs.
        layers: every layer's call.
        blocks: every call of a module made of others, with the MACs, parameters and memory of all in it.
        parameters: all of the network's, also those that took no part (auxiliary heads).
        trainable_parameters: those that require a gradient.
        unused_parameters: those of no layer in the table.
        macs, activation_bytes: over all layers.
        input_bytes, parameter_bytes: memory of the inputs, and of all parameters in ``dtype``.
    """

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    layers: tuple[Layer, ...]
    blocks: tuple[Layer, ...]
    parameters: int
    trainable_parameters: int
    unused_parameters: int
    macs: int
    activation_bytes: int
    input_bytes: int
    parameter_bytes: int

    def __getitem__(self, name: str) -> Layer:
        for layer in (*self.layers, *self.blocks):
            if layer.name == name:
                return layer
        raise KeyError(f"no layer or block that ran is named {name!r}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "dtype": self.dtype,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "unused_parameters": self.unused_parameters,
            "macs": self.macs,
            "activation_bytes": self.activation_bytes,
            "input_bytes": self.input_bytes,
            "parameter_bytes": self.parameter_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "blocks": [block.to_dict() for block in self.blocks],
        }

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        lines = [
            f"{self.model}, input {shapes} {self.dtype}",
            text_table(_HEADINGS, [layer._row() for layer in self.layers], left=(0, 1, 2)),
            f"parameters   {self.parameters:,} ({_bytes(self.parameter_bytes)})",
        ]
        if self.trainable_parameters != self.parameters:
            lines.append(f"             {self.trainable_parameters:,} of them trainable")
        if self.unused_parameters:
            lines.append(f"             {self.unused_parameters:,} of them in no layer above")
        lines += [
            f"MACs         {self.macs:,}",
            f"activations  {_bytes(self.activation_bytes)}, input {_bytes(self.input_bytes)}",
            "sees, stride, offset: receptive field in input pixels; all: the whole input; -: no window of fixed size",
        ]
        return "\n".join(lines)


def _per_axis(values: tuple[float, ...]) -> str:
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else "x".join(texts)


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def _bytes(value: int) -> str:
    """Decimal units, as memory sizes in papers and lectures."""
    if not value:
        return ""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value} B"
