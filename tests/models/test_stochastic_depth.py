"""Stochastic depth: which blocks are left out, how often, what that does not compute, and the scaling in evaluation."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from support.accuracy import relative_error
from support.plain_twin import randomise_batch_norms
from support.preactivation_twins import plain_twin
from support.steps import assert_bf16_accurate, assert_eval_equal
from torch import nn
from torch.nn import functional as F

import fastcnn
from fastcnn.backends import intercept
from fastcnn.models import CifarPreResNet, CifarResNet, CifarResNeXt, CifarWideResNet, PreResNet, ResNet
from fastcnn.nn import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from fastcnn.nn.stochastic_depth import StochasticDepth, survival_probabilities


def blocks_of(model: nn.Module) -> list[StochasticDepth]:
    return [module for module in model.modules() if isinstance(module, StochasticDepth)]


def test_survival_decays_linearly() -> None:
    assert survival_probabilities(4, 0.5) == [0.875, 0.75, 0.625, 0.5]
    with torch.device("meta"):
        model = fastcnn.create_model("resnet110_sd_cifar")
    survivals = [block.survival for block in blocks_of(model)]
    assert len(survivals) == 54
    assert survivals[0] == 1 - 0.5 / 54
    assert survivals[-1] == 0.5
    assert sum(survivals) == pytest.approx(40.25)  # "E(L~) is about 40" (section 3)
    with torch.device("meta"):
        assert len(blocks_of(fastcnn.create_model("resnet1202_sd_cifar"))) == 600
        plain = fastcnn.create_model("resnet110_cifar")
        other = fastcnn.create_model("resnet110_sd_cifar", stochastic_depth=0.8)
        for name, count in (("preresnet50", 16), ("preresnet164_cifar", 54), ("wrn28_10_cifar", 12)):
            deep = fastcnn.create_model(name, stochastic_depth=0.5)
            assert [block.survival for block in blocks_of(deep)] == survival_probabilities(count, 0.5)
            assert all(block.survival == 1 for block in blocks_of(fastcnn.create_model(name)))
    assert all(block.survival == 1 for block in blocks_of(plain))
    assert blocks_of(other)[-1].survival == pytest.approx(0.8)


SMALL = {
    "cifar-A": lambda: CifarResNet(14, stochastic_depth=0.5),
    "basic": lambda: ResNet(BasicBlock, (1, 2, 1, 1), num_classes=7, stochastic_depth=0.3),
    "bottleneck": lambda: ResNet(Bottleneck, (1, 2, 1, 1), num_classes=7, stochastic_depth=0.5),
    "resnext": lambda: CifarResNeXt(11, 2, 32, stochastic_depth=0.5),
    "preact-basic": lambda: PreResNet(PreActBasicBlock, (1, 2, 1, 1), num_classes=7, stochastic_depth=0.3),
    "preact-bottleneck": lambda: PreResNet(PreActBottleneck, (1, 2, 1, 1), num_classes=7, stochastic_depth=0.5),
    "preact-cifar": lambda: CifarPreResNet(20, stochastic_depth=0.5),
    "wide": lambda: CifarWideResNet(16, 2, stochastic_depth=0.5),
}
PREACTIVATION = ("preact-basic", "preact-bottleneck", "preact-cifar", "wide")


def make(case: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(SMALL[case]())


@pytest.mark.parametrize("case", SMALL)
def test_evaluation_scales_the_branch_in_its_last_convolution(case: str) -> None:
    ours = make(case).eval()
    twin = plain_twin(ours)  # multiplies by p_l
    x = torch.randn(2, 3, 64, 48)
    fastcnn.reset_fallbacks()
    assert_eval_equal(ours, twin, x)
    assert fastcnn.fallbacks() == {}
    operators: list[str] = []
    with torch.no_grad():
        with intercept(lambda call: (operators.append(call.operator), call.run())[1]):
            y = ours(x)
        own_batch_norms = ["channel_affine"] * 4 if case in PREACTIVATION else []  # three shared ones, and the last
        assert [name for name in operators if name == "channel_affine"] == own_batch_norms
        assert set(operators) - {"channel_affine"} <= {"conv2d", "max_pool2d", "adaptive_avg_pool2d", "linear"}
        for block in blocks_of(ours):
            block.survival = 1.0
        assert relative_error(ours(x), y) > 1e-3


@pytest.mark.parametrize("case", ["bottleneck", "preact-bottleneck", "wide"])
def test_evaluation_with_gradients_equals_twin(case: str) -> None:
    ours = make(case).eval()
    models = [copy.deepcopy(ours).double(), plain_twin(ours).double()]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with fastcnn.use_backend("reference"):
        for model in models:
            model(x).square().sum().backward()
    for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert relative_error(mine.grad, theirs.grad) <= 1e-11


@pytest.mark.parametrize("case", ["cifar-A", "preact-cifar", "wide"])
def test_bf16(case: str) -> None:
    ours = make(case)
    assert_bf16_accurate(ours, plain_twin(ours), torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("hooked", [nn.BatchNorm2d, nn.Conv2d])
@pytest.mark.parametrize("case", ["bottleneck", "preact-bottleneck", "preact-basic"])
@torch.no_grad()
def test_hooked_modules_are_scaled_too(case: str, hooked: type[nn.Module]) -> None:
    ours, x = make(case).eval(), torch.randn(1, 3, 32, 32)
    expected = ours(x)
    for module in ours.modules():
        if isinstance(module, hooked):
            module.register_forward_hook(lambda *_: None)
    assert relative_error(ours(x), expected) <= 1e-5


@pytest.mark.parametrize("block", [BasicBlock(8, 8), Bottleneck(32, 8)], ids=["basic", "bottleneck"])
@torch.no_grad()
def test_a_dropped_block_is_not_computed(block: nn.Module) -> None:
    randomise_batch_norms(block).train()
    state = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(2, block.conv1.in_channels, 6, 6)
    block.survival = 1e-30
    calls: list[str] = []
    with intercept(lambda call: calls.append(call.operator)):
        y = block(x)
    assert calls == []
    assert torch.equal(y, F.relu(x))
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())  # no statistics of what did not run
    block.survival = 1.0
    assert not torch.equal(block(x), F.relu(x))


PREACTIVATED = {"basic": lambda kind: PreActBasicBlock(8, 8, preactivation=kind, dropout=0.5),
                "bottleneck": lambda kind: PreActBottleneck(32, 8, preactivation=kind)}  # fmt: skip


@pytest.mark.parametrize("kind", ["branch", "none"])
@pytest.mark.parametrize("case", PREACTIVATED)
@torch.no_grad()
def test_a_dropped_preactivation_block_is_its_input(case: str, kind: str) -> None:
    block = randomise_batch_norms(PREACTIVATED[case](kind)).train()
    state = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(2, block.conv1.in_channels, 6, 6)
    block.survival = 1e-30
    calls: list[str] = []
    with intercept(lambda call: calls.append(call.operator)):
        y = block(x)
    assert calls == []
    assert torch.equal(y, x)
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())
    block.survival = 1.0
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("block", [PreActBasicBlock, PreActBottleneck])
def test_a_dropped_preactivation_block_computes_what_its_projection_reads(block: type[nn.Module]) -> None:
    """The shared batch norm is the shortcut's too: it runs, learns, and takes its statistics."""
    module = randomise_batch_norms(block(8, 16, 2, preactivation="shared")).train()
    module.survival = 1e-30
    x = torch.randn(2, 8, 6, 6)
    normalised, var = F.batch_norm(x, None, None, training=True), module.bn1.running_var.clone()
    y = module(x)
    activated = F.relu(normalised * module.bn1.weight[:, None, None] + module.bn1.bias[:, None, None])
    assert relative_error(y, module.downsample(activated)) <= 1e-6
    y.sum().backward()
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None} == {"bn1", "downsample"}
    assert not torch.equal(module.bn1.running_var, var)
    assert module.bn2.num_batches_tracked == 0


def test_a_dropped_block_keeps_its_projection_and_passes_the_gradient() -> None:
    model = ResNet(BasicBlock, (1, 1, 1, 1), stochastic_depth=0.5)
    block = model.layer2[0]
    block.survival = 1e-30
    x = torch.randn(2, 64, 6, 6, requires_grad=True)
    y = block(x)
    assert y.shape == (2, 128, 3, 3)
    assert (y >= 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert block.downsample[0].weight.grad is not None
    assert block.conv1.weight.grad is None


def test_gates_follow_their_probabilities() -> None:
    """One draw a block and mini-batch, from PyTorch's generator."""
    block = BasicBlock(4, 4).train()
    for survival in (0.5, 0.9):
        block.survival = survival
        torch.manual_seed(0)
        draws = [block.is_dropped() for _ in range(4000)]
        assert abs(sum(draws) / 4000 - (1 - survival)) < 4 * (survival * (1 - survival) / 4000) ** 0.5
        torch.manual_seed(0)
        assert [block.is_dropped() for _ in range(50)] == draws[:50]
    assert not any(block.eval().is_dropped() for _ in range(50))
    block.train().survival = 1.0
    before = torch.get_rng_state()
    assert not block.is_dropped()
    assert torch.equal(torch.get_rng_state(), before)  # networks without stochastic depth draw nothing


def without_branch(block: nn.Module) -> nn.Module:
    """What a dropped block of a twin computes, its parameters under the same names."""
    if block.downsample is None:
        return nn.Identity()
    if getattr(block, "preactivation", None) == "shared":
        return nn.Sequential(OrderedDict(bn1=block.bn1, relu=nn.ReLU(), downsample=block.downsample))
    return block.downsample


@pytest.mark.parametrize("case", ["cifar-A", "preact-cifar", "wide"])
def test_a_training_step_equals_that_of_the_network_without_the_dropped_blocks(case: str) -> None:
    model = make(case).double().train()
    blocks = blocks_of(model)

    def draws(seed: int) -> list[bool]:
        torch.manual_seed(seed)
        return [block.is_dropped() for block in blocks]

    seed = next(s for s in range(1000) if draws(s)[2] and not all(draws(s)) and any(draws(s)[5:]))
    dropped = draws(seed)  # the block that begins the second stage, the last one, and perhaps more
    twin = plain_twin(model).train()
    for s, stage in enumerate((twin.layer1, twin.layer2, twin.layer3)):
        for i, block in enumerate(stage):
            if dropped[i + 2 * s]:
                stage[i] = without_branch(block)
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 6, 2])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        with fastcnn.use_backend("reference"):
            torch.manual_seed(seed)
            losses.append(F.cross_entropy(network(x), target))
        losses[-1].backward()
        optimizer.step()
    assert relative_error(*losses) <= 1e-11
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            assert relative_error(parameter.grad, theirs[name].grad) <= 1e-10, name
            assert relative_error(parameter, theirs[name]) <= 1e-11, name
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
    statistics = dict(twin.named_buffers())
    for name, buffer in model.named_buffers():
        if name in statistics:
            assert relative_error(buffer, statistics[name]) <= 1e-11, name


def test_wrong_arguments() -> None:
    for wrong in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="stochastic_depth must be a probability"):
            CifarResNet(8, stochastic_depth=wrong)
        with pytest.raises(ValueError, match="stochastic_depth must be a probability"):
            CifarWideResNet(10, 1, stochastic_depth=wrong)
    with pytest.raises(ValueError, match="without shortcuts"):
        fastcnn.create_model("plain18", stochastic_depth=0.5)


def test_copies_keep_their_probabilities() -> None:
    model = copy.deepcopy(make("cifar-A"))
    assert blocks_of(model)[-1].survival == 0.5
    assert "survival" not in str(list(model.state_dict()))
    assert "survival=0.5" in repr(model)
    assert "survival" not in repr(CifarResNet(8))
