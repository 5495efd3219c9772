"""Pre-activation ResNets, and the two families built of the same parts: wide ResNets and CIFAR ResNeXts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.accuracy import relative_error
from support.plain_twin import randomise_batch_norms
from support.preactivation_twins import plain_twin
from support.steps import assert_bf16_accurate, assert_eval_equal, assert_step_equal
from torch import Tensor, nn

import fastcnn
from fastcnn.backends import Call, intercept
from fastcnn.models import CifarPreResNet, CifarResNeXt, CifarWideResNet, PreResNet
from fastcnn.nn import PreActBasicBlock, PreActBottleneck

SMALL: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: PreResNet(PreActBasicBlock, (2, 2, 1, 1), num_classes=7),
    "bottleneck": lambda: PreResNet(PreActBottleneck, (1, 2, 1, 1), num_classes=7, in_channels=1),
    "cifar": lambda: CifarPreResNet(20),
    "wide": lambda: CifarWideResNet(16, 2),
    "wide-1": lambda: CifarWideResNet(10, 1, in_channels=1),  # the first stage keeps its channels
    "wide-dropout": lambda: CifarWideResNet(10, 2, dropout=0.3),
    "resnext": lambda: CifarResNeXt(11, 4, 16),
}


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


def make(case: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(SMALL[case]())


def image(model: nn.Module, batch: int = 4) -> Tensor:
    """Channels-last: dropout draws in the order of memory, and the twin keeps its input's."""
    size = 64 if isinstance(model, PreResNet) else 32
    x = torch.randn(batch, model.conv1.in_channels, size, size - 8)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", SMALL)
def test_eval_equals_twin(case: str) -> None:
    ours = make(case)
    assert_eval_equal(ours, plain_twin(ours), image(ours, 2))


@pytest.mark.parametrize("name", ["preresnet18", "preresnet50", "preresnet164_cifar", "wrn16_8_cifar"])
def test_registered_networks_equal_their_twins(name: str) -> None:
    torch.manual_seed(0)
    ours = randomise_batch_norms(fastcnn.create_model(name))
    size = 64 if fastcnn.models.model_info(name).input_size[1] == 224 else 32
    assert_eval_equal(ours, plain_twin(ours), torch.randn(1, 3, size, size))


@pytest.mark.parametrize("case", SMALL)
def test_one_training_step_equals_twin(case: str) -> None:
    ours = make(case)
    assert_step_equal(ours, plain_twin(ours), image(ours), torch.tensor([0, 3, 6, 2]))


@pytest.mark.parametrize("case", SMALL)
def test_bf16(case: str) -> None:
    ours = make(case)
    assert_bf16_accurate(ours, plain_twin(ours), image(ours))


def test_eval_with_gradients_equals_twin() -> None:
    ours = make("cifar").eval()
    models = [copy.deepcopy(ours).double(), plain_twin(ours).double()]
    x = image(ours).double()
    with fastcnn.use_backend("reference"):
        for model in models:
            model(x).square().sum().backward()
    for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert relative_error(mine.grad, theirs.grad) <= 1e-11


@pytest.mark.parametrize(("case", "convolutions"), [("cifar", 1 + 18 + 3), ("wide", 1 + 12 + 3)])
@torch.no_grad()
def test_a_network_is_its_convolutions(case: str, convolutions: int) -> None:
    """Besides them only the shared batch norms, one a stage, and the last run on their own."""
    model, calls = make(case).eval(), []

    def note(call: Call) -> None:
        calls.append(call)
        call.run()

    with intercept(note):
        model(image(model))
    names = [call.operator for call in calls]
    assert {n: names.count(n) for n in names} == {
        "conv2d": convolutions, "channel_affine": 3 + 1, "adaptive_avg_pool2d": 1, "linear": 1,
    }  # fmt: skip
    convs = [call.args for call in calls if call.operator == "conv2d"]
    blocks = 6
    assert sum(args[6] is not None for args in convs) == blocks - 3  # prologues: where the shortcut is the identity
    assert sum(args[5] is not None for args in convs) == blocks  # residual additions


@pytest.mark.parametrize("case", ["basic", "cifar", "wide-dropout"])
@torch.no_grad()
def test_hooks_are_honoured(case: str) -> None:
    model, seen = make(case).eval(), []
    x = image(model)
    expected = model(x)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    assert relative_error(model(x), expected) <= 1e-5
    assert set(seen) == {name for name, _ in model.named_modules()}


def test_dropout_is_between_the_convolutions() -> None:
    block = PreActBasicBlock(8, 8, dropout=0.5).train()
    seen = []
    block.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    block(torch.randn(2, 8, 6, 6))
    ((before, after),) = seen
    assert (before >= 0).all()  # behind a ReLU
    assert 0.2 < (after[before > 0] == 0).float().mean() < 0.8


def test_the_paper_network_shares_only_where_sizes_change() -> None:
    with torch.device("meta"):
        imagenet, cifar = fastcnn.create_model("preresnet50"), fastcnn.create_model("preresnet164_cifar")
    kinds = [[block.preactivation for block in stage] for stage in (imagenet.layer1, imagenet.layer2)]
    assert kinds == [["none", "branch", "branch"], ["shared", "branch", "branch", "branch"]]
    assert cifar.layer2[0].conv1.stride == cifar.layer2[0].downsample.stride == (2, 2)
    assert imagenet.layer2[0].conv2.stride == (2, 2)
    assert all(block.downsample is None for block in (*cifar.layer1[1:], *imagenet.layer1[1:]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    torch.manual_seed(0)
    model = randomise_batch_norms(CifarPreResNet(11)).train(mode == "train")
    eager, x = copy.deepcopy(model), image(model, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        assert relative_error(compiled(x), eager(x)) <= 1e-5


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"depth must be 9n \+ 2"):
        CifarPreResNet(21)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4"):
        CifarWideResNet(20, 2)
    with pytest.raises(ValueError, match=r"depth must be 9n \+ 2"):
        CifarResNeXt(28)
    with pytest.raises(ValueError, match="preactivation must be one of branch, shared, none, is 'both'"):
        PreActBasicBlock(8, 8, preactivation="both")
