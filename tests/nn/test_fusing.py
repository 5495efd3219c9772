"""conv_bn and its siblings: the same results as the modules called one by one, in one operator call where possible."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn.nn as fnn
from fastcnn.nn import bn_act, conv_act, conv_bn, linear_act

SHAPE = (2, 8, 7, 6)


class OperatorLog(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))

    @property
    def fastcnn(self) -> list[str]:
        return [name for name in self.names if name.startswith("fastcnn.")]


class Pair(nn.Module):
    """A convolution, a batch norm and a ReLU, fused or one by one."""

    def __init__(
        self, fused: bool = True, conv: dict[str, Any] | None = None, bn: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, **{"padding": 1, "bias": False, **(conv or {})})
        self.bn = nn.BatchNorm2d(8, **(bn or {}))
        self.relu = nn.ReLU(inplace=True)
        self.fused = fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused:
            return conv_bn(x, self.conv, self.bn, residual=residual, activation=self.relu)
        y = self.bn(self.conv(x))
        return self.relu(y if residual is None else y + residual)


def make_pair(**options: Any) -> Pair:
    torch.manual_seed(0)
    pair = Pair(**options)
    if pair.bn.running_mean is not None:
        randomise_batch_norms(pair)
    return pair.eval()


def unfused(pair: Pair) -> Pair:
    other = copy.deepcopy(pair)
    other.fused = False
    return other


VARIANTS = {
    "plain": {},
    "conv-bias": {"conv": {"bias": True}},
    "groups-reflect": {"conv": {"groups": 2, "padding_mode": "reflect"}},
    "eps": {"bn": {"eps": 0.1}},
    "no-affine": {"bn": {"affine": False}},
    "no-affine-conv-bias": {"bn": {"affine": False}, "conv": {"bias": True}},
    "no-running": {"bn": {"track_running_stats": False}},
}


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_statistics(variant: str, training: bool, with_residual: bool) -> None:
    ours = make_pair(**VARIANTS[variant]).train(training)
    models = [ours, unfused(ours), unfused(ours).double()]
    x, r, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    results = []
    for model in models:
        dtype = model.conv.weight.dtype
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in ((x, r) if with_residual else (x,))]
        y = model(*inputs)
        y.backward(grad.to(dtype))
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        results.append([y, *(i.grad for i in inputs), *(p.grad for p in model.parameters()), *buffers])
    for ours_, theirs, exact in zip(*results, strict=True):
        assert_accurate(ours_, theirs, exact)
    if ours.bn.num_batches_tracked is not None:
        assert ours.bn.num_batches_tracked == models[1].bn.num_batches_tracked == int(training)


def test_eval_is_one_operator_and_train_has_no_separate_epilogue() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        pair(x)
        with OperatorLog() as log:
            pair(x, torch.randn(SHAPE))
        assert [n for n in log.names if not n.startswith("aten.randn")] == ["fastcnn.conv2d"]
        with OperatorLog() as log:
            pair.train()(x, x)
        assert log.fastcnn == ["fastcnn.conv2d", "fastcnn.batch_statistics", "fastcnn.batch_norm"]
        assert not any("relu" in n for n in log.names)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_frozen_batch_norm_in_a_training_network(training: bool) -> None:
    """bn.eval() and no gradient for gamma and beta: the usual way to fine-tune a detector."""
    ours = make_pair().train(training)
    ours.bn.eval().requires_grad_(False)
    models = [ours, unfused(ours), unfused(ours).double()]
    x = torch.randn(SHAPE)
    for model in models:
        model(x.to(model.conv.weight.dtype)).square().sum().backward()
    assert_accurate(*[m.conv.weight.grad for m in models])


# ---- the cache ---------------------------------------------------------------------------------------------------


def _in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


def _data(tensor: Tensor) -> None:
    tensor.data.mul_(1.5)


def _new_data(tensor: Tensor) -> None:
    tensor.data = tensor.data * 1.5


def _numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[:] *= 1.5


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "in_place": _in_place, "data_write": _data, "new_data": _new_data, "numpy": _numpy,
}  # fmt: skip
TENSORS = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def tensors_of(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TENSORS)
def test_every_change_is_noticed(name: str, change: str, inference: bool) -> None:
    pair, x = make_pair(conv={"bias": True}), torch.randn(SHAPE)
    with torch.inference_mode() if inference else torch.no_grad():
        before = pair(x)
        CHANGES[change](tensors_of(pair)[name])
        after = pair(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, unfused(pair)(x), rtol=1e-4, atol=1e-5)


def _replaced_parameter(pair: Pair) -> None:
    pair.bn.weight = nn.Parameter(pair.bn.weight.detach() * 1.5)


def _replaced_module(pair: Pair) -> None:
    pair.bn = randomise_batch_norms(nn.BatchNorm2d(8), seed=7).eval()


def _loaded(pair: Pair) -> None:
    pair.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in pair.state_dict().items()})


def _assigned(pair: Pair) -> None:
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in pair.state_dict().items()}
    pair.load_state_dict(state, assign=True)


def _trained(pair: Pair) -> None:
    pair.train()(torch.randn(SHAPE) * 3)
    pair.eval()


def _optimised(pair: Pair) -> None:
    pair(torch.randn(SHAPE)).sum().backward()
    torch.optim.SGD(pair.parameters(), lr=0.1).step()


def _eps(pair: Pair) -> None:
    pair.bn.eps = 0.7


def _to_and_back(pair: Pair) -> None:
    pair.to(torch.float64).to(torch.float32)
    _in_place(pair.bn.running_var)


@pytest.mark.parametrize(
    "change", [_replaced_parameter, _replaced_module, _loaded, _assigned, _trained, _optimised, _eps, _to_and_back]
)
def test_every_change_of_the_modules_is_noticed(change: Callable[[Pair], None]) -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        before = pair(x)
    change(pair)
    with torch.no_grad():
        after = pair(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, unfused(pair)(x), rtol=1e-4, atol=1e-5)


def test_functional_call_uses_the_given_parameters() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        pair(x)
        given = {k: v * 1.5 for k, v in pair.state_dict().items() if v.is_floating_point()}
        result = torch.func.functional_call(pair, given, x)
        torch.testing.assert_close(result, torch.func.functional_call(unfused(pair), given, x), rtol=1e-4, atol=1e-5)


WIDE = (2, 16, 4, 4)  # and 512 output channels: more values than are all looked at


def wide_pair() -> Pair:
    torch.manual_seed(0)
    pair = Pair(conv={"bias": True}).eval()
    pair.conv, pair.bn = nn.Conv2d(16, 512, 3, padding=1), randomise_batch_norms(nn.BatchNorm2d(512)).eval()
    return pair


@pytest.mark.parametrize(
    ("name", "index"),
    [("conv.weight", (5,)), ("conv.weight", (slice(None), 5)), ("conv.bias", (5,))]
    + [(name, (5,)) for name in TENSORS if name.startswith("bn")],
)
def test_pruning_through_data_is_noticed(name: str, index: tuple[int | slice, ...]) -> None:
    """One filter, input channel or scale set to a value behind autograd's back, as pruning recipes do."""
    pair, x = wide_pair(), torch.randn(WIDE)
    with torch.no_grad():
        pair(x)
        tensors_of(pair)[name].data[index] = 3.0
        torch.testing.assert_close(pair(x), unfused(pair)(x), rtol=1e-4, atol=1e-4)


def test_single_writes_to_inference_tensors_are_noticed() -> None:
    with torch.inference_mode():
        pair, x = wide_pair(), torch.randn(WIDE)
        pair(x)
        pair.conv.weight[5, 3, 1, 1] += 30
        torch.testing.assert_close(pair(x), unfused(pair)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_optimizer_steps_are_noticed_without_versions(options: dict[str, bool], monkeypatch: Any) -> None:
    """Fused optimizers count no version; on a GPU nothing else tells that they wrote."""
    from fastcnn.backends import derived

    monkeypatch.setattr(derived._native, "tensor_states", lambda *args: b"")
    pair, x = make_pair(conv={"bias": True}), torch.randn(SHAPE)
    pair(x).square().sum().backward()
    with torch.no_grad():
        pair(x)
        torch.optim.SGD(pair.parameters(), lr=0.01, **options).step()
        torch.testing.assert_close(pair(x), unfused(pair)(x), rtol=1e-4, atol=1e-5)


def test_traced_modules_follow_their_statistics() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        pair(x)
        traced = torch.jit.trace(pair, x)
        _in_place(pair.bn.running_var)
        torch.testing.assert_close(traced(x), unfused(pair)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ensembles_by_vmap() -> None:
    pairs, x = [make_pair(), make_pair()], torch.randn(SHAPE)
    _in_place(pairs[1].conv.weight), _in_place(pairs[1].bn.running_var)
    parameters, buffers = torch.func.stack_module_state(pairs)
    with torch.no_grad():
        result = torch.func.vmap(lambda p, b: torch.func.functional_call(pairs[0], (p, b), (x,)))(parameters, buffers)
        expected = torch.stack([unfused(pair)(x) for pair in pairs])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_cache_leaves_no_trace_in_the_module() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    keys, attributes = list(pair.state_dict()), [set(m.__dict__) for m in pair.modules()]
    with torch.no_grad():
        expected = pair(x)
        assert list(pair.state_dict()) == keys
        assert [set(m.__dict__) for m in pair.modules()] == attributes
        for copied in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
            assert torch.equal(copied(x), expected)
            _in_place(copied.bn.weight)
            assert not torch.allclose(copied(x), expected)
        assert torch.equal(pair(x), expected)


def test_cache_made_in_inference_mode_serves_training_later() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    pair.bn.requires_grad_(False)
    with torch.inference_mode():
        pair(x)
    pair(x).sum().backward()  # saves the cached vectors for backward
    assert pair.conv.weight.grad is not None


def test_cache_dies_with_the_module() -> None:
    from fastcnn.backends import derived

    pair = make_pair()
    derived.clear()
    with torch.no_grad():
        pair(torch.randn(SHAPE))
    assert derived._entries
    del pair
    assert not derived._entries


# ---- modules that must not be swallowed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "bn", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run(name: str, kind: str) -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    pair.relu.inplace = False  # in-place and backward hooks do not go together in PyTorch either
    calls: list[str] = []
    handle = getattr(getattr(pair, name), f"register_{kind}_hook")(lambda module, *_: calls.append(name))
    x.requires_grad_()
    y = pair(x, x)
    y.sum().backward()
    assert calls == [name]
    torch.testing.assert_close(y, unfused(pair)(x, x), rtol=1e-4, atol=1e-5)
    handle.remove()
    with torch.no_grad(), OperatorLog() as log:
        pair(x)
    assert log.fastcnn == ["fastcnn.conv2d"]


def test_hook_may_change_the_result() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    pair.bn.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        assert torch.equal(pair(x), F.relu(2 * F.batch_norm(pair.conv(x), *_statistics(pair.bn))))


def _statistics(bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    return bn.running_mean, bn.running_var, bn.weight, bn.bias


def test_global_hooks_see_every_module() -> None:
    pair, x = make_pair(), torch.randn(SHAPE)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        pair(x)
    finally:
        handle.remove()
    assert seen == [pair.conv, pair.bn, pair.relu, pair]


@pytest.mark.parametrize(
    "reparametrise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old_spectral_norm", "pruning"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_convolutions(reparametrise: Callable[[nn.Module], nn.Module], training: bool) -> None:
    pair, twin, x = make_pair(), make_pair(fused=False), torch.randn(SHAPE)
    for model in (pair, twin):
        torch.manual_seed(1)
        reparametrise(model.conv)
        model.train(training)
    for _ in range(2):
        y, expected = pair(x), twin(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(z.square().sum(), list(m.conv.parameters())) for z, m in ((y, pair), (expected, twin))]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_other_types_and_overridden_forwards_are_called() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        plain = pair.conv
        pair.conv = Doubled(8, 8, 3, padding=1, bias=False)
        pair.conv.load_state_dict(plain.state_dict())
        torch.testing.assert_close(pair(x), unfused(pair)(x), rtol=1e-4, atol=1e-5)
        pair.conv, pair.bn = plain, nn.Identity()
        torch.testing.assert_close(pair(x), F.relu(plain(x)), rtol=1e-4, atol=1e-5)
        pair = make_pair()
        pair.bn.forward = lambda input: input + 1  # type: ignore[method-assign]
        torch.testing.assert_close(pair(x), F.relu(pair.conv(x) + 1), rtol=1e-4, atol=1e-5)
        pair = make_pair()
        pair.relu = nn.Hardtanh()
        torch.testing.assert_close(pair(x, x), unfused(pair)(x, x), rtol=1e-4, atol=1e-5)


# ---- outputs, dtypes, compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "none", nn.ReLU(), nn.Hardtanh()], ids=str)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_out_is_written(activation: str | nn.Module, hooked: bool) -> None:
    pair = make_pair()
    if hooked:
        pair.conv.register_forward_hook(lambda *_: None)
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    wide = torch.full((2, 20, 7, 6), 9.0).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv_bn(x, pair.conv, pair.bn, residual=x, activation=activation)
        out = wide[:, 4:12]
        assert conv_bn(x, pair.conv, pair.bn, residual=x, activation=activation, out=out) is out
    assert torch.equal(wide[:, 4:12], expected)
    assert (wide[:, :4] == 9).all()
    assert (wide[:, 12:] == 9).all()


def test_unknown_activation() -> None:
    pair = make_pair()
    for _ in range(2):
        with pytest.raises(ValueError, match="activation must be"):
            conv_bn(torch.randn(SHAPE), pair.conv, pair.bn, activation="gelu")
        pair.conv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, training: bool) -> None:
    exact = make_pair(conv={"bias": True}).train(training).to(dtype)
    ours, theirs, exact = exact, unfused(exact), unfused(exact).double()
    x = torch.randn(SHAPE, dtype=dtype)
    with torch.no_grad():
        assert_accurate(ours(x, x), theirs(x, x), exact(x.double(), x.double()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_autocast(training: bool, residual_dtype: torch.dtype) -> None:
    ours = make_pair().train(training)
    theirs, exact = unfused(ours), unfused(ours).double()
    x, r = torch.randn(SHAPE), torch.randn(SHAPE).to(residual_dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x, r), theirs(x, r)
    assert y.dtype == expected.dtype
    assert relative_error(y, exact(x.double(), r.double())) < 2e-2


@pytest.mark.parametrize("mode", ["eval", "eval-grad", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    pair, x = make_pair(conv={"bias": True}).train(mode == "train"), torch.randn(SHAPE)
    eager = copy.deepcopy(pair)
    compiled = torch.compile(pair, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode != "eval"):
        for _ in range(2):
            y, expected = compiled(x, x), eager(x, x)
            torch.testing.assert_close(y, expected)
            if mode != "eval":
                grads = [
                    torch.autograd.grad(z.square().sum(), list(m.parameters()))
                    for z, m in ((y, pair), (expected, eager))
                ]
                torch.testing.assert_close(*grads)
            _data(pair.bn.weight), _data(eager.bn.weight)


def test_fake_tensors_are_not_cached() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        pair = Pair().eval()
        assert pair(torch.empty(SHAPE)).shape == SHAPE


def test_fake_results_do_not_reach_real_calls() -> None:
    from torch._subclasses import FakeTensorMode

    pair, x = make_pair(), torch.randn(SHAPE)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert pair(mode.from_tensor(x)).shape == SHAPE
        torch.testing.assert_close(pair(x), unfused(pair)(x), rtol=1e-4, atol=1e-5)


def test_siblings() -> None:
    torch.manual_seed(0)
    conv, bn, linear = nn.Conv2d(8, 8, 3, padding=1), randomise_batch_norms(nn.BatchNorm2d(8)), fnn.Linear(6, 5)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for training in (True, False):
            bn.train(training)
            expected = F.relu(copy.deepcopy(bn)(x) + x)
            torch.testing.assert_close(bn_act(x, bn, residual=x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(conv_act(x, conv), F.relu(conv(x)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(conv_act(x, conv, activation=nn.Tanh()), conv(x).tanh(), rtol=1e-4, atol=1e-5)
        expected = F.relu(F.linear(x, linear.weight, linear.bias))
        torch.testing.assert_close(linear_act(x, linear), expected, rtol=1e-4, atol=1e-5)
        linear.register_forward_hook(lambda module, args, output: output + 1)
        expected = F.linear(x, linear.weight, linear.bias) + 1
        torch.testing.assert_close(linear_act(x, linear, activation="none"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_conv_act_scales_the_branch_and_not_the_residual(dtype: torch.dtype, hooked: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, dtype=dtype)
    x, residual = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)

    def plain(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(0.3 * F.conv2d(x, conv.weight, conv.bias, padding=1) + residual)

    wide = copy.deepcopy(conv).double()
    expected, exact = plain(conv, x, residual), plain(wide, x.double(), residual.double())
    gradients = [torch.autograd.grad(y.sum(), tuple(c.parameters())) for y, c in ((expected, conv), (exact, wide))]
    if hooked:
        conv.register_forward_hook(lambda *_: None)
    with OperatorLog() as log:
        actual = conv_act(x, conv, residual=residual, branch_scale=0.3)
    assert log.fastcnn == ([] if hooked else ["fastcnn.conv2d"])
    assert_accurate(actual, expected, exact)
    for results in zip(torch.autograd.grad(actual.sum(), tuple(conv.parameters())), *gradients, strict=True):
        assert_accurate(*results)
