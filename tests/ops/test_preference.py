"""The table that names the backends for calls that nobody chose one for."""

from __future__ import annotations

import timeit

import pytest
import torch

import fastcnn
from fastcnn import ops, tuning
from fastcnn.backends import intercept, preference
from fastcnn.backends.preference import Rule


@pytest.fixture(autouse=True)
def nothing_tuned(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)
    tuning.forget()
    yield
    tuning.forget()


def served(batch: int) -> list[str]:
    seen = []

    def look(call):
        seen.append(call.backend)
        call.run()

    with intercept(look), torch.no_grad():
        x = torch.randn(batch, 4, 5, 5)
        ops.conv2d(x, torch.randn(3, 4, 3, 3))
        ops.max_pool2d(x, 2)
    return seen


def test_a_device_has_an_order():
    assert preference.DEFAULT_ORDER["cpu"] == ("cpp",)
    assert preference.DEFAULT_ORDER["cuda"] == ("triton", "cuda")
    assert served(2) == ["cpp", "cpp"]


def test_the_first_rule_that_applies_counts(monkeypatch):
    rules = (
        Rule(lambda dtype, args: args[1].shape[0] > 4, ("reference",)),
        Rule(lambda dtype, args: dtype == torch.float32, ("cuda", "cpp")),  # cuda cannot run here: passed over
    )
    monkeypatch.setitem(preference.RULES, ("cpu", "conv2d"), rules)
    fastcnn.reset_fallbacks()
    assert served(5) == ["reference", "cpp"]
    assert served(2) == ["cpp", "cpp"]
    assert fastcnn.fallbacks() == {}
    with fastcnn.use_backend("cpp"):
        assert served(5) == ["cpp", "cpp"], "who chooses a backend gets it"


def test_asking_costs_little():
    def ask() -> object:
        return preference.order("conv2d", "cpu", torch.float32, ())

    assert min(timeit.repeat(ask, number=2000, repeat=15)) / 2000 < 1e-6
