"""Saved models of a GPU, rehearsed on the CPU: round trips, copies, and files that must be refused."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_capture import FakeCapturer
from support.networks import small_input, small_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn.graph.freezing import FrozenOnGpu
from fastcnn.graph.freezing.gpu import cuda_graph, freeze_on_gpu
from fastcnn.graph.freezing.gpu.frozen import load_on_gpu
from fastcnn.graph.freezing.gpu.operators import allowed
from fastcnn.graph.freezing.gpu.saving import program_of
from fastcnn.graph.freezing.gpu.settings import Settings
from fastcnn.verification import calibrate

BF16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads a file finds a fake GPU."""
    monkeypatch.setattr(cuda_graph, "capturer_on", lambda device=None: FakeCapturer())


def freeze(model: nn.Module, *examples: Tensor, dtype: torch.dtype | None = None) -> FrozenOnGpu:
    return freeze_on_gpu(model, examples, dtype, capturer=FakeCapturer())


def reloaded(frozen: FrozenOnGpu, folder: Path) -> FrozenOnGpu:
    frozen.save(folder / "file")
    loaded = fastcnn.load_frozen(folder / "file")
    assert isinstance(loaded, FrozenOnGpu)
    return loaded


@functools.cache
def small_file() -> bytes:
    return freeze(small_network(), small_input())._content()


def rewritten(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file whose header was changed by ``change(header)``, and whose digest is right."""
    end = 16 + int.from_bytes(content[8:16], "little")
    header = json.loads(content[16:end])
    change(header)
    text = json.dumps(header).encode()
    content = content[:8] + len(text).to_bytes(8, "little") + text + content[end:-32]
    return content + hashlib.sha256(content).digest()


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# ---- round trips -----------------------------------------------------------------------------------------------------


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision googlenet": lambda: torchvision.models.googlenet(init_weights=False),
    "torchvision densenet121": torchvision.models.densenet121,
    "torchvision mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "torchvision shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "densenet_bc100_k12_cifar": lambda: fastcnn.create_model("densenet_bc100_k12_cifar"),
    "googlenet": lambda: fastcnn.create_model("googlenet"),
}


class Counting(TorchDispatchMode):
    """Counts fastcnn's operators in :attr:`calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[operator] += getattr(operator, "namespace", "") == "fastcnn"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_calls_what_the_model_calls(name: str) -> None:
    """Merged convolutions stay merged, and what is written into slices is not concatenated."""
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    frozen = freeze(NETWORKS[name]().eval(), x)
    with torch.no_grad(), Counting() as counting:
        frozen._held.model(*frozen.inputs)
    program = program_of(frozen._held.model, frozen.inputs)[0]
    steps = Counter(step.operator for step in program.steps)
    assert {k: n for k, n in steps.items() if k.namespace == "fastcnn"} == +counting.calls


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = calibrate(NETWORKS[name]().eval(), torch.randn(4, 3, 32, 32))
    frozen = freeze(model, torch.randn(2, 3, 32, 32), dtype=dtype)
    loaded = reloaded(frozen, tmp_path)
    assert loaded.recomputed == 0
    inputs = [torch.randn(2, 3, 32, 32).to(dtype) for _ in range(2)]
    results = [loaded(x) for x in inputs]
    assert not torch.equal(*results)
    for x, result in zip(inputs, results, strict=True):
        expected = frozen(x)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
    assert loaded.memory().inputs == frozen.memory().inputs
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_the_models_code_is_not_needed(tmp_path: Path) -> None:
    freeze(small_network(), small_input()).save(tmp_path / "file")
    torch.save(small_input(), tmp_path / "x")
    code = """
import sys, torch, fastcnn
sys.path.insert(0, sys.argv[1])
from support.fake_capture import FakeCapturer
from fastcnn.graph.freezing.gpu import cuda_graph
cuda_graph.capturer_on = lambda device=None: FakeCapturer()
frozen = fastcnn.load_frozen(sys.argv[2] + "/file")
torch.save(frozen(torch.load(sys.argv[2] + "/x")), sys.argv[2] + "/result")
assert "support.networks" not in sys.modules
"""
    tests = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, tests, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "result"), freeze(small_network(), small_input())(small_input()))


def test_structures_of_results_and_several_inputs(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            halves = torch.split(y, 8, dim=2)
            return OrderedDict(sum=x + y, both=(x, [halves[1] * 2, {"half": halves[0]}]))

    x, y = small_input(), small_input().contiguous(memory_format=torch.channels_last) + 1
    loaded = reloaded(freeze(Several(), x, y), tmp_path)
    found = loaded(y, x)
    assert type(found) is OrderedDict
    assert torch.equal(found["sum"], x + y)
    assert torch.equal(found["both"][0], y)
    assert torch.equal(found["both"][1][0], x[:, :, 8:] * 2)
    assert torch.equal(found["both"][1][1]["half"], x[:, :, :8])
    assert [t.stride() for t in loaded.inputs] == [x.stride(), y.stride()]


def test_what_begins_as_a_constant_may_be_written(tmp_path: Path) -> None:
    class Accumulates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            total = self.start.clone()
            total += x.sum((0, 2, 3))
            return torch.cat([total, self.start * 2])

    model, x = Accumulates(), small_input()
    loaded = reloaded(freeze(model, x), tmp_path)
    for each in (x, x + 1):
        assert torch.equal(loaded(each), model(each))


def test_a_storage_is_stored_once(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 1000))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight[:8] + (x * 2) @ self.weight[8:]

    model, x = Views().requires_grad_(False), torch.randn(2, 8)
    loaded = reloaded(freeze(model, x), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert model.weight.nbytes < (tmp_path / "file").stat().st_size < 1.5 * model.weight.nbytes


def _doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(again: Callable[[nn.Module], nn.Module]) -> None:
    class Local(nn.Sequential):
        """Pickle could not find it."""

    x = small_input()
    model = nn.Sequential(freeze(Local(*small_network()), x), nn.ReLU())
    model[0].register_forward_hook(_doubled)
    other = again(model)
    expected = model(x)
    assert torch.equal(other(x), expected)
    for mine, theirs in ((model[0].inputs, other[0].inputs), (model[0]._outputs, other[0]._outputs)):
        assert mine[0].data_ptr() != theirs[0].data_ptr()
    model[0](x + 1)
    assert torch.equal(other[0].replay() * 2, other[0](x))


def test_saving_leaves_the_graphs_results_alone() -> None:
    frozen = freeze(small_network(), small_input())
    result = frozen.replay()
    expected = result.clone()
    frozen.inputs[0].copy_(small_input() + 1)
    frozen._content()
    assert torch.equal(result, expected)
    assert not torch.equal(frozen.replay(), expected)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [fastcnn.exact(), fastcnn.use_backend("reference", strict=True)])
def test_settings_are_those_of_freezing(setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Settings] = []

    class Noting(FakeCapturer):
        def capture(self, run: Callable[[], Any], most_lanes: int, early: bool = False) -> Any:
            seen.append(Settings.now(CPU))
            return super().capture(run, most_lanes, early)

    monkeypatch.setattr(cuda_graph, "capturer_on", lambda device=None: Noting())
    usual = Settings.now(CPU)
    with setting:
        frozen = freeze(small_network(), small_input())
        wanted = Settings.now(CPU)
    loaded = reloaded(frozen, tmp_path)
    assert wanted != usual
    assert seen == [wanted]
    assert loaded._held.settings == wanted
    assert Settings.now(CPU) == usual


_TF32 = """
import torch
from fastcnn.graph.freezing.gpu.settings import Settings
def state():
    flags = [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    for read in (lambda: torch.backends.cudnn.allow_tf32, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            flags.append(read())
        except RuntimeError:
            flags.append("mixed")
    return flags
{}
before, cpu = state(), torch.device("cpu")
for convolutions in (False, True):
    for products in (False, True):
        wanted = Settings(False, None, False, convolutions, products)
        with wanted.applied(cpu):
            assert Settings.now(cpu) == wanted, Settings.now(cpu)
        assert state() == before, (state(), before)
"""


@pytest.mark.parametrize(
    "first",
    [
        "",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cudnn.fp32_precision = 'ieee'",
        "torch.backends.cudnn.conv.fp32_precision = 'none'; assert Settings.now(torch.device('cpu'))[3] is None",
    ],
)
def test_tf32_by_either_kind_of_flag(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", _TF32.format(first)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_autocast_is_in_the_operators(tmp_path: Path) -> None:
    model, x = small_network(), small_input()
    with torch.autocast("cpu", BF16):
        frozen = freeze(model, x)
        expected = frozen(x)
    assert expected.dtype == BF16
    loaded = reloaded(frozen, tmp_path)
    assert torch.equal(loaded(x), expected)


# ---- what no file can hold -------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "one other")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda x: x.sort().values + torch.take_along_dim(x, x.argsort(), -1),
            r"no file can hold aten.gather.default, .*aten.sort.default",
        ),
        (lambda x: Pair(x * 2, x), "returns a Pair; a file can hold"),
        (lambda x: {1: x * 2}, "returns a dict with keys other than strings"),
        (lambda x: x.double().to(torch.complex128).real, "complex128"),
    ],
)
def test_what_cannot_be_saved_is_frozen_all_the_same(function: Any, words: str, tmp_path: Path) -> None:
    x = small_input()
    frozen = freeze(Calls(function), x)
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=rf"(?s)cannot be saved: .*{words}"):
        frozen.save(path)
    assert not path.exists()
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="cannot be saved"):
            copying(frozen)
    frozen(x)


def test_a_graph_that_does_more_than_its_operators_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model launches kernels that PyTorch does not see."""
    frozen = freeze(small_network(), small_input())
    replay = frozen._graph.replay

    def and_more() -> None:
        replay()
        frozen._outputs[0].mul_(1.1)

    monkeypatch.setattr(frozen._graph, "replay", and_more)
    with pytest.raises(ValueError, match=r"cannot be saved: .* give another result than its graph"):
        frozen._content()


def test_operators_of_files_draw_nothing_and_look_at_no_values() -> None:
    bad = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    operators = allowed()
    assert len(operators) > 200
    for name, operator in operators.items():
        assert isinstance(operator, torch._ops.OpOverload)
        assert str(operator) == name
        assert not any(tag in operator.tags for tag in bad), name


def test_files_may_hold_every_operator_of_fastcnn() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcnn::")}
    assert len(names) > 10
    assert {f"{name.replace('::', '.')}.default" for name in names} <= allowed().keys()


# ---- files that are refused ------------------------------------------------------------------------------------------


def load(content: bytes) -> FrozenOnGpu:
    return load_on_gpu(content, "file")


def test_without_a_gpu_or_on_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def on_h100(header: dict[str, Any]) -> None:
        header["gpu"] = {"name": "NVIDIA H100", "capability": [9, 0]}

    content = rewritten(small_file(), on_h100)
    with pytest.raises(
        ValueError, match=r"frozen on NVIDIA H100 \(compute capability 9.0\), and this is cpu, of another"
    ):
        load(content)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"frozen on a GPU, NVIDIA H100 .*9\.0\), and here is none: freeze the model again"
    ):
        fastcnn.load_frozen(tmp_path / "file")
    pickled = freeze(small_network(), small_input())
    state = {**pickled.__getstate__(), "_file": content}
    with pytest.raises(ValueError, match=r"the pickled model was frozen on a GPU, .* and here is none"):
        FrozenOnGpu.__new__(FrozenOnGpu).__setstate__(state)


@pytest.mark.parametrize("here", [(9, 0), (8, 0)])
def test_another_gpu_of_the_same_architecture_is_fine(here: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcnn.graph.freezing.gpu import storage

    def on_h100(header: dict[str, Any]) -> None:
        header["gpu"] = {"name": "NVIDIA H100", "capability": [9, 0]}

    content = rewritten(small_file(), on_h100)
    monkeypatch.setattr(storage.Gpu, "of", classmethod(lambda cls, device: cls("NVIDIA of these tests", here)))
    if here == (9, 0):
        assert torch.equal(load(content)(small_input()), load(content)(small_input()))
    else:
        with pytest.raises(ValueError, match=r"this is NVIDIA of these tests \(compute capability 8.0\), of another"):
            load(content)


@pytest.mark.parametrize(("key", "value"), [("format", 99), ("fastcnn", "0.0.0"), ("torch", "1.0")])
def test_a_file_for_something_else_is_refused(key: str, value: object) -> None:
    def change(header: dict[str, Any]) -> None:
        header[key] = value

    with pytest.raises(ValueError, match=f"was written for {key} {value}, here it is .*: freeze the model again"):
        load(rewritten(small_file(), change))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever byte is another, or wherever a file ends."""
    content = bytearray(small_file())
    header = 16 + int.from_bytes(content[8:16], "little")
    place = (
        st.integers(0, header + 64)
        | st.integers(0, len(content) - 1)
        | st.integers(len(content) - 64, len(content) - 1)
    )
    if data.draw(st.booleans()):
        del content[data.draw(place) :]
    else:
        for at in data.draw(st.lists(place, min_size=1, max_size=4, unique=True)):
            content[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged|is not a frozen fastcnn model"):
        fastcnn.load_frozen(tmp_path / "file")


def test_the_file_as_it_was_written_is_fine(tmp_path: Path) -> None:
    assert torch.equal(load(small_file())(small_input()), freeze(small_network(), small_input())(small_input()))
    with pytest.raises(ValueError, match="is damaged"):
        load(small_file() + b"x")
    with pytest.raises(FileNotFoundError):
        fastcnn.load_frozen(tmp_path / "absent")


def _step(header: dict[str, Any], operator: str) -> Any:
    return next(step for step in header["program"]["steps"] if step[0] == operator)


def _unknown_operator(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][0] = "aten.rand.default"


def _attribute_for_an_operator(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][0] = "fastcnn.__class__.default"


def _value_of_the_future(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][1][0] = {"value": 10_000}


def _negative_value(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][1][0] = {"value": -1}


def _unknown_argument(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][2]["surprise"] = 1


def _text_for_a_tensor(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][1][0] = "x"


def _argument_of_another_kind(header: dict[str, Any]) -> None:
    header["program"]["steps"][0][1][0] = {"import": "os"}


def _other_shape_of_a_result(header: dict[str, Any]) -> None:
    _step(header, "fastcnn.conv2d.default")[3][0][0][1] += 1


def _other_strides_of_a_result(header: dict[str, Any]) -> None:
    _step(header, "fastcnn.conv2d.default")[3][0][1][0] *= 2


def _no_result(header: dict[str, Any]) -> None:
    _step(header, "fastcnn.conv2d.default")[3] = []


def _constant_beyond_its_part(header: dict[str, Any]) -> None:
    header["program"]["constants"][0][1] = 1 << 20


def _constant_before_its_part(header: dict[str, Any]) -> None:
    header["program"]["constants"][0][1] = -1


def _constant_in_no_part(header: dict[str, Any]) -> None:
    header["program"]["constants"][0][0] = 99


def _large_constant(header: dict[str, Any]) -> None:
    header["program"]["constants"][0][2][0] = [1 << 40, 1 << 20]
    header["program"]["constants"][0][2][1] = [1 << 20, 1]


def _endless_broadcast(header: dict[str, Any]) -> None:
    header["program"]["constants"][0][2][0:2] = [[1 << 30] * 4, [0] * 4]


def _negative_stride(header: dict[str, Any]) -> None:
    header["program"]["inputs"][0][1][0] = -1


def _huge_input(header: dict[str, Any]) -> None:
    header["program"]["inputs"][0][0][0] = 1 << 50


def _empty_input(header: dict[str, Any]) -> None:
    header["program"]["inputs"][0][0][0] = 0


def _overlapping_input(header: dict[str, Any]) -> None:
    header["program"]["inputs"][0][1][0] = 0


def _input_of_integers(header: dict[str, Any]) -> None:
    header["program"]["inputs"][0][2] = "int64"


def _other_parts(header: dict[str, Any]) -> None:
    header["lengths"][0] += 4
    header["lengths"][1] -= 4


def _negative_part(header: dict[str, Any]) -> None:
    header["lengths"] += [8, -8]


def _result_of_the_future(header: dict[str, Any]) -> None:
    header["program"]["outputs"] = [10_000]


def _other_structure(header: dict[str, Any]) -> None:
    header["program"]["structure"] = ["tuple", [0, 1]]


def _class_for_a_structure(header: dict[str, Any]) -> None:
    header["program"]["structure"] = ["collections.deque", [0]]


def _unknown_backend(header: dict[str, Any]) -> None:
    header["settings"]["backend"] = "os"


def _no_program(header: dict[str, Any]) -> None:
    del header["program"]


@pytest.mark.parametrize(
    "change",
    [
        _unknown_operator, _attribute_for_an_operator, _value_of_the_future, _negative_value, _unknown_argument,
        _text_for_a_tensor, _argument_of_another_kind, _other_shape_of_a_result, _other_strides_of_a_result, _no_result,
        _constant_beyond_its_part, _constant_before_its_part, _constant_in_no_part, _large_constant, _endless_broadcast,
        _negative_stride, _huge_input, _empty_input, _overlapping_input, _input_of_integers, _other_parts,
        _negative_part, _result_of_the_future, _other_structure, _class_for_a_structure, _unknown_backend, _no_program,
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    """Whatever a file says, and however well it is signed."""
    with pytest.raises(ValueError, match=r"is damaged|cannot run here|cannot be frozen"):
        load(rewritten(small_file(), change))


def test_a_program_that_writes_its_constants_is_refused() -> None:
    def change(header: dict[str, Any]) -> None:
        program = header["program"]
        constant = len(program["inputs"])
        program["steps"].insert(0, ["aten.zero_.default", [{"value": constant}], {}, []])

    with pytest.raises(ValueError, match="gives 1 tensors, not 0"):
        load(rewritten(small_file(), change))

    def change_inputs(header: dict[str, Any]) -> None:
        header["program"]["steps"].append(["aten.zero_.default", [{"value": 0}], {}, [header["program"]["inputs"][0]]])

    with pytest.raises(ValueError, match="writes to an input"):
        load(rewritten(small_file(), change_inputs))


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [path, *(leaf for key, child in children for leaf in _leaves(child, (*path, key)))]


_ANYTHING = st.sampled_from(
    [
        None, True, -1, 0, 1, 2, 3, 7, 1 << 20, 1 << 40, 1 << 62, 1 << 70, 1.5, float("nan"), "relu", "float16", [],
        [1], {}, {"value": 0}, {"value": 3}, {"dtype": "bool"}, {"device": 0}, {"memory_format": "channels_last"}, [[]],
    ]
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_header_is_a_model_or_refused(data: st.DataObject) -> None:
    """Nothing but ValueError comes of a wrong file with a right digest; what is no error is a model."""

    def change(header: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            part = header[data.draw(st.sampled_from(["program", "program", "program", "settings", "lengths", "gpu"]))]
            path = data.draw(st.sampled_from([leaf for leaf in _leaves(part) if leaf]))
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = copy.deepcopy(data.draw(_ANYTHING))

    content = rewritten(small_file(), change)
    try:
        model = load(content)
    except ValueError:
        return
    model.replay()
