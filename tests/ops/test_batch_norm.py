"""batch_norm, channel_affine, batch_statistics and fold_batch_norm on the C++ backend against float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.gradients import assert_gradients, assert_registered, leaf
from support.layout import LAYOUTS, GuardedSlice, sliced
from torch.testing._internal.common_methods_invocations import op_db

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (2, 1, 1, 1), (2, 3, 5, 7), (1, 13, 1, 4), (3, 16, 3, 3), (1, 24, 13, 11), (1, 67, 9, 2), (4, 259, 7, 5),
    (1, 65, 41, 37), (2, 3, 67, 71),
]  # fmt: skip


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    torch.manual_seed(0)
    with fastcnn.use_backend("cpp", strict=True):
        yield


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """running_mean, running_var, weight, bias."""
    mean, weight, bias = (torch.randn(channels) for _ in range(3))
    return [t.to(dtype) for t in (mean, torch.rand(channels) + 0.5, weight, bias)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, training):
    x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    values = parameters(shape[1])
    for layout in (torch.contiguous_format, torch.channels_last):
        x, r = x.contiguous(memory_format=layout), r.contiguous(memory_format=layout)
        stats, theirs, exact = ([v.clone() for v in values] for _ in range(3))
        exact = [v.double() for v in exact]
        ours = ops.batch_norm(x, *stats, training, residual=r, activation="relu")
        reference = F.relu(F.batch_norm(x, *theirs, training) + r)
        assert_accurate(ours, reference, F.relu(F.batch_norm(x.double(), *exact, training) + r.double()))
        assert ours.stride() == reference.stride()
        for mine, other, true in zip(stats[:2], theirs[:2], exact[:2], strict=True):
            assert_accurate(mine, other, true)
        plain = ops.batch_norm(x, *stats, training)
        assert_accurate(plain, F.batch_norm(x, *stats, training), F.batch_norm(x.double(), *exact, training))


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 5, 7, 2), (2, 37, 9, 11), (4, 64, 16, 16)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_costs_nothing_in_training(shape, offset, layout):
    # PyTorch's own error grows with mean / deviation, to 1e-3 here; what is left of ours is the result's rounding.
    x = LAYOUTS[layout](torch.randn(shape) + offset * torch.randn(shape[1], 1, 1))
    _, _, weight, bias = parameters(shape[1])
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    plain = F.batch_norm(x.double(), None, None, None, None, True)
    for ours, wanted in (
        (ops.batch_norm(x, None, None, weight, bias, True), exact),
        (ops.batch_norm(x, None, None, None, None, True), plain),
        (ops.batch_norm(x, None, None, weight, bias, True, residual=x * 0, activation="relu"), exact.relu()),
    ):
        assert_accurate(ours, wanted.float(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_values_in_training(dtype):
    # Of four values the mean may be much larger than the deviation: no digits to lose in x * scale + shift.
    errors, theirs = [], []
    for seed in range(40):
        x = torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
        _, _, weight, bias = parameters(8)
        exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
        errors.append(relative_error(ops.batch_norm(x, None, None, weight, bias, True), exact))
        theirs.append(relative_error(F.batch_norm(x, None, None, weight, bias, True), exact))
    assert sum(errors) <= 1.05 * sum(theirs)
    assert max(errors) <= 1.05 * max(theirs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype, training):
    x = LAYOUTS[layout](torch.randn(2, 11, 5, 6).to(dtype))
    values = parameters(11)
    ours = ops.batch_norm(x, *[v.clone() for v in values], training, activation="relu")
    theirs = F.relu(F.batch_norm(x, *values, training))
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 7), torch.randn(3, 7, 9), torch.randn(3, 7, 2, 3, 4), torch.randn(2, 7, 2, 2, 2, 2),
        torch.randn(7, 5).t(), torch.randn(3, 9, 7).transpose(1, 2),
        torch.randn(3, 7, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(3, 2, 7, 4, 3).permute(0, 2, 1, 3, 4),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.stride()}",
)  # fmt: skip
def test_any_number_of_dimensions(x, training):
    values = parameters(7)
    residual = torch.randn(x.shape)
    ours = ops.batch_norm(x, *[v.clone() for v in values], training, residual=residual)
    theirs = F.batch_norm(x, *values, training)
    torch.testing.assert_close(ours, theirs + residual)
    assert ours.stride() == theirs.stride()
    out = torch.empty(x.shape)
    assert ops.batch_norm(x, *values, training, out=out) is out
    torch.testing.assert_close(out, F.batch_norm(x, *values, training))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_low_precision_parameters(parameter_dtype, training):
    x = torch.randn(4, 6, 5, 5).bfloat16()
    values = parameters(6, parameter_dtype)
    mine, theirs = [v.clone() for v in values], [v.clone() for v in values]
    # PyTorch rounds the batch's statistics to the parameters' dtype; fastcnn keeps them in fp32.
    torch.testing.assert_close(
        ops.batch_norm(x, *mine, training), F.batch_norm(x, *theirs, training), rtol=2e-2, atol=2e-2
    )
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == parameter_dtype
        torch.testing.assert_close(a, b)


def test_missing_parameters():
    x = torch.randn(3, 5, 4, 4)
    mean, var, weight, bias = parameters(5)
    torch.testing.assert_close(ops.batch_norm(x, mean, var), F.batch_norm(x, mean, var))
    torch.testing.assert_close(ops.batch_norm(x, mean, var, bias=bias), F.batch_norm(x, mean, var, bias=bias))
    torch.testing.assert_close(
        ops.batch_norm(x, None, None, weight, None, True), F.batch_norm(x, None, None, weight, None, True)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_follow_pytorch(momentum):
    mine, theirs = parameters(9), None
    theirs = [v.clone() for v in mine]
    for _ in range(4):
        x = torch.randn(3, 9, 4, 5) * 2 + 1
        ops.batch_norm(x, *mine, True, momentum)
        F.batch_norm(x, *theirs, True, momentum)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)], ids=str)
def test_empty_batch_leaves_statistics_alone(shape):
    x = torch.randn(shape, requires_grad=True)
    values = parameters(4)
    weight = values[2].requires_grad_()
    before = [v.clone() for v in values]
    y = ops.batch_norm(x, *values, True)
    assert y.shape == shape
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    y.sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_out(dtype, training):
    x, r = torch.randn(2, 9, 4, 3).to(dtype), torch.randn(2, 9, 4, 3).to(dtype)
    values = parameters(9)

    def run(x, r, out=None):
        return ops.batch_norm(x, *[v.clone() for v in values], training, residual=r, activation="relu", out=out)

    expected = run(x, r)
    target = GuardedSlice((2, 9, 4, 3), dtype)
    assert run(sliced(x), sliced(r), target.view) is target.view
    assert torch.equal(target.view, expected)
    target.assert_guards_intact()
    for layout in LAYOUTS.values():
        a = layout(x).clone(memory_format=torch.preserve_format)
        assert torch.equal(run(a, r, a), expected)
        b = layout(r).clone(memory_format=torch.preserve_format)
        assert torch.equal(run(x, b, b), expected)


# ---- batch_statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 1, 1), (2, 600, 3, 3), (64, 17, 17, 19)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_statistics(shape, dtype, layout):
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    mean, var = ops.batch_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert mean.dtype == var.dtype == torch.float32
    # A mean near zero is as exact as the values allow: relative to their size, not to its own.
    assert ((mean - exact_mean).abs() <= 5e-7 * (exact_mean.abs() + exact_var.sqrt())).all()
    assert_accurate(var, exact_var.float(), exact_var)


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e5])
@pytest.mark.parametrize("outlier", [False, True])
def test_statistics_of_large_means(offset, outlier):
    x = (torch.randn(3, 37, 29, 31, dtype=torch.float64) + offset).float()
    if outlier:
        x[0, :, 0, 0] = -offset
    mean, var = ops.batch_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


def test_statistics_do_not_depend_on_threads():
    x, threads = torch.randn(5, 300, 23, 29) + 3, torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(torch.stack(ops.batch_statistics(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_statistics_of_constants_and_special_values():
    x = torch.full((2, 20, 9, 9), 0.1)
    mean, var = ops.batch_statistics(x)
    assert torch.equal(mean, torch.full((20,), 0.1))
    assert (var < 1e-15).all()
    assert (var >= 0).all()
    x[0, 3, 2, 2], x[1, 5, 1, 1] = float("nan"), float("inf")
    mean, var = ops.batch_statistics(x)
    assert mean[3].isnan()
    assert var[3].isnan()
    assert mean[5] == float("inf")
    assert var[5].isnan()
    assert mean[[i for i in range(20) if i not in (3, 5)]].isfinite().all()
    assert torch.stack(ops.batch_statistics(torch.empty(0, 4, 2, 2))).isnan().all()


# ---- channel_affine, fold_batch_norm -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_affine(shape, dtype):
    x = torch.randn(shape).to(dtype)
    a, b = torch.randn(shape[1]), torch.randn(shape[1]).to(dtype)
    wide = (-1, 1, 1)
    for scale, shift in ((a, b), (a, None), (None, b), (None, None)):
        exact = x.double() * (1 if scale is None else scale.double().view(wide))
        exact = exact + (0 if shift is None else shift.double().view(wide))
        for layout in (LAYOUTS["channels_last"], LAYOUTS["channel_slice"]):
            assert_accurate(ops.channel_affine(layout(x), scale, shift), exact.to(dtype), exact)
        assert_accurate(ops.channel_affine(x, scale, shift, activation="relu"), exact.relu().to(dtype), exact.relu())


def test_nan_and_infinity_pass():
    x = torch.randn(2, 18, 3, 3)
    x[0, 1], x[0, 2], x[0, 17] = float("nan"), float("inf"), -float("inf")
    mean, var, weight, bias = parameters(18)
    ours, theirs = (
        ops.batch_norm(x, mean, var, weight, bias, activation="relu"),
        F.batch_norm(x, mean, var, weight, bias).relu(),
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(
        ops.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True), equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fold_batch_norm(dtype):
    mean, var, weight, bias = parameters(6, dtype)
    conv_bias = torch.randn(6).to(dtype)
    x = torch.randn(2, 6, 3, 3).double()
    for w, b, c in ((weight, bias, None), (weight, bias, conv_bias), (None, None, None), (weight, None, conv_bias)):
        scale, shift = ops.fold_batch_norm(mean, var, w, b, 1e-3, c)
        assert scale.dtype == shift.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = [None if t is None else t.double() for t in (mean, var, w, b)]
        biased = x if c is None else x + c.double().view(-1, 1, 1)
        expected = F.batch_norm(biased, *wide, eps=1e-3)
        torch.testing.assert_close(
            x * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1), expected, rtol=1e-5, atol=1e-5
        )


# ---- gradients, registration, compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients(activation):
    x, w, b, r = leaf(3, 4, 3, 2), leaf(4), leaf(4), leaf(3, 4, 3, 2)
    mean, var = leaf(4), leaf(4, positive=True)
    assert_gradients(
        lambda x, w, b, r: ops.batch_norm(x, None, None, w, b, True, residual=r, activation=activation), x, w, b, r
    )
    assert_gradients(lambda x, m, v, w, b: ops.batch_norm(x, m, v, w, b, activation=activation), x, mean, var, w, b)
    assert_gradients(lambda x, w, b, r: ops.channel_affine(x, w, b, residual=r, activation=activation), x, w, b, r)


def test_gradients_of_other_forms():
    assert_gradients(lambda x: ops.batch_norm(x, None, None, None, None, True), leaf(3, 4, 5))
    assert_gradients(lambda x: ops.batch_norm(x, None, None, None, None, True), leaf(5, 3))
    assert_gradients(lambda x: torch.stack(ops.batch_statistics(x)), leaf(3, 4, 3, 2))
    mean, var = leaf(4), leaf(4, positive=True)
    assert_gradients(
        lambda m, v, w, c: torch.stack(ops.fold_batch_norm(m, v, w, None, 1e-5, c)), mean, var, leaf(4), leaf(4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_pytorch(dtype, parameter_dtype):
    if parameter_dtype not in (dtype, torch.float32):
        pytest.skip("PyTorch does not mix these")
    x = (torch.randn(4, 6, 5, 5) + 2).to(dtype).contiguous(memory_format=torch.channels_last)
    _, _, weight, bias = parameters(6, parameter_dtype)
    upstream = torch.randn(x.shape).to(dtype)
    results = []
    for function in (ops.batch_norm, F.batch_norm):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(leaves[0], None, None, leaves[1], leaves[2], True).relu()
        results.append(torch.autograd.grad(y, leaves, upstream))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_registration():
    x = torch.randn(2, 6, 4, 5)
    statistics = torch.ops.fastcnn.batch_statistics(x)
    a, b = torch.randn(6), torch.randn(6)
    namespace = torch.ops.fastcnn
    for layout in LAYOUTS.values():
        assert_registered(namespace.channel_affine.default, layout(x), a, b, layout(x), "relu")
    assert_registered(namespace.batch_statistics.default, x)
    torch.library.opcheck(namespace.batch_norm.default, (x, statistics, a, b, 1e-5, x, "relu"))
    recorded = [t.clone().requires_grad_() for t in (x, a, b)]
    torch.library.opcheck(namespace.batch_norm.default, (recorded[0], statistics, *recorded[1:], 1e-5, None, "none"))
    torch.library.opcheck(namespace.channel_affine_into.default, (torch.empty_like(x), x, a, b, None, "relu"))
    torch.library.opcheck(namespace.batch_statistics_into.default, (torch.empty(2, 6, dtype=torch.float64), x))
    torch.library.opcheck(
        namespace.batch_norm_into.default, (torch.empty_like(x), x, statistics, a, b, 1e-5, None, "relu")
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile(training):
    def function(x, mean, var, weight, bias):
        return ops.batch_norm(x, mean, var, weight, bias, training, residual=x, activation="relu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 4, 5)
    mine = [v.requires_grad_(i > 1) for i, v in enumerate(parameters(6))]
    theirs = [v.detach().clone() for v in mine]
    ours = compiled(x, *mine)
    torch.testing.assert_close(ours, F.relu(F.batch_norm(x, *theirs, training) + x))
    ours.sum().backward()
    torch.testing.assert_close([v.detach() for v in mine], theirs)
    assert mine[2].grad is not None


def test_autocast_changes_nothing():
    x = torch.randn(2, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for training in (False, True):
            ours = ops.batch_norm(x, *parameters(3), training)
            assert ours.dtype == F.batch_norm(x, *parameters(3), training).dtype == torch.float32


def test_messages():
    x = torch.randn(2, 3, 4, 5)
    values = parameters(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.batch_norm(torch.randn(1, 3, 1, 1), *values, True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.batch_norm(torch.randn(1, 3), *values, True)
    with pytest.raises(ValueError, match="running_mean and running_var must be given"):
        ops.batch_norm(x, None, None)
    with pytest.raises(ValueError, match=r"running_mean must have shape \(3,\)"):
        ops.batch_norm(x, *parameters(4))
    with pytest.raises(TypeError, match="weight must be"):
        ops.batch_norm(x, values[0], values[1], values[2].half())
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, ...\)"):
        ops.batch_norm(torch.randn(3), *values)
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        ops.batch_norm(x, *values, residual=torch.randn(2, 3, 4, 4))
    with pytest.raises(TypeError, match="residual must have the input's dtype"):
        ops.batch_norm(x, *values, residual=x.half())
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.channel_affine(x, None, None, activation="tanh")
    with pytest.raises(ValueError, match="scale must have shape"):
        ops.channel_affine(x, torch.randn(2), None)
    with pytest.raises(ValueError, match="out must have shape"):
        ops.channel_affine(x, None, None, out=torch.empty(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\)"):
        ops.batch_statistics(torch.randn(2, 3))
    with pytest.raises(TypeError, match="input must be a floating-point tensor"):
        ops.batch_statistics(torch.ones(2, 3, 1, 1, dtype=torch.int32))


def test_pytorchs_own_samples():
    info = next(op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
    count = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        mine, theirs = (
            [t.clone() if i < 2 and t is not None else t for i, t in enumerate(sample.args)] for _ in range(2)
        )
        ours, expected = (
            ops.batch_norm(sample.input, *mine, **sample.kwargs), F.batch_norm(sample.input, *theirs, **sample.kwargs)
        )  # fmt: skip
        torch.testing.assert_close(ours, expected)
        assert ours.stride() == expected.stride()
        torch.testing.assert_close(mine, theirs)
        leaves = [t for t in (sample.input, *sample.args) if t is not None and t.requires_grad]
        upstream = torch.randn_like(expected)
        got, wanted = (torch.autograd.grad(y, leaves, upstream, allow_unused=True) for y in (ours, expected))
        torch.testing.assert_close(got, wanted)
        count += 1
    assert count > 8
