"""What every operator does to receptive fields; the principles stand in :mod:`fastcnn.analysis.receptive_field`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcnn.analysis.receptive_field import (
    UNKNOWN,
    WHOLE,
    Field,
    Operation,
    Seen,
    Window,
    after_linear,
    changed,
    first,
    merge,
    moved,
)


def after(operation: Operation) -> Seen | None:
    """What the values of an operator's output see."""
    values = [operation.seen(t) for t in operation.tensors()]
    if all(v is None for v in values) or operation.name in _CONSTANT:
        return None
    if any(v is WHOLE for v in values):
        return WHOLE
    if any(v is UNKNOWN for v in values):
        return UNKNOWN
    rule = _RULES.get(operation.name)
    if rule is None:
        return _aligned(operation) if operation.pointwise or operation.name in _BY_POSITION else UNKNOWN
    return rule(operation)


def is_pointwise(operator: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in operator.tags


# ---- by position: element by element, with broadcasting ------------------------------------------------------------

_POSITIONAL = (
    "alias clone detach lift_fresh contiguous _to_copy copy native_dropout native_batch_norm cudnn_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update batch_norm_elemt "
    "native_layer_norm native_group_norm _fused_rms_norm channel_affine batch_norm local_response_norm residual_add "
    "_prelu_kernel native_channel_shuffle channel_shuffle expand hardswish log_sigmoid_forward rrelu_with_noise "
    "bernoulli fill"
)
_BY_POSITION = frozenset(_POSITIONAL.split())
_NEW = "new_empty new_empty_strided new_zeros new_ones new_full empty_like zeros_like ones_like full_like"
_CONSTANT = frozenset(_NEW.split())  # of the tensor they are given, only the size matters


def _aligned(operation: Operation) -> Seen | None:
    values: list[Seen | None] = []
    for tensor in operation.tensors():
        value = operation.seen(tensor)
        if isinstance(value, Window):
            shift = len(operation.shape) - tensor.dim()
            dims = tuple(dim + shift for dim in value.dims)
            if any(d < 0 or operation.shape[d] != tensor.shape[d - shift] for d in dims):
                return UNKNOWN
            value = Window(dims, value.fields)
        values.append(value)
    return merge(values)


# ---- sliding windows -----------------------------------------------------------------------------------------------


def _slide(
    tensor: Tensor, window: Window, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Window:  # fmt: skip
    """A window over the last dimensions of a tensor, as many as the kernel has."""
    count = len(kernel)
    stride, padding, dilation = (tuple(v) * count if len(v) == 1 else tuple(v) for v in (stride, padding, dilation))

    def grow(dim: int, field: Field) -> Field:
        i = dim - (tensor.dim() - count)
        if i < 0:
            return field
        reach = (kernel[i] - 1) * dilation[i]
        return Field(
            field.size + reach * field.stride,
            field.stride * stride[i],
            field.offset + (reach / 2 - padding[i]) * field.stride,
        )

    return changed(window, grow)


def _convolution(operation: Operation) -> Seen | None:
    a = operation.arguments
    tensor, weight = a["input"], a["weight"]
    value = operation.seen(tensor)
    if a.get("transposed") or not isinstance(value, Window) or tensor.dim() != weight.dim() or 1 in value.dims:
        return UNKNOWN
    grown = _slide(tensor, value, weight.shape[2:], a["stride"], a["padding"], a["dilation"])
    residual = a.get("residual")
    return grown if residual is None else merge([grown, operation.seen(residual)])


def _pool(operation: Operation) -> Seen:
    tensor, window = first(operation)
    a = operation.arguments
    kernel = a["kernel_size"]
    kernel = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    dimensions = int(operation.name.split("pool")[1][0])
    kernel = kernel * dimensions if len(kernel) == 1 else kernel
    return _slide(tensor, window, kernel, a["stride"] or kernel, a["padding"], a.get("dilation") or (1,))


def _adaptive_pool(operation: Operation) -> Seen:
    tensor, window = first(operation)
    sizes = {dim: (tensor.shape[dim], operation.shape[dim]) for dim in window.dims}
    if all(outputs == 1 for _, outputs in sizes.values()):
        return WHOLE
    if any(inputs % outputs for inputs, outputs in sizes.values()):
        return UNKNOWN
    steps = [tensor.shape[d] // operation.shape[d] for d in range(1, tensor.dim())]
    return _slide(tensor, window, steps, steps, (0,), (1,))


def _linear(operation: Operation) -> Seen | None:
    tensor = operation.arguments["input"]
    return after_linear(operation.seen(tensor), tensor.dim())


# ---- views and padding ---------------------------------------------------------------------------------------------


def _reshape(operation: Operation) -> Seen:
    tensor, window = first(operation)
    places: dict[int, int] = {}
    for old, new in _groups(tensor.shape, operation.shape):
        old_real, new_real = ([d for d in dims if shape[d] != 1] for dims, shape in
                              ((old, tensor.shape), (new, operation.shape)))  # fmt: skip
        if len(old_real) == len(new_real) == 1:
            places[old_real[0]] = new_real[0]
        elif len(old) == len(new) == 1:
            places[old[0]] = new[0]
        elif len(new_real) > 1 and any(d in window.dims for d in old_real):
            return UNKNOWN  # an axis is cut into several
    return moved(window, places.get)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of two shapes of one memory that hold the same values, in order: (N, C, H, W) and (N, C, H * W)."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [i], [j]
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b and (i < len(old) if a < b else j < len(new)):
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def _squeeze(operation: Operation) -> Seen:
    tensor, window = first(operation)
    chosen = operation.arguments.get("dim")
    given = range(tensor.dim()) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    gone = {d % tensor.dim() for d in given if tensor.shape[d] == 1}
    return moved(window, lambda dim: None if dim in gone else dim - sum(g < dim for g in gone))


def _unsqueeze(operation: Operation) -> Seen:
    _, window = first(operation)
    new = operation.arguments["dim"] % len(operation.shape)
    return moved(window, lambda dim: dim + (dim >= new))


def _permute(operation: Operation) -> Seen:
    tensor, window = first(operation)
    a, count = operation.arguments, tensor.dim()
    if operation.name == "permute":
        order = [d % count for d in a["dims"]]
    else:
        order = list(range(count))
        i, j = (a["dim0"] % count, a["dim1"] % count) if "dim0" in a else (0, count - 1)
        order[i], order[j] = order[j], order[i]
    return moved(window, order.index)


def _slice(operation: Operation) -> Seen:
    tensor, window = first(operation)
    a = operation.arguments
    cut, step = (a.get("dim") or 0) % tensor.dim(), a.get("step") or 1
    start = slice(a.get("start"), a.get("end"), step).indices(tensor.shape[cut])[0]

    def change(dim: int, field: Field) -> Field:
        if dim != cut:
            return field
        return Field(field.size, field.stride * step, field.offset + start * field.stride)

    return changed(window, change)


def _split(operation: Operation) -> Seen:
    tensor, window = first(operation)
    return UNKNOWN if (operation.arguments.get("dim") or 0) % tensor.dim() in window.dims else window


def _select(operation: Operation) -> Seen:
    tensor, window = first(operation)
    gone = (operation.arguments.get("dim") or 0) % tensor.dim()
    return UNKNOWN if gone in window.dims else moved(window, lambda dim: dim - (gone < dim))


def _pad(operation: Operation) -> Seen:
    tensor, window = first(operation)
    a = operation.arguments
    amounts = a["pad"] if "pad" in a else a["padding"]
    before = {tensor.dim() - 1 - i: amounts[2 * i] for i in range(len(amounts) // 2)}
    return changed(
        window, lambda dim, field: field._replace(offset=field.offset - before.get(dim, 0) * field.stride)
    )  # fmt: skip


# ---- joining and reducing ------------------------------------------------------------------------------------------


def _cat(operation: Operation) -> Seen | None:
    _, window = first(operation)
    joined = (operation.arguments.get("dim") or 0) % len(operation.shape)
    return UNKNOWN if joined in window.dims else _aligned(operation)


def _softmax(operation: Operation) -> Seen | None:
    """Over a dimension that must be no axis; so too the gates of glu."""
    tensor, window = first(operation)
    return UNKNOWN if operation.arguments["dim"] % tensor.dim() in window.dims else _aligned(operation)


def _stack(operation: Operation) -> Seen:
    merged = merge([operation.seen(t) for t in operation.tensors()])
    new = (operation.arguments.get("dim") or 0) % len(operation.shape)
    return moved(merged, lambda dim: dim + (dim >= new)) if isinstance(merged, Window) else UNKNOWN


def _reduce(operation: Operation) -> Seen:
    tensor, window = first(operation)
    chosen = operation.arguments.get("dim")
    dims = [chosen] if isinstance(chosen, int) else chosen
    gone = {d % tensor.dim() for d in dims} if dims else set(range(tensor.dim()))
    kept = len(operation.shape) == tensor.dim()
    return moved(window, lambda dim: None if dim in gone else dim if kept else dim - sum(g < dim for g in gone))


_GROUPS: tuple[tuple[Callable[[Operation], Seen | None], str], ...] = (
    (_convolution, "convolution conv2d"),
    (_pool, "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d_with_indices "
            "avg_pool1d avg_pool2d avg_pool3d"),
    (_adaptive_pool, "adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
                     "adaptive_max_pool3d"),
    (_linear, "linear"),
    (_reshape, "view _unsafe_view reshape _reshape_alias _reshape_copy"),
    (_squeeze, "squeeze"),
    (_unsqueeze, "unsqueeze"),
    (_permute, "permute transpose t"),
    (_slice, "slice"),
    (_split, "split split_with_sizes unsafe_split chunk"),
    (_select, "select unbind"),
    (_pad, "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
           "replication_pad3d"),
    (_cat, "cat"),
    (_softmax, "_softmax _log_softmax glu"),
    (_stack, "stack"),
    (_reduce, "mean sum amax amin prod var std logsumexp linalg_vector_norm max min"),
)  # fmt: skip
_RULES = {name: rule for rule, names in _GROUPS for name in names.split()}
