"""Tests run on the installed package, in an empty folder: a child process must not find the source tree either."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_source_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _flags_can_be_set() -> Iterator[None]:
    """PyTorch's own test helpers, which some test modules import, forbid to set torch.backends' flags by assignment."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield
