"""The fused functions against the operators they replace, one after the other, in PyTorch and in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.gradients import assert_gradients, leaf
from support.layout import GuardedSlice

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    torch.manual_seed(0)
    with fastcnn.use_backend("cpp", strict=True):
        yield


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def statistics(channels: int) -> list[torch.Tensor]:
    """running_mean, running_var, weight, bias."""
    return [torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)]


# ---- conv_bn_relu, bottleneck_projection ---------------------------------------------------------------------------


def unfused(x, w, bn, conv_bias, residual, training, **geometry):
    y = F.batch_norm(F.conv2d(x, w, conv_bias, **geometry), *bn, training, 0.2, 1e-3)
    return F.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "r", "geometry"),
    [
        ((1, 3, 17, 13), 19, 3, {"stride": 2, "padding": 1}),
        ((2, 24, 7, 9), 31, 1, {}),
        ((2, 12, 9, 9), 18, 3, {"padding": 2, "dilation": 2, "groups": 3}),
        ((3, 7, 5, 5), 7, 3, {"padding": "same", "groups": 7}),
    ],
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_bn_relu(shape, k, r, geometry, dtype, training, with_residual):
    x = channels_last(*shape).to(dtype)
    w = torch.randn(k, shape[1] // geometry.get("groups", 1), r, r).to(dtype)
    bn, conv_bias = statistics(k), torch.randn(k).to(dtype)
    mine, theirs, exact = [v.clone() for v in bn], [v.clone() for v in bn], [v.double() for v in bn]
    size = F.conv2d(x, w, **geometry).shape
    residual = channels_last(*size).to(dtype) if with_residual else None
    ours = ops.conv_bn_relu(
        x, w, *mine, conv_bias=conv_bias, **geometry, training=training, momentum=0.2, eps=1e-3, residual=residual
    )
    reference = unfused(x, w, theirs, conv_bias, residual, training, **geometry)
    wide = [None if t is None else t.double() for t in (x, w, conv_bias, residual)]
    assert_accurate(ours, reference, unfused(wide[0], wide[1], exact, wide[2], wide[3], training, **geometry))
    assert ours.stride() == reference.stride()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_conv_bn_relu_into_a_slice():
    x, w, bn = channels_last(2, 8, 6, 5), torch.randn(11, 8, 3, 3), statistics(11)
    for training in (False, True):
        expected = ops.conv_bn_relu(x, w, *[v.clone() for v in bn], padding=1, training=training)
        target = GuardedSlice((2, 11, 6, 5), torch.float32)
        assert ops.conv_bn_relu(x, w, *bn, padding=1, training=training, out=target.view) is target.view
        assert torch.equal(target.view, expected)
        target.assert_guards_intact()


def test_conv_bn_relu_gradients():
    x, w, g, b, c, r = leaf(2, 2, 3, 3), leaf(3, 2, 3, 3), leaf(3), leaf(3), leaf(3), leaf(2, 3, 3, 3)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    for training in (False, True):
        assert_gradients(
            lambda x, w, g, b, r, training=training: ops.conv_bn_relu(
                x, w, mean.clone(), var.clone(), g, b, conv_bias=c.detach(), padding=1, training=training, residual=r
            ),
            x, w, g, b, r, fast=True,
        )  # fmt: skip


def test_bottleneck_projection():
    x, w, bn = channels_last(2, 16, 7, 6), torch.randn(24, 16, 1, 1), statistics(24)
    r = channels_last(2, 24, 4, 3)
    for training in (False, True):
        ours = ops.bottleneck_projection(x, w, *[v.clone() for v in bn], stride=2, residual=r, training=training)
        y = F.batch_norm(F.conv2d(x, w, stride=2), *[v.clone() for v in bn], training)
        torch.testing.assert_close(ours, F.relu(y + r), rtol=1e-4, atol=1e-4)
    plain = ops.bottleneck_projection(x, w, *bn, activation="none")
    torch.testing.assert_close(plain, F.batch_norm(F.conv2d(x, w), *bn), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"weight must be a 1x1 filter .* has shape \(24, 16, 3, 3\)"):
        ops.bottleneck_projection(x, torch.randn(24, 16, 3, 3), *bn)


# ---- inception_concat ----------------------------------------------------------------------------------------------


def inception(dtype=torch.float32, **options):
    x, y = channels_last(2, 12, 7, 9).to(dtype), channels_last(2, 5, 7, 9).to(dtype)
    inputs = [x, y, x, y]
    weights = [torch.randn(7, 12, 1, 1), torch.randn(9, 5, 3, 3), torch.randn(17, 12, 5, 5), torch.randn(3, 5, 1, 1)]
    weights = [w.to(dtype) for w in weights]
    biases = [torch.randn(7), None, torch.randn(17), torch.randn(3)]
    scales = [None, torch.randn(9), torch.randn(17), None]
    return inputs, weights, biases, {"scales": scales, "paddings": [0, 1, 2, "same"], **options}


def separately(inputs, weights, biases, *, scales, paddings):
    branches = []
    for x, w, b, s, p in zip(inputs, weights, biases, scales, paddings, strict=True):
        y = F.conv2d(x, w, padding=p)
        y = y if s is None else y * s.to(y.dtype).view(-1, 1, 1)
        branches.append(F.relu(y if b is None else y + b.to(y.dtype).view(-1, 1, 1)))
    return torch.cat(branches, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inception_concat(dtype):
    inputs, weights, biases, options = inception(dtype)
    exact = separately([x.double() for x in inputs], [w.double() for w in weights], biases, **options)
    reference = separately(inputs, weights, biases, **options)
    with fastcnn.exact():
        assert_accurate(ops.inception_concat(inputs, weights, biases, **options), reference, exact)
    ours = ops.inception_concat(inputs, weights, biases, **options)
    if dtype == torch.float32:
        assert relative_error(ours, exact) <= 1e-5  # what is stated of fast algorithms
    else:
        assert_accurate(ours, reference, exact)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    target = GuardedSlice(tuple(ours.shape), dtype)
    assert ops.inception_concat(inputs, weights, biases, **options, out=target.view) is target.view
    assert torch.equal(target.view, ours)
    target.assert_guards_intact()


def test_inception_concat_with_a_branch_that_only_pools():
    x, pooled = channels_last(1, 6, 9, 9), channels_last(1, 6, 4, 4)
    w = torch.randn(5, 6, 3, 3)
    ours = ops.inception_concat([x, pooled], [w, None], strides=[2, 1])
    torch.testing.assert_close(ours, torch.cat([F.conv2d(x, w, stride=2).relu(), pooled], 1), rtol=1e-4, atol=1e-4)


def test_inception_concat_records_gradients():
    inputs, weights, biases, options = inception()
    weights = [w.requires_grad_() for w in weights]
    ours = ops.inception_concat(inputs, weights, biases, **options)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = separately(inputs, weights, biases, **options)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            ops.inception_concat(inputs, weights, biases, **options), expected, rtol=1e-4, atol=1e-4
        )


def test_inception_concat_messages():
    x, w = channels_last(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with pytest.raises(ValueError, match="weights must have one entry for each of the 2 inputs, has 1"):
        ops.inception_concat([x, x], [w])
    with pytest.raises(ValueError, match="inputs must give outputs of one size"):
        ops.inception_concat([x, x], [w, w], paddings=[0, 1])
    with pytest.raises(ValueError, match="inputs must have at least one branch"):
        ops.inception_concat([], [])
    with pytest.raises(ValueError, match="out must have shape"):
        ops.inception_concat([x], [w], out=torch.empty(1, 3, 5, 5))
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a torch\.Tensor"):
        ops.inception_concat([x, None], [w, w])


# ---- dense_concat --------------------------------------------------------------------------------------------------


def dense_block(x, layers, buffer=None):
    features = x
    if buffer is not None:
        features = buffer[:, : x.shape[1]].copy_(x)
    for scale, shift, weight in layers:
        features = ops.dense_concat(
            features, weight, padding=1, input_scale=scale, input_shift=shift, input_activation="relu", buffer=buffer
        )
    return features


def plain_dense_block(x, layers):
    for scale, shift, weight in layers:
        scale, shift = (v.to(x.dtype).view(-1, 1, 1) for v in (scale, shift))
        x = torch.cat([x, F.conv2d(F.relu(x * scale + shift), weight, padding=1)], 1)
    return x


def dense_layers(channels, growth, count, dtype):
    widths = [channels + i * growth for i in range(count)]
    return [(torch.randn(c), torch.randn(c), (torch.randn(growth, c, 3, 3) / (3 * c**0.5)).to(dtype)) for c in widths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_concat(dtype):
    x, layers = channels_last(2, 5, 6, 7).to(dtype), dense_layers(5, 3, 4, dtype)
    exact = plain_dense_block(x.double(), [(s, t, w.double()) for s, t, w in layers])
    reference = plain_dense_block(x, layers)
    assert_accurate(dense_block(x, layers), reference, exact)
    buffer = torch.full((2, 20, 6, 7), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    ours = dense_block(x, layers, buffer)
    assert ours.data_ptr() == buffer.data_ptr()
    assert ours.shape == reference.shape
    assert_accurate(ours, reference, exact)
    assert buffer[:, 17:].isnan().all()


def test_dense_concat_with_a_bottleneck():
    x, w = channels_last(1, 6, 5, 5), torch.randn(4, 8, 3, 3)
    inner, scale, bias = channels_last(1, 8, 5, 5), torch.randn(4), torch.randn(4)
    new = (F.conv2d(inner, w, padding=1) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)).relu()
    buffer = torch.zeros(1, 10, 5, 5).contiguous(memory_format=torch.channels_last)
    buffer[:, :6] = x
    options = {"bottleneck": inner, "padding": 1, "scale": scale, "activation": "relu"}
    for features, target in ((x, None), (buffer[:, :6], buffer)):
        ours = ops.dense_concat(features, w, bias, **options, buffer=target)
        torch.testing.assert_close(ours, torch.cat([x, new], 1), rtol=1e-4, atol=1e-4)


def test_dense_concat_records_gradients():
    x, layers = channels_last(2, 3, 4, 4), dense_layers(3, 2, 3, torch.float32)
    weights = [w.requires_grad_() for _, _, w in layers]
    buffer = torch.zeros(2, 9, 4, 4).contiguous(memory_format=torch.channels_last)
    ours, expected = dense_block(x, layers, buffer), plain_dense_block(x, layers)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dense_concat_messages():
    buffer = torch.zeros(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    w = torch.randn(2, 6, 3, 3)
    with pytest.raises(ValueError, match="features must be the buffer's first channels"):
        ops.dense_concat(channels_last(1, 6, 5, 5), w, padding=1, buffer=buffer)
    with pytest.raises(ValueError, match=r"buffer must have shape \(1, at least 9, 5, 5\)"):
        ops.dense_concat(buffer[:, :6], torch.randn(3, 6, 3, 3), padding=1, buffer=buffer)
    with pytest.raises(ValueError, match=r"padding 0 must let the convolution .* keep the size"):
        ops.dense_concat(buffer[:, :6], w, buffer=buffer)


# ---- compilation, autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_compile(gradients):
    x, w1 = channels_last(2, 6, 5, 5), torch.randn(8, 6, 1, 1, requires_grad=gradients)
    w3 = torch.randn(4, 8, 3, 3, requires_grad=gradients)
    bn = statistics(8)

    def network(x, training):
        y = ops.conv_bn_relu(x, w1, *bn, training=training)
        y = ops.bottleneck_projection(x, w1, *bn, training=training, residual=y)
        y = ops.inception_concat([y, y, y], [w3, None, w3], paddings=[1, 0, 1])
        buffer = y.new_empty((2, 20, 5, 5)).contiguous(memory_format=torch.channels_last)
        features = buffer[:, :16].copy_(y)
        y = ops.dense_concat(features, torch.cat([w3, w3], 1), padding=1, buffer=buffer)
        return ops.residual_add(y, y)

    for training in (False, True):
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        state = [v.clone() for v in bn]
        expected = network(x, training)
        for value, kept in zip(bn, state, strict=True):
            value.copy_(kept)
        ours = compiled(x, training)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        if gradients:
            ours.square().mean().backward()
            assert w1.grad is not None
            assert w3.grad is not None


def test_autocast():
    x, bn = channels_last(2, 6, 5, 5), statistics(8)
    w = torch.randn(8, 6, 3, 3)
    buffer = torch.zeros(2, 20, 5, 5).contiguous(memory_format=torch.channels_last)
    buffer[:, :6] = x
    with torch.autocast("cpu", torch.bfloat16):
        for training in (False, True):
            ours = ops.conv_bn_relu(x, w, *bn, padding=1, training=training)
            theirs = F.relu(F.batch_norm(F.conv2d(x, w, padding=1), *bn, training))
            assert ours.dtype == theirs.dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=6e-2)
        assert ops.inception_concat([x, x], [w, w]).dtype == torch.bfloat16
        plain = torch.cat([x, F.conv2d(x, w, padding=1)], 1)
        ours = ops.dense_concat(buffer[:, :6], w, padding=1, buffer=buffer)
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=3e-2, atol=6e-2)
