"""torchvision's networks, optimized: the same results by the accuracy rule, on fastcnn's kernels, and trainable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate
from support.dropin import check_network
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn

torchvision = pytest.importorskip("torchvision")

# Name, image size, and the least fraction of the multiply-accumulates on fastcnn's kernels.
NETWORKS = {
    "alexnet": (64, 0.99),
    "resnet18": (64, 0.99),
    "resnet50": (64, 0.99),
    "resnext50_32x4d": (64, 0.99),
    "wide_resnet50_2": (64, 0.99),
    "vgg11": (64, 0.99),
    "vgg11_bn": (64, 0.99),
    "googlenet": (64, 0.99),
    "inception_v3": (96, 0.99),
    "densenet121": (64, 0.99),
    "squeezenet1_0": (64, 0.99),
    "squeezenet1_1": (64, 0.99),
    "mobilenet_v2": (64, 0.99),
    "mobilenet_v3_large": (64, 0.99),
    "mobilenet_v3_small": (64, 0.99),
    "mnasnet0_5": (64, 0.99),
    "shufflenet_v2_x0_5": (64, 0.99),
    "efficientnet_b0": (64, 0.99),
    "efficientnet_v2_s": (64, 0.99),
    "regnet_x_400mf": (64, 0.99),
    "regnet_y_400mf": (64, 0.99),
    "convnext_tiny": (64, 0.99),
}


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return randomise_batch_norms(model).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_eval(name: str) -> None:
    size, fraction = NETWORKS[name]
    report = check_network(build(name), torch.randn(2, 3, size, size), fraction)
    assert not any("traced" in entry.reason for entry in report.left)
    assert not any(entry.kind == "cat" for entry in report.left)


def _first(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def _step_and_evaluate(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Load a checkpoint, one step of SGD in train mode, outputs of both modes."""
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the draws would be the same only as long as nothing else draws
    x = x.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = _first(model.train()(x))
    sum(o.square().mean() for o in outputs).backward()
    optimizer.step()
    with torch.no_grad():
        after = model.eval()(x)
    return [*outputs, after, *model.buffers()]


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_training_step_from_a_checkpoint(name: str) -> None:
    options = {"aux_logits": False} if name == "googlenet" else {}
    checkpoint = build(name, **options).state_dict()
    x = torch.randn(3, 3, 64, 64)
    torch.manual_seed(1)
    plain = build(name, **options)
    torch.nn.init.normal_(next(plain.parameters()))  # the checkpoint must overwrite what the graphs were made with
    optimized = fastcnn.optimize(plain)
    exact = copy.deepcopy(plain).double()
    results = [_step_and_evaluate(m, checkpoint, x) for m in (optimized, plain, exact)]
    assert results[0][0].grad_fn is not None
    for ours, theirs, precise in zip(*results, strict=True):
        if ours.is_floating_point():
            assert_accurate(ours, theirs, precise)
        else:
            assert torch.equal(ours, theirs)


def test_googlenets_outputs_depend_on_the_mode() -> None:
    model = fastcnn.optimize(build("googlenet", aux_logits=True))
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(model(x), Tensor)
    outputs = model.train()(x)
    assert type(outputs).__name__ == "GoogLeNetOutputs"
    assert [o.shape for o in outputs] == [(2, 10)] * 3
    assert isinstance(model.eval()(x), Tensor)
    assert fastcnn.report(model).left == ()


def test_the_users_model_stays_as_it_was() -> None:
    model = build("resnet18")
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    kinds = [type(m) for m in model.modules()]
    optimized = fastcnn.optimize(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(dict(m.__dict__) == before[name] for name, m in model.named_modules())
    assert not {id(p) for p in optimized.parameters()} & {id(p) for p in model.parameters()}
    assert repr(optimized) == repr(model)
    assert isinstance(optimized, type(model))
