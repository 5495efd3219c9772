"""The tuner's choices on disk: one JSON file per environment in ``FASTCNN_CACHE_DIR`` or ``~/.cache/fastcnn``.

An environment is everything but the call itself that a measured choice depends on: the device and the versions of
fastcnn, its native build, torch and Triton. Files of other environments are left alone, so that a folder can be
shared. Choices that ship with the package (:mod:`fastcnn.tuning.shipping`) give way to what is here. A file that cannot
be read or does not hold what it should is ignored with a warning, never trusted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastcnn.tuning.key import Key, from_json, to_json

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One tuned operator call: what serves it, how long each right candidate took, and why others were rejected."""

    key: Key
    choice: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": to_json(self.key),
            "choice": self.choice,
            "milliseconds": self.milliseconds,
            "rejected": self.rejected,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Entry:
        """Raises KeyError, TypeError or ValueError where ``data`` is not an entry."""
        from fastcnn.backends import BACKENDS, backend_module

        choice = data["choice"]
        if not isinstance(choice, str) or choice.partition(":")[0] not in BACKENDS:
            raise ValueError(f"unknown backend {choice!r}")
        if ":" in choice:
            backend_module(choice)  # a variant's name must be one
        if not isinstance(data["key"], list):
            raise TypeError("the key must be a list")
        times = {str(name): float(value) for name, value in data["milliseconds"].items()}
        rejected = {str(name): str(reason) for name, reason in data["rejected"].items()}
        return cls(from_json(data["key"]), choice, times, rejected)


def cache_folder() -> Path:
    """Where choices are stored: ``FASTCNN_CACHE_DIR``, else ``fastcnn`` in the user's cache folder."""
    chosen = os.environ.get("FASTCNN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcnn"


def environment(device: torch.device) -> dict[str, str]:
    """What a choice depends on besides the call."""
    import fastcnn
    from fastcnn.measurement.conditions import device_name, triton_version

    return {
        "fastcnn": fastcnn.__version__,
        "native": _native_build(),
        "torch": torch.__version__,
        "triton": triton_version() or "none",
        "device": device_name(device),
        "architecture": _architecture(device),
    }


def path_for(device: torch.device) -> Path:
    text = json.dumps(environment(device), sort_keys=True)
    return cache_folder() / f"tuning-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def files() -> list[Path]:
    """Every file of choices in the cache folder, of any environment."""
    try:
        return sorted(cache_folder().glob("tuning-*.json"))
    except OSError:
        return []


def load(device: torch.device) -> list[Entry]:
    """The choices made for a device in this environment; empty when there are none."""
    path = path_for(device)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        warn(path, str(error))
        return []
    return read(text, path, expected=environment(device))[1]


def read(text: str, path: Path, expected: dict[str, str] | None = None) -> tuple[dict[str, str], list[Entry]]:
    """A file's environment and entries; nothing, with a warning, where it is not a file of choices."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, not {FORMAT}")
        found = {str(name): str(value) for name, value in data["environment"].items()}
        if expected is not None and found != expected:
            raise ValueError("it was made for another device or other versions")
        return found, [Entry.from_dict(item) for item in data["choices"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warn(path, f"{type(error).__name__}: {error}")
        return {}, []


def choices_for(device: torch.device) -> dict[Key, str]:
    """What serves calls on a device: the choices made here, over those that ship with the package.

    Costs a look into two folders where there are none.
    """
    from fastcnn.tuning import shipping

    shipped = shipping.load(device) if shipping.file_for(device) is not None else []
    own = load(device) if files() else []
    return {entry.key: entry.choice for entry in (*shipped, *own)}


def save(device: torch.device, entries: Iterable[Entry]) -> Path:
    """Add choices to the device's file, replacing older ones for the same calls, and return the file's path.

    The file is replaced in one step: a reader sees the old one or the new one.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        merged = {entry.key: entry for entry in load(device)}
        merged.update({entry.key: entry for entry in entries})
        data = {
            "format": FORMAT,
            "environment": environment(device),
            "choices": [entry.to_dict() for entry in merged.values()],
        }
        replace_file(path, json.dumps(data, indent=1))
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step. Raises OSError where its folder cannot be written."""
    handle, temporary = tempfile.mkstemp(prefix=".tuning-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def clear() -> list[Path]:
    """Delete every file of choices in the cache folder and return their paths."""
    removed = files()
    for path in removed:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    return removed


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep two tuners from losing each other's choices, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def warn(path: Path, reason: str) -> None:
    """Say that a file is not used."""
    warnings.warn(f"fastcnn: ignoring the tuning file {path}: {reason}", RuntimeWarning, stacklevel=3)


def _architecture(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    from fastcnn import _native

    return str(_native.cpu_instruction_set())


@functools.cache
def _native_build() -> str:
    """A digest of the native module's file: other kernels, other choices."""
    from fastcnn import _native

    with open(_native.__file__, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]
