"""GoogLeNet against torchvision's, the paper's against a plain function of torch, and the inception modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.counting import multiply_adds, on_meta, parameters, volumes
from support.plain_twin import randomise_batch_norms
from support.steps import FunctionTwin, assert_bf16_accurate, assert_eval_equal, assert_step_equal
from torch import Tensor, nn

import fastcnn
from fastcnn.models.googlenet import AUX_LOSS_WEIGHT, BLOCKS, GoogLeNetOutputs
from fastcnn.nn import ConvBNReLU, ConvReLU, Inception, InceptionNaive

Tensors = dict[str, Tensor]
TARGET = torch.tensor([0, 5, 2])


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


def loss_with_aux(output: GoogLeNetOutputs, target: Tensor) -> Tensor:
    logits, aux2, aux1 = output
    loss = F.cross_entropy
    return loss(logits, target) + AUX_LOSS_WEIGHT * (loss(aux1, target) + loss(aux2, target))


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "main", "with_aux", "macs"),
    [("googlenet", 6_624_904, 13_004_888, 1_498_376_192), ("googlenet_lrn", 6_998_552, 13_378_280, 1_582_671_872)],
)
def test_counts(name: str, main: int, with_aux: int, macs: int) -> None:
    model = on_meta(name)
    assert parameters(model) == with_aux
    assert parameters(model, without="aux") == parameters(on_meta(name, aux_logits=False)) == main
    assert multiply_adds(model, (3, 224, 224)) == macs


@pytest.mark.parametrize("name", ["googlenet", "googlenet_lrn"])
def test_volumes(name: str) -> None:
    model = on_meta(name)
    found = {}
    for block in BLOCKS:
        module = getattr(model, f"inception{block}")
        module.register_forward_hook(lambda m, i, o, block=block: found.__setitem__(block, tuple(o.shape[1:])))
    layers = volumes(model, (3, 224, 224))
    channels = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
    sizes = {"3": 28, "4": 14, "5": 7}
    assert found == {block: (c, sizes[block[0]], sizes[block[0]]) for block, c in channels.items()}
    assert layers["conv1.conv"] == (64, 112, 112)
    assert layers["maxpool1"] == (64, 56, 56)
    assert layers["maxpool2"] == (192, 28, 28)


def test_options() -> None:
    model = on_meta("googlenet_lrn", num_classes=10, in_channels=1, aux_logits=False)
    assert parameters(model) == 6_998_552 - 1025 * 990 - 64 * 49 * 2
    assert (model.dropout.p, on_meta("googlenet_lrn", dropout=0.1).dropout.p, on_meta("googlenet").dropout.p) == (
        0.4, 0.1, 0.2,
    )  # fmt: skip
    assert model.aux1 is None
    with pytest.raises(ValueError, match="transform_input is for in_channels=3"):
        fastcnn.create_model("googlenet", transform_input=True, in_channels=1)


# ---- checkpoints with and without the auxiliary classifiers ---------------------------------------------------------


@pytest.fixture(scope="module", params=["googlenet", "googlenet_lrn"])
def checkpoint(request: pytest.FixtureRequest) -> tuple[str, Tensors]:
    """A network's name, and its state with the auxiliary classifiers."""
    torch.manual_seed(0)
    model = fastcnn.create_model(request.param, num_classes=3, init_weights=False)
    return request.param, randomise_batch_norms(model).state_dict()


def test_without_aux_a_checkpoints_aux_keys_are_left_out(checkpoint: tuple[str, Tensors]) -> None:
    name, state = checkpoint
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    for weights in (state, wrapped):
        model = fastcnn.create_model(name, num_classes=3, aux_logits=False, init_weights=False, weights=weights)
        own = model.state_dict()
        assert own.keys() == {key for key in state if not key.startswith("aux")}
        assert all(torch.equal(value, state[key]) for key, value in own.items())
    whole = fastcnn.create_model(name, num_classes=3, init_weights=False, weights=state)
    assert whole.state_dict().keys() == state.keys()
    assert torch.equal(whole.aux2.fc2.weight, state["aux2.fc2.weight"])


def test_without_aux_all_other_keys_stay_strict(checkpoint: tuple[str, Tensors]) -> None:
    name, state = checkpoint
    options = {"num_classes": 3, "aux_logits": False, "init_weights": False}
    added = ("aux1.fc3.weight", "aux3.fc1.weight", "auxiliary.fc1.weight", "inception9.conv.weight")
    changed = {**state, **{key: torch.zeros(1) for key in added}, "fc.bias": torch.zeros(4)}
    del changed["inception4e.branch1.conv.weight"]
    with pytest.raises(ValueError, match="does not fit") as caught:
        fastcnn.create_model(name, weights=changed, **options)
    problems = str(caught.value).splitlines()[1:4]
    assert problems == [
        "  1 missing: inception4e.branch1.conv.weight",
        f"  4 unexpected: {'; '.join(added)}",
        "  1 of another shape: fc.bias (4,), the model's is (3,)",
    ]


def test_with_aux_a_checkpoint_without_is_refused(checkpoint: tuple[str, Tensors]) -> None:
    name, state = checkpoint
    small = {key: value for key, value in state.items() if not key.startswith("aux")}
    with pytest.raises(ValueError, match=r"missing: aux1\.conv") as caught:
        fastcnn.create_model(name, num_classes=3, init_weights=False, weights=small)
    assert "aux_logits=False" in str(caught.value)
    partly = {key: value for key, value in state.items() if not key.startswith("aux2")}
    with pytest.raises(ValueError, match=r"missing: aux2\.conv"):
        fastcnn.create_model(name, num_classes=3, init_weights=False, weights=partly)


# ---- torchvision -----------------------------------------------------------------------------------------------------


def torchvision_googlenet(**options: object) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    options = {"init_weights": False, "num_classes": 10, "dropout": 0.0, "dropout_aux": 0.0} | options
    return randomise_batch_norms(torchvision.models.googlenet(weights=None, **options))


def like(theirs: nn.Module, **options: object) -> nn.Module:
    ours = on_meta("googlenet", **({"num_classes": 10, "dropout": 0.0, "dropout_aux": 0.0} | options))
    ours.to_empty(device="cpu")  # whatever is not loaded is garbage
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


@pytest.mark.parametrize("size", [64, 224])
def test_eval_equals_torchvision(size: int) -> None:
    torch.manual_seed(0)
    theirs = torchvision_googlenet()
    ours, x = like(theirs), torch.randn(1, 3, size, size)
    assert_eval_equal(ours, theirs, x)
    randomise_batch_norms(ours, seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_eval_equal(ours, theirs, x[:, :, :60, :64])


def test_transform_input() -> None:
    torch.manual_seed(0)
    theirs = torchvision_googlenet(aux_logits=False, transform_input=True)
    ours = like(theirs, aux_logits=False, transform_input=True)
    assert_eval_equal(ours, theirs, torch.randn(2, 3, 64, 64))


def test_train_mode_with_aux_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs = torchvision_googlenet().train()
    ours, x = like(theirs).train(), torch.randn(4, 3, 96, 96)
    exact = copy.deepcopy(theirs).double()
    with fastcnn.use_backend("cpp", strict=True):
        outputs = [ours(x), theirs(x), exact(x.double())]
    assert isinstance(outputs[0], GoogLeNetOutputs)
    assert outputs[0]._fields == outputs[1]._fields
    for results in zip(*outputs, strict=True):
        assert_accurate(*results)
        # 22 batch norms in a row amplify fp32's rounding: torchvision's own error is 1e-5 to 2e-5, by memory layout.
        assert relative_error(results[0], results[1]) <= 3e-5


def test_training_step_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs = torchvision_googlenet()
    assert_step_equal(like(theirs), theirs, torch.randn(3, 3, 64, 64), TARGET, loss_with_aux)


def test_bf16_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs = torchvision_googlenet()
    assert_bf16_accurate(like(theirs), theirs, torch.randn(1, 3, 64, 64))


def test_same_seed_same_initial_weights() -> None:
    torch.manual_seed(3)
    theirs = torchvision_googlenet(init_weights=True)
    torch.manual_seed(3)
    ours = fastcnn.create_model("googlenet", num_classes=10)
    for a, b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a[0] == b[0]
        assert "bn" in a[0] or torch.equal(a[1], b[1])  # the batch norms were randomised


# ---- the paper's -----------------------------------------------------------------------------------------------------


def paper(p: Tensors, x: Tensor, training: bool) -> Tensor | tuple[Tensor, ...]:
    """Table 1 and section 5; normalisation as in Caffe's bvlc_googlenet."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = p[f"{name}.conv.weight"]
        return F.relu(F.conv2d(x, weight, p[f"{name}.conv.bias"], stride, weight.shape[-1] // 2))

    def norm(x: Tensor) -> Tensor:  # PyTorch's has no bf16 on a CPU
        wide = x.float() if x.dtype == torch.bfloat16 else x
        return F.local_response_norm(wide, 5, 1e-4, 0.75, 1.0).to(x.dtype)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def inception(name: str, x: Tensor) -> Tensor:
        name = f"inception{name}"
        return torch.cat(
            [
                conv(f"{name}.branch1", x),
                conv(f"{name}.branch2.1", conv(f"{name}.branch2.0", x)),
                conv(f"{name}.branch3.1", conv(f"{name}.branch3.0", x)),
                conv(f"{name}.branch4.1", F.max_pool2d(x, 3, 1, 1)),
            ],
            1,
        )

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def aux(name: str, x: Tensor) -> Tensor:
        x = conv(f"{name}.conv", F.avg_pool2d(x, 5, 3)).flatten(1)
        return linear(f"{name}.fc2", F.relu(linear(f"{name}.fc1", x)))

    x = norm(pool(conv("conv1", x, 2)))
    x = pool(norm(conv("conv3", conv("conv2", x))))
    x = pool(inception("3b", inception("3a", x)))
    x = x4a = inception("4a", x)
    x = x4d = inception("4d", inception("4c", inception("4b", x)))
    x = inception("5b", inception("5a", pool(inception("4e", x))))
    logits = linear("fc", x.mean((2, 3)))
    return (logits, aux("aux2", x4d), aux("aux1", x4a)) if training and "aux1.fc1.weight" in p else logits


def make_paper(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return fastcnn.create_model("googlenet_lrn", num_classes=10, dropout=0.0, dropout_aux=0.0, **options)


def test_paper_equals_twin() -> None:
    model = make_paper()
    twin = FunctionTwin(model, paper)
    x = torch.randn(1, 3, 224, 224)
    assert_eval_equal(model, twin, x)
    assert_eval_equal(model, twin, x[:, :, :80, :64])
    assert_bf16_accurate(model, twin, x[:, :, :64, :64])
    with fastcnn.use_backend("cpp", strict=True):
        outputs = model.train()(x), twin.train()(x)
    assert outputs[0]._fields == ("logits", "aux_logits2", "aux_logits1")
    for ours, theirs in zip(*outputs, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_paper_training_step_equals_twin() -> None:
    model = make_paper()
    assert_step_equal(model, FunctionTwin(model, paper), torch.randn(1, 3, 224, 224), TARGET[:1], loss_with_aux)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_lecture_counts_of_the_naive_and_the_bottleneck_module() -> None:
    naive = InceptionNaive(256, 128, 192, 96)
    bottleneck = Inception(256, 128, 64, 192, 64, 96, 64)
    x = torch.randn(1, 256, 28, 28)
    with torch.no_grad():
        assert naive(x).shape == (1, 672, 28, 28)
        assert bottleneck(x).shape == (1, 480, 28, 28)
    assert multiply_adds(naive, (256, 28, 28)) == 854_196_224
    assert multiply_adds(bottleneck, (256, 28, 28)) == 271_351_808


@pytest.mark.parametrize("block", [ConvReLU, ConvBNReLU])
def test_naive_module_equals_its_branches(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = randomise_batch_norms(InceptionNaive(6, 3, 4, 5, block)).eval()
    x = torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)
    branches = [module.branch1, module.branch2, module.branch3]
    expected = torch.cat([*(branch(x) for branch in branches), F.max_pool2d(x, 3, 1, 1)], 1)
    with torch.no_grad():
        assert relative_error(module(x), expected) <= 1e-6
    assert relative_error(module(x), expected) <= 1e-6  # with a gradient
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def small_module(block: type[nn.Module] = ConvBNReLU) -> tuple[Inception, Tensor]:
    torch.manual_seed(0)
    module = randomise_batch_norms(Inception(12, 8, 6, 10, 4, 5, 7, block)).eval()
    return module, torch.randn(2, 12, 9, 7).contiguous(memory_format=torch.channels_last)


def plain(module: Inception, x: Tensor) -> Tensor:
    """The branches one after the other, by torch."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        conv = block.conv
        x = F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)
        if isinstance(block, ConvBNReLU):
            bn = block.bn
            x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return F.relu(x)

    pooled = F.max_pool2d(x, 3, 1, 1)
    chains = (([module.branch1], x), (module.branch2, x), (module.branch3, x), ([module.branch4[1]], pooled))
    parts = []
    for blocks, part in chains:
        for block in blocks:
            part = run(block, part)
        parts.append(part)
    return torch.cat(parts, 1)


def conv_calls(module: nn.Module, x: Tensor) -> int:
    calls: list[str] = []

    def record(call: fastcnn.backends.Call) -> None:
        calls.append(call.operator)
        call.run()

    with fastcnn.backends.intercept(record):
        module(x)
    return calls.count("conv2d")


@pytest.mark.parametrize("block", [ConvReLU, ConvBNReLU])
def test_first_convolutions_run_as_one(block: type[nn.Module]) -> None:
    module, x = small_module(block)
    with torch.no_grad():
        assert conv_calls(module, x) == 4
        assert relative_error(module(x), plain(module, x)) <= 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert conv_calls(module, x) == 6
            assert module(x).dtype == torch.bfloat16
    assert conv_calls(module, x) == 6  # records gradients
    assert relative_error(module(x), plain(module, x)) <= 1e-6
    assert conv_calls(module.requires_grad_(False), x) == 4
    assert conv_calls(module, x.clone().requires_grad_()) == 6
    with torch.inference_mode():
        assert relative_error(module(x), plain(module, x)) <= 1e-6
    assert conv_calls(module.train(), x) == (6 if block is ConvBNReLU else 4)


def test_changed_weights_change_the_merged_convolution() -> None:
    module, x = small_module()
    first = (module.branch1, module.branch2[0], module.branch3[0])
    with torch.no_grad():
        module(x)
        for block in first:
            for changed in (block.conv.weight, block.bn.weight, block.bn.running_var, block.bn.bias):
                changed.mul_(1.3)
                assert relative_error(module(x), plain(module, x)) <= 1e-6
            block.bn.eps = 0.3
            assert relative_error(module(x), plain(module, x)) <= 1e-6
        other = Inception(12, 8, 6, 10, 4, 5, 7, ConvBNReLU)
        module.load_state_dict(other.state_dict())
        assert relative_error(module(x), plain(module, x)) <= 1e-6
        copied = copy.deepcopy(module)
        assert relative_error(copied(x), plain(module, x)) <= 1e-6
        low = module.bfloat16()
        assert low(x.bfloat16()).dtype == torch.bfloat16
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    copied(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert relative_error(copied(x), plain(copied, x)) <= 1e-6


def test_hooks_of_the_branches_are_honoured() -> None:
    module, x = small_module()
    with torch.no_grad():
        expected = module(x)
        for name, child in module.named_modules():
            seen: list[str] = []
            handle = child.register_forward_hook(lambda m, i, o, seen=seen, name=name: seen.append(name))
            assert relative_error(module(x), expected) <= 1e-6, name
            handle.remove()
            assert seen == [name]
        module.branch2[0] = nn.utils.parametrize.register_parametrization(
            module.branch2[0].conv, "weight", _Doubled()
        ) and module.branch2[0]  # fmt: skip
        assert relative_error(module(x), plain(module, x)) <= 1e-6


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_replaced_branches_run() -> None:
    module, x = small_module()
    module.branch3 = nn.Conv2d(12, 5, 1)
    with torch.no_grad():
        assert module(x).shape == (2, 30, 9, 7)
    module, x = small_module()
    module.branch4[0] = nn.AvgPool2d(3, 1, 1)
    with torch.no_grad():
        assert relative_error(module(x)[:, 23:], module.branch4(x)) <= 1e-6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    module, x = small_module()
    module.train(mode == "train")
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        actual, expected = compiled(x), eager(x)
        assert relative_error(actual, expected) <= 1e-5
        if mode == "train":
            actual.sum().backward()
            expected.sum().backward()
            assert relative_error(module.branch1.conv.weight.grad, eager.branch1.conv.weight.grad) <= 1e-4
