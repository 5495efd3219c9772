"""The accuracy rule itself."""

from __future__ import annotations

import math

import pytest
import torch

from fastcnn.verification import judge, relative_error
from fastcnn.verification.accuracy import TINY


def test_errors_are_relative_to_the_exact_result():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = relative_error(torch.tensor([3.0, 4.5]), exact)
    assert error.norm == pytest.approx(0.1)
    assert error.largest == pytest.approx(0.125)


def test_equal_infinities_and_nans_are_no_error_and_others_are_infinite():
    exact = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
    assert relative_error(exact.float(), exact).norm == 0
    for wrong in (
        [1.0, -math.inf, math.nan],
        [1.0, math.inf, 2.0],
        [math.nan, math.inf, math.nan],
        [1.0, 5.0, math.nan],
    ):
        assert relative_error(torch.tensor(wrong), exact).norm == math.inf, wrong


def test_zero_results_are_judged_absolutely():
    exact = torch.zeros(4, dtype=torch.float64)
    assert relative_error(torch.zeros(4), exact).norm == 0
    assert relative_error(torch.full((4,), 0.5), exact).norm == 1.0


def test_an_empty_result_has_no_error():
    assert relative_error(torch.empty(0), torch.empty(0, dtype=torch.float64)).norm == 0


@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_twice_the_references_error_passes_and_more_does_not(dtype):
    exact = torch.randn(1000, dtype=torch.float64)
    unit = 40 * TINY[dtype]
    reference = (exact * (1 + unit)).to(dtype)
    assert judge((exact * (1 + 1.9 * unit)).to(dtype), reference, exact).passed
    wrong = judge((exact * (1 + 2.3 * unit)).to(dtype), reference, exact)
    assert not wrong.passed
    assert wrong.share > 1


def test_a_single_wrong_element_in_a_large_result_is_noticed_in_bf16():
    exact = torch.randn(1_000_000, dtype=torch.float64)
    reference = exact.bfloat16()
    ours = reference.clone()
    ours[12345] += 0.5
    judged = judge(ours, reference, exact)
    assert judged.ours.norm < judged.bound.norm
    assert not judged.passed


def test_one_rounding_where_the_reference_is_exact_passes():
    exact = torch.randn(1000, dtype=torch.float64).bfloat16().double()
    off = (exact * (1 + 2**-10)).bfloat16()
    assert judge(off, exact.bfloat16(), exact).passed


def test_an_infinite_reference_excuses_an_infinite_result_only():
    exact = torch.tensor([70000.0, 1.0], dtype=torch.float64)
    overflown = exact.half()
    assert judge(overflown, overflown, exact).passed
    assert judge(exact.half().clamp(max=60000), overflown, exact).passed
    assert not judge(overflown, exact.half().clamp(max=60000), exact).passed


def test_an_allowance_widens_the_bound():
    exact = torch.randn(1000, dtype=torch.float64)
    ours = (exact * (1 + 5e-6)).float()
    assert not judge(ours, exact.float(), exact).passed
    assert judge(ours, exact.float(), exact, allowance=1e-5).passed
