"""Saved frozen models: round trips, and files that must be refused."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.networks import small_input, small_network
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastcnn


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.frozen"
    fastcnn.freeze(small_network(), small_input()).save(path)
    return path


def rewritten(path: Path, change: Any) -> Path:
    """The file with its header changed by ``change(header)``."""
    content = path.read_bytes()
    end = 16 + int.from_bytes(content[8:16], "little")
    header = json.loads(content[16:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(content[:8] + len(text).to_bytes(8, "little") + text + content[end:])
    return path


@pytest.mark.parametrize("name", ["resnet20_cifar", "densenet40_k12_cifar", "resnext29_8x64d_cifar"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    frozen = fastcnn.freeze(fastcnn.create_model(name), x)
    frozen.save(tmp_path / "model")
    loaded = fastcnn.load_frozen(tmp_path / "model")
    assert torch.equal(loaded(x), frozen(x))
    assert loaded.memory() == frozen.memory()


class _Several(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(F.max_pool2d(x, 2))


class _Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_structures_of_results(tmp_path: Path) -> None:
    def result(y: Tensor) -> Any:
        return OrderedDict(b=[y, (y + 1,)], a={"z": y[:, :1], "c": y * 2})

    x = small_input()
    model = _Several(result)
    frozen = fastcnn.freeze(model, x)
    frozen.save(tmp_path / "model")
    for each in (frozen, fastcnn.load_frozen(tmp_path / "model"), copy.deepcopy(frozen)):
        ours, theirs = each(x), model(x)
        assert type(ours) is OrderedDict
        assert str(ours.keys()) == str(theirs.keys())
        assert type(ours["b"]) is list
        assert type(ours["b"][1]) is tuple
        assert list(ours["a"]) == ["z", "c"]
        for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            assert torch.equal(a, b)


def test_a_result_of_another_class_is_for_this_process(tmp_path: Path) -> None:
    x = small_input()
    frozen = fastcnn.freeze(_Several(lambda y: _Pair(y, y * 2)), x)
    result = frozen(x)
    assert type(result) is _Pair
    assert torch.equal(result.second, 2 * result.first)
    for attempt in (lambda: frozen.save(tmp_path / "model"), lambda: copy.deepcopy(frozen)):
        with pytest.raises(ValueError, match="the model returns a _Pair; a file can hold tuples, lists, and dict"):
            attempt()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(again: Callable[[nn.Module], nn.Module]) -> None:
    x = small_input()
    model = nn.Sequential(fastcnn.freeze(small_network(), x), nn.ReLU())
    model[0].register_forward_hook(_doubled)
    other = again(model)
    expected = model(x)
    model[0]._plan.fill_arena(0xFF)  # an arena of its own
    assert torch.equal(other(x), expected)
    assert other[0].memory() == model[0].memory()
    assert not other[0].training


def _doubled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2 * output


def test_a_pickle_for_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps(fastcnn.freeze(small_network(), small_input()))
    monkeypatch.setattr("fastcnn.graph.freezing.storage.FORMAT", 99)
    with pytest.raises(ValueError, match=r"the pickled model was written for format .*, here it is 99: freeze"):
        pickle.loads(content)


def test_loads_in_another_process_without_the_model(saved: Path, tmp_path: Path) -> None:
    x = small_input()
    torch.save(x, tmp_path / "x")
    code = (
        "import torch, fastcnn, sys\ntorch.save(fastcnn.load_frozen(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])"
    )
    result = tmp_path / "y"
    subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path / "x"), str(result)], check=True)
    assert torch.equal(torch.load(result), fastcnn.freeze(small_network(), x)(x))


@pytest.mark.parametrize(
    ("key", "value"), [("format", 99), ("fastcnn", "0.0.0"), ("instruction_set", "an instruction set of the future")]
)
def test_a_file_for_something_else_is_refused(saved: Path, key: str, value: object) -> None:
    def change(header: dict[str, Any]) -> None:
        header[key] = value

    with pytest.raises(ValueError, match=f"was written for {key} {value}, here it is .*: freeze the model again"):
        fastcnn.load_frozen(rewritten(saved, change))


@pytest.mark.skipif(len(fastcnn._native.cpu_instruction_sets()) < 2, reason="this processor has one instruction set")
def test_another_instruction_set_refuses_the_file(saved: Path) -> None:
    other = fastcnn._native.cpu_instruction_sets()[-1]
    code = "import fastcnn, sys; fastcnn.load_frozen(sys.argv[1])"
    process = subprocess.run(
        ["env", f"FASTCNN_CPU_ISA={other}", sys.executable, "-c", code, str(saved)], capture_output=True, text=True
    )
    assert process.returncode != 0
    assert (
        f"was written for instruction_set {fastcnn._native.cpu_instruction_set()}, here it is {other}" in process.stderr
    )


def test_damaged_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    end = 16 + int.from_bytes(content[8:16], "little")
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for damaged in (bytes(flipped), content[:-1], content + b"x", content[: end - 3], content[:20]):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            fastcnn.load_frozen(saved)
    for other in (b"", b"PK\x03\x04 a zip file"):
        saved.write_bytes(other)
        with pytest.raises(ValueError, match="is not a frozen fastcnn model"):
            fastcnn.load_frozen(saved)
    with pytest.raises(FileNotFoundError):
        fastcnn.load_frozen(saved.with_name("absent"))


def _outside_the_arena(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][0][1][1] = 1 << 30


def _negative_offset(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][0][1][1] = -64


def _huge_shape(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][-1][1][3][0] = 1 << 50


def _endless_broadcast(header: dict[str, Any]) -> None:
    step = header["recipe"]["steps"][0]
    assert step[0] == "copy"
    for operand in (step[1], step[2][0]):
        operand[3:5] = [[1 << 39] * 4, [0] * 4]


def _negative_stride(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][0][1][4][0] = -1


def _writes_constants(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][-1][1][0:2] = [1, 0]


def _smaller_arena(header: dict[str, Any]) -> None:
    header["recipe"]["arena_bytes"] = 64


def _unknown_step(header: dict[str, Any]) -> None:
    header["recipe"]["steps"][0][0] = "run"


def _result_beyond_its_memory(header: dict[str, Any]) -> None:
    header["recipe"]["outputs"][0][3] = [4, 1000]


def _unknown_weight(header: dict[str, Any]) -> None:
    step = next(step for step in header["recipe"]["steps"] if step[0] == "conv2d")
    step[4] = 77


def _other_weight_shape(header: dict[str, Any]) -> None:
    header["recipe"]["weights"][0][0][0] *= 64


def _other_algorithm(header: dict[str, Any]) -> None:
    header["recipe"]["weights"][0][2] = "winograd4"


def _unknown_algorithm(header: dict[str, Any]) -> None:
    header["recipe"]["weights"][0][2] = "toom_cook"


def _weight_of_another_step(header: dict[str, Any]) -> None:
    step = next(step for step in header["recipe"]["steps"] if step[0] == "conv2d")
    step[0], step[3] = "conv2d_winograd", step[3][:2] + step[3][3:4]


def _class_for_a_structure(header: dict[str, Any]) -> None:
    header["recipe"]["structure"] = ["collections.deque", [0]]


def _specification_of_pytorch(header: dict[str, Any]) -> None:
    """PyTorch's reader would import what ``node_spec`` names."""
    leaf = {"type": None, "context": "null", "children_spec": []}
    named = {"type": "builtins.list", "context": ["a_module_that_nobody_has", "A"], "children_spec": [leaf]}
    header["recipe"]["structure"] = json.dumps([1, named])


def _leaf_that_is_not_there(header: dict[str, Any]) -> None:
    header["recipe"]["structure"] = ["tuple", [0, 1]]


def _no_recipe(header: dict[str, Any]) -> None:
    del header["recipe"]


@pytest.mark.parametrize(
    "change",
    [
        _outside_the_arena, _negative_offset, _huge_shape, _endless_broadcast, _negative_stride, _writes_constants,
        _smaller_arena, _unknown_step, _result_beyond_its_memory, _unknown_weight, _other_weight_shape,
        _other_algorithm, _unknown_algorithm, _weight_of_another_step, _class_for_a_structure,
        _specification_of_pytorch, _leaf_that_is_not_there, _no_recipe,
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(saved: Path, change: Any) -> None:
    """Whatever a file says, no address outside a plan's memory is used."""
    with pytest.raises(ValueError, match="is damaged"):
        fastcnn.load_frozen(rewritten(saved, change))


def test_the_digest_covers_all_values(saved: Path) -> None:
    content = saved.read_bytes()
    end = 16 + int.from_bytes(content[8:16], "little")
    header = json.loads(content[16:end])
    assert hashlib.sha256(content[end:]).hexdigest() == header["sha256"]
    assert sum(header["lengths"]) == len(content) - end > 0
