"""The backend "cuda" on CPU tensors: csrc/cuda compiled for the host (tests/cuda), for a rehearsal of the GPU tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends import cuda

H100 = 23  # the emulated device: sm_90 with 128 multiprocessors


def _tools() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "cuda" / "conftest.py"
    spec = importlib.util.spec_from_file_location("emulator_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Let ``fastcnn.backends.cuda`` run on CPU tensors through the emulator."""
    tools = _tools()
    kernels = tools.EmulatedKernels(tools._compile_emulated_kernels("g++"))
    kernels.eager(False)

    def pixels(tensor: Tensor | None) -> Any:
        """A channels-last view (or a matrix, as pixels of one row) as the emulator takes it."""
        if tensor is None:
            return None
        if tensor.dim() == 2:
            rows, columns = tensor.shape
            stride = tensor.stride(0) if rows > 1 else columns
            return tools.Pixels(tensor.as_strided((rows, 1, 1, columns), (stride, stride, stride, 1)), tensor, stride)
        from fastcnn.ops._layout import pixel_stride

        n, c, h, w = tensor.shape
        stride = pixel_stride(tensor)
        assert stride is not None
        return tools.Pixels(tensor.as_strided((n, h, w, c), (h * w * stride, w * stride, stride, 1)), tensor, stride)

    def conv2d(out, x, weight, scale, bias, residual, input_scale, input_shift, input_relu, relu, stride, padding,
               dilation, groups, tf32, kernel):  # fmt: skip
        kernels.conv2d(
            pixels(out), pixels(x), weight, stride=stride, padding=padding, dilation=dilation, groups=groups,
            scale=scale, bias=bias, residual=pixels(residual), input_scale=input_scale, input_shift=input_shift,
            input_relu=input_relu, relu=relu, allow_tf32=tf32, device=H100, kernel=kernel,
        )  # fmt: skip

    def conv2d_max_pool2d(out, x, weight, scale, bias, relu, stride, padding, dilation, groups, size, *pooling):
        names = ("kernel", "pool_stride", "pool_padding", "pool_dilation")
        kernels.conv2d_max_pool2d(
            pixels(out), pixels(x), weight, size, stride=stride, padding=padding, dilation=dilation, groups=groups,
            scale=scale, bias=bias, relu=relu, device=H100, **dict(zip(names, pooling, strict=True)),
        )  # fmt: skip

    def conv2d_kernels(out, x, weight, residual, prologue, stride, padding, dilation, groups, tf32):
        geometry = tools.Conv2dGeometry(weight.shape[2], weight.shape[3], *stride, *padding, *dilation, groups)
        krsc = weight.permute(0, 2, 3, 1).contiguous()
        added = tools.TensorView() if residual is None else pixels(residual).view()
        names = kernels._call(
            "conv2d_names", pixels(out).view(), pixels(x).view(), tools.ctypes.c_void_p(krsc.data_ptr()),
            tools.Prologue(None, None, prologue), tools.Epilogue(None, None, added, 0), geometry, int(tf32), H100,
        )  # fmt: skip
        return names.split(",")

    def statistics(mean, var, x, workspace):
        for target, value in zip((mean, var), kernels.batch_statistics(pixels(x)), strict=True):
            target.copy_(value)

    def pair(wide, narrow, x, residual, expand, expand_scale, expand_bias, reduce, reduce_scale, reduce_bias):
        views = [pixels(tensor).view() for tensor in (wide, narrow, x, residual)]
        factors = [tools._address(vector) for vector in (expand_scale, expand_bias, reduce_scale, reduce_bias)]
        return tools.Conv1x1Pair(*views, expand.data_ptr(), reduce.data_ptr(), *factors)

    replaced = {
        "cuda_conv2d": conv2d,
        "cuda_conv2d_1x1_pair": lambda *args: kernels._run("conv2d_1x1_pair", pair(*args), H100),
        "cuda_conv2d_1x1_pair_unsupported": lambda *args: kernels._call(
            "conv2d_1x1_pair_unsupported", pair(*args), H100
        ),
        "cuda_conv2d_1x1_pair_weights": lambda *channels: kernels._call(
            "conv2d_1x1_pair_weights", *map(tools.ctypes.c_int64, channels[:3]), H100
        ),
        "cuda_conv2d_kernels": conv2d_kernels,
        "cuda_conv2d_max_pool2d": conv2d_max_pool2d,
        "cuda_architectures": lambda: ["80", "90a"],
        "cuda_linear": lambda out, x, w, bias, relu, tf32: kernels.linear(
            pixels(out), pixels(x), pixels(w), bias, relu, tf32, H100
        ),
        "cuda_channel_affine": lambda out, x, scale, shift, centre, residual, relu: kernels.channel_affine(
            pixels(out), pixels(x), scale, shift, pixels(residual), relu, centre=centre
        ),
        "cuda_residual_add": lambda out, x, residual, scale, relu: kernels.residual_add(
            pixels(out), pixels(x), pixels(residual), scale, relu
        ),
        "cuda_batch_statistics_workspace": lambda x: 4,
        "cuda_batch_statistics": statistics,
        "cuda_max_pool2d": lambda out, x, *window: kernels.max_pool2d(pixels(out), pixels(x), *window),
        "cuda_avg_pool2d": lambda out, x, *window: kernels.avg_pool2d(pixels(out), pixels(x), *window),
        "cuda_adaptive_avg_pool2d": lambda out, x: kernels.adaptive_avg_pool2d(pixels(out), pixels(x)),
        "cuda_local_response_norm": lambda out, x, *rest: kernels.local_response_norm(pixels(out), pixels(x), *rest),
    }
    for name, function in replaced.items():
        setattr(_native, name, function)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.unavailable = lambda: None

    def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
        if dtype not in cuda.DTYPES or device != torch.device("cpu"):
            return f"dtype {dtype}"
        return cuda.no_stem_pool(device, dtype, **facts) if operator == "conv2d_max_pool2d" else None

    cuda.unsupported = unsupported
