"""The reference where TF32 is allowed: how operands are rounded, and which of two results is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import relative_error

import fastcnn
from fastcnn import ops
from fastcnn.backends import Call, intercept
from fastcnn.verification import calls, tf32


def nearest_by_search(value: float) -> float:
    """The TF32 value nearest to a normal one, the larger of two: by its definition, in Python's own arithmetic."""
    mantissa, exponent = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
    steps = float(mantissa) * 2**11  # mantissa in [0.5, 1): ten bits after the leading one
    return float(torch.copysign(torch.tensor(int(steps + 0.5) * 2.0 ** (int(exponent) - 11)), torch.tensor(value)))


def test_rounds_to_nearest():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 10
    values = torch.cat([values, torch.tensor([1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-20, 2 - 2**-20])])
    expected = torch.tensor([nearest_by_search(float(v)) for v in values])
    assert torch.equal(tf32.round_to_tf32(values), expected)


def test_leaves_what_is_not_finite():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    rounded = tf32.round_to_tf32(values)
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded[[0, 1, 3]], values[[0, 1, 3]])


def recorded(run) -> Call:
    found: list[Call] = []

    def keep(call: Call) -> None:
        found.append(call)
        call.run()

    with torch.no_grad(), intercept(keep):
        run()
    return found[0]


def convolution() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 24, 9, 9), torch.randn(40, 24, 3, 3)
    ops.conv2d(
        x, w, torch.randn(40), padding=1, scale=torch.rand(40), residual=torch.randn(2, 40, 9, 9), activation="relu",
        input_scale=torch.rand(24), input_shift=torch.randn(24), input_activation="relu",
    )  # fmt: skip


def layer() -> None:
    torch.manual_seed(0)
    ops.linear(torch.randn(16, 300), torch.randn(40, 300), torch.randn(40), activation="relu")


@pytest.mark.parametrize("run", [convolution, layer])
def test_emulation_costs_what_tf32_costs(run):
    call = recorded(run)
    exact = calls.exact_outputs(call)[0]
    emulated = torch.empty_like(exact, dtype=torch.float32)
    tf32.fill_in_tf32(calls.into(call, (emulated,), "reference"))
    error = relative_error(emulated, exact)
    assert 1e-5 < error < 5e-4, error  # 2^-11 at most for each operand, less where errors cancel


def test_a_gpu_call_is_judged_by_the_less_precise(monkeypatch):
    call = recorded(convolution)
    plain = calls.Answers.of(call)
    assert relative_error(plain.reference[0], plain.exact[0]) < 1e-6  # a CPU multiplies exactly, whatever the setting
    monkeypatch.setattr(calls, "may_use_tf32", lambda call: True)
    loose = calls.Answers.of(call)
    assert relative_error(loose.reference[0], loose.exact[0]) > 1e-5


def test_only_where_the_setting_allows_it(monkeypatch):
    call = recorded(convolution)
    on_gpu = call._replace(device=torch.device("cuda"))
    monkeypatch.setattr(tf32, "convolutions_use_tf32", lambda: True)
    assert tf32.may_use_tf32(on_gpu)
    assert not tf32.may_use_tf32(call)
    assert not tf32.may_use_tf32(on_gpu._replace(dtype=torch.bfloat16))
    assert not tf32.may_use_tf32(on_gpu._replace(operator="max_pool2d"))
    monkeypatch.setattr(tf32, "convolutions_use_tf32", lambda: False)
    assert not tf32.may_use_tf32(on_gpu)


def test_verify_runs_the_network_in_tf32_too(monkeypatch):
    """As on a GPU: every call may use TF32, so the network's own reference is the emulated one."""
    from fastcnn.verification import compare

    model = fastcnn.create_model("resnet20_cifar").eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = fastcnn.verify(model, x, per_layer=False).outputs[0].judgement
    monkeypatch.setattr(compare, "may_use_tf32", lambda call: call.operator in ("conv2d", "linear"))
    result = fastcnn.verify(model, x, per_layer=False)
    assert result.outputs[0].judgement.reference.norm > 50 * before.reference.norm
    assert any("TF32" in note for note in result.notes)


def test_less_precise():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.01])
    assert tf32.less_precise(exact, near, far) is far
    assert tf32.less_precise(exact, far, near) is far
    assert tf32.less_precise(exact, near, torch.tensor([1.0, float("nan")])).isnan().any()


def test_exact_products_stay_exact():
    """The emulation's sums are float64 ones: an exact product stays exact."""
    x, w = torch.ones(1, 16, 3, 3), torch.full((8, 16, 3, 3), 0.5)
    call = recorded(lambda: ops.conv2d(x, w))
    emulated = torch.empty_like(calls.outputs_of(call)[0])
    tf32.fill_in_tf32(calls.into(call, (emulated,), "reference"))
    assert torch.equal(emulated, F.conv2d(x, w))
