"""The C++ backend: fastcnn's own CPU kernels (csrc/cpu)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import _native, backends
from fastcnn.backends.derived import derived

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return None


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    if device.type != "cpu":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    return "no kernel for the two" if operator == "conv2d_max_pool2d" else None


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """fp16 tensors as fp32: the CPU kernels have no fp16 storage of their own."""
    return [None if t is None else t.float() for t in tensors]


class Tiles(NamedTuple):
    """Winograd's algorithm in tiles of ``size`` x ``size`` outputs, for convolutions of one stride."""

    size: int
    stride: int


# How conv2d is computed: the plain sum, or Winograd's algorithm, where winogradMsS is for stride S; in tiles of 4x4
# also with weights that stay plain in memory and are transformed while they are used; winograd1x4sS and winograd1x2 in
# tiles of a row; or, of 1x1 filters, Strassen's algorithm.
DIRECT, WINOGRAD4_PLAIN, STRASSEN = "direct", "winograd4_plain", "strassen"
WINOGRAD6, WINOGRAD4, WINOGRAD2 = "winograd6", "winograd4", "winograd2"
_TILES = {WINOGRAD6: Tiles(6, 1), WINOGRAD4: Tiles(4, 1), WINOGRAD2: Tiles(2, 1)}
_TILES.update({f"winograd{size}s{stride}": Tiles(size, stride) for stride in (2, 3, 4) for size in (4, 2)})
WINOGRAD_1X2 = "winograd1x2"
_ROWS = {WINOGRAD_1X2: 1, **{f"winograd1x4s{stride}": stride for stride in (2, 3, 4)}}
ALGORITHMS = (DIRECT, *_TILES, *_ROWS, WINOGRAD4_PLAIN, STRASSEN)
# A fully connected weight in fewer bits, without loss; and so that what meets a zero input is not read.
SHORT, SHORT_BY_INPUT = "short", "short_by_input"
# By the taps of a phase, to a side: those of filters with stride 1 are the filter's.
_SIZES = {1: {3: (6, 4, 2), 5: (4, 2)}, 2: {2: (2,), 3: (4, 2), 4: (4,)}}
_SIZES[3] = _SIZES[4] = _SIZES[2]
# What those of fixed filters cover.
_SERVES = {
    WINOGRAD6: "3x3 filters with stride 1 and one group",
    WINOGRAD4: "3x3 and 5x5 filters with stride 1 and one group",
    WINOGRAD2: "3x3 and 5x5 filters with stride 1 and one group",
    WINOGRAD_1X2: "5x5 filters with stride 1 and one group",
    WINOGRAD4_PLAIN: "3x3 filters with stride 1 and one group, groups of whole vectors, or of 4 to a vector's channels",
    STRASSEN: "1x1 filters with one group, an even number of input channels, stride 1, no padding, fp32 or fp16",
}
_WORTHWHILE = 1.08  # by how much the estimate must favour Strassen's algorithm: it is off by as much
# Tiles of 4x4 under filters of 4 taps a phase have 7x7 points, which costs digits at the first layer of deep networks
# (GoogLeNet's logits went from 1.0e-5 to 1.7e-5 off on white noise, PyTorch's are 9e-6): only the tuner and
# freeze(tune=True) use them. Tiles of a row lose half as much.
_MOST_TAPS_BY_RULE = 3
# Tiles of 6x6 round four times as much as those of 4x4, and took GoogLeNet's logits on white noise from 1e-5 to 2e-5:
# only the tuner and freeze(tune=True) use them, too.
_WHEN_TUNED = (WINOGRAD6,)
_LEAST_CHANNELS_ALONG_ROWS = 5  # in, with stride 1: what fewer save in products, transforms cost


PackedWeight = (
    _native.PackedConv2dWeight
    | _native.PackedConv2dWinogradWeight
    | _native.PlainWinogradWeight
    | _native.RowWinogradWeight
    | _native.ShortLinearWeight
)


def algorithms(
    weight: Sequence[int],
    stride: Pair,
    dilation: Pair,
    groups: int,
    dtype: torch.dtype = torch.float32,
    padded: bool = False,
) -> tuple[str, ...]:
    """Those that cover a convolution, the plain sum first. ``weight``: its shape; ``padded``: whether the output of a
    1x1 filter is larger than the input."""
    r, s = weight[2:]
    step = stride[0]
    if r != s or stride != (step, step) or dilation != (1, 1):
        return (DIRECT,)
    if (r, step, groups) == (1, 1, 1):
        strassen = not padded and dtype != torch.bfloat16 and weight[1] % 2 == 0
        return (DIRECT, STRASSEN) if strassen else (DIRECT,)
    plain = (r, step) == (3, 1) and _native.PlainWinogradWeight.covers(weight[0], weight[1] * groups, groups)
    sizes = _SIZES.get(step, {}).get(-(-r // step), ()) if groups == 1 else ()
    names = [name for name, tiles in _TILES.items() if tiles.stride == step and tiles.size in sizes]
    in_rows = sizes and (step > 1 or r == 5)
    names += [name for name, stride_of_rows in _ROWS.items() if stride_of_rows == step and in_rows]
    return (DIRECT, *names, WINOGRAD4_PLAIN) if plain else (DIRECT, *names)


def may_pool(weight: PackedWeight, algorithm: str, size: Pair) -> bool:
    """Whether a Winograd algorithm's way back can take the maximum of 2x2 windows of a picture of that height and
    width: where its tiles hold whole ones."""
    if isinstance(weight, _native.PackedConv2dWinogradWeight):
        return weight.may_pool(*size)
    return algorithm in (WINOGRAD_1X2, WINOGRAD4_PLAIN)


def _served(algorithm: str) -> str:
    if algorithm in _SERVES:
        return _SERVES[algorithm]
    if algorithm in _ROWS:
        stride = _ROWS[algorithm]
        return f"{stride + 1} to {4 * stride} taps a side with stride {stride} and one group"
    size, stride = _TILES[algorithm]
    taps = [taps for taps, sizes in _SIZES[stride].items() if size in sizes]
    return f"{(min(taps) - 1) * stride + 1} to {max(taps) * stride} taps a side with stride {stride} and one group"


def has_bf16_dot_products() -> bool:
    """Whether bf16 tensors are convolved in bf16 arithmetic, with twice the multiplications of fp32."""
    return _native.cpu_instruction_set() == "avx512_bf16"


def conv2d_algorithm(
    out: Sequence[int],
    weight: Sequence[int],
    stride: Pair,
    dilation: Pair,
    groups: int,
    dtype: torch.dtype,
    padded: bool = False,
) -> str:
    """Which algorithm serves a convolution: a function of its form, of :func:`fastcnn.exact`, of whether a gradient
    is recorded and of the processor's instruction set, nothing else. ``out`` and ``weight`` are shapes.

    Where Winograd is allowed and covers the form, from 8 channels in (with a stride: any) and out and 16 output
    pixels: what an estimate of cycles prefers. 5x5 filters over 5 to 7 channels with stride 1, into more than 8: tiles
    of a row (1x2). Larger tiles need fewer products, but their transformed weights are, of 3x3 filters, 4 times as
    large as the weights in 4x4 tiles, 1.8 times in 2x2 tiles: for few tiles, reading them takes longest. Tiles that
    hang over the edge of a narrow output waste products. 6x6 tiles, which round more, are for the tuner. With a stride
    s the filter is one of r/s taps with stride 1 over s*s phases of the input; up to 3 taps are chosen by themselves, 4
    in tiles of a row (1x4), which need more products and round less. In bf16, on a processor with bf16 dot products,
    those serve the plain sum and 2x2 tiles of 3x3 filters with stride 1; all else is computed in fp32.

    1x1 filters in fp32 (and fp16): Strassen's algorithm, which takes 7 products where the plain sum takes 8 and the
    same weights, where the estimate prefers it: large layers with some 128 channels in and out or more.
    """
    covering = algorithms(weight, stride, dilation, groups, dtype, padded)
    if covering == (DIRECT,) or not backends.allows_fast_algorithms():
        return DIRECT
    bf16 = dtype == torch.bfloat16 and has_bf16_dot_products()
    return _cheapest(covering, tuple(out), weight[1], weight[2], stride[0], groups, bf16)


@functools.lru_cache(maxsize=4096)
def _cheapest(
    covering: tuple[str, ...],
    out: tuple[int, ...],
    in_channels: int,
    filter: int,
    stride: int,
    groups: int,
    bf16: bool,
) -> str:
    n, k, p, q = out
    if k < 8 or n * p * q < 16:
        return DIRECT
    if stride == 1 and in_channels < 8:
        along_rows = WINOGRAD_1X2 in covering and in_channels >= _LEAST_CHANNELS_ALONG_ROWS and k > 8 and not bf16
        return WINOGRAD_1X2 if along_rows else DIRECT
    covering = tuple(name for name in covering if name != WINOGRAD_1X2 and name not in _WHEN_TUNED)
    if stride > 1 and -(-filter // stride) > _MOST_TAPS_BY_RULE:
        covering = tuple(name for name in covering if name not in _TILES)
    if bf16:  # tiles of a row are computed in fp32
        covering = tuple(name for name in covering if name not in _ROWS)

    def cycles(name: str) -> float:
        if name == WINOGRAD4_PLAIN:
            return _native.cpu_conv2d_winograd_plain_cycles(out, in_channels * groups, groups)
        if name in _ROWS:
            return _native.cpu_conv2d_winograd_rows_cycles(out, in_channels, filter, stride)
        if name == STRASSEN:
            return _WORTHWHILE * _native.cpu_conv2d_strassen_cycles(out, in_channels)
        tile = 0 if name == DIRECT else _TILES[name].size
        return _native.cpu_conv2d_cycles(out, in_channels, filter, stride, tile, bf16)

    return min(covering, key=cycles)


def fast_algorithm(operator: str, *args: Any) -> str | None:
    if operator != "conv2d":
        return None
    out, input, weight, (stride, _, dilation, groups) = args[0], args[1], args[2], args[10:14]
    padded = out.shape[2:] != input.shape[2:]
    algorithm = conv2d_algorithm(out.shape, weight.shape, stride, dilation, groups, weight.dtype, padded)
    return _family(algorithm)


def _family(algorithm: str) -> str | None:
    """A fast algorithm's name, whatever its tiles; None: the plain sum."""
    return None if algorithm == DIRECT else STRASSEN if algorithm == STRASSEN else "winograd"


def conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    padded = out.shape[2:] != input.shape[2:]
    algorithm = conv2d_algorithm(out.shape, weight.shape, stride, dilation, groups, weight.dtype, padded)
    conv2d_by(
        algorithm, out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, activation,
        stride, padding, dilation, groups,
    )  # fmt: skip


def conv2d_by(
    algorithm: str,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    """The contract's conv2d by a given algorithm."""
    padded = out.shape[2:] != input.shape[2:]
    if algorithm != DIRECT and algorithm not in algorithms(
        weight.shape, stride, dilation, groups, weight.dtype, padded
    ):
        raise ValueError(
            f"{algorithm} serves {_served(algorithm)} only, all with dilation 1; weight has shape "
            f"{tuple(weight.shape)}, stride is {stride}, dilation {dilation}, groups {groups}"
        )
    result = out
    if out.dtype == torch.float16:
        result = torch.empty_like(out, dtype=torch.float32, memory_format=torch.channels_last)
        input = input.float()
        residual = None if residual is None else residual.float()
    relu, threads = activation == "relu", torch.get_num_threads()
    packing = DIRECT if algorithm == STRASSEN else algorithm  # the same weights
    packed: Any = derived(weight, ("cpu_conv2d", groups, packing), lambda w: pack_weight(w, groups, packing))
    if algorithm == DIRECT:
        _native.cpu_conv2d(
            result, input, packed, scale, bias, residual, input_scale, input_shift, input_relu, relu, stride, padding,
            dilation, threads,
        )  # fmt: skip
    elif algorithm == STRASSEN:
        _native.cpu_conv2d_strassen(
            result, input, packed, scale, bias, residual, input_scale, input_shift, input_relu, relu, threads
        )
    else:
        _native.cpu_conv2d_winograd(
            result, input, packed, scale, bias, residual, input_scale, input_shift, input_relu, relu, padding,
            threads,
        )  # fmt: skip
    if result is not out:
        out.copy_(result)


def pack_weight(weight: Tensor, groups: int, algorithm: str) -> PackedWeight:
    """A convolution's weight, packed for this processor's instruction set and an algorithm."""
    weight = weight.detach()
    if weight.dtype == torch.float16:
        weight = weight.float()
    if algorithm in (DIRECT, STRASSEN):
        return _native.PackedConv2dWeight(weight, groups)
    if algorithm == WINOGRAD4_PLAIN:
        return _native.PlainWinogradWeight(weight, groups)
    if algorithm in _ROWS:
        return _native.RowWinogradWeight(weight, _ROWS[algorithm])
    return _native.PackedConv2dWinogradWeight(weight, *_TILES[algorithm])


def pack_linear(weight: Tensor, algorithm: str = SHORT) -> PackedWeight:
    """A fully connected weight (K, C), fp32 or bf16, stored short; ``_native.cpu_reads_short_weights`` says where.

    ``SHORT_BY_INPUT`` is for one input row and finite fp32 weights.
    """
    return _native.ShortLinearWeight(weight.detach(), algorithm == SHORT_BY_INPUT)


def packed_weight_from(
    packed: bytes | memoryview, shape: tuple[int, ...], groups: int, algorithm: str, dtype: str
) -> PackedWeight:
    """The same from the bytes that its ``packed()`` gave. Raises ValueError for what no packing gives."""
    if algorithm in (DIRECT, STRASSEN):
        return _native.PackedConv2dWeight.from_packed(packed, shape, groups, dtype)
    if algorithm in (SHORT, SHORT_BY_INPUT):
        columns, depth = shape
        return _native.ShortLinearWeight.from_packed(packed, columns, depth, dtype, algorithm == SHORT_BY_INPUT)
    if algorithm == WINOGRAD4_PLAIN:
        return _native.PlainWinogradWeight.from_packed(packed, shape, groups)
    if (algorithm not in _TILES and algorithm not in _ROWS) or groups != 1:
        raise ValueError(f"no weight of {groups} groups is packed for {algorithm!r}")
    if algorithm in _ROWS:
        return _native.RowWinogradWeight.from_packed(packed, shape, _ROWS[algorithm])
    return _native.PackedConv2dWinogradWeight.from_packed(packed, shape, *_TILES[algorithm], dtype)


def variants(operator: str, *args: Any) -> tuple[str, ...]:
    """The algorithms that cover a convolution, for the tuner."""
    if operator != "conv2d" or not backends.allows_fast_algorithms():
        return ()
    padded = args[0].shape[2:] != args[1].shape[2:]
    covering = algorithms(args[2].shape, args[10], args[12], args[13], args[2].dtype, padded)
    return () if covering == (DIRECT,) else covering


def variant(text: str) -> Any:
    if text not in ALGORITHMS:
        raise ValueError(f"backend 'cpp' has the variants {', '.join(ALGORITHMS)}, not {text!r}")
    return _Algorithm(text)


class _Algorithm:
    """This backend's conv2d by one algorithm."""

    def __init__(self, name: str) -> None:
        self._name = name

    def unsupported(self, operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
        if operator != "conv2d":
            return f"no algorithm {self._name} for {operator}"
        if self._name != DIRECT and not backends.allows_fast_algorithms():
            return "exact arithmetic was asked for"
        return unsupported(operator, device, dtype, **facts)

    def fast_algorithm(self, operator: str, *args: object) -> str | None:
        return _family(self._name)

    def conv2d(self, *args: Any) -> None:
        conv2d_by(self._name, *args)


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    relu, threads = activation == "relu", torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32)
        wide_weight = derived(weight, "cpu_linear", lambda w: w.detach().float().contiguous())
        _native.cpu_linear(wide, input.float(), wide_weight, bias, relu, threads)
        out.copy_(wide)
        return
    _native.cpu_linear(out, input, weight, bias, relu, threads)


def channel_affine(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    centre: Tensor | None = None,
) -> None:
    _channel_affine(out, input, scale, shift, centre, residual, activation, 1.0)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    _channel_affine(out, input, None, None, None, residual, activation, scale)


def _channel_affine(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    residual: Tensor | None,
    activation: str,
    factor: float,
) -> None:
    relu, threads = activation == "relu", torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = input.float()
        (wide_residual,) = _widened(residual)
        _native.cpu_channel_affine(wide, wide, scale, shift, centre, wide_residual, relu, factor, threads)
        out.copy_(wide)
        return
    _native.cpu_channel_affine(out, input, scale, shift, centre, residual, relu, factor, threads)


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    if input.dtype == torch.float16:
        input = input.float()
    _native.cpu_batch_statistics(mean, var, input, torch.get_num_threads())


def batch_norm_vectors(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """centre, scale and shift of :func:`channel_affine` for batch norm with a batch's own (float64) statistics.

    Not of the contract: a dozen tensor operations in one call, which would take longer than normalising a small batch.
    """
    centre, scale, shift = torch.empty((3, statistics.shape[1]), dtype=torch.float32).unbind(0)
    _native.cpu_batch_norm_vectors(centre, scale, shift, statistics[0], statistics[1], weight, bias, eps)
    return centre, scale, shift


def _storable(kernel: Callable[..., None], out: Tensor, input: Tensor, *args: object) -> None:
    """kernel(out, input, *args, threads), by way of fp32 copies where the storage is fp16."""
    threads = torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32, memory_format=torch.channels_last)
        kernel(wide, input.to(torch.float32, memory_format=torch.channels_last), *args, threads)
        out.copy_(wide)
        return
    kernel(out, input, *args, threads)


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    _storable(_native.cpu_max_pool2d, out, input, kernel, stride, padding, dilation)


def avg_pool2d(
    out: Tensor,
    input: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    padding_end: Pair,
    count_include_pad: bool,
    divisor: int,
) -> None:
    _storable(
        _native.cpu_avg_pool2d, out, input, kernel, stride, padding, padding_end, count_include_pad, divisor
    )  # fmt: skip


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    _storable(_native.cpu_adaptive_avg_pool2d, out, input)


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    _storable(_native.cpu_local_response_norm, out, input, size, alpha, beta, k)
