"""DenseNets: torchvision both ways, old checkpoint keys, plain twins, and the buffer that grows in place."""

from __future__ import annotations

import copy

import pytest
import torch
from support.accuracy import assert_accurate, relative_error
from support.plain_twin import randomise_batch_norms
from support.preactivation_twins import plain_twin
from support.steps import assert_bf16_accurate, assert_step_equal, training_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn.backends import Call, intercept
from fastcnn.models import DenseNet
from fastcnn.models.densenet import DenseBlock, DenseLayer, cifar_densenet


@pytest.fixture(autouse=True)
def no_fallback() -> object:
    fastcnn.reset_fallbacks()
    yield
    assert fastcnn.fallbacks() == {}


# ---- torchvision and old checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchvision_densenet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    torch.manual_seed(0)
    return randomise_batch_norms(torchvision.models.densenet121()).eval()


def empty_densenet121() -> nn.Module:
    with torch.device("meta"):
        ours = fastcnn.create_model("densenet121").eval()
    return ours.to_empty(device="cpu")  # whatever is not loaded is garbage


@torch.no_grad()
def test_state_dicts_and_results_both_ways(torchvision_densenet: nn.Module) -> None:
    theirs, ours = copy.deepcopy(torchvision_densenet), empty_densenet121()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with fastcnn.use_backend("cpp", strict=True):
        expected, actual = theirs(x), ours(x)
        assert relative_error(actual, expected) <= 1e-5
        assert actual.stride() == expected.stride()
        randomise_batch_norms(ours, seed=1)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = x[:, :, :64, :96]
        assert relative_error(ours(x), theirs(x)) <= 1e-5


@pytest.mark.parametrize("name", ["densenet169", "densenet201", "densenet161"])
def test_keys_and_shapes_are_torchvisions(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(), fastcnn.create_model(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


def test_same_seed_same_initial_weights() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the independent reference of this test")
    torch.manual_seed(3)
    theirs = torchvision.models.DenseNet(16, (2, 3), 32)
    torch.manual_seed(3)
    ours = DenseNet(16, (2, 3), 32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_old_checkpoint_keys(torchvision_densenet: nn.Module) -> None:
    state = torchvision_densenet.state_dict()
    old = {}
    for key, value in state.items():
        if "denselayer" in key:
            for kind in ("norm", "conv"):
                key = key.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
        if not key.endswith("num_batches_tracked"):  # older than those
            old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    loaded = fastcnn.create_model("densenet121", weights=old).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def test_weights_that_do_not_fit_say_what_would() -> None:
    state = fastcnn.create_model("densenet40_k12_cifar", num_classes=7, in_channels=1).state_dict()
    with pytest.raises(ValueError, match=r"create_model\('densenet40_k12_cifar', num_classes=7, in_channels=1, weig"):
        fastcnn.create_model("densenet40_k12_cifar", weights=state)


# ---- twins -----------------------------------------------------------------------------------------------------------

SMALL = {
    "imagenet": lambda: DenseNet(8, (2, 3, 1), 16, num_classes=7),
    "bc": lambda: cifar_densenet(22, 12, bottleneck=True, in_channels=1),
    "plain": lambda: cifar_densenet(10, 12, bottleneck=False, num_classes=7),
    "dropout": lambda: cifar_densenet(10, 8, bottleneck=False, drop_rate=0.2),
}


def make(case: str) -> DenseNet:
    torch.manual_seed(0)
    return randomise_batch_norms(SMALL[case]())


def image(model: DenseNet, batch: int = 2, size: int = 40) -> Tensor:
    """Channels-last: dropout draws in the order of memory, and the twin keeps its input's."""
    x = torch.randn(batch, model.features.conv0.in_channels, size, size - 8)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", SMALL)
@torch.no_grad()
def test_eval_equals_twin_for_several_batches(case: str) -> None:
    ours = make(case).eval()
    twin = plain_twin(ours)
    with fastcnn.use_backend("cpp", strict=True):
        for batch in (2, 5, 1):
            x = image(ours, batch)
            expected = twin(x)
            first = ours(x)
            kept = first.clone()
            assert relative_error(first, expected) <= 1e-5
            assert torch.equal(ours(x.contiguous()), first)
            features = ours.forward_features(x)
            other = ours.forward_features(-x)
            assert torch.equal(first, kept)
            assert not torch.equal(features, other)
            assert torch.equal(ours.forward_features(x), features)  # no forward writes what another returned


@pytest.mark.parametrize("case", SMALL)
def test_one_training_step_equals_twin(case: str) -> None:
    ours = make(case).train()
    assert_step_equal(ours, plain_twin(ours), image(ours, 4), torch.tensor([0, 3, 6, 2]))


def test_eval_with_gradients_equals_twin() -> None:
    ours = make("bc").eval()
    models = [copy.deepcopy(ours).double(), plain_twin(ours).double()]
    x = image(ours).double()
    with fastcnn.use_backend("reference"):
        for model in models:
            model(x).square().sum().backward()
    for mine, theirs in zip(*(m.parameters() for m in models), strict=True):
        assert relative_error(mine.grad, theirs.grad) <= 1e-11


@pytest.mark.parametrize("case", ["plain", "dropout"])
@torch.no_grad()
def test_train_mode_without_gradients_grows_the_buffer_too(case: str) -> None:
    ours = make(case).train()
    twin, x = plain_twin(ours), image(ours, 4)
    outputs = []
    for model in (ours, twin):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert relative_error(*outputs) <= 1e-5
    assert relative_error(ours.features.norm5.running_var, twin.features.norm5.running_var) <= 1e-5


@pytest.mark.parametrize("case", ["imagenet", "bc", "plain"])
def test_bf16(case: str) -> None:
    model = make(case)
    assert_bf16_accurate(model, plain_twin(model), image(model, 4))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_autocast(training: bool) -> None:
    model = make("bc").train(training)
    twin, exact = plain_twin(model), plain_twin(model).double()
    x = image(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), twin(x)
    assert_accurate(actual, expected, exact(x.double()))


# ---- memory_efficient ------------------------------------------------------------------------------------------------


def pair_of(case: str) -> tuple[DenseNet, DenseNet]:
    """The same network, plain and memory-efficient."""
    plain, efficient = make(case), make(case)
    for module in efficient.modules():
        if isinstance(module, (DenseBlock, DenseLayer)):
            module.memory_efficient = True
    return plain, efficient


def test_memory_efficient_reaches_every_layer() -> None:
    with torch.device("meta"):
        model = fastcnn.create_model("densenet121", memory_efficient=True)
        plain = fastcnn.create_model("densenet121")
    kinds = (DenseBlock, DenseLayer)
    flags = [module.memory_efficient for module in model.modules() if isinstance(module, kinds)]
    assert flags == [True] * (4 + 58)
    assert not any(module.memory_efficient for module in plain.modules() if isinstance(module, kinds))
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("case", SMALL)
def test_memory_efficient_step_equals_plain(case: str) -> None:
    """Also of the statistics: a second update would show in them, and in the count of batches."""
    results = []
    x, target = image(make(case), 4), torch.tensor([0, 3, 6, 2])
    for model in pair_of(case):
        with fastcnn.use_backend("cpp", strict=True):
            step = training_step(model.train(), x, target)
        batches = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert set(batches) == {1}
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        results.append(step)
    for key, value in results[0].items():
        assert relative_error(results[1][key], value) <= 1e-6, key
    assert torch.equal(results[1]["buffers"], results[0]["buffers"])


@pytest.mark.parametrize("case", SMALL)
def test_memory_efficient_step_equals_twin(case: str) -> None:
    _, ours = pair_of(case)
    assert_step_equal(ours.train(), plain_twin(ours), image(ours, 4), torch.tensor([0, 3, 6, 2]))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps of one forward pass, parameters and buffers aside; a storage kept twice counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize(("bn_size", "kept_channels"), [(4, 4 * 8 + 8), (0, 8)])
def test_memory_efficient_keeps_less(bn_size: int, kept_channels: int) -> None:
    """A layer's own channels (and its 3x3's input); plain, each layer keeps all channels before it, twice."""
    layers, x = 6, torch.randn(2, 16, 12, 10, requires_grad=True).contiguous(memory_format=torch.channels_last)
    pixel_bytes = 2 * 12 * 10 * 4
    sizes = []
    for memory_efficient in (False, True):
        block = DenseBlock(layers, 16, 8, bn_size, 0.0, memory_efficient)
        sizes.append(saved_bytes(block.train(), x))
    inputs = sum(16 + 8 * i for i in range(layers))
    assert sizes[0] >= 2 * inputs * pixel_bytes
    small = 4096  # statistics, and the checkpoint's own notes
    assert sizes[1] <= (16 + layers * kept_channels) * pixel_bytes + small


def test_memory_efficient_recomputes_on_the_same_backend() -> None:
    _, model = pair_of("bc")
    model.train()
    calls: list[tuple[str, str]] = []

    def note(call: Call) -> None:
        calls.append((call.operator, call.backend))
        call.run()

    with fastcnn.use_backend("reference"):
        loss = model(image(model)).sum()
    with intercept(note):
        loss.backward()
    assert calls.count(("conv2d", "reference")) == 9  # the 1x1 of each of the nine layers
    assert {backend for _, backend in calls} == {"reference"}


def test_memory_efficient_graph_is_used_twice() -> None:
    """By two backward passes, and by the gradient of a gradient."""
    results = []
    x, target = image(make("bc")).double(), torch.tensor([2, 5])
    for model in pair_of("bc"):
        model.double().train()
        weight = model.features.denseblock1.denselayer2.conv1.weight
        with fastcnn.use_backend("reference"):
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward(retain_graph=True)
            once = weight.grad.clone()
            loss.backward(retain_graph=True)
            assert relative_error(weight.grad, 2 * once) <= 1e-12
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        results.append((once, second))
        assert model.features.norm5.num_batches_tracked == 1
        assert model.features.denseblock1.denselayer2.norm1.num_batches_tracked == 1
    for plain, efficient in zip(*results, strict=True):
        assert relative_error(efficient, plain) <= 1e-10


def test_memory_efficient_leaves_evaluation_alone() -> None:
    plain, efficient = pair_of("bc")
    x = image(plain)
    with torch.no_grad():
        assert torch.equal(efficient.eval()(x), plain.eval()(x))
    norm, (before, after) = efficient.features.denseblock1.denselayer2.norm1, (x.clone() for _ in range(2))
    mean = norm.running_mean.clone()
    for model, input in ((plain, before), (efficient, after)):  # frozen statistics, with gradients
        model(input.requires_grad_()).square().sum().backward()
    assert relative_error(after.grad, before.grad) <= 1e-5
    assert torch.equal(norm.running_mean, mean)


def test_memory_efficient_honours_hooks_and_dropout() -> None:
    _, model = pair_of("dropout")
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    torch.manual_seed(1)
    model.train()(image(model)).sum().backward()
    assert set(seen) == {name for name, _ in model.named_modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)


def test_memory_efficient_under_autocast_and_compile() -> None:
    plain, efficient = (model.train() for model in pair_of("bc"))
    x, gradients = image(plain), []
    compiled = torch.compile(copy.deepcopy(efficient), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), copy.deepcopy(plain)(x)) <= 1e-5
    for model in (plain, efficient):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


# ---- the buffer ------------------------------------------------------------------------------------------------------


class Log(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bn_size", "calls"), [(4, ["conv2d", "conv2d_into"]), (0, ["conv2d_into"])])
@torch.no_grad()
def test_a_layer_is_its_convolutions_and_a_block_one_allocation(bn_size: int, calls: list[str]) -> None:
    block = randomise_batch_norms(DenseBlock(3, 16, 8, bn_size, 0.0)).eval()
    x = torch.randn(2, 16, 9, 7)
    expected = plain_twin(block)(x)
    block(x)  # folds
    with Log() as log:
        y = block(x)
    assert [n.removeprefix("fastcnn.") for n in log.names if n.startswith("fastcnn.")] == 3 * calls
    others = [n for n in log.names if not n.startswith("fastcnn.")]
    assert others.count("aten.empty.memory_format") == 1
    assert set(others) <= {"aten.empty.memory_format", "aten.slice.Tensor", "aten.copy_"}
    assert others.count("aten.copy_") == 1
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y[:, :16], x)
    assert relative_error(y, expected) <= 1e-6


@torch.no_grad()
def test_hooks_are_honoured() -> None:
    model, seen = make("bc").eval(), []
    x = image(model)
    expected = model(x)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    assert relative_error(model(x), expected) <= 1e-5
    assert set(seen) == {name for name, _ in model.named_modules()}


@torch.no_grad()
def test_a_hook_may_replace_a_layers_output() -> None:
    block = randomise_batch_norms(DenseBlock(3, 16, 8, 4, 0.0)).eval()
    x = torch.randn(2, 16, 9, 7)
    block.denselayer2.register_forward_hook(lambda module, args, output: output * 2)
    with torch.enable_grad():
        expected = block(x)  # joined by cat
    assert relative_error(block(x), expected) <= 1e-6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    model = make("bc").train(mode == "train")
    eager, x = copy.deepcopy(model), image(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        assert relative_error(compiled(x), eager(x)) <= 1e-5
        for m in (model, eager):
            m.features.norm5.weight.data.mul_(2)
        assert relative_error(compiled(x), eager(x)) <= 1e-5


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4, is 101"):
        cifar_densenet(101, 12, bottleneck=True)
    with pytest.raises(ValueError, match="compression must be"):
        DenseNet(compression=0)
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\)"):
        make("plain")(torch.empty(3, 32, 32))


@torch.no_grad()
def test_empty_batch() -> None:
    assert make("plain").eval()(torch.empty(0, 3, 32, 32)).shape == (0, 7)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_vmap_and_inference_mode() -> None:
    block = randomise_batch_norms(DenseBlock(3, 16, 8, 4, 0.0)).eval()
    x = torch.randn(3, 16, 9, 7)
    expected = block(x)
    mapped = torch.func.vmap(lambda one: block(one[None])[0])(x)
    assert relative_error(mapped, expected) <= 1e-6
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
