"""The tuner: wrong candidates are rejected, slow ones not chosen, choices used, stored and read by others."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from support.cudnn_on_cpu import substitute_cudnn
from support.networks import Conv, small_input, small_network
from torch import nn

import fastcnn
from fastcnn import tuning
from fastcnn.backends import backend_module, cpp, cudnn, intercept, reference, variants
from fastcnn.measurement import Timing
from fastcnn.tuning import store, tune, tuner
from fastcnn.tuning.compiling import CompilingAhead
from fastcnn.verification import calls as judging

RIGHT = cpp.conv2d


def served_by(model, *inputs) -> list[str]:
    seen = []

    def look(call):
        seen.append(call.backend)
        call.run()

    with intercept(look), torch.no_grad():
        model(*inputs)
    return seen


def slow(function, seconds=0.03):
    def slowed(*args):
        function(*args)
        time.sleep(seconds)

    return slowed


@pytest.fixture
def quickest(monkeypatch):
    """Replace the clock: the named candidate is the quickest, whatever the machine is busy with."""

    def choose(name):
        def interleave(candidates, *args, **kwargs):
            for run in candidates.values():
                run()
            return {c: Timing(1.0 if c == name else 2.0, 1.0, 2.0, 1, 1) for c in candidates}

        monkeypatch.setattr(tuner, "interleave", interleave)

    return choose


def candidate(call, name):
    return next(c for c in call.candidates if c.name == name)


def test_the_quickest_right_candidate_is_chosen_stored_and_used(monkeypatch, cache_folder):
    model, x = small_network(), small_input()
    monkeypatch.setattr(cpp, "variants", lambda operator, *args: ())  # as quick as the backend itself: a coin's toss
    monkeypatch.setattr(reference, "conv2d", slow(reference.conv2d))
    report = tune(model, x, rounds=3)
    assert [call.choice for call in report.calls] == ["cpp"] * 4
    assert all(call.occurrences == 1 for call in report.calls)
    for call in report.calls:
        assert candidate(call, "reference").timing.median_ms > candidate(call, "cpp").timing.median_ms
        assert candidate(call, "cpp").error < 1e-6
    assert report.path is not None
    assert report.path.parent == cache_folder
    assert report.rejected == []
    assert "conv2d float32 4x3x16x16, 16x3x3x3 -> 4x16x16x16" in str(report)
    assert served_by(model, x) == ["cpp"] * 4


def test_a_slower_candidate_is_not_chosen(monkeypatch):
    model, x = small_network(), small_input()
    monkeypatch.setattr(cpp, "variants", lambda operator, *args: ())  # these are not slowed down
    monkeypatch.setattr(cpp, "conv2d", slow(RIGHT))
    report = tune(model, x, rounds=3)
    assert [call.choice for call in report.calls] == ["reference"] * 4
    fastcnn.reset_fallbacks()
    assert served_by(model, x) == ["reference"] * 4
    assert fastcnn.fallbacks() == {}, "a tuned choice of the reference is no fallback"
    with fastcnn.use_backend("cpp"):
        assert served_by(model, x) == ["cpp"] * 4, "a forced backend beats the tuner"


def wrong_values(out, *rest):
    RIGHT(out, *rest)
    out[0, 0, 0, 0] += 1


def writes_nothing(out, *rest):
    """Old memory may hold the right values: only a poisoned output shows it."""


def raises(out, *rest):
    raise RuntimeError("no shared memory left")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong_values, "wrong: relative error"),
        (writes_nothing, "wrong: relative error inf"),
        (raises, "no shared memory"),
    ],
)
def test_a_wrong_candidate_is_rejected_however_quick(monkeypatch, quickest, kernel, reason):
    model, x = small_network(), small_input()
    quickest("cpp")
    if kernel is raises:  # the network itself must still run
        broken = False

        def sometimes(out, *rest):
            if broken:
                raises(out)
            RIGHT(out, *rest)

        monkeypatch.setattr(cpp, "conv2d", sometimes)
        original = tuner._check

        def check(*args):
            nonlocal broken
            broken = args[0].backend == "cpp"
            try:
                return original(*args)
            finally:
                broken = False

        monkeypatch.setattr(tuner, "_check", check)
    else:
        monkeypatch.setattr(cpp, "conv2d", kernel)
    report = tune(model, x, rounds=3)
    assert [call.choice for call in report.calls] == ["reference"] * 4
    assert len(report.rejected) == 4
    assert all(name == "cpp" and reason in why for _, name, why in report.rejected), report.rejected
    assert candidate(report.calls[0], "cpp").timing is None
    assert all("cpp" in entry.rejected for entry in store.load(torch.device("cpu")))
    assert served_by(model, x) == ["reference"] * 4


def test_a_candidate_that_writes_beside_its_slice_is_rejected(monkeypatch, quickest):
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            buffer = torch.empty(x.shape[0], 16, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
            fastcnn.ops.conv2d(x, self.conv.weight, self.conv.bias, out=buffer[:, 4:12])
            return buffer[:, 4:12]

    def spills(out, *rest):
        RIGHT(out, *rest)
        if out.stride(3) > out.shape[1]:
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.shape[1]).fill_(7.0)

    quickest("cpp")
    model, x = Slices().eval(), small_input()
    assert tune(model, x, rounds=3).rejected == []
    monkeypatch.setattr(cpp, "conv2d", spills)
    report = tune(model, x, rounds=3, again=True)
    assert [(name, why) for _, name, why in report.rejected] == [("cpp", "wrote outside its output")]
    assert report.calls[0].choice == "reference"


def test_in_place_calls_are_tuned_on_copies():
    class InPlace(nn.Module):
        def forward(self, x):
            x = x.contiguous(memory_format=torch.channels_last).clone()
            fastcnn.ops.residual_add(x, x * 0.5, scale=1.0, activation="relu", out=x)
            return x

    x = small_input()
    expected = InPlace()(x)
    tune(InPlace(), x, rounds=3)
    torch.testing.assert_close(InPlace()(x), expected)


def test_tuning_again_keeps_what_is_known_and_again_does_not(quickest):
    model, x = small_network(), small_input()
    quickest("cpp")
    assert len(tune(model, x, rounds=3).calls) == 4
    tuning.forget()
    second = tune(model, x, rounds=3)
    assert second.calls == ()
    assert second.kept == 4
    assert second.path is None
    assert "4 calls were tuned before" in str(second)
    assert len(tune(model, x, rounds=3, again=True).calls) == 4
    other_batch = tune(model, small_input(batch=2), rounds=3)
    assert len(other_batch.calls) == 4
    assert len(store.load(torch.device("cpu"))) == 8


def test_equal_calls_are_tuned_once():
    model = nn.Sequential(Conv(4, 4, 1), Conv(4, 4, 1))
    report = tune(model, torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last), rounds=3)
    assert [call.occurrences for call in report.calls] == [2]


def test_choices_need_not_be_stored(cache_folder):
    report = tune(small_network(), small_input(), rounds=3, save=False)
    assert report.path is None
    assert not cache_folder.exists()


def test_other_threads_are_another_case(quickest):
    model, x = small_network(), small_input()
    quickest("reference")
    tune(model, x, rounds=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert served_by(model, x) == ["cpp"] * 4
    finally:
        torch.set_num_threads(threads)
    assert served_by(model, x) == ["reference"] * 4


def test_another_process_uses_the_choices(quickest, cache_folder):
    model, x = small_network(), small_input()
    quickest("reference")
    tune(model, x, rounds=3)
    script = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import torch
        torch.set_num_threads({torch.get_num_threads()})
        from fastcnn.backends import intercept
        from support.networks import small_input, small_network
        def look(call):
            print(call.backend)
            call.run()
        with intercept(look), torch.no_grad():
            small_network()(small_input())
    """
    environment = {**os.environ, "FASTCNN_CACHE_DIR": str(cache_folder)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference"] * 4


def test_variants_of_a_backend_are_candidates_of_their_own(monkeypatch, quickest):
    """A backend that offers variants: the quick right one is chosen by name, the wrong one is rejected."""

    class Variant:
        def __init__(self, text):
            self.text = text

        def unsupported(self, *args, **facts):
            return None

        def conv2d(self, out, *rest):
            if self.text == "wrong":
                out.zero_()
            else:
                RIGHT(out, *rest)

    quickest("cpp:quick")
    monkeypatch.setattr(cpp, "variants", lambda operator, *args: ["wrong", "quick"], raising=False)
    monkeypatch.setattr(cpp, "variant", Variant, raising=False)
    try:
        model, x = small_network(), small_input()
        report = tune(model, x, rounds=3)
        assert [call.choice for call in report.calls] == ["cpp:quick"] * 4
        assert {name for _, name, _ in report.rejected} == {"cpp:wrong"}
        tuning.forget()
        assert served_by(model, x) == ["cpp:quick"] * 4
    finally:
        backend_module.cache_clear()


def test_quick_effort_leaves_out_variants_that_must_be_compiled(monkeypatch):
    model, x = small_network(), small_input()
    with_variants = tune(model, x, rounds=1, save=False, effort="quick")
    assert any(":" in c.name for call in with_variants.calls for c in call.candidates)
    monkeypatch.setattr(cpp, "compilation", lambda operator, *args: None, raising=False)
    full = tune(model, x, rounds=1, save=False)
    quick = tune(model, x, rounds=1, save=False, effort="quick")
    assert any(":" in c.name for call in full.calls for c in call.candidates)
    for call in quick.calls:
        assert {c.name for c in call.candidates} == {"reference", "cpp"}
    assert quick.seconds > 0
    with pytest.raises(ValueError, match="effort must be one of quick, full"):
        tune(model, x, effort="some")


def test_a_backend_that_replaces_fresh_outputs_is_timed_as_it_will_run(monkeypatch, quickest):
    """cuDNN gives new outputs its own memory: no copy in its time; and its results are checked all the same."""
    calls = substitute_cudnn(monkeypatch)
    model, x = small_network(), small_input()
    quickest("cudnn")
    seen = []
    original = cudnn.conv2d
    monkeypatch.setattr(cudnn, "conv2d", lambda *args, fresh=False: (seen.append(fresh), original(*args, fresh=fresh)))
    report = tune(model, x, rounds=1, backends=["cudnn"])
    assert [call.choice for call in report.calls] == ["cudnn"] * 4
    assert all(candidate(call, "cudnn").error < 1e-6 for call in report.calls)
    assert all(seen)
    with torch.no_grad():
        ours = model(x)
        with fastcnn.use_backend("reference"):
            torch.testing.assert_close(ours, model(x))
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *args: calls.results[0].new_zeros(()))
    monkeypatch.setattr(cudnn, "conv2d", original)
    report = tune(model, x, rounds=1, backends=["cudnn"], again=True)
    assert {name for _, name, _ in report.rejected} == {"cudnn", "cudnn:benchmark"}, report


def test_float64_answers_by_parts_are_those_of_the_whole(monkeypatch):
    whole, parts = [], []

    def look(call):
        monkeypatch.setattr(judging, "_MOST_AT_ONCE", 2**26)
        whole.append(judging.exact_outputs(call))
        monkeypatch.setattr(judging, "_MOST_AT_ONCE", 700)
        parts.append(judging.exact_outputs(call))
        call.run()

    x, residual = torch.randn(5, 4, 6, 6), torch.randn(5, 5, 6, 6)
    with intercept(look), torch.no_grad():
        # As many images as filters: the weight must not be cut.
        fastcnn.ops.conv2d(x, torch.randn(5, 4, 3, 3), torch.randn(5), 1, 1, residual=residual, activation="relu")
        fastcnn.ops.residual_add(residual, residual * 2)
        fastcnn.ops.channel_affine(x, torch.randn(4), torch.randn(4))
        fastcnn.ops.max_pool2d(x, 2)
        fastcnn.ops.linear(torch.randn(5, 400), torch.randn(5, 400))
        fastcnn.ops.batch_statistics(x)
    assert len(whole) == 6
    for a, b in zip(whole, parts, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_kernels_are_compiled_ahead_and_a_failure_is_left_to_the_check(monkeypatch):
    done = []

    def compilation(name, operator, args):
        if name == "bad now":
            raise RuntimeError("no")
        return {"good": lambda: done.append(operator), "bad later": lambda: 1 / 0, "nothing": None}[name]

    monkeypatch.setattr(variants, "compilation", compilation)

    def look(call):
        with CompilingAhead() as ahead:
            ahead.compile(call, ["bad now", "good", "bad later", "nothing", "good"])
        call.run()

    with intercept(look):
        fastcnn.ops.max_pool2d(torch.randn(1, 2, 4, 4), 2)
    assert done == ["max_pool2d"] * 2


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backends must be of"):
        tune(small_network(), small_input(), backends=["fast"])


def test_triton_tiles_are_candidates_and_right():
    pytest.importorskip("triton")
    script = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import torch
        from support.networks import Conv
        from fastcnn.tuning import tune
        x = torch.randn(1, 64, 4, 4).contiguous(memory_format=torch.channels_last)
        call, = tune(Conv(64, 64, 3, padding=1), x, rounds=1, save=False).calls
        names = [c.name for c in call.candidates if c.rejected is None]
        assert call.choice in names
        assert "triton" in names and any(name.startswith("triton:") for name in names), call.candidates
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_triton_tiles_have_names_that_come_back():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="a Triton tile looks like"):
        variants.variant("triton:big")
    assert variants.variant("triton:128x64x32w4s3g8").unsupported("linear", torch.device("cpu"), torch.float32)
