"""conv2d's GPU kernels against float64 and PyTorch: awkward shapes, then layers of real networks at batch 1 to 256."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.gpu import BF16, FP16, FP32, PRECISIONS, TF32, Precision, Random, as_it_is, assert_follows, references
from support.gpu_record import noting
from support.layout import GuardedSlice, sliced
from torch import Tensor

from fastcnn import ops
from fastcnn.backends import Call, intercept, variants
from fastcnn.verification.calls import into

# n, c, h, w, k, filter, stride, padding, dilation, groups
AWKWARD = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1, 1),
    (1, 3, 7, 7, 5, (3, 3), 1, 1, 1, 1),
    (2, 7, 13, 11, 17, (1, 1), 1, 0, 1, 1),
    (1, 31, 5, 3, 33, (1, 1), 2, 0, 1, 1),
    (3, 13, 9, 17, 29, (3, 3), (2, 1), (2, 0), (1, 2), 1),
    (1, 3, 33, 29, 64, (7, 7), 2, 3, 1, 1),
    (2, 3, 35, 39, 19, (11, 11), 4, 0, 1, 1),
    (1, 24, 9, 9, 40, (2, 4), 1, 1, 1, 1),
    (2, 64, 6, 6, 64, (3, 3), 1, 1, 1, 16),
    (1, 24, 6, 6, 24, (3, 3), 1, 1, 1, 24),
    (1, 23, 6, 6, 46, (3, 3), 1, 1, 1, 23),
    (2, 96, 5, 5, 128, (5, 5), 1, 2, 1, 2),
    (1, 2, 3, 3, 4, (3, 3), 3, 3, 1, 1),
    (5, 16, 1, 1, 10, (1, 1), 1, 0, 1, 1),
    (2, 72, 14, 14, 136, (3, 3), 1, 1, 1, 1),
    (1, 520, 4, 4, 40, (1, 1), 1, 0, 1, 1),
]
# One for each of Triton's kernels: depthwise, packed groups, stem, pointwise, implicit_gemm.
ONE_A_KERNEL = [AWKWARD[i] for i in (9, 8, 4, 15, 14)]
# One rounded product says nothing of how well a kernel rounds; nor do a few outputs.
TOO_FEW_FOR_TF32 = (AWKWARD[0], AWKWARD[12], AWKWARD[13])

# Where each of the CUDA kernels is tried, whichever the rule would choose: several tiles along rows and filters, with
# remains; a group of few channels; one pixel to a row; nothing aligned; few tiles whose reductions clusters split, 1x1
# (584 channels are 10 stages, and 19 blocks of 32) and 3x3; up to 64 channels, 3x3, more tiles of patches than
# multiprocessors.
TILES = [
    (3, 72, 19, 17, 200, (3, 3), 1, 1, 1, 1),
    (2, 128, 15, 33, 264, (1, 1), 1, 0, 1, 1),
    (3, 128, 20, 18, 128, (3, 3), 2, 1, 1, 2),
    (2, 64, 17, 15, 64, (3, 3), 1, 1, 1, 16),
    (2, 13, 17, 15, 70, (3, 3), 1, 1, 1, 1),
    (2, 64, 17, 15, 32, (3, 3), 1, 1, 1, 1),
    (2, 3, 44, 64, 96, (7, 7), 2, 3, 1, 1),
    (700, 64, 1, 1, 72, (1, 1), 1, 0, 1, 1),
    (1, 584, 9, 7, 72, (1, 1), 1, 0, 1, 1),
    (1, 192, 7, 9, 136, (3, 3), 1, 1, 1, 1),
    (9, 56, 61, 57, 72, (3, 3), 1, 1, 1, 1),
]


@dataclass(frozen=True)
class Case:
    problem: tuple
    precision: Precision
    fused: bool

    def __str__(self) -> str:
        n, c, h, w, k, (r, s), *geometry = self.problem
        sizes = f"{n}x{c}x{h}x{w}-{k}x{r}x{s}-{'-'.join(str(g).replace(' ', '') for g in geometry)}"
        return f"{sizes}-{self.precision}-{'fused' if self.fused else 'plain'}"


class Layer:
    """The operands of a case, and its formula in plain PyTorch."""

    def __init__(self, case: Case, device: torch.device) -> None:
        n, c, h, w, k, (r, s), stride, padding, dilation, groups = case.problem
        random, self.dtype = Random(case, device), case.precision.dtype
        self.case, self.geometry = case, (stride, padding, dilation, groups)
        self.x = random(n, c, h, w, dtype=self.dtype).contiguous(memory_format=torch.channels_last)
        self.weight = random(k, c // groups, r, s, dtype=self.dtype)
        self.bias, self.input_shift = random(k), random(c)
        self.scale, self.input_scale = (random.factors(size) for size in (k, c))
        self.shape = tuple(F.conv2d(self.x[:1], self.weight, None, *self.geometry).shape)
        self.shape = (n, *self.shape[1:])
        self.residual = random(*self.shape, dtype=self.dtype).contiguous(memory_format=torch.channels_last)

    def formula(self, images: slice = slice(None)) -> Callable[[torch.dtype, Callable[[Tensor], Tensor]], Tensor]:
        def compute(dtype: torch.dtype, operand: Callable[[Tensor], Tensor] = as_it_is) -> Tensor:
            def channel(vector: Tensor) -> Tensor:
                return vector.to(dtype).view(-1, 1, 1)

            y, weight = self.x[images].to(dtype), operand(self.weight.to(dtype))
            if not self.case.fused:
                return F.conv2d(operand(y), weight, None, *self.geometry)
            y = F.relu(y * channel(self.input_scale) + channel(self.input_shift))
            y = F.conv2d(operand(y), weight, None, *self.geometry)
            return F.relu(y * channel(self.scale) + channel(self.bias) + self.residual[images].to(dtype))

        return compute

    def run(self, x: Tensor, residual: Tensor, out: Tensor) -> None:
        options: dict[str, object] = {}
        if self.case.fused:
            options = {
                "scale": self.scale, "residual": residual, "activation": "relu", "input_scale": self.input_scale,
                "input_shift": self.input_shift, "input_activation": "relu",
            }  # fmt: skip
        bias = self.bias if self.case.fused else None
        with torch.no_grad():
            ops.conv2d(x, self.weight, bias, *self.geometry, **options, out=out)

    def poisoned(self) -> Tensor:
        out = torch.empty(self.shape, device=self.x.device, dtype=self.dtype, memory_format=torch.channels_last)
        return out.fill_(float("nan"))


def awkward_cases(backend: str) -> list[Case]:
    """All of them for compiled kernels. Triton compiles each combination: every problem in one precision with
    everything fused, and one problem for each kernel in all of them."""
    cases = [Case(p, precision, fused) for p in AWKWARD for precision in PRECISIONS for fused in (False, True)]
    cases = [c for c in cases if not (c.precision.tf32 and c.problem in TOO_FEW_FOR_TF32)]
    if backend == "triton":
        cases = [c for c in cases if c.problem in ONE_A_KERNEL or (c.fused and c.precision in (BF16, FP32))]
    return cases


@pytest.mark.cases.with_args(awkward_cases)
def test_awkward_shapes(backend, device, case: Case):
    """Slices of wider tensors (nothing aligned) into a poisoned slice, then dense tensors into a poisoned output."""
    layer = Layer(case, device)
    with case.precision.applied(), torch.no_grad():
        reference, exact = references(layer.formula(), case.precision)
        # Dense tensors make another kernel of each: for Triton in one precision, plain and fused in turns.
        both = backend != "triton" or case.precision == BF16
        if both or case.fused:
            out = GuardedSlice(layer.shape, layer.dtype, device)
            layer.run(sliced(layer.x), sliced(layer.residual), out.view)
            assert_accurate(out.view, reference, exact)
            out.assert_guards_intact()
        if both or not case.fused:
            out = layer.poisoned()
            layer.run(layer.x, layer.residual, out)
            assert_accurate(out, reference, exact)
            repeated = layer.poisoned()
            layer.run(layer.x, layer.residual, repeated)
            assert torch.equal(out, repeated), "the same call must give the same bits"


def tile_cases(backend: str) -> list[Case]:
    if backend != "cuda":
        return []
    return [Case(p, precision, fused) for p in TILES for precision in PRECISIONS for fused in (False, True)]


@pytest.mark.cases.with_args(tile_cases)
def test_each_kernel(backend, device, request, case: Case):
    """Every kernel that could serve the call, not only the one that the rule prefers on this GPU."""
    layer = Layer(case, device)
    calls: list[Call] = []

    def keep(call: Call) -> None:
        calls.append(call)
        call.run()

    with case.precision.applied(), torch.no_grad():
        with intercept(keep):
            layer.run(layer.x, layer.residual, layer.poisoned())
        reference, exact = references(layer.formula(), case.precision)
        note = noting(request.node.user_properties)
        wrong = {}
        for name in (backend, *variants.names(backend, "conv2d", calls[0].args)):
            out = GuardedSlice(layer.shape, layer.dtype, device, before=8, after=8)
            try:
                note(into(calls[0], (out.view,), name))
                assert_accurate(out.view, reference, exact)
                out.assert_guards_intact()
            except (AssertionError, RuntimeError, ValueError) as error:
                wrong[name] = str(error)
    assert not wrong, wrong


# The batch size comes from BATCHES, or stands last where a picture is large.
REAL = {
    "resnet50-stem": (3, 224, 224, 64, (7, 7), 2, 3, 1, 1),
    "resnet50-1x1-64": (64, 56, 56, 64, (1, 1), 1, 0, 1, 1),
    "resnet50-3x3-64": (64, 56, 56, 64, (3, 3), 1, 1, 1, 1),
    "resnet50-1x1-256": (64, 56, 56, 256, (1, 1), 1, 0, 1, 1),
    "resnet50-down-512": (256, 56, 56, 512, (1, 1), 2, 0, 1, 1),
    "resnet50-3x3s2-128": (128, 56, 56, 128, (3, 3), 2, 1, 1, 1),
    "resnet50-3x3-512": (512, 7, 7, 512, (3, 3), 1, 1, 1, 1),
    "resnet50-1x1-2048": (2048, 7, 7, 512, (1, 1), 1, 0, 1, 1),
    "vgg16-first": (3, 224, 224, 64, (3, 3), 1, 1, 1, 1),
    "vgg16-3x3-64": (64, 224, 224, 64, (3, 3), 1, 1, 1, 1),
    "vgg16-3x3-512": (512, 14, 14, 512, (3, 3), 1, 1, 1, 1),
    "googlenet-5x5-32": (16, 28, 28, 32, (5, 5), 1, 2, 1, 1),
    "googlenet-5x5-128": (48, 7, 7, 128, (5, 5), 1, 2, 1, 1),
    "densenet-1x1-128": (256, 56, 56, 128, (1, 1), 1, 0, 1, 1),
    "densenet-3x3-32": (128, 28, 28, 32, (3, 3), 1, 1, 1, 1),
    "resnext50-128": (128, 56, 56, 128, (3, 3), 1, 1, 1, 32),
    "resnext50-1024": (1024, 7, 7, 1024, (3, 3), 1, 1, 1, 32),
}  # fmt: skip
CHUNK = 32
# One layer of each kind in the other precisions, at the smaller batches.
OTHER_PRECISIONS = ("resnet50-stem", "resnet50-3x3-64", "resnet50-1x1-2048", "resnext50-128")


@dataclass(frozen=True)
class RealLayer:
    name: str
    precision: Precision
    fused: bool

    @property
    def batches(self) -> tuple[int, ...]:
        if "vgg16" in self.name and REAL[self.name][1] == 224:
            return (1, 16)
        return (1, 32, 256) if self.precision == BF16 else (1, 32)

    def __str__(self) -> str:
        return f"{self.name}-{self.precision}-{'fused' if self.fused else 'plain'}"


def real_cases(backend: str) -> list[RealLayer]:
    cases = [RealLayer(name, BF16, fused) for name in REAL for fused in (False, True)]
    return cases + [RealLayer(name, p, True) for name in OTHER_PRECISIONS for p in (FP32, TF32, FP16)]


@pytest.mark.cost(5)
@pytest.mark.cases.with_args(real_cases)
def test_real_layers(backend, device, case: RealLayer):
    """In chunks of images, as float64 takes room; of a large batch the first, a middle and the last chunk."""
    for batch in case.batches if device.type == "cuda" else (1,):
        layer = Layer(Case((batch, *REAL[case.name]), case.precision, case.fused), device)
        with case.precision.applied(), torch.no_grad():
            out = GuardedSlice(layer.shape, layer.dtype, device, before=8, after=8)
            layer.run(layer.x, layer.residual, out.view)
            chunks = range(0, batch, CHUNK)
            for start in {chunks[0], chunks[len(chunks) // 2], chunks[-1]}:
                images = slice(start, start + CHUNK)
                assert_follows(out.view[images], layer.formula(images), case.precision)
            assert not out.view.isnan().any()
            out.assert_guards_intact()
        del layer, out
    if device.type == "cuda":
        torch.cuda.empty_cache()  # several processes share the memory
