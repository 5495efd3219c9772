"""LeNet-5, today's and the paper's, against plain functions of torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import relative_error
from support.counting import multiply_adds, on_meta, parameters, volumes
from support.steps import FunctionTwin, assert_bf16_accurate, assert_eval_equal, assert_step_equal
from torch import Tensor, nn

import fastcnn

# Table I of the paper: a row for each map of S2, a column for each map of C3.
TABLE_1 = (
    "X...XXX..XXXX.XX",
    "XX...XXX..XXXX.X",
    "XXX...XXX..X.XXX",
    ".XXX..XXXX..X.XX",
    "..XXX..XXXX.XX.X",
    "...XXX..XXXX.XXX",
)

Tensors = dict[str, Tensor]


def modern(p: Tensors, x: Tensor, training: bool) -> Tensor:
    x = F.max_pool2d(F.relu(F.conv2d(x, p["c1.weight"], p["c1.bias"])), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, p["c3.weight"], p["c3.bias"])), 2)
    x = F.relu(F.conv2d(x, p["c5.weight"], p["c5.bias"])).flatten(1)
    return F.linear(F.relu(F.linear(x, p["f6.weight"], p["f6.bias"])), p["output.weight"], p["output.bias"])


def squash(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(x * 2 / 3)


def paper(p: Tensors, x: Tensor, training: bool) -> Tensor:
    def subsample(x: Tensor, name: str) -> Tensor:
        sums = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        return squash(sums * p[f"{name}.weight"].view(-1, 1, 1) + p[f"{name}.bias"].view(-1, 1, 1))

    x = subsample(squash(F.conv2d(x, p["c1.weight"], p["c1.bias"])), "s2")
    maps, filters = [], iter(p["c3.weight"])
    for j in range(16):
        inputs = [i for i in range(6) if TABLE_1[i][j] == "X"]
        kernels = torch.stack([next(filters) for _ in inputs])
        maps.append(F.conv2d(x[:, inputs], kernels[None], p["c3.bias"][j : j + 1]))
    x = subsample(squash(torch.cat(maps, 1)), "s4")
    x = squash(F.conv2d(x, p["c5.weight"], p["c5.bias"])).flatten(1)
    x = squash(F.linear(x, p["f6.weight"], p["f6.bias"]))
    return -torch.stack([(x - code).square().sum(1) for code in p["output.codes"]], 1)


TWINS = {"lenet5": modern, "lenet5_1998": paper}


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return fastcnn.create_model(name, **options)


def test_counts() -> None:
    model = on_meta("lenet5")
    assert parameters(model) == 61_706
    assert multiply_adds(make("lenet5"), (1, 32, 32)) == 416_520
    layers = [parameters(getattr(model, name)) for name in ("c1", "c3", "c5", "f6", "output")]
    assert layers == [156, 2_416, 48_120, 10_164, 850]


def test_counts_of_1998() -> None:
    model = on_meta("lenet5_1998")
    assert parameters(model) == 60_000
    layers = [parameters(getattr(model, name)) for name in ("c1", "s2", "c3", "s4", "c5", "f6", "output")]
    assert layers == [156, 12, 1_516, 32, 48_120, 10_164, 0]


@pytest.mark.parametrize("name", TWINS)
def test_volumes(name: str) -> None:
    expected = {"c1": (6, 28, 28), "s2": (6, 14, 14), "c3": (16, 10, 10), "s4": (16, 5, 5), "c5": (120, 1, 1)}
    found = volumes(on_meta(name), (1, 32, 32))
    assert {key: found[key] for key in expected} == expected
    assert (found["f6"], found["output"]) == ((84,), (10,))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "num_classes": 7}], ids=["digits", "options"])
def test_equals_twin(name: str, options: dict[str, int]) -> None:
    model = make(name, **options)
    x = torch.rand(3, options.get("in_channels", 1), 32, 32) * 1.275 - 0.1
    twin = FunctionTwin(model, TWINS[name])
    assert_eval_equal(model, twin, x)
    assert_bf16_accurate(model, twin, x)
    assert_step_equal(model, twin, x, torch.tensor([2, 0, 6]))


def test_dropout_is_for_train_mode_only() -> None:
    model, x = make("lenet5", dropout=0.5), torch.randn(2, 1, 32, 32)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_changed_filters_change_the_result() -> None:
    model, x = make("lenet5_1998").eval(), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        before = model(x)
        model.c3.weight.mul_(2)
        assert not torch.allclose(model(x), before)
        assert relative_error(model(x), FunctionTwin(model, paper)(x)) <= 1e-5
        model.c3.weight.div_(2)
        assert torch.equal(copy.deepcopy(model)(x), before)


def test_codes() -> None:
    codes = make("lenet5_1998").output.codes
    assert codes.shape == (10, 84)
    assert (codes.abs() == 1).all()
    assert torch.cdist(codes, codes).fill_diagonal_(math.inf).min() > 3  # digits differ in several pixels
    seven = make("lenet5_1998", num_classes=7)
    assert torch.equal(seven.output.codes, make("lenet5_1998", num_classes=7).output.codes)
    assert len(seven.output.codes.unique(dim=0)) == 7


def test_squashing_keeps_the_codes() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.allclose(make("lenet5_1998").squash(x), x, atol=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_wrong_sizes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="32x32"):
        make(name)(torch.randn(1, 1, 36, 36))
    with pytest.raises(ValueError, match="channels"):
        make(name)(torch.randn(1, 2, 32, 32))


def test_weights_that_do_not_fit_say_what_would() -> None:
    state = make("lenet5", num_classes=7, in_channels=3).state_dict()
    with pytest.raises(ValueError, match=r"create_model\('lenet5', num_classes=7, in_channels=3, weights"):
        make("lenet5", weights=state)
    with pytest.raises(ValueError, match=r"create_model\('lenet5_1998', weights"):
        make("lenet5", weights=make("lenet5_1998").state_dict())


def test_learns_from_its_own_loss() -> None:
    """A few steps on two images: the paper's network trains as it is initialised."""
    model = make("lenet5_1998").train()
    x, target = torch.rand(2, 1, 32, 32), torch.tensor([3, 8])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
