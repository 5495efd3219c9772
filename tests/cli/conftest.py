"""The command line in this process (quick) and in one of its own (what a user runs)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from fastcnn import tuning
from fastcnn.cli import main


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(constant):
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def cli(capsys):
    """Call the command line's function."""

    def call(*arguments: object) -> Result:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture
def command(tmp_path):
    """Run `python -m fastcnn` in another process."""

    def call(*arguments: object, **variables: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "fastcnn", *map(str, arguments)],
            capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, **variables},
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return call
