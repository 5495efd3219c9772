"""Every tuning test has a cache folder and choices of its own."""

from __future__ import annotations

import pytest

from fastcnn import tuning
from fastcnn.tuning import shipping


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(folder))
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)
    monkeypatch.setattr(shipping, "FOLDER", tmp_path / "shipped")
    tuning.forget()
    yield folder
    tuning.forget()
