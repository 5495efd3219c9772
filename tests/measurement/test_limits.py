"""The machine's limits: the loops do the work they say, and are not beaten by what they are limits of."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastcnn import _native
from fastcnn.measurement import interleave
from fastcnn.measurement.limits import MachineLimits, machine_limits


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_multiply_adds_are_done_and_counted(threads):
    few, _ = _native.cpu_fma_limit(1600, threads)
    many, mean = _native.cpu_fma_limit(3200, threads)
    assert many == 2 * few > 0
    assert few % (2 * threads) == 0
    assert mean == 2.0  # where x = x / 2 + 1 comes to rest
    assert _native.cpu_fma_limit(16, 1)[1] > 2.0  # one round a piece: not there yet


def test_bf16_products_are_done_and_counted():
    operations, mean = _native.cpu_bf16_dot_limit(1600, 2)
    if operations == 0:
        pytest.skip("no bf16 arithmetic here")
    assert mean == 2 * 100  # 1600 rounds in 16 pieces, each of which begins at zero and adds 1 * 1 + 1 * 1
    assert operations == 2 * _native.cpu_bf16_dot_limit(1600, 1)[0]


@pytest.mark.parametrize("count", [1, 100, 262_144, 262_145, 3_000_001])
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_and_copied_whole(count, threads):
    values = torch.randint(-8, 9, (count,)).float()  # sums are exact
    assert _native.cpu_read_limit(values, threads) == values.double().sum().item()
    out = torch.full((count + 2,), 7.0)
    _native.cpu_copy_limit(out[1:-1], values, threads)
    assert torch.equal(out[1:-1], values)
    assert out[0] == out[-1] == 7


def test_bad_arguments_are_refused():
    values = torch.ones(8)
    with pytest.raises(ValueError, match="iterations must be positive, is 0"):
        _native.cpu_fma_limit(0, 1)
    with pytest.raises(ValueError, match="threads must be positive, is -1"):
        _native.cpu_read_limit(values, -1)
    with pytest.raises(TypeError, match="input must be contiguous float32"):
        _native.cpu_read_limit(values.bfloat16(), 1)
    with pytest.raises(TypeError, match="input must be contiguous float32"):
        _native.cpu_read_limit(values[::2], 1)
    with pytest.raises(ValueError, match="input must have 1 dimensions"):
        _native.cpu_read_limit(values.view(2, 4), 1)
    with pytest.raises(ValueError, match="out must be as long as input"):
        _native.cpu_copy_limit(torch.ones(7), values, 1)
    with pytest.raises(ValueError, match="out must not overlap input"):
        _native.cpu_copy_limit(values[:4], values[2:6], 1)


def test_limits_are_measured():
    found = machine_limits(1, rounds=2)
    assert (found.threads, found.instruction_set) == (1, _native.cpu_instruction_set())
    assert found.flops_per_second > 1e8
    assert found.read_bytes_per_second > 1e7
    assert found.copy_bytes_per_second > 1e7
    assert found.peak(torch.float32) == found.flops_per_second
    json.dumps(found.to_dict())
    assert "1 threads" in str(found)
    assert math.isnan(machine_limits(1, rounds=1, memory=False).read_bytes_per_second)


def test_without_bf16_arithmetic_the_peak_is_fp32s():
    assert MachineLimits(2, "avx2", 3e11, None, 1e10, 1e10).peak(torch.bfloat16) == 3e11
    assert MachineLimits(2, "avx512", 5e11, 1e12, 1e10, 1e10).peak(torch.bfloat16) == 1e12


def test_a_matrix_product_does_not_beat_the_peak():
    """The loop is the limit: with one thread, nothing that multiplies and adds in fp32 may be quicker."""
    a = torch.randn(384, 384)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        operations, _ = _native.cpu_fma_limit(50_000, 1)
        found = interleave(
            {"loop": lambda: _native.cpu_fma_limit(50_000, 1), "product": lambda: a @ a}, rounds=15, round_ms=2.0
        )
    finally:
        torch.set_num_threads(threads)
    if _native.cpu_instruction_set() != _native.cpu_instruction_sets()[0]:
        pytest.skip("PyTorch uses a wider instruction set than the one that is forced")
    assert found["product"].flops_per_second(2 * 384**3) < 1.1 * found["loop"].flops_per_second(operations)
