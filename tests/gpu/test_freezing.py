"""Frozen models on a GPU: CUDA graphs against float64 and cuDNN, on several streams and threads."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate
from support.fake_capture import FakeCapturer
from support.networks import small_input, small_network
from torch import Tensor, nn

import fastcnn
from fastcnn.backends import backend_module, derived
from fastcnn.graph.freezing import FrozenOnGpu
from fastcnn.graph.freezing.gpu import cuda_graph, freeze_on_gpu
from fastcnn.graph.freezing.gpu import frozen as frozen_module
from fastcnn.graph.freezing.gpu.cuda_graph import CudaCapturer, Graph
from fastcnn.verification import calibrate

REHEARSAL = os.environ.get("FASTCNN_REHEARSE") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on a GPU only")
BF16 = torch.bfloat16


def freeze(model: nn.Module, *examples: Tensor, dtype: torch.dtype | None = None) -> FrozenOnGpu:
    if REHEARSAL:
        return freeze_on_gpu(model, examples, dtype, capturer=FakeCapturer(times={2: 0.5, 3: 0.5, 4: 0.5}))
    frozen = fastcnn.freeze(model, examples, dtype=dtype)
    assert isinstance(frozen, FrozenOnGpu)
    return frozen


def torchvision_model(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    options = {"init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options)


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """cuDNN does without TF32 where it likes: results in fp32 are compared without."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def loads_where_it_rehearses(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSAL:
        capturer = FakeCapturer(times={2: 0.5, 3: 0.5, 4: 0.5})
        monkeypatch.setattr(cuda_graph, "capturer_on", lambda device=None: capturer)


@pytest.fixture
def small(device: torch.device) -> tuple[FrozenOnGpu, nn.Module]:
    model = small_network(BF16).to(device).eval()
    return freeze(model, small_input(BF16).to(device)), model


NETWORKS = [
    ("torchvision resnet18", torch.float32), ("googlenet", torch.float32), ("torchvision resnet18", BF16),
    ("torchvision googlenet", BF16), ("torchvision densenet121", BF16), ("googlenet", BF16), ("resnet20_cifar", BF16),
    ("densenet_bc100_k12_cifar", BF16), ("alexnet_owt", BF16), ("torchvision resnet18", torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), NETWORKS, ids=str)
def test_networks_with_changed_inputs(device: torch.device, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = 32 if name.endswith("cifar") else 64
    make = torchvision_model if name.startswith("torchvision") else fastcnn.create_model
    model = calibrate(make(name.removeprefix("torchvision ")).eval(), torch.randn(4, 3, size, size)).to(device)
    frozen = freeze(model, torch.randn(2, 3, size, size, device=device), dtype=dtype)
    assert frozen.recomputed == 0, "packed and folded weights must not be computed in the graph"
    reference = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(reference).double()
    results = []
    for _ in range(3):
        x = torch.randn(2, 3, size, size, device=device).to(dtype)
        results.append(frozen(x))
        with torch.no_grad(), fastcnn.use_backend("reference"):
            assert_accurate(results[-1].cpu(), reference(x).cpu(), exact(x.double()).cpu())
    assert not torch.equal(results[0], results[2]), "results must have memory of their own"


def test_inputs_and_results_in_place(device: torch.device, small) -> None:
    frozen, _ = small
    (static,) = frozen.inputs
    first, second = (small_input(BF16).to(device) + i for i in range(2))
    by_copy = [frozen(x) for x in (first, second)]
    assert torch.equal(frozen(first), by_copy[0]), "the same call must give the same bits"
    static.copy_(second)
    assert torch.equal(frozen(static), by_copy[1])
    result = frozen.replay()
    assert torch.equal(result, by_copy[1])
    static.copy_(first)
    assert frozen.replay() is result
    assert torch.equal(result, by_copy[0])
    strided = second.contiguous(memory_format=torch.channels_last)
    assert torch.equal(frozen(strided), by_copy[1])


def test_wrong_inputs_are_named(device: torch.device, small) -> None:
    frozen, _ = small
    x = small_input(BF16).to(device)
    for wrong, words in [
        (x[:3], r"input 0 must have shape \(4, 3, 16, 16\).*has shape \(3, 3, 16, 16\)"),
        (x.float(), "dtype torch.bfloat16 on .* dtype torch.float32"),
        (x.to("meta"), "on meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            frozen(wrong)
    with pytest.raises(ValueError, match="takes 1 inputs, was given 0"):
        frozen()


def test_the_models_changes_do_not_reach_it(device: torch.device, small) -> None:
    frozen, model = small
    x = small_input(BF16).to(device)
    expected = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    derived.clear()
    frozen.train()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        junk = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(16)]  # over whatever was freed
        del junk
    assert torch.equal(frozen(x), expected)


def test_two_frozen_models_interleaved(device: torch.device) -> None:
    models = [small_network(BF16).to(device).eval() for _ in range(2)]
    with torch.no_grad():
        models[1][-1].bias += 1
    x = small_input(BF16).to(device)
    one, other = (freeze(model, x) for model in models)
    expected = one(x), other(x)
    assert not torch.equal(*expected)
    for _ in range(10):
        assert torch.equal(one(x), expected[0])
        assert torch.equal(other(x), expected[1])


def test_memory(device: torch.device, small) -> None:
    frozen, model = small
    memory = frozen.memory()
    assert memory.inputs == small_input(BF16).nbytes
    assert memory.weights >= sum(p.nbytes for p in model.parameters())
    assert 0 < memory.graph < 2**30


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x / x.float().max().item(), "looks at values"),
        (lambda x: x[x > 0], "looks at values"),
        (lambda x: x + torch.rand_like(x), "draws random numbers"),
        (lambda x: x.relu_(), "writes to an input"),
    ],
)
def test_what_no_graph_can_hold(device: torch.device, function, words: str) -> None:
    x = small_input(BF16).to(device)
    with pytest.raises(ValueError, match=words):
        freeze(Calls(function), x)
    assert torch.equal(freeze(Calls(lambda x: x * 2), x)(x), x * 2), "the next one must work"


def test_settings_are_those_of_freezing(device: torch.device) -> None:
    model = small_network().to(device).eval()
    x = small_input().to(device)
    frozen = freeze(model, x)
    expected = frozen(x)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert torch.equal(frozen(x), expected)


# ---- files -----------------------------------------------------------------------------------------------------------


def reloaded(frozen: FrozenOnGpu, path: Path) -> FrozenOnGpu:
    frozen.save(path)
    loaded = fastcnn.load_frozen(path)
    assert isinstance(loaded, FrozenOnGpu)
    return loaded


SAVED = [
    ("torchvision resnet18", torch.float32), ("torchvision googlenet", torch.float32),
    ("torchvision densenet121", torch.float32), ("googlenet", BF16), ("torchvision resnet18", BF16),
    ("torchvision densenet121", BF16), ("torchvision mobilenet_v3_small", torch.float16),
    ("densenet_bc100_k12_cifar", BF16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), SAVED, ids=str)
def test_a_loaded_network_gives_the_same_bits(
    device: torch.device, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = 32 if name.endswith("cifar") else 64
    make = torchvision_model if name.startswith("torchvision") else fastcnn.create_model
    model = calibrate(make(name.removeprefix("torchvision ")).eval(), torch.randn(4, 3, size, size)).to(device)
    frozen = freeze(model, torch.randn(2, 3, size, size, device=device), dtype=dtype)
    loaded = reloaded(frozen, tmp_path / "file")
    assert loaded.recomputed == 0, "packed weights and converted vectors must not be computed in the graph"
    for _ in range(2):
        x = torch.randn(2, 3, size, size, device=device).to(dtype)
        expected = frozen(x)
        assert torch.equal(loaded(x), expected)
        assert loaded(x).stride() == expected.stride()
    assert loaded.memory().inputs == frozen.memory().inputs
    assert 0 < loaded.memory().graph < 2 * frozen.memory().graph
    loaded.save(tmp_path / "again")
    if not any(" in one kernel, " in found for found in loaded.fusions):  # by its own times, which may differ
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(device: torch.device, small, again) -> None:
    frozen, _ = small
    x = small_input(BF16).to(device)
    expected = frozen(x)
    other = again(frozen)
    assert torch.equal(other(x), expected)
    frozen(x + 1)
    assert torch.equal(other.replay(), expected), "it must have memory of its own"
    assert other.inputs[0].device == frozen.inputs[0].device


def test_a_loaded_model_has_the_settings_of_freezing(device: torch.device, tmp_path: Path) -> None:
    model, x = small_network().to(device).eval(), small_input().to(device)
    frozen = freeze(model, x)  # without TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    loaded = reloaded(frozen, tmp_path / "file")
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.equal(loaded(x), frozen(x))


def test_saving_leaves_the_graphs_results_alone(device: torch.device, small, tmp_path: Path) -> None:
    frozen, _ = small
    result = frozen.replay()
    expected = result.clone()
    frozen.inputs[0].copy_(small_input(BF16).to(device) + 1)
    frozen.save(tmp_path / "file")
    assert torch.equal(result, expected)
    assert not torch.equal(frozen.replay(), expected)


def test_files_that_are_refused(small, tmp_path: Path) -> None:
    frozen, _ = small
    frozen.save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    end = 16 + int.from_bytes(content[8:16], "little")
    header = json.loads(content[16:end])
    header["gpu"] = {"name": "a GPU of the past", "capability": [1, 0]}
    text = json.dumps(header).encode()
    other = content[:8] + len(text).to_bytes(8, "little") + text + content[end:-32]
    flipped = bytearray(content)
    flipped[end + 100] ^= 1
    for wrong, words in [
        (other + hashlib.sha256(other).digest(), r"frozen on a GPU of the past .*1\.0\), and this is"),
        (flipped, "is damaged"),
        (content[:-100], "is damaged"),
    ]:
        (tmp_path / "file").write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            fastcnn.load_frozen(tmp_path / "file")


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


@needs_gpu
def test_freeze_wants_everything_on_one_gpu() -> None:
    x = small_input(BF16).cuda()
    with pytest.raises(ValueError, match="model must be on cuda:0"):
        fastcnn.freeze(small_network(BF16), x)
    with pytest.raises(ValueError, match=r"example_inputs\[1\] must be .* on one GPU"):
        fastcnn.freeze(small_network(BF16).cuda(), [x, x.cpu()])
    with pytest.raises(ValueError, match="tune is for the CPU"):
        fastcnn.freeze(small_network(BF16).cuda(), x, tune=True)


@needs_gpu
def test_runs_on_the_current_stream(small) -> None:
    """The input is produced late on a side stream; the result is used there."""
    frozen, _ = small
    x = small_input(BF16).cuda()
    expected, late, stream = frozen(x), torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        result = frozen(late) * 1
    stream.synchronize()
    assert torch.equal(result, expected)


@needs_gpu
def test_calls_on_several_streams_do_not_overtake(small) -> None:
    """A call waits for the one before it, which is held up on another stream."""
    frozen, _ = small
    inputs = [small_input(BF16).cuda() + i for i in range(3)]
    expected = [frozen(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for x, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            results.append(frozen(x))
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@needs_gpu
def test_threads_on_streams_of_their_own(small) -> None:
    frozen, _ = small
    inputs = [small_input(BF16).cuda() + i for i in range(4)]
    expected = [frozen(x) for x in inputs]
    torch.cuda.synchronize()

    def work(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            same = [torch.equal(frozen(inputs[index]), expected[index]) for _ in range(25)]
        return all(same)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


class PrefersBranches(CudaCapturer):
    def milliseconds(self, graph: Graph) -> float:
        return 1 / graph.lanes


@needs_gpu
@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_branches_side_by_side(name: str) -> None:
    model = fastcnn.create_model(name).eval().to("cuda", BF16)
    x = torch.randn(4, 3, 96, 96, device="cuda", dtype=BF16)
    capturer = PrefersBranches(x.device)
    together = freeze_on_gpu(model, [x], None, capturer=capturer)
    apart = freeze_on_gpu(model, [x], None, most_lanes=1)
    assert (together.lanes > 1, apart.lanes) == (True, 1), together.branches
    for _ in range(50):
        x = torch.randn_like(x)
        assert torch.equal(together(x), apart(x))


class PrefersFusions(CudaCapturer):
    """What is timed first, the new graph, is faster."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._timed = 0.0

    def milliseconds(self, graph: Graph) -> float:
        self._timed += 1.0
        return self._timed


@needs_gpu
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121"])
def test_a_stem_and_its_pooling_in_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = fastcnn.create_model(name).eval().to("cuda", BF16)
    x = torch.randn(3, 3, 96, 96, device="cuda", dtype=BF16)
    together = freeze_on_gpu(model, [x], None, capturer=PrefersFusions(x.device), most_lanes=1)
    if unavailable := backend_module("cuda").unavailable():
        pytest.skip(unavailable)
    assert ["conv2d and max_pool2d in one kernel, 1 times" in note for note in together.fusions] == [True]
    assert together.recomputed == 0
    monkeypatch.setattr(frozen_module, "RULES", ())
    apart = freeze_on_gpu(model, [x], None, most_lanes=1)
    assert apart.fusions == ()
    loaded = reloaded(together, tmp_path / "file")
    for _ in range(3):
        x = torch.randn_like(x)
        expected = apart(x)
        assert torch.equal(together(x), expected)
        assert torch.equal(loaded(x), expected)


@needs_gpu
def test_pairs_of_1x1_convolutions_in_one_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not backend_module("cuda").conv2d_1x1_pair_weights(device, BF16, (64, 256, 64)):
        pytest.skip("no kernel for pairs of 1x1 convolutions here")
    torch.manual_seed(0)
    model = calibrate(torchvision_model("resnet50").eval(), torch.randn(4, 3, 96, 96)).to(device, BF16)
    x = torch.randn(5, 3, 96, 96, device=device, dtype=BF16)
    together = freeze_on_gpu(model, [x], None, capturer=PrefersFusions(device), most_lanes=1)
    pairs = [note.split(":")[0] for note in together.fusions if note.startswith("pairs")]
    assert pairs == [
        "pairs of 1x1 conv2d (resident weights) in one kernel, 3 times",
        "pairs of 1x1 conv2d (streamed weights) in one kernel, 4 times",
    ]
    assert together.recomputed == 0
    monkeypatch.setattr(frozen_module, "RULES", ())
    apart = freeze_on_gpu(model, [x], None, most_lanes=1)
    loaded, exact = reloaded(together, tmp_path / "file"), copy.deepcopy(model).double()
    for _ in range(3):
        x = torch.randn_like(x)
        ours = together(x)
        with torch.no_grad(), fastcnn.use_backend("reference"):
            assert_accurate(ours, apart(x), exact(x.double()))
        assert torch.equal(together(x), ours), "the same call must give the same bits"
        assert torch.equal(loaded(x), ours)


@needs_gpu
def test_in_inference_mode_and_under_autocast() -> None:
    model, x = small_network().cuda().eval(), small_input().cuda()
    with torch.inference_mode():
        frozen = fastcnn.freeze(model, x)
        assert frozen.recomputed == 0
        expected = model(x)
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(x), expected.clone(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", BF16), torch.no_grad():
        half = fastcnn.freeze(model, x)
        expected = model(x)
    assert half(x).dtype == expected.dtype == BF16
    torch.testing.assert_close(half(x), expected, rtol=3e-2, atol=3e-2)


@needs_gpu
def test_no_call_inside_another_capture(small) -> None:
    frozen, _ = small
    x = small_input(BF16).cuda()
    expected = frozen(x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="another CUDA graph is captured"), torch.cuda.graph(graph):
        frozen(x)
    assert torch.equal(frozen(x), expected)


@needs_gpu
def test_dropped_while_it_runs() -> None:
    model, x = small_network(BF16).cuda().eval(), small_input(BF16).cuda()
    expected = fastcnn.freeze(model, x)(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        frozen = fastcnn.freeze(model, x)
        torch.cuda._sleep(50_000_000)
        result = frozen(x)
    del frozen  # its memory goes back to the allocator
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(16)]
    torch.cuda.synchronize()
    del junk
    assert torch.equal(result, expected)


_LOADING = """
import sys, torch, fastcnn
frozen = fastcnn.load_frozen(sys.argv[1] + "/file")
torch.save(frozen(torch.load(sys.argv[1] + "/x")).cpu(), sys.argv[1] + "/result")
"""


@needs_gpu
def test_in_another_process_without_the_models_code(small, tmp_path: Path) -> None:
    frozen, _ = small
    x = small_input(BF16).cuda()
    frozen.save(tmp_path / "file")
    torch.save(x, tmp_path / "x")
    done = subprocess.run(
        [sys.executable, "-c", _LOADING, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "result"), frozen(x).cpu())


@needs_gpu
def test_autocast_is_in_a_files_operators(tmp_path: Path) -> None:
    model, x = small_network().cuda().eval(), small_input().cuda()
    with torch.autocast("cuda", BF16):
        frozen = fastcnn.freeze(model, x)
    loaded = reloaded(frozen, tmp_path / "file")
    assert loaded(x).dtype == BF16
    assert torch.equal(loaded(x), frozen(x))


_FAILING = """
import torch, fastcnn
class Constant(torch.nn.Module):
    def forward(self, x):
        return x * torch.tensor([2.0, 3.0], device=x.device)  # copied from the CPU in each call
x = torch.randn(3, 2, device="cuda")
try:
    fastcnn.freeze(Constant(), x)
except ValueError as error:
    assert "cannot be frozen" in str(error), error
else:
    raise AssertionError("it must be refused")
frozen = fastcnn.freeze(torch.nn.Linear(2, 2).cuda().eval(), x)
print("fine", frozen(x).shape)
"""


@needs_gpu
def test_after_a_capture_that_cuda_refused() -> None:
    done = subprocess.run([sys.executable, "-c", _FAILING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout


@needs_gpu
@pytest.mark.parametrize("size", [(1, 64), (3, 96)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "densenet121", "googlenet"])
def test_kernels_that_begin_early_give_the_same_results(name: str, size: tuple[int, int]) -> None:
    """Each replay has other inputs, so that a kernel which reads too soon finds the values of the one before."""
    device = torch.device("cuda", torch.cuda.current_device())
    capturer = CudaCapturer(device)
    if not capturer.early_starts:
        pytest.skip("needs a GPU with sm_90 or newer and a build with CUDA kernels")
    torch.manual_seed(0)
    shape = (size[0], 3, size[1], size[1])
    model = calibrate(fastcnn.create_model(name).eval(), torch.randn(4, *shape[1:]))
    model = model.to(device, BF16, memory_format=torch.channels_last).requires_grad_(False)
    x = torch.empty(shape, device=device, dtype=BF16, memory_format=torch.channels_last)
    with torch.no_grad(), fastcnn.use_backend("cuda"):
        x.copy_(torch.randn(shape))
        capturer.warm_up(lambda: model(x))
        graphs = [capturer.capture(lambda: model(x), 1, early) for early in (False, True)]
    for seed in range(20):
        x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        results = []
        for graph, result in graphs:
            graph.replay()
            graph.replay()  # behind itself, too
            results.append(result.clone())
        assert torch.equal(*results)
        assert results[0].isfinite().all()
