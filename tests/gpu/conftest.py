"""GPU tests. FASTCNN_REHEARSE=1 runs their logic on the CPU with the C++ backend, before a visit needs it."""

from __future__ import annotations

import os

import pytest
import torch

from fastcnn import backends

REHEARSAL = os.environ.get("FASTCNN_REHEARSE") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not REHEARSAL and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpp"] if REHEARSAL else ["triton", "cuda"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Runs a test under one backend, where every case must be covered by its kernels."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with backends.use_backend(request.param, strict=True):
        yield request.param


@pytest.fixture(params=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest):
    """Both ways of multiplying fp32 on tensor cores or not; the reference follows the same setting."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield request.param == "tf32"
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
