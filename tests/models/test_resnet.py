"""ImageNet ResNets, ResNeXts, wide and plain networks against torchvision and torch.nn twins."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support.accuracy import TINY as TINY_ERROR
from support.accuracy import assert_accurate, relative_error
from support.plain_twin import plain_twin, randomise_batch_norms
from support.steps import assert_step_equal
from torch import nn

import fastcnn
from fastcnn.models import ResNet
from fastcnn.nn import BasicBlock, Bottleneck, PlainBlock

BOTH = ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"]


def torchvision_model(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    return getattr(torchvision.models, name)()


def make(name: str, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_batch_norms(fastcnn.create_model(name, **options), seed)


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


# ---- torchvision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_state_dicts_and_results_both_ways(name: str) -> None:
    theirs = randomise_batch_norms(torchvision_model(name)).eval()
    with torch.device("meta"):
        ours = fastcnn.create_model(name).eval()
    ours.to_empty(device="cpu")  # whatever is not loaded is garbage
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    size = 224 if name == "resnet50" else 64
    x = torch.randn(1, 3, size, size)
    with torch.no_grad(), fastcnn.use_backend("cpp", strict=True):
        expected, actual = theirs(x), ours(x)
        assert relative_error(actual, expected) <= 1e-5
        assert actual.stride() == expected.stride()
        randomise_batch_norms(ours, seed=1)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert relative_error(ours(x[:, :, :64, :64]), theirs(x[:, :, :64, :64])) <= 1e-5


def test_same_seed_same_initial_weights() -> None:
    torch.manual_seed(3)
    theirs = torchvision_model("resnext50_32x4d")
    torch.manual_seed(3)
    ours = fastcnn.create_model("resnext50_32x4d")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# ---- torch.nn twins --------------------------------------------------------------------------------------------------

SMALL = {
    "resnet18-A": ("resnet18", {"shortcut": "A"}),
    "resnet18-C": ("resnet18", {"shortcut": "C", "in_channels": 1, "num_classes": 5}),
    "resnet50-v1": ("resnet50", {"stride_in_1x1": True}),
    "plain18": ("plain18", {}),
}


@pytest.mark.parametrize("case", SMALL)
def test_eval_equals_twin(case: str) -> None:
    name, options = SMALL[case]
    ours = make(name, **options).eval()
    x = torch.randn(2, options.get("in_channels", 3), 48, 40)
    with torch.no_grad():
        expected = plain_twin(ours)(x)
        assert relative_error(ours(x), expected) <= 1e-5
        for layout in (torch.contiguous_format, torch.channels_last):
            assert relative_error(ours(x.contiguous(memory_format=layout)), expected) <= 1e-5


TINY = {
    "basic-A": (BasicBlock, {"shortcut": "A"}),
    "bottleneck-v1": (Bottleneck, {"stride_in_1x1": True}),
    "plain": (PlainBlock, {"shortcut": None}),
}


def training_step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss, all gradients in one vector, running statistics in another, and the state after one step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), target)
    loss.backward()
    optimizer.step()
    return {
        "loss": loss.detach(),
        "gradients": torch.cat([p.grad.flatten() for p in model.parameters()]),
        "buffers": torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()]),
        "batches": torch.stack([b for b in model.buffers() if not b.is_floating_point()]),
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
    }


@pytest.mark.parametrize("case", TINY)
def test_one_training_step_equals_twin(case: str) -> None:
    """A value that rounding moves across ReLU's kink switches its gradient on or off: on such a batch fp32 gradients
    are off by a thousandth or more, PyTorch's too. Most batches meet none, and a wrong formula would fail on all."""
    torch.manual_seed(0)
    block, options = TINY[case]
    ours = randomise_batch_norms(ResNet(block, (1, 2, 1, 1), num_classes=7, **options)).train()
    target = torch.tensor([0, 3, 6, 2])
    away_from_kinks = 0
    for _ in range(6):
        x = torch.randn(4, 3, 64, 64)
        models = (copy.deepcopy(ours), plain_twin(ours), plain_twin(ours).double())
        mine, theirs, exact = (training_step(model, x, target) for model in models)
        for key in ("loss", "buffers"):
            assert_accurate(mine[key], theirs[key], exact[key])
        assert torch.equal(mine["batches"], theirs["batches"])
        errors = [relative_error(result["gradients"], exact["gradients"]) for result in (mine, theirs)]
        if errors[0] <= 2 * errors[1] + TINY_ERROR[torch.float32]:
            assert_accurate(mine["parameters"], theirs["parameters"], exact["parameters"])
            away_from_kinks += 1
    assert away_from_kinks >= 2
    wide = copy.deepcopy(ours).double()
    with fastcnn.use_backend("reference"):
        for key, value in training_step(wide, x, target).items():
            assert relative_error(value, exact[key]) <= 1e-11


STEPS = {
    "basic-B": (BasicBlock, {}),
    "basic-C": (BasicBlock, {"shortcut": "C"}),
    "bottleneck-A": (Bottleneck, {"shortcut": "A"}),
    "bottleneck-B": (Bottleneck, {}),
    "wide": (Bottleneck, {"width_per_group": 96}),
    "resnext": (Bottleneck, {"groups": 32, "width_per_group": 4}),
}


@pytest.mark.parametrize("case", STEPS)
def test_one_optimisation_step_equals_twin(case: str) -> None:
    block, options = STEPS[case]
    torch.manual_seed(0)
    ours = randomise_batch_norms(ResNet(block, (1, 1, 1, 1), num_classes=7, **options))
    assert_step_equal(ours, plain_twin(ours), torch.randn(3, 3, 40, 36), torch.tensor([0, 3, 6]))


def test_zero_init_residual_starts_as_identity() -> None:
    model = ResNet(Bottleneck, (1, 2, 1, 1), zero_init_residual=True)
    assert all(not block.bn3.weight.any() for block in model.layer2)
    assert model.layer2[0].bn2.weight.all()
    assert not ResNet(BasicBlock, (1, 1, 1, 1), zero_init_residual=True).layer1[0].bn2.weight.any()


# ---- use -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10)).eval()


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(small: nn.Module, copy_of: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = small(x)
        copied = copy_of(small)
        assert torch.equal(copied(x), expected)
        assert list(copied.state_dict()) == list(small.state_dict())


def test_bf16(small: nn.Module) -> None:
    model = copy.deepcopy(small).bfloat16()
    twin, exact = plain_twin(model), plain_twin(model).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_accurate(model(x), twin(x), exact(x.double()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(small: nn.Module, training: bool) -> None:
    model = copy.deepcopy(small).train(training)
    twin, exact = plain_twin(model), plain_twin(model).double()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), twin(x)
    with torch.no_grad():
        assert_accurate(actual, expected, exact(x.double()))


def test_empty_batch(small: nn.Module) -> None:
    with torch.no_grad():
        assert small(torch.empty(0, 3, 64, 64)).shape == (0, 10)


def test_wrong_inputs_are_named(small: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\)"):
        small(torch.empty(3, 64, 64))
    with pytest.raises(ValueError, match="channels"):
        small(torch.empty(1, 4, 64, 64))


def test_eval_with_gradients_equals_twin(small: nn.Module) -> None:
    models = [copy.deepcopy(small).double(), plain_twin(small).double()]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with fastcnn.use_backend("reference"):
        for model in models:
            model(x).square().sum().backward()
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert relative_error(ours.grad, theirs.grad) <= 1e-11


def test_changed_weights_change_the_result(small: nn.Module) -> None:
    model, x = copy.deepcopy(small), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(x)
        for changed in (model.conv1.weight, model.layer2[0].downsample[1].running_var, model.layer4[0].bn2.bias):
            changed.mul_(1.3)
            assert relative_error(model(x), plain_twin(model)(x)) <= 1e-5
        model.load_state_dict(small.state_dict())
        assert torch.equal(model(x), small(x))


def test_hooks_are_honoured(small: nn.Module) -> None:
    model, x, seen = copy.deepcopy(small), torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = model(x)
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        assert relative_error(model(x), expected) <= 1e-5
    assert set(seen) == {name for name, _ in model.named_modules()}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    kwargs = {"groups": 2, "width_per_group": 32, "num_classes": 5}
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (1, 1, 1, 1), **kwargs)
    randomise_batch_norms(model).train(mode == "train")
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # By plain sums: a compiled training step may use fast algorithms, and batch statistics of two values enlarge what
    # they differ by.
    with fastcnn.exact(), torch.set_grad_enabled(mode == "train"):
        actual, expected = compiled(x), eager(x)
        assert relative_error(actual, expected) <= 1e-5
        if mode == "train":
            actual.sum().backward()
            expected.sum().backward()
            assert relative_error(model.conv1.weight.grad, eager.conv1.weight.grad) <= 1e-4
            assert relative_error(model.bn1.running_var, eager.bn1.running_var) <= 1e-5
