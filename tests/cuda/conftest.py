"""Runs the CUDA kernels without a GPU: csrc/cuda compiled by the host compiler against the emulator in this folder.

The fixture `emulated` offers one method per operator, on CPU tensors in NHWC memory. What it proves: every address,
predicate, swizzle, fragment, pipeline stage and epilogue of the kernels' own source. What it cannot: that the GPU's
instructions do what the PTX manual says, races between warps that the fibers' order hides, and speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parent / "emulator"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Emulated devices: 2 ** (d % 16) multiprocessors; 0-15 are sm_80, 16-31 sm_90. A device of one multiprocessor gets the
# largest tiles, one of 128 the smallest.
SM80, SM80_LARGE, SM90, SM90_LARGE = 0, 7, 16, 23


class TensorView(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("h", ctypes.c_int64),
        ("w", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("pixel_stride", ctypes.c_int64),
    )


class Conv2dGeometry(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "filter_h", "filter_w", "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups",
        )
    )  # fmt: skip


class Prologue(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("relu", ctypes.c_bool))


class Epilogue(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", TensorView),
        ("activation", ctypes.c_int32),
    )


class Conv1x1Pair(ctypes.Structure):
    _fields_ = (
        *((name, TensorView) for name in ("wide", "narrow", "input", "residual")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "expand_weight", "reduce_weight", "expand_scale", "expand_bias", "reduce_scale", "reduce_bias",
            )
        ),
    )  # fmt: skip


class Pool2dGeometry(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w",
        )
    )  # fmt: skip


@dataclass
class Pixels:
    """An NHWC tensor inside a larger buffer of NaN: `start` elements of margin, pixel stride `stride` >= channels."""

    values: torch.Tensor  # (N, H, W, C), a view of `buffer`
    buffer: torch.Tensor
    stride: int

    @classmethod
    def empty(cls, n: int, h: int, w: int, c: int, dtype: torch.dtype, extra: int = 0, start: int = 0) -> Pixels:
        stride, margin = c + extra, 64
        buffer = torch.full((n * h * w * stride + 2 * margin + start + 16,), float("nan"), dtype=dtype)
        # Storage of torch tensors is 64-byte aligned, so `start` alone decides the alignment of the first pixel.
        assert buffer.data_ptr() % 16 == 0
        values = buffer.as_strided((n, h, w, c), (h * w * stride, w * stride, stride, 1), margin + start)
        return cls(values, buffer, stride)

    @classmethod
    def of(cls, nchw: torch.Tensor, extra: int = 0, start: int = 0) -> Pixels:
        n, c, h, w = nchw.shape
        pixels = cls.empty(n, h, w, c, nchw.dtype, extra, start)
        pixels.values.copy_(nchw.permute(0, 2, 3, 1))
        return pixels

    @property
    def nchw(self) -> torch.Tensor:
        return self.values.permute(0, 3, 1, 2)

    def untouched_around(self) -> bool:
        """Nothing outside the pixels' own channels was written."""
        rest = self.buffer.clone()
        rest.as_strided(self.values.shape, self.values.stride(), self.values.storage_offset()).fill_(float("nan"))
        return bool(torch.isnan(rest).all())

    def view(self) -> TensorView:
        n, h, w, c = self.values.shape
        return TensorView(self.values.data_ptr(), DTYPES[self.values.dtype], n, h, w, c, self.stride)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class EmulatedKernels:
    """The entry points of csrc/cuda/kernels.h. A call raises RuntimeError with the kernel's own message."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self.kernels: list[str] = []  # that could serve the last convolution

    def _call(self, name: str, *arguments: object) -> str | None:
        function = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p
        converted = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        result = function(*converted)
        return None if result is None else result.decode()

    def _run(self, name: str, *arguments: object) -> None:
        message = self._call(name, *arguments)
        if message is not None:
            raise RuntimeError(message)

    def eager(self, on: bool) -> None:
        """Asynchronous copies and products land at once (True) or at the last moment the program allows (False)."""
        self._library.emulated_eager(int(on))

    def conv2d(
        self,
        out: Pixels,
        x: Pixels,
        weight: torch.Tensor,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: Pixels | None = None,
        input_scale: torch.Tensor | None = None,
        input_shift: torch.Tensor | None = None,
        input_relu: bool = False,
        relu: bool = False,
        allow_tf32: bool = False,
        device: int = SM80,
        kernel: str = "",
    ) -> str:
        """Runs conv2d (weight (K, C/groups, R, S)) and returns the name of the kernel that serves it by itself."""
        krsc = weight.permute(0, 2, 3, 1).contiguous()
        geometry = Conv2dGeometry(weight.shape[2], weight.shape[3], *stride, *padding, *dilation, groups)
        prologue = Prologue(_address(input_scale), _address(input_shift), input_relu)
        residual_view = TensorView() if residual is None else residual.view()
        epilogue = Epilogue(_address(scale), _address(bias), residual_view, int(relu))
        arguments = (
            out.view(), x.view(), ctypes.c_void_p(krsc.data_ptr()), prologue, epilogue, geometry, int(allow_tf32),
            device,
        )  # fmt: skip
        self.kernels = (self._call("conv2d_names", *arguments) or "").split(",")
        self._run("conv2d", *arguments, kernel.encode())
        return self.kernels[0]

    def conv2d_max_pool2d(
        self,
        out: Pixels,
        x: Pixels,
        weight: torch.Tensor,
        size: Sequence[int],
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        relu: bool = False,
        kernel: Sequence[int] = (3, 3),
        pool_stride: Sequence[int] = (2, 2),
        pool_padding: Sequence[int] = (0, 0),
        pool_dilation: Sequence[int] = (1, 1),
        device: int = SM90,
    ) -> None:
        """``size`` is the convolution's output size."""
        krsc = weight.permute(0, 2, 3, 1).contiguous()
        geometry = Conv2dGeometry(weight.shape[2], weight.shape[3], *stride, *padding, *dilation, groups)
        epilogue = Epilogue(_address(scale), _address(bias), TensorView(), int(relu))
        pooling = Pool2dGeometry(*kernel, *pool_stride, *pool_padding, *pool_dilation)
        self._run(
            "conv2d_max_pool2d", out.view(), x.view(), ctypes.c_void_p(krsc.data_ptr()), epilogue, geometry,
            *map(ctypes.c_int64, size), pooling, device,
        )  # fmt: skip

    def conv2d_1x1_pair(
        self,
        wide: Pixels,
        narrow: Pixels,
        x: Pixels,
        residual: Pixels,
        expand: torch.Tensor,
        reduce: torch.Tensor,
        factors: Sequence[torch.Tensor | None] = (None,) * 4,
        device: int = SM90,
    ) -> None:
        """Weights (J, C) and (K, J), contiguous; factors: scale and bias of the first, of the second."""
        assert expand.is_contiguous()
        assert reduce.is_contiguous()
        views = [pixels.view() for pixels in (wide, narrow, x, residual)]
        pair = Conv1x1Pair(*views, expand.data_ptr(), reduce.data_ptr(), *map(_address, factors))
        self._run("conv2d_1x1_pair", pair, device)

    def fast_divide_error(self, divisor: int, tries: int) -> int:
        """The first number whose quotient by `divisor` is wrong, or -1."""
        function = self._library.emulated_fast_divide_error
        function.restype = ctypes.c_int64
        return function(ctypes.c_int64(divisor), ctypes.c_int64(tries))

    def gather(
        self, image: tuple[int, int, int, int], pixel_stride: int, geometry: Sequence[int], output: tuple[int, int],
        row: int, column: int,
    ) -> int:  # fmt: skip
        """The element that im2col reads at (row, column), or -1; geometry in the order of Conv2dGeometry's fields."""
        function = self._library.emulated_gather
        function.restype = ctypes.c_int64
        view = TensorView(None, 0, *image, pixel_stride)
        indices = [ctypes.c_int64(i) for i in (*output, row, column)]
        return function(ctypes.byref(view), ctypes.byref(Conv2dGeometry(*geometry)), *indices)

    def linear(
        self,
        out: Pixels,
        x: Pixels,
        weight: Pixels,
        bias: torch.Tensor | None = None,
        relu: bool = False,
        allow_tf32: bool = False,
        device: int = SM80,
    ) -> None:
        vector = ctypes.c_void_p(_address(bias))
        self._run("linear", out.view(), x.view(), weight.view(), vector, int(relu), int(allow_tf32), device)

    def channel_affine(
        self,
        out: Pixels,
        x: Pixels,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: Pixels | None = None,
        relu: bool = False,
        device: int = SM80,
        centre: torch.Tensor | None = None,
    ) -> None:
        vectors = [ctypes.c_void_p(_address(vector)) for vector in (scale, shift, centre)]
        residual_view = TensorView() if residual is None else residual.view()
        self._run("channel_affine", out.view(), x.view(), *vectors, residual_view, int(relu), device)

    def residual_add(self, out: Pixels, x: Pixels, residual: Pixels, scale: float, relu: bool = False) -> None:
        self._run("residual_add", out.view(), x.view(), residual.view(), ctypes.c_float(scale), int(relu), SM80)

    def batch_statistics(self, x: Pixels) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._library.emulated_batch_statistics_bytes
        size.restype = ctypes.c_size_t
        workspace = torch.full((size(ctypes.byref(x.view())) // 4,), float("nan"))
        mean, variance = (torch.full((x.values.shape[3],), float("nan")) for _ in range(2))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (mean, variance, workspace)]
        self._run("batch_statistics", *pointers[:2], x.view(), pointers[2], SM80)
        return mean, variance

    def max_pool2d(
        self, out: Pixels, x: Pixels, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int] = (1, 1),
    ) -> None:  # fmt: skip
        self._run("max_pool2d", out.view(), x.view(), Pool2dGeometry(*kernel, *stride, *padding, *dilation), SM80)

    def avg_pool2d(
        self, out: Pixels, x: Pixels, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        padding_end: Sequence[int], count_include_pad: bool, divisor: int,
    ) -> None:  # fmt: skip
        geometry = Pool2dGeometry(*kernel, *stride, *padding, 1, 1)
        ends = (ctypes.c_int64(padding_end[0]), ctypes.c_int64(padding_end[1]))
        counted = int(count_include_pad), ctypes.c_int64(divisor)
        self._run("avg_pool2d", out.view(), x.view(), geometry, *ends, *counted, SM80)

    def adaptive_avg_pool2d(self, out: Pixels, x: Pixels) -> None:
        self._run("adaptive_avg_pool2d", out.view(), x.view(), SM80)

    def local_response_norm(self, out: Pixels, x: Pixels, size: int, alpha: float, beta: float, k: float) -> None:
        factors = ctypes.c_float(alpha), ctypes.c_float(beta), ctypes.c_float(k)
        self._run("local_response_norm", out.view(), x.view(), ctypes.c_int64(size), *factors, SM80)


def _compile_emulated_kernels(compiler: str) -> Path:
    """Compiles csrc/cuda for the host, once per content of the sources (15 seconds), into the temporary directory."""
    headers = [p for folder in (KERNELS, KERNELS / "device", EMULATOR, KERNELS.parent / "common")
               for p in sorted(folder.iterdir()) if p.is_file()]  # fmt: skip
    digest = hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in headers)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastcnn-emulated-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{digest}.so"
    if library.exists():
        return library
    flags = ["-std=c++17", "-O2", "-Wno-psabi", "-fPIC", "-fno-strict-aliasing", "-DFASTCNN_CUDA_EMULATOR"]
    flags += [f"-I{EMULATOR}", f"-I{KERNELS}", '-DFASTCNN_CUDA_ARCHS="80-real,90a-real"']
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sources = [*sorted(KERNELS.glob("*.cu")), *sorted(EMULATOR.glob("*.cpp"))]
        objects = [Path(scratch) / f"{s.name}.o" for s in sources]

        def build(pair: tuple[Path, Path]) -> None:
            source, target = pair
            subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(build, zip(sources, objects, strict=True)))
        linked = Path(scratch) / "library.so"
        subprocess.run([compiler, "-shared", "-o", str(linked), *map(str, objects)], check=True)
        linked.replace(library)
    return library


@pytest.fixture(scope="session")
def _emulated_library() -> EmulatedKernels:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host emulator")
    return EmulatedKernels(_compile_emulated_kernels(compiler))


@pytest.fixture(params=["late", "eager"])
def emulated(request: pytest.FixtureRequest, _emulated_library: EmulatedKernels) -> EmulatedKernels:
    """The emulated kernels; each test runs with asynchronous work landing late and at once."""
    _emulated_library.eager(request.param == "eager")
    return _emulated_library


@pytest.fixture
def emulated_once(_emulated_library: EmulatedKernels) -> EmulatedKernels:
    """The emulated kernels, for operators without asynchronous work."""
    _emulated_library.eager(False)
    return _emulated_library


@pytest.fixture(scope="session")
def pixels() -> type[Pixels]:
    return Pixels
