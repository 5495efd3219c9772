"""What the Triton kernels share: the launch record, views of NHWC memory, tile order, prologue and epilogue.

Memory. Activations are channels-last views: pixel (n, h, w) starts at ((n*H + h)*W + w) * ld elements and its C
channels are adjacent; ld >= C is the pixel stride (docs/internals.md). Kernels take ld and channel counts divided by
a constant power of two (`*_ALIGN`) and multiply it back: the compiler then knows that rows start on 16-byte
boundaries and moves 16 bytes at a time, also for strides such as 24 or 40 that Triton's own specialisation (multiples
of 16 only) misses. Nothing else about a run-time integer is specialised, so that a network of many shapes compiles
few kernels.

Index width. Offsets are int32 while every tensor spans fewer than 2^31 elements, else int64 (`WIDE`).
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .precision import convolutions_use_tf32, matrix_products_use_tf32

# int32 offsets of masked-out lanes may run past the end of a tensor by up to a tile of pixels; leave room for them.
_INT32_LIMIT = 2**31 - 2**24


def kernel(function: Callable) -> Any:
    """`triton.jit` that specialises on pointers (`*_ptr`: None or not, 16-byte aligned or not) and constants alone."""
    parameters = inspect.signature(function).parameters.values()
    runtime = [p.name for p in parameters if p.annotation is not tl.constexpr and not p.name.endswith("_ptr")]
    return triton.jit(do_not_specialize=runtime)(function)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything but the stream. `arguments` maps every kernel parameter to its value."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Launches on the current stream of the device that holds the tensors."""
        anchor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(anchor):  # no-op for CPU tensors (interpreter mode)
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)

    def compilation(self, device: torch.device) -> Callable[[], object]:
        """What compiles the kernel for this launch on `device` without running it; it keeps none of the tensors alive.

        It may be called in any thread. What is compiled already is not compiled again.
        """
        arguments = {name: _as_pointer(value) for name, value in self.arguments.items()}
        options = dict(grid=self.grid, num_warps=self.num_warps, num_stages=self.num_stages)
        index = -1 if device.index is None else device.index  # -1: stay where we are

        def compile() -> None:
            with torch.cuda.device(index):  # a thread starts on device 0
                self.kernel.warmup(**arguments, **options)

        return compile


def _as_pointer(value: Any) -> Any:
    """A tensor as the compiler sees it: its dtype and whether it starts on a 16-byte boundary."""
    if not isinstance(value, torch.Tensor):
        return value
    return _Pointer(value.dtype, value.data_ptr() % 16)


class _Pointer(triton.runtime.jit.MockTensor):
    def __init__(self, dtype: torch.dtype, remainder: int) -> None:
        super().__init__(dtype)
        self._remainder = remainder

    def data_ptr(self) -> int:
        return self._remainder


# ---------------------------------------------------------------------------------------------------- host side


def pixel_stride(tensor: torch.Tensor) -> int:
    """Elements between neighbouring pixels of a channels-last view; strides of size-1 dimensions mean nothing."""
    n, c, h, w = tensor.shape
    if w > 1:
        return tensor.stride(3)
    if h > 1:
        return tensor.stride(2)
    return tensor.stride(0) if n > 1 else c


def pixel_count(tensor: torch.Tensor) -> int:
    n, _, h, w = tensor.shape
    return n * h * w


def row_stride(matrix: torch.Tensor) -> int:
    """Elements between rows of a 2-D tensor whose columns are adjacent."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def is_wide(*extents: int) -> bool:
    """Whether offsets into tensors of these spans (elements) need int64."""
    return max(extents) > _INT32_LIMIT


def alignment(*sizes: int, limit: int = 8) -> int:
    """The largest power of two up to `limit` that divides all sizes: how many elements may move as one vector.

    8 elements of 2 bytes fill the 16-byte access; for fp32 4 would do.
    """
    return math.gcd(limit, *sizes)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def unroll_factor(taps: int) -> int:
    """How far a loop over filter taps is unrolled: whole up to 3x3, so that the loads of all taps are in flight."""
    return taps if taps <= 9 else 4


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, in NumPy on the CPU: TRITON_INTERPRET=1 when Triton was imported."""
    return not isinstance(relu, triton.runtime.JITFunction)


def conv_precision(dtype: torch.dtype) -> str:
    """tl.dot's input precision for convolutions: TF32 for fp32 exactly where cuDNN would use it."""
    return _precision(dtype, convolutions_use_tf32)


def matmul_precision(dtype: torch.dtype) -> str:
    """The same for `linear`: TF32 for fp32 exactly where cuBLAS would use it."""
    return _precision(dtype, matrix_products_use_tf32)


def _precision(dtype: torch.dtype, allows_tf32: Callable[[], bool]) -> str:
    if dtype == torch.bfloat16 and is_interpreted():
        return "emulated"
    if dtype != torch.float32:
        return "ieee"  # has no meaning for 16-bit operands; one value keeps the kernel cache small
    # The interpreter multiplies in full precision.
    return "tf32" if allows_tf32() and not is_interpreted() else "ieee"


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """fp32 values rounded to TF32's 10 mantissa bits, to nearest.

    Tensor cores cut the other 13 bits off, which has about 2.6 times the error of rounding and shrinks every product.
    `dot` rounds the other operand as it is read.
    """
    nearest = (values.view(torch.int32) + 0x1000).bitwise_and_(~0x1FFF).view(torch.float32)
    return torch.where(values.isfinite(), nearest, values)


# -------------------------------------------------------------------------------------------------- device side


@triton.jit
def block_indices(block, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """block*SIZE .. block*SIZE + SIZE-1, in int64 where offsets made from them may exceed int32."""
    if WIDE:
        block = block.to(tl.int64)
    return block * SIZE + tl.arange(0, SIZE)


@triton.jit
def tile_of_program(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program, in strips of GROUP_M tile rows walked column by column.

    Programs that run at the same time then share GROUP_M row tiles and a few column tiles, so both operands are read
    from L2 instead of DRAM.
    """
    strip = program // (GROUP_M * tiles_n)
    first = strip * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program - strip * (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def relu(x):
    """max(x, 0) that hands NaN through, as PyTorch's does (the hardware maximum would return 0)."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x @ w. "emulated": the interpreter's dot multiplies bf16 values as integers; widen them first (exact).

    In full precision each block's products are summed from zero and the blocks' sums are added: the rounding errors of
    one chain through thousands of products would exceed cuBLAS's, which splits long sums. The addition is written as an
    fma, because the compiler turns a plain one back into the chain.

    In TF32 the tensor cores cut 13 bits off their operands. Cutting makes every product smaller, which adds up from
    layer to layer; so x is rounded to nearest first (w is rounded when it is prepared).
    """
    if PRECISION == "emulated":
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "ieee" and x.dtype == tl.float32:
        return tl.fma(tl.dot(x, w, input_precision="ieee"), 1.0, acc)
    elif PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        nearest = tl.where((bits & 0x7F800000) == 0x7F800000, bits, bits + 0x1000)  # infinities and NaN as they are
        return tl.dot(nearest.to(tl.float32, bitcast=True), w, acc, input_precision="tf32")
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def apply_prologue(x, scale_ptr, shift_ptr, channel, channel_mask, RELU: tl.constexpr):
    """relu?(x * scale[c] + shift[c]) for a tile whose last axis is the channel; fp32 in between, x's dtype out."""
    y = x.to(tl.float32)
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr + channel, mask=channel_mask, other=0.0)[None, :]
    if shift_ptr is not None:
        y = y + tl.load(shift_ptr + channel, mask=channel_mask, other=0.0)[None, :]
    if RELU:
        y = relu(y)
    return y.to(x.dtype)


@triton.jit
def store_tile(
    acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask, channel, channels, out_ld, residual_ld,
    RELU: tl.constexpr,
):  # fmt: skip
    """The epilogue: out[row, k] = act(acc * scale + bias + residual) for the columns k < channels, from `channel` on.

    `channel` is a scalar. Large tiles are finished half by half: a whole tile of residual beside a whole tile
    of accumulators does not fit in the registers.
    """
    HALF: tl.constexpr = acc.shape[1] // 2
    if residual_ptr is not None and acc.shape[0] * acc.shape[1] > 8192:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        store_tile(left, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask, channel, channels,
                   out_ld, residual_ld, RELU)  # fmt: skip
        store_tile(right, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask, channel + HALF, channels,
                   out_ld, residual_ld, RELU)  # fmt: skip
    else:
        k = channel + tl.arange(0, acc.shape[1])
        k_mask = k < channels
        if scale_ptr is not None:
            acc = acc * tl.load(scale_ptr + k, mask=k_mask, other=0.0)[None, :]
        if bias_ptr is not None:
            acc = acc + tl.load(bias_ptr + k, mask=k_mask, other=0.0)[None, :]
        mask = row_mask[:, None] & k_mask[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + (row * residual_ld)[:, None] + k[None, :], mask=mask, other=0.0)
            acc = acc + residual.to(tl.float32)
        if RELU:
            acc = relu(acc)
        tl.store(out_ptr + (row * out_ld)[:, None] + k[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
