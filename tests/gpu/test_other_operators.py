"""The operators beside conv2d on a GPU, against float64 and PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import TINY, assert_accurate, relative_error
from support.gpu import BF16, FP16, FP32, PRECISIONS, Precision, Random, assert_follows
from support.gpu_operators import MEMORY_BOUND
from support.layout import GuardedSlice, sliced

from fastcnn import ops

SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 17, 13, 11), (3, 64, 14, 14), (2, 96, 27, 27), (1, 2048, 7, 7)]
# In all dtypes where each combination must be compiled: one that nothing divides, one of whole vectors.
FEW_SHAPES = (SHAPES[2], SHAPES[3])


@dataclass(frozen=True)
class Case:
    operator: str
    shape: tuple[int, int, int, int]
    precision: Precision

    def __str__(self) -> str:
        return f"{self.operator}-{'x'.join(map(str, self.shape))}-{self.precision}"


def memory_bound_cases(backend: str) -> list[Case]:
    cases = [Case(name, shape, p) for name in MEMORY_BOUND for shape in SHAPES for p in (FP32, BF16, FP16)]
    cases = [c for c in cases if min(c.shape[2:]) >= MEMORY_BOUND[c.operator].smallest]
    return [c for c in cases if backend != "triton" or c.precision == BF16 or c.shape in FEW_SHAPES]


@pytest.mark.cases.with_args(memory_bound_cases)
def test_memory_bound(backend, device, case: Case):
    operator, random = MEMORY_BOUND[case.operator], Random(case, device)
    x, residual = (random(*case.shape, dtype=case.precision.dtype) for _ in range(2))
    vector = random(case.shape[1])
    exact = operator.theirs(x.double(), vector.double(), residual.double())
    reference = operator.theirs(x, vector, residual)
    out = GuardedSlice(tuple(exact.shape), x.dtype, device)
    with torch.no_grad():
        operator.ours(sliced(x), vector, sliced(residual), out.view)
        assert_accurate(out.view, reference, exact)
        out.assert_guards_intact()
        dense = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual)]
        first, again = (operator.ours(dense[0], vector, dense[1], None) for _ in range(2))
    assert_accurate(first, reference, exact)
    assert torch.equal(first, again), "the same call must give the same bits"


@dataclass(frozen=True)
class Matrix:
    sizes: tuple[int, int, int]
    precision: Precision

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))}-{self.precision}"


def linear_cases(backend: str) -> list[Matrix]:
    sizes = [(1, 7, 5), (1, 4096, 1000), (3, 130, 17), (64, 512, 1000), (129, 100, 257), (256, 2048, 1000)]
    # Seven products an output and five outputs say nothing of how well a kernel rounds.
    return [Matrix(s, p) for s in sizes for p in PRECISIONS if not (p.tf32 and s == (1, 7, 5))]


@pytest.mark.cases.with_args(linear_cases)
def test_linear(backend, device, case: Matrix):
    (m, c, k), random, dtype = case.sizes, Random(case, device), case.precision.dtype
    x, w, bias = random(m, c, dtype=dtype), random(k, c, dtype=dtype), random(k, dtype=dtype)
    with case.precision.applied(), torch.no_grad():
        ours, again = (ops.linear(x, w, bias, activation="relu") for _ in range(2))
        assert_follows(
            ours,
            lambda to, operand: F.relu(F.linear(operand(x.to(to)), operand(w.to(to)), bias.to(to))),
            case.precision,
        )
    assert torch.equal(ours, again), "the same call must give the same bits"


@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 17, 13, 11), (8, 64, 56, 56), (4, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_batch_statistics(backend, device, shape: tuple, precision: Precision, mean: float):
    x = (Random((shape, mean), device)(*shape) + mean).to(precision.dtype)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    reference_var = torch.var(x.float(), (0, 2, 3), correction=0)
    dense = x.contiguous(memory_format=torch.channels_last)
    (ours_mean, ours_var), again = ops.batch_statistics(dense), ops.batch_statistics(dense)
    # A mean near zero is as exact as the values allow: relative to their size, not to its own.
    assert ((ours_mean - exact_mean).abs() <= 5e-7 * (exact_mean.abs() + exact_var.sqrt())).all()
    # Means are kept in fp32: what half a unit in their last place costs a variance of 1 is granted.
    bound = 2 * relative_error(reference_var, exact_var) + TINY[torch.float32] + 2**-24 * mean
    assert relative_error(ours_var, exact_var) <= bound
    assert torch.equal(torch.stack([ours_mean, ours_var]), torch.stack(list(again)))


def test_max_pool_and_relu_let_nan_through(backend, device):
    x = Random("nan", device)(1, 8, 6, 6)
    x[0, 3, 2, 2] = float("nan")
    pooled = ops.max_pool2d(x, 3, 1, 1)
    assert torch.equal(pooled.isnan(), F.max_pool2d(x, 3, 1, 1).isnan())
    assert ops.residual_add(x, x)[0, 3, 2, 2].isnan()
    assert ops.channel_affine(x, x[0, :, 0, 0], None, activation="relu")[0, 3, 2, 2].isnan()
