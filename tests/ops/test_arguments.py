"""What examples/bad_inputs.py found: arguments that once ended in an unclear error or a wrong answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcnn import ops


def image() -> Tensor:
    return torch.randn(2, 4, 6, 6)


def vectors() -> list[Tensor]:
    return [torch.randn(6), torch.rand(6) + 0.5, torch.randn(6), torch.randn(6)]


NOT_DENSE = {
    "sparse": lambda t: t.to_sparse(),
    "oneDNN": lambda t: t.to_mkldnn(),
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
}
CALLS = {
    "input": lambda bad: ops.conv2d(bad(image()), torch.randn(6, 4, 1, 1)),
    "bias": lambda bad: ops.conv2d(image(), torch.randn(6, 4, 1, 1), bad(torch.randn(6))),
    "residual": lambda bad: ops.channel_affine(image(), None, None, residual=bad(image())),
    "weight": lambda bad: ops.linear(torch.randn(2, 4), bad(torch.randn(6, 4))),
    "running_var": lambda bad: ops.batch_norm(image(), torch.zeros(4), bad(torch.ones(4))),
    "bn_bias": lambda bad: ops.conv_bn_relu(image(), torch.randn(6, 4, 3, 3), *vectors()[:3], bad(torch.zeros(6))),
    r"inputs\[1\]": lambda bad: ops.inception_concat([image(), bad(image())], [None, None]),
    r"biases\[0\]": lambda bad: ops.inception_concat([image()], [torch.randn(6, 4, 1, 1)], [bad(torch.randn(6))]),
    "buffer": lambda bad: ops.dense_concat(image(), torch.randn(2, 4, 1, 1), buffer=bad(torch.randn(2, 6, 6, 6))),
    "out": lambda bad: ops.max_pool2d(image(), 2, out=bad(torch.zeros(2, 4, 3, 3))),
}


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_must_be_dense_tensors(argument: str, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"{argument} must be a (dense )?torch\.Tensor"):
        CALLS[argument](NOT_DENSE[kind])


@pytest.mark.parametrize("value", [1.5, None, "2", True, (1, None), [1.0, 1.0]])
def test_steps_must_be_ints(value: object) -> None:
    with pytest.raises(TypeError, match=r"dilation must be an int or two ints"):
        ops.conv2d(image(), torch.randn(6, 4, 1, 1), dilation=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"padding must be an int or two ints"):
        ops.avg_pool2d(image(), 2, padding=True if value == "2" else value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [2.0, None, "2", (2,), True])
def test_single_ints(value: object) -> None:
    with pytest.raises(TypeError, match=r"groups must be an int"):
        ops.conv2d(image(), torch.randn(6, 4, 1, 1), groups=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"size must be an int"):
        ops.local_response_norm(image(), value)  # type: ignore[arg-type]


def test_numpy_integers_are_ints() -> None:
    numpy = pytest.importorskip("numpy")
    x = image()
    torch.testing.assert_close(ops.max_pool2d(x, numpy.int64(2)), ops.max_pool2d(x, 2))


def test_ints_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"stride must fit into 64 bits"):
        ops.conv2d(image(), torch.randn(6, 4, 1, 1), stride=2**63)
    with pytest.raises(ValueError, match=r"padding .* more than memory can address"):
        ops.conv2d(image(), torch.randn(6, 4, 1, 1), padding=2**62)
    with pytest.raises(ValueError, match=r"output_size .* more than memory can address"):
        ops.adaptive_avg_pool2d(image(), 2**62)


@pytest.mark.parametrize("value", [None, "1", [1.0], 1j])
def test_numbers(value: object) -> None:
    with pytest.raises(TypeError, match=r"eps must be a number"):
        ops.fold_batch_norm(*vectors(), value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scale must be a number"):
        ops.residual_add(image(), image(), scale=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"beta must be a number"):
        ops.local_response_norm(image(), 3, beta=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("wrong", [lambda v: v[:1], lambda v: v[0], lambda v: v[None]])
def test_batch_norm_vectors_are_not_broadcast(position: int, wrong) -> None:
    bad = vectors()
    bad[position] = wrong(bad[position])
    name = ("running_mean", "running_var", "weight", "bias")[position]
    with pytest.raises(ValueError, match=rf"must have shape .*{name}|{name} must have shape"):  # of two that disagree
        ops.fold_batch_norm(*bad, 1e-5)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(6,\)"):
        ops.conv_bn_relu(image(), torch.randn(6, 4, 3, 3), *bad)


def test_batch_norm_vector_dtypes_of_conv_bn_relu() -> None:
    for dtype in (torch.float16, torch.int64, torch.complex64):
        mean, var, weight, bias = vectors()
        with pytest.raises(TypeError, match=r"bn_weight must be torch.float32"):
            ops.conv_bn_relu(image(), torch.randn(6, 4, 3, 3), mean, var, weight.to(dtype), bias)


def test_training_statistics() -> None:
    x, ones = image(), torch.ones(4)
    with pytest.raises(ValueError, match=r"running_mean and running_var must both be given"):
        ops.batch_norm(x, None, ones, training=True)
    with pytest.raises(ValueError, match=r"running_mean .* must not require grad"):
        ops.batch_norm(x, ones.clone().requires_grad_(), ones, training=True)
    with pytest.raises(ValueError, match=r"running_var .* must not overlap itself"):
        ops.batch_norm(x, ones, ones[:1].expand(4), training=True)
    with pytest.raises(ValueError, match=r"eps must be positive"):
        ops.batch_norm(x, ones, ones, training=True, eps=0.0)


@pytest.mark.parametrize("strides", [(0, 36, 6, 1), (0, 0, 0, 0), (1, 3, 5, 7)])
def test_out_must_not_overlap_itself(strides: tuple[int, ...]) -> None:
    memory = torch.full((400,), math.pi)
    with pytest.raises(ValueError, match=r"out must not overlap itself"):
        ops.residual_add(image(), image(), out=memory.as_strided((2, 4, 6, 6), strides))
    assert (memory == math.pi).all()


def test_out_of_interleaved_dimensions_is_written() -> None:
    x, memory = torch.randn(2, 1, 3, 1), torch.zeros(8)
    out = memory.as_strided((2, 1, 3, 1), (3, 1, 2, 1))  # values at 0 2 4 and 3 5 7
    torch.testing.assert_close(ops.residual_add(x, x, activation="none", out=out), 2 * x)


def test_out_must_not_be_lazily_negated() -> None:
    out = torch.zeros(2, 4, 6, 6, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"out must not be a lazily negated"):
        ops.residual_add(image(), image(), out=out)


def test_dtypes_that_nothing_covers() -> None:
    eighth = image().to(torch.float8_e4m3fn)
    for operator in (ops.batch_statistics, lambda x: ops.max_pool2d(x, 2), lambda x: ops.channel_affine(x, None, None)):
        with pytest.raises(TypeError, match=r"input .* torch.float8_e4m3fn"):
            operator(eighth)
    with pytest.raises(TypeError, match=r"input is torch.uint8"):
        ops.local_response_norm(image().byte(), 3)


def test_sizes_in_concatenations() -> None:
    with pytest.raises(ValueError, match=r"strides must be at least 1"):
        ops.inception_concat([image()], [torch.randn(6, 4, 1, 1)], strides=[0])
    with pytest.raises(TypeError, match=r"weights must be a list"):
        ops.inception_concat([image()], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"padding 0 must let the convolution"):
        ops.dense_concat(image(), torch.randn(2, 4, 3, 3))
