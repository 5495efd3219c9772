"""Choices that ship with the package: read below the user's own, for the right device and versions only."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import fastcnn
from fastcnn import tuning
from fastcnn.backends import backend_module
from fastcnn.tuning import shipping, store, tuned_backend
from fastcnn.tuning.key import key_of

CPU = torch.device("cpu")


def arguments(batch: int = 1) -> tuple[object, ...]:
    tensors = [torch.randn(batch, c, 6, 6).contiguous(memory_format=torch.channels_last) for c in (8, 4)]
    return (*tensors, torch.randn(8, 4, 1, 1), None, torch.randn(8), None, None, None, False, "relu", (1, 1), (0, 0),
            (1, 1), 1)  # fmt: skip


def entry(batch: int = 1, choice: str = "reference") -> store.Entry:
    return store.Entry(key_of("conv2d", CPU, torch.float32, arguments(batch)), choice, {choice: 0.1}, {"cuda": "wrong"})


def look_up(batch: int = 1) -> str | None:
    return tuned_backend("conv2d", CPU, torch.float32, arguments(batch))


def ship(*entries: store.Entry, **changes: object) -> Path:
    """Put a file for this device into the package's folder."""
    environment = store.environment(CPU)
    shipping.FOLDER.mkdir(exist_ok=True)
    path = shipping.FOLDER / shipping.name_for(environment["device"])
    data = json.loads(shipping.exported(environment, entries))
    path.write_text(json.dumps({**data, **changes}))
    tuning.forget()
    return path


def test_a_shipped_choice_is_used_and_gives_way_to_a_choice_made_here():
    assert look_up() is None
    ship(entry(1), entry(2))
    assert look_up(1) == look_up(2) == "reference"
    store.save(CPU, [entry(2, "cpp")])
    tuning.forget()
    assert look_up(1) == "reference"
    assert look_up(2) == "cpp"
    assert store.load(CPU) == [entry(2, "cpp")], "tuning does not count them as done"


def test_export_and_read_give_the_same_choices():
    path = ship(entry(1), entry(2))
    header, entries = shipping.read(path.read_text(), path)
    assert entries == [entry(1), entry(2)]
    assert shipping.holds(header, store.environment(CPU))
    first, end = header.versions["fastcnn"]
    assert fastcnn.__version__.startswith(first)
    assert end != first


@pytest.mark.parametrize(
    ("versions", "used"),
    [
        ({"torch": ("2.11", "3")}, True),
        ({"torch": ("2.11", "2.11.1")}, False),
        ({"torch": ("99", "100")}, False),
        ({"fastcnn": ("0.0.9", "0.1")}, False),
        ({"fastcnn": ("0.1", "0.2"), "torch": ("2.9", "10")}, True),
        ({"nothing of this name": ("1", "2")}, False),
    ],
)
def test_ranges_of_versions(monkeypatch, versions, used):
    here = {**store.environment(CPU), "torch": "2.14.1+cu130", "fastcnn": "0.1.0"}
    monkeypatch.setattr(store, "environment", lambda device: here)
    ship(entry(), versions=versions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert look_up() == ("reference" if used else None)


@pytest.mark.parametrize("part", ["device", "architecture"])
def test_another_device_of_the_same_file_name_does_not_count(part):
    ship(entry(), **{part: "another"})
    assert look_up() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99}, {"versions": {"torch": ["a", "b"]}}, {"versions": {"torch": "2"}}, {"choices": [{}]},
        {"choices": [{**entry().to_dict(), "choice": "nonsense"}]}, {"versions": None},
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning(changes):
    ship(entry(), **changes)
    with pytest.warns(RuntimeWarning, match="ignoring the tuning file"):
        assert look_up() is None
    assert look_up() is None


def test_file_names():
    assert shipping.name_for("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_the_files_in_the_package_can_be_read(monkeypatch):
    monkeypatch.undo()  # the folder of the installed package
    for path in shipping.files():
        header, entries = shipping.read(path.read_text(encoding="utf-8"), path)
        assert header is not None, path
        assert path.name == shipping.name_for(header.device)
        assert entries, path
        for choice in {e.choice for e in entries}:
            assert hasattr(backend_module(choice), "unsupported")
