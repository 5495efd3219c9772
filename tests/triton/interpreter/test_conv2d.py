"""conv2d: each of the five kernels over odd sizes, types, slices, prologue and epilogue."""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from fastcnn.triton_kernels import conv2d as kernels  # noqa: E402
from fastcnn.triton_kernels.configs import Tile  # noqa: E402

from fastcnn.backends import proven  # noqa: E402
from fastcnn.backends import triton as backend  # noqa: E402

#   N, C, H, W,  K, filter, stride, padding, dilation, groups, the kernel that must serve it
SHAPES = [
    ((1, 16, 1, 1), 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, "pointwise"),
    ((2, 23, 5, 7), 37, (1, 1), (1, 1), (0, 0), (1, 1), 1, "pointwise"),
    ((1, 3, 6, 5), 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, "pointwise"),
    ((2, 40, 7, 9), 24, (1, 1), (2, 3), (0, 0), (1, 1), 1, "pointwise"),
    ((1, 64, 4, 5), 48, (1, 1), (1, 1), (0, 0), (1, 1), 2, "pointwise"),
    ((1, 16, 4, 5), 17, (1, 1), (1, 1), (1, 2), (1, 1), 1, "implicit_gemm"),
    ((2, 24, 7, 5), 33, (3, 3), (1, 1), (1, 1), (1, 1), 1, "implicit_gemm"),
    ((1, 80, 9, 6), 19, (3, 5), (2, 1), (1, 3), (2, 1), 1, "implicit_gemm"),
    ((1, 34, 6, 6), 34, (2, 3), (1, 2), (0, 1), (1, 1), 2, "implicit_gemm"),
    ((1, 64, 5, 5), 130, (3, 3), (1, 1), (1, 1), (1, 1), 1, "implicit_gemm"),
    ((1, 16, 3, 3), 16, (3, 3), (1, 1), (4, 4), (1, 1), 1, "implicit_gemm"),
    ((2, 3, 13, 11), 19, (7, 7), (2, 2), (3, 3), (1, 1), 1, "stem"),
    ((1, 1, 9, 8), 16, (3, 3), (1, 1), (1, 0), (1, 1), 1, "stem"),
    ((1, 5, 9, 8), 3, (3, 2), (1, 2), (1, 1), (2, 2), 1, "stem"),
    ((1, 6, 9, 8), 40, (3, 3), (1, 1), (1, 1), (1, 1), 2, "stem"),
    ((2, 32, 6, 5), 32, (3, 3), (1, 1), (1, 1), (1, 1), 8, "packed_groups"),
    ((1, 24, 6, 5), 24, (3, 3), (2, 1), (1, 0), (1, 1), 3, "packed_groups"),
    ((1, 15, 6, 5), 35, (3, 1), (1, 1), (1, 0), (2, 1), 5, "packed_groups"),
    ((1, 28, 4, 4), 14, (1, 1), (1, 1), (0, 0), (1, 1), 14, "packed_groups"),
    ((2, 17, 7, 5), 17, (3, 3), (1, 1), (1, 1), (1, 1), 17, "depthwise"),
    ((1, 8, 9, 7), 8, (5, 7), (2, 2), (2, 3), (1, 1), 8, "depthwise"),
    ((1, 5, 6, 6), 15, (3, 3), (1, 2), (1, 1), (2, 1), 5, "depthwise"),
    ((1, 1, 6, 6), 1, (2, 2), (1, 1), (0, 0), (1, 1), 1, "depthwise"),
]
IDS = [f"{shape[-1]}-{'x'.join(map(str, shape[0]))}-k{shape[1]}-g{shape[6]}" for shape in SHAPES]


def reference(x, weight, scale, bias, residual, input_scale, input_shift, *, input_relu, relu, geometry):
    """The formula in plain PyTorch, in the tensors' own dtype."""
    per_channel = lambda vector: vector.to(x.dtype).view(-1, 1, 1)  # noqa: E731
    if input_scale is not None:
        x = x * per_channel(input_scale) + per_channel(input_shift)
    x = F.relu(x) if input_relu else x
    y = F.conv2d(x, weight, None, *geometry)
    y = y if scale is None else y * per_channel(scale)
    y = y if bias is None else y + per_channel(bias)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def output_shape(shape) -> tuple[int, ...]:
    (n, _, h, w), k, (r, s), stride, padding, dilation, _, _ = shape
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return n, k, p, q


def run(tools, shape, dtype, *, plain=False, slices=(0, 0), config=None) -> None:
    """One convolution into a poisoned slice, with everything (prologue, epilogue) or nothing around it."""
    (n, c, h, w), k, filter_size, stride, padding, dilation, groups, _ = shape
    x = tools.nhwc(n, c, h, w, dtype=dtype, before=slices[0], after=slices[1])
    weight = torch.randn(k, c // groups, *filter_size).to(dtype)
    out = tools.nhwc(*output_shape(shape), dtype=dtype, before=slices[1], after=slices[0], fill=float("nan"))
    scale = bias = residual = input_scale = input_shift = None
    if not plain:
        scale, bias = torch.rand(k) + 0.5, torch.randn(k)
        residual = tools.nhwc(*out.shape, dtype=dtype, after=slices[0])
        input_scale, input_shift = torch.rand(c) + 0.5, torch.randn(c)
    arguments = (scale, bias, residual, input_scale, input_shift, not plain, "none" if plain else "relu")
    if config is None:
        backend.conv2d(out, x, weight, *arguments, stride, padding, dilation, groups)
    else:
        kernels.conv2d(out, x, weight, *arguments, stride, padding, dilation, groups, config=config)

    def compute(*tensors):
        geometry = (stride, padding, dilation, groups)
        return reference(*tensors, input_relu=not plain, relu=not plain, geometry=geometry)

    tools.check(out, compute, x, weight, scale, bias, residual, input_scale, input_shift)


def kernel_of(shape) -> str:
    (n, c, h, w), k, (r, s), stride, padding, dilation, groups, _ = shape
    _, _, p, q = output_shape(shape)
    return kernels.Geometry(
        n, h, w, p, q, r, s, c // groups, k // groups, groups, stride, padding, dilation
    ).kernel_name


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_kernel_choice(shape) -> None:
    assert kernel_of(shape) == shape[-1]


def test_every_kernel_is_among_the_shapes() -> None:
    """And fastcnn.backends.proven, which tells what has run on a GPU, lists exactly these."""
    listed = {name.removeprefix("conv2d ") for name in proven.KERNELS["triton"] if name.startswith("conv2d ")}
    assert {shape[-1] for shape in SHAPES} == listed


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_alone(tools, shape) -> None:
    run(tools, shape, torch.float32, plain=True)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_with_prologue_epilogue_and_slices(tools, shape, dtype) -> None:
    run(tools, shape, dtype, slices=(3, 5))


@pytest.mark.parametrize("shape", SHAPES[1::4], ids=IDS[1::4])
def test_aligned_slices(tools, shape) -> None:
    run(tools, shape, torch.float16, slices=(16, 8))


@pytest.mark.parametrize("index", [1, 3, 6, 8, 11], ids=lambda index: IDS[index])
def test_many_tiles(tools, index) -> None:
    """Small tiles, so that a launch has several row tiles, column tiles, strips and reduction blocks."""
    run(tools, SHAPES[index], torch.float32, slices=(1, 2), config=Tile(16, 16, 16, 4, 2, group_m=2))


def test_wide_tile_stored_in_halves(tools) -> None:
    shape = ((1, 16, 6, 5), 200, (1, 1), (1, 1), (0, 0), (1, 1), 1, "pointwise")
    run(tools, shape, torch.float32, slices=(1, 2), config=Tile(64, 256, 16, 4, 2))


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 6, 11, 15, 19)], ids=[IDS[i] for i in (1, 6, 11, 15, 19)])
def test_every_listed_config_is_valid(tools, shape) -> None:
    (n, c, h, w), k, filter_size, *geometry, _ = shape
    x, out = tools.nhwc(n, c, h, w, dtype=torch.float32), tools.nhwc(*output_shape(shape), dtype=torch.float32)
    configs = kernels.conv2d_configs(out, x, torch.randn(k, c // geometry[-1], *filter_size), *geometry)
    assert len(configs) == len(set(configs)) > 1
    assert configs == kernels.conv2d_configs(out, x, torch.randn(k, c // geometry[-1], *filter_size), *geometry)
    run(tools, shape, torch.float32, config=configs[-1])


def test_output_larger_than_the_input_covers_reads_zero(tools) -> None:
    """P and Q come from `out`: what a filter reaches beyond the input is zero, for a 1x1 filter as well."""
    x, weight = tools.nhwc(1, 16, 3, 3, dtype=torch.float32), torch.randn(16, 16, 1, 1)
    out = tools.nhwc(1, 16, 5, 4, dtype=torch.float32, fill=float("nan"))
    backend.conv2d(out, x, weight, None, None, None, None, None, False, "none", (1, 1), (0, 0), (1, 1), 1)
    tools.check(out, lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 2)), w), x, weight)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 6, 11, 15, 19)], ids=[IDS[i] for i in (1, 6, 11, 15, 19)])
def test_nan_passes_through_relu(tools, shape, dtype) -> None:
    (n, c, h, w), k, filter_size, stride, padding, dilation, groups, _ = shape
    x, out = tools.nhwc(n, c, h, w, dtype=dtype), tools.nhwc(*output_shape(shape), dtype=dtype)
    weight = torch.randn(k, c // groups, *filter_size).to(dtype)
    x[0, 0, h // 2, w // 2] = float("nan")
    backend.conv2d(out, x, weight, None, None, None, None, None, True, "relu", stride, padding, dilation, groups)
    expected = F.relu(F.conv2d(F.relu(x).double(), weight.double(), None, stride, padding, dilation, groups))
    assert expected.isnan().any()
    # A packed dot multiplies the NaN of one group by the zeros of the others in its pack.
    if kernel_of(shape) == "packed_groups":
        assert out[expected.isnan()].isnan().all()
    else:
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("filter_size", [1, 3])
def test_offsets_beyond_int32(filter_size) -> None:
    """Pixels 2^29 elements apart: the tensor spans more than 2^31 elements, of which only a few pages are touched."""
    h = w = 3
    ld, c = 2**29, 16
    buffer = torch.empty(h * w * ld, dtype=torch.float16)
    x = buffer.as_strided((1, c, h, w), (h * w * ld, 1, w * ld, ld))
    x.copy_(torch.randn(1, c, h, w))
    out = buffer.as_strided((1, c, h, w), (h * w * ld, 1, w * ld, ld), storage_offset=c)
    weight = torch.randn(c, c, filter_size, filter_size).half()
    padding = (filter_size // 2,) * 2
    backend.conv2d(out, x, weight, None, None, None, None, None, False, "none", (1, 1), padding, (1, 1), 1)
    expected = F.conv2d(x.double(), weight.double(), None, 1, padding)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-2)


def test_weights_are_prepared_once_and_again_after_a_change() -> None:
    weight = torch.randn(8, 16, 3, 3)
    first = backend.prepared_weight(weight, 1)
    assert backend.prepared_weight(weight, 1) is first
    weight.add_(1)
    assert torch.equal(backend.prepared_weight(weight, 1), weight.permute(0, 2, 3, 1))
    lying_right = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    assert backend.prepared_weight(lying_right, 1).data_ptr() == lying_right.data_ptr()
