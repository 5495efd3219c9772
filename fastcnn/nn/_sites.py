"""Fused convolutions that were called before: what a call led to, kept while nothing that it depends on has changed.

A fused call finds out much that is the same every time: whether its arguments fit, what batch norms fold to, which
kernel serves it. For a small picture, and on a GPU for most, that takes longer than the kernel. :func:`learn` keeps the
answers for the modules that were called and the form of their operands (shapes, strides, dtype, device);
:func:`repeat` uses them.

What the answers depend on is looked at in every call: the modules' tensors (as ``backends.derived`` does: identity,
version, address, form and, on the CPU, values), the modules' settings, ours (``backends.settings``), and whether
autograd, autocast, a mode or a tracer wants to see the call. A site goes when a module or a tensor of it dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn import _native, backends
from fastcnn.backends import derived
from fastcnn.ops._layout import pixel_stride
from fastcnn.ops._registration import _TENSOR_TYPES, _needs_no_dispatcher, autocasts
from fastcnn.ops.conv2d import OPERATOR, contract, operator_arguments

_MOST_FORMS = 64  # of operands, at one site; then it begins anew


class Fused(NamedTuple):
    """Modules as one convolution: ``act(factor * bn(conv(input_act(input_bn(x)))) + residual)``."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    input_bn: nn.BatchNorm2d | None
    factor: float
    activation: str
    input_activation: str

    def key(self) -> Hashable:
        return (id(self.conv), id(self.bn), id(self.input_bn), *self[3:])

    def settings(self) -> tuple[object, ...]:
        own = self.conv.__dict__
        return (
            own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"],
            None if self.bn is None else self.bn.eps, None if self.input_bn is None else self.input_bn.eps,
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor | None, ...]:
        parameters = self.conv._parameters
        found: list[Tensor | None] = [parameters.get("weight"), parameters.get("bias")]
        for bn in (self.bn, self.input_bn):
            if bn is not None:
                parameters, buffers = bn._parameters, bn._buffers
                found += (
                    buffers.get("running_mean"), buffers.get("running_var"), parameters.get("weight"),
                    parameters.get("bias"),
                )  # fmt: skip
        return tuple(found)


class _Form(NamedTuple):
    """A call of the kernel contract, but for its operands."""

    shape: torch.Size  # of an output to be made
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    backend: ModuleType
    scale: Tensor | None
    bias: Tensor | None
    takes_own_bias: bool  # the convolution's, as it is
    rest: tuple[Any, ...]  # what follows the residual


@dataclass
class _Site:
    settings: tuple[object, ...]
    identities: tuple[int, ...]
    states: tuple[object, ...]
    generation: int
    storages: list[torch.UntypedStorage]  # alive, so that an address seen again is the same storage
    references: list[weakref.ref[Any]]
    forms: dict[bytes | None, _Form] = field(default_factory=dict)


_sites: dict[Hashable, _Site] = {}


def repeat(fused: Fused, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor | None:
    """The result of a call whose form was learnt, or None where one was not or something has changed."""
    site = _sites.get(fused.key())
    if site is None or not _is_unseen(x, residual, out):
        return None
    form = site.forms.get(_native.signature((x, residual, out)))
    if form is None:
        return None
    tensors = fused.tensors()
    if not _holds(site, fused, tensors):
        return None
    weight = tensors[0]
    bias = tensors[1] if form.takes_own_bias else form.bias
    if out is None:
        y = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
    elif _native.may_overlap(out, (x, residual, weight, form.scale, bias)):
        return None
    else:
        y = out
    form.backend.conv2d(y, x, weight, form.scale, bias, residual, *form.rest)
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return y


def _is_unseen(x: Tensor, residual: Tensor | None, out: Tensor | None) -> bool:
    """Whether nobody but the kernel needs to see a call."""
    return (
        type(x) in _TENSOR_TYPES
        and _needs_no_dispatcher((x, residual, out))
        and not autocasts(x.device.type)
        and not backends.is_intercepted()
        and not derived.is_keeping()
    )


def _holds(site: _Site, fused: Fused, tensors: tuple[Tensor | None, ...]) -> bool:
    if tuple(map(id, tensors)) != site.identities or site.generation != derived.generation():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return (*backends.settings(), *fused.settings()) == site.settings and derived.states_of(tensors) == site.states


def learn(
    fused: Fused,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    epilogue: tuple[Tensor | None, Tensor | None],
    prologue: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Keep what a call has just led to, if the next one may go straight to its kernel.

    Args:
        fused: the modules.
        x, residual, out: the operands.
        epilogue, prologue: (scale, shift), what the batch norms and the convolution's bias folded to.
    """
    if not _is_unseen(x, residual, out) or fused.conv.padding_mode != "zeros":
        return
    tensors = fused.tensors()
    if tensors[0] is None or not all(t is None or _may_be_kept(t) for t in tensors):
        return
    form = _form_of(fused, x, residual, out, epilogue, prologue)
    signature = _native.signature((x, residual, out))
    if form is None or signature is None:
        return
    site = _sites.get(fused.key())
    if site is None or not _holds(site, fused, tensors):
        site = _sites[fused.key()] = _new_site(fused, tensors)
    if len(site.forms) >= _MOST_FORMS:
        site.forms.clear()
    site.forms[signature] = form


def _may_be_kept(tensor: Tensor) -> bool:
    """Whether a change of it would be seen: no subclass, and no inference tensor on a GPU. No gradient is recorded."""
    if type(tensor) not in derived.PLAIN_TENSORS or (tensor.is_inference() and not tensor.is_cpu):
        return False
    return not (torch.is_grad_enabled() and tensor.requires_grad)


def _new_site(fused: Fused, tensors: tuple[Tensor | None, ...]) -> _Site:
    key = fused.key()

    def drop(reference: weakref.ref[Any]) -> None:
        current = _sites.get(key)
        if current is not None and reference in current.references:
            _sites.pop(key, None)

    present = [t for t in tensors if t is not None]
    modules = [m for m in fused[:3] if m is not None]
    return _Site(
        settings=(*backends.settings(), *fused.settings()),
        identities=tuple(map(id, tensors)),
        states=derived.states_of(tensors),
        generation=derived.generation(),
        storages=[t.untyped_storage() for t in present],
        references=[weakref.ref(owner, drop) for owner in (*present, *modules)],
    )


def _form_of(
    fused: Fused,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    epilogue: tuple[Tensor | None, Tensor | None],
    prologue: tuple[Tensor | None, Tensor | None],
) -> _Form | None:
    """None where a call needs more than its kernel: copies into another layout, the reference path, warnings."""
    conv = fused.conv
    arguments = operator_arguments(
        x, conv.weight, epilogue[1], conv.stride, conv.padding, conv.dilation, conv.groups, epilogue[0], residual,
        fused.activation, prologue[0], prologue[1], fused.input_activation,
    )  # fmt: skip
    if out is None:
        known = OPERATOR.known_form(arguments)
        if known is None or known.is_empty or not known.is_finished:
            return None
        like = torch.empty_strided(known.shape, known.strides, dtype=known.dtype, device=known.device)
    else:
        like = out
        if out.numel() == 0 or pixel_stride(out) is None:
            return None
    if x.numel() == 0:
        return None
    if like.is_cuda and like.dtype == torch.float32:
        return None  # PyTorch's TF32 settings would have to be watched too
    call, facts = contract(like, *arguments)
    if call[1] is not x or call[5] is not residual:
        return None
    backend, refused = backends.resolve("conv2d", like.device, like.dtype, call, facts)
    if refused is not None or backend.split(":")[0] not in ("cpp", "cuda", "triton"):
        return None
    scale, bias = call[3:5]
    own = bias is not None and bias is conv.bias  # not held here, so that it can die
    return _Form(
        like.shape, like.stride(), like.dtype, like.device, backends.backend_module(backend), scale,
        None if own else bias, own, call[6:],
    )  # fmt: skip
