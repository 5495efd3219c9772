"""Choices that ship with the package, one JSON file for a device: ``fastcnn/tuning/shipped/DEVICE.json``.

They were measured on that device and checked there. The tuner's own files hold for exactly one set of versions; a
shipped file holds for ranges, because a choice that another version would make differently is only a slower one:
every backend's kernels pass the same tests. What the tuner finds on a user's machine comes before it.

``fastcnn tune --export FILE`` writes such a file from the choices in the cache folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from fastcnn.tuning import store
from fastcnn.tuning.store import Entry

FOLDER = Path(__file__).parent / "shipped"

Range = tuple[str, str]  # from a version on, and below another


class Header(NamedTuple):
    """Where a file's choices hold."""

    device: str
    architecture: str
    versions: dict[str, Range]


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []


def name_for(device_name: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"nvidia-h100-80gb-hbm3.json"``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def file_for(device: torch.device) -> Path | None:
    """The file that ships for a device, if there is one."""
    from fastcnn.measurement.conditions import device_name

    if not FOLDER.is_dir():
        return None
    path = FOLDER / name_for(device_name(device))
    return path if path.is_file() else None


def load(device: torch.device) -> list[Entry]:
    """The choices that ship for a device and hold for the versions here; otherwise none.

    A file for other versions is passed over in silence: it is nobody's mistake. A damaged one gives a warning.
    """
    path = file_for(device)
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        store.warn(path, str(error))
        return []
    header, entries = read(text, path)
    return entries if header is not None and holds(header, store.environment(device)) else []


def read(text: str, path: Path) -> tuple[Header | None, list[Entry]]:
    """A file's header and entries; nothing, with a warning, where it is not a shipped file."""
    try:
        data = json.loads(text)
        if data["format"] != store.FORMAT:
            raise ValueError(f"format {data['format']!r}, not {store.FORMAT}")
        versions = {str(name): (str(first), str(end)) for name, (first, end) in data["versions"].items()}
        for bound in (bound for bounds in versions.values() for bound in bounds):
            if not _release(bound):
                raise ValueError(f"not a version: {bound!r}")
        header = Header(str(data["device"]), str(data["architecture"]), versions)
        return header, [Entry.from_dict(item) for item in data["choices"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        store.warn(path, f"{type(error).__name__}: {error}")
        return None, []


def holds(header: Header, environment: dict[str, str]) -> bool:
    """Whether a file's choices may serve here: the same device, and every version within its range."""
    if (header.device, header.architecture) != (environment["device"], environment["architecture"]):
        return False
    return all(
        _release(first) <= _release(environment.get(name, "")) < _release(end)
        for name, (first, end) in header.versions.items()
    )


def exported(environment: dict[str, str], entries: Iterable[Entry]) -> str:
    """A shipped file's text, from choices made in an environment.

    It holds for this minor version of fastcnn, and for torch and Triton from this minor version to the next major one.
    """
    versions: dict[str, Range] = {}
    for name in ("fastcnn", "torch", "triton"):
        release = _release(environment[name])
        if not release:  # no Triton: nothing was chosen from it
            continue
        major, minor = (*release, 0)[:2]
        versions[name] = (f"{major}.{minor}", f"{major}.{minor + 1}" if name == "fastcnn" else str(major + 1))
    head = {
        "format": store.FORMAT,
        "device": environment["device"],
        "architecture": environment["architecture"],
        "versions": versions,
        "measured_with": environment,
    }
    choices = ",\n".join(json.dumps(entry.to_dict()) for entry in entries)  # a line each
    return json.dumps(head, indent=1)[:-2] + f',\n "choices": [\n{choices}\n]}}\n'


def _release(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` -> (2, 11, 0); empty where it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
