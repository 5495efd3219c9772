"""GPU tests: every kernel against float64 and PyTorch, on the device.

FASTCNN_REHEARSE runs their logic without a GPU: `1` on the CPU's kernels, `triton` on Triton's in its interpreter
(with TRITON_INTERPRET=1), `cuda` on the CUDA kernels compiled for the host (tests/cuda).
$OUT receives what failed and which kernels ran: see support/gpu_record.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import gpu_record
from support.gpu import FP32, cases_id

from fastcnn import backends

REHEARSAL = os.environ.get("FASTCNN_REHEARSE", "0")
BACKENDS = {"0": ["triton", "cuda"], "1": ["cpp"]}.get(REHEARSAL, [REHEARSAL])

_lost: list[str] = []  # the test that destroyed this process's CUDA context


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(of): a function from a backend to the values of `case`")
    config.addinivalue_line("markers", "cost(seconds): longer tests start first")
    if REHEARSAL == "cuda":
        from support import emulated_cuda

        emulated_cuda.install()
    if os.environ.get("OUT") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(gpu_record.Recorder(Path(os.environ["OUT"]), REHEARSAL != "0"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/tests/gpu/" in str(item.path)]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if REHEARSAL == "0" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
    if len(ours) == len(items):  # longest first, for an even end on several processes
        items.sort(key=_cost, reverse=True)


def _cost(item: pytest.Item) -> float:
    marker = item.get_closest_marker("cost")
    # Triton's kernels are compiled on their first use.
    return (marker.args[0] if marker else 1.0) * (2.0 if "[triton" in item.name else 1.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        metafunc.parametrize("backend", BACKENDS, indirect=True)
        return
    pairs = [(backend, case) for backend in BACKENDS for case in marker.args[0](backend)]
    ids = [f"{backend}-{cases_id(case)}" for backend, case in pairs]
    metafunc.parametrize(("backend", "case"), pairs, ids=ids, indirect=["backend"])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL != "0" else "cuda")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test under one backend, where every case must be covered by its kernels; notes the kernels used."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    note = gpu_record.noting(request.node.user_properties)
    with backends.use_backend(request.param, strict=True), backends.intercept(note):
        yield request.param


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    """fp32 is fp32 unless a test applies another precision: PyTorch lets convolutions use TF32 by default."""
    with FP32.applied():
        yield


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """No work of a test outlives it, so that a failing kernel is blamed on its own test."""
    yield
    if REHEARSAL == "0" and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _lost.append(request.node.nodeid)
            raise


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """After an illegal access nothing works in this process any more: end it. pytest-xdist starts another one."""
    if _lost and os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(70)
    if _lost:
        pytest.exit(f"{_lost[0]} destroyed the CUDA context", returncode=70)
