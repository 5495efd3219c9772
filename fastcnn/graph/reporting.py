"""``fastcnn.report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.analysis import summary
from fastcnn.analysis.summarising import Size, _shapes
from fastcnn.backends import Call, intercept
from fastcnn.graph.classes import STATE, original_class
from fastcnn.graph.optimizing import is_fastcnn, left_in, plans_of
from fastcnn.graph.plans import watching
from fastcnn.graph.result import FusedSite, Report
from fastcnn.graph.rewriting import Left, Site
from fastcnn.models._registry import default_input_size
from fastcnn.ops._layout import pixel_stride
from fastcnn.verification.naming import CallNames


def report(model: nn.Module, input_size: Size | Sequence[Size] | None = None) -> Report:
    """What of a model runs as fused operators, on which kernels, and what does not and why.

    The model runs once in eval mode on an input of this size to see which kernels serve it. It is left as it was.

    Args:
        model: one that :func:`fastcnn.optimize` returned, a model of fastcnn's own, or any other.
        input_size: as in :func:`fastcnn.summary`. Default: of the example inputs that ``optimize`` was given, else the
            size that a fastcnn model was designed for; without either the model is not run and no kernels are named.

    Returns:
        A :class:`Report`; print it for a table.

    Raises:
        TypeError: ``model`` is no module.
        ValueError, TypeError: ``input_size`` is no size.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, is {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    optimized = any(STATE in m.__dict__ for m in model.modules())
    shapes, dtypes = _inputs(model, input_size)
    parameter = next(model.parameters(), torch.empty(0))
    seen: list[FusedSite] | None = None
    macs = None
    if shapes is not None:
        seen = _run(model, shapes, dtypes, parameter.device)
        macs = summary(model, list(shapes), dtype=dtypes[0]).macs
    with _evaluating(model):  # the plans for eval mode
        sites = tuple(_planned(model) if seen is None else seen)
        left = tuple(_left(model, optimized))
    return Report(
        model=original_class(model).__name__,
        optimized=optimized,
        input_shapes=shapes,
        device=str(parameter.device),
        dtype=str(dtypes[0] if dtypes else parameter.dtype).removeprefix("torch."),
        sites=sites,
        left=left,
        macs=macs,
    )


def _inputs(model: nn.Module, input_size: Any) -> tuple[tuple[tuple[int, ...], ...] | None, list[torch.dtype]]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if input_size is not None:
        shapes = _shapes(input_size)
        return shapes, [dtype] * len(shapes)
    state = model.__dict__.get(STATE)
    if state is not None and state.input_shapes:
        kept = state.input_shapes
        return tuple(s for s, _ in kept), [dtype if d.is_floating_point else d for _, d in kept]
    size = default_input_size(model)
    return (None, []) if size is None else (((1, *size),), [dtype])


class _Watcher:
    """Gathers operator calls, those of one site together."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[FusedSite] = []
        self._names = CallNames(model)
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._site: tuple[str, Site] | None = None
        self._calls: list[Call] = []
        self._merged: set[str] = set()  # layers whose work a merged call has done

    def observe(self, module: nn.Module, site: Site | None) -> None:
        if site is None:
            assert self._site is not None
            prefix, done = self._site
            into_slice = "+into slice" if self._calls and _writes_a_slice(self._calls[-1]) else ""
            names = tuple(prefix + m for m in done.modules)
            if done.call == "pointwise":
                self._merged = self._merged | set(names) if self._calls else self._merged - set(names)
            if not self._calls and (done.call == "pointwise" or (done.merged and self._merged.issuperset(names))):
                self._site = None
                return
            self.found.append(_served(names, done.pattern + into_slice, done.call, self._calls))
            self._site = None
        else:
            path = self._paths.get(id(module), "")
            self._site = (f"{path}." if path else "", site)
        self._calls = []

    def __call__(self, call: Call) -> None:
        call.run()
        if self._site is not None:
            self._calls.append(call)
        else:
            self.found.append(_served((self._names.name(call),), _vocabulary(call), call.operator, [call]))


def _run(
    model: nn.Module, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[FusedSite]:  # fmt: skip
    watcher = _Watcher(model)
    inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    token = watching.set(watcher.observe)
    try:
        with torch.no_grad(), _evaluating(model), torch.random.fork_rng(devices=[]), intercept(watcher):
            model(*inputs)
    finally:
        watching.reset(token)
    return watcher.found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _served(modules: tuple[str, ...], pattern: str, call: str, calls: Sequence[Call]) -> FusedSite:
    refused = [c.refused for c in calls if c.refused is not None]
    return FusedSite(
        modules=modules,
        pattern=pattern,
        call=call,
        operators=tuple(c.operator for c in calls),
        backends=tuple(c.backend for c in calls) or ("PyTorch",),
        macs=sum(map(_macs, calls)),
        fallback=f"{refused[0].backend}: {refused[0].reason}" if refused else None,
    )


def _macs(call: Call) -> int:
    """Multiply-accumulates of an operator call: outputs times the filter's size."""
    if call.operator not in ("conv2d", "linear"):
        return 0
    out, _, weight = call.args[:3]
    assert isinstance(out, Tensor)
    assert isinstance(weight, Tensor)
    return out.numel() * weight[0].numel()


def _vocabulary(call: Call) -> str:
    """An operator call in the words of the kernel contract: prologue, operator, epilogue, channel slice."""
    parts = [call.operator]
    arguments = call.args
    if call.operator == "conv2d":
        scale, bias, residual, input_scale, _, input_relu, activation = arguments[3:10]
        if input_scale is not None:
            parts.insert(0, "affine+relu" if input_relu else "affine")
        parts += [n for n, v in (("scale", scale), ("bias", bias), ("residual", residual)) if v is not None]
        parts += ["relu"] if activation == "relu" else []
    else:
        parts += ["relu"] if "relu" in [a for a in arguments if isinstance(a, str)] else []
    if _writes_a_slice(call):
        parts.append("into slice")
    return "+".join(parts)


def _writes_a_slice(call: Call) -> bool:
    """Whether a call's output is some channels of a wider tensor."""
    out = call.args[0]
    return isinstance(out, Tensor) and out.dim() == 4 and (pixel_stride(out) or 0) > out.shape[1]


def _planned(model: nn.Module) -> Iterator[FusedSite]:
    """The sites of the graphs for eval mode, where nothing was run."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for plan in list(plans_of(module, in_force=True))[:1]:
            for site in plan.sites.values():
                if site.merged:  # the merged call is a site too
                    continue
                yield FusedSite(tuple(prefix + m for m in site.modules), site.pattern, site.call)


def _left(model: nn.Module, optimized: bool) -> Iterator[Left]:
    if optimized:
        yield from dict.fromkeys(left_in(model, in_force=True))
    elif not is_fastcnn(model):
        yield Left("(model)", original_class(model).__name__, "not optimized: see fastcnn.optimize")
