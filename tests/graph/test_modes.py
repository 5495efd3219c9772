"""An optimized model in every setting that the plain one may be used in."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
from fastcnn.graph import dynamo

C = 8


class Unit(nn.Module):
    def __init__(self, kernel_size: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn, self.activation = nn.BatchNorm2d(C), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class Net(nn.Module):
    """Nested modules, a ModuleList, a Sequential, a sum, branches, pre-activation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.units = nn.ModuleList([Unit(3, nn.ReLU()), Unit(1, nn.ReLU(inplace=True)), Unit(3, nn.Identity())])
        self.norm, self.mix = nn.BatchNorm2d(3 * C), nn.Conv2d(3 * C, C, 1, bias=False)
        self.fc = nn.Linear(C, 5)
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.units[2](self.units[0](x))
        y += x
        y = torch.cat([F.relu(y), self.units[1](x), F.max_pool2d(x, 3, 1, 1)], 1)
        y = self.mix(F.relu(self.norm(y)))
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def compiled(net: nn.Module) -> nn.Module:
    dynamo.register()
    return torch.compile(net, backend="fastcnn")  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


both = pytest.mark.parametrize("make", [fastcnn.optimize, compiled], ids=["optimize", "compile"])
Make = Callable[[nn.Module], nn.Module]


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 7, 6, generator=torch.Generator().manual_seed(3))


def exact(net: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(net).double()(x.double())


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradient_modes(make: Make, mode: Callable[[], Any]) -> None:
    net = Net().eval()
    fast = make(copy.deepcopy(net))
    for _ in range(2):
        with mode():
            ours, theirs = fast(image()), net(image())
        assert ours.requires_grad == theirs.requires_grad
        assert ours.is_inference() == theirs.is_inference()
        assert_accurate(ours.detach(), theirs.detach(), exact(net, image()).detach())


@both
def test_one_model_in_all_gradient_modes_by_turns(make: Make) -> None:
    net = Net().eval()
    fast = make(copy.deepcopy(net))
    double = copy.deepcopy(net).double()
    for mode in (torch.inference_mode, torch.no_grad, contextlib.nullcontext, torch.inference_mode):
        with mode():
            assert_accurate(fast(image()).detach(), net(image()).detach(), double(image().double()).detach())
    gradients = []
    for model in (fast, net, double):
        x = image().to(next(model.parameters()).dtype).requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    assert_accurate(*gradients)


@both
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_models(dtype: torch.dtype, training: bool, make: Make) -> None:
    net = Net().train(training).to(dtype)
    ours = make(copy.deepcopy(net))(image().to(dtype))
    double = exact(net, image().to(dtype))
    assert_accurate(ours, net(image().to(dtype)), double)


@both
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(training: bool, make: Make) -> None:
    net = Net().train(training)
    found = []
    for model in (make(copy.deepcopy(net)), net, copy.deepcopy(net).double()):
        x = image().to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            y = model(x)
        y.float().square().sum().backward()
        # Of the last layer: further down one value that rounding takes across a ReLU's kink outweighs all the rest.
        *_, weight, bias = model.parameters()
        found.append((y.detach(), weight.grad, bias.grad))
    for ours, theirs, precise in zip(*found, strict=True):
        assert_accurate(ours, theirs, precise)


@both
@torch.no_grad()
def test_batches_of_any_size(make: Make) -> None:
    net = Net().eval()
    fast = make(copy.deepcopy(net))
    for batch in (2, 0, 1, 5, 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = image(batch).contiguous(memory_format=layout)
            assert_accurate(fast(x), net(x), exact(net, x))


@torch.no_grad()
def test_images_of_any_size_and_an_unbatched_one() -> None:
    net = nn.Sequential(nn.Conv2d(3, C, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(C, C, 1)).eval()
    fast = fastcnn.optimize(net)
    for shape in ((2, 3, 9, 12), (1, 3, 5, 4), (3, 8, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert_accurate(fast(x), net(x), exact(net, x))


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_train_on_their_own(copied: Callable[[nn.Module], nn.Module], make: Make) -> None:
    net = Net().train()
    fast = make(copy.deepcopy(net))
    fast(image())
    if make is compiled:
        fast = fast._orig_mod  # type: ignore[assignment]  # torch.compile's wrapper is made again
    other = copied(fast)
    if make is compiled:
        other = make(other)
    before = [p.clone() for p in fast.parameters()]
    net(image())  # running statistics as in the copy
    results = []
    for model in (other, net, copy.deepcopy(net).double()):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dtype = next(model.parameters()).dtype
        model(image().to(dtype)).square().sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            results.append(model(image().to(dtype)))
    assert_accurate(*results)
    assert all(map(torch.equal, before, fast.parameters()))


def test_saved_whole(tmp_path: Path) -> None:
    fast = fastcnn.optimize(Net().eval())
    torch.save(fast, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(image()), fast(image()))
    assert fastcnn.report(loaded, (1, 3, 7, 6)).sites[0].pattern == "conv+bn+relu"


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_distributed_data_parallel() -> None:
    net = Net().train()
    results = []
    for model in (fastcnn.optimize(net), net, copy.deepcopy(net).double()):
        wrapped = nn.parallel.DistributedDataParallel(model)
        dtype = next(model.parameters()).dtype
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        wrapped(image().to(dtype)).square().sum().backward()
        optimizer.step()
        wrapped.eval()
        with torch.no_grad():
            after = wrapped(image().to(dtype))
        results.append([after, *(p.detach() for p in model.parameters())])
    for ours, theirs, precise in zip(*results, strict=True):
        assert_accurate(ours, theirs, precise)


@torch.no_grad()
def test_a_branch_on_values_breaks_the_compiled_graph_in_two() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.units[0](x) if x.mean() > 0.5 else self.units[1](x)
            return F.relu(self.units[2](x))

    net = Branching().eval()
    fast = compiled(copy.deepcopy(net))
    for scale in (0.1, 10.0, 0.1):
        x = image() * scale
        assert_accurate(fast(x), net(x), exact(net, x))


@torch.no_grad()
def test_preactivation_is_a_prologue_in_compiled_graphs() -> None:
    from fastcnn.backends import Call, intercept

    calls: list[tuple[str, bool]] = []

    def watch(call: Call) -> None:
        calls.append((call.operator, call.operator == "conv2d" and call.args[6] is not None))
        call.run()

    fast = compiled(Net().eval())
    with intercept(watch):
        fast(image())
    assert calls.count(("conv2d", True)) == 1
    assert "channel_affine" not in [operator for operator, _ in calls]
