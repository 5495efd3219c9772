"""``fastcnn.optimize`` and ``fastcnn.restore``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastcnn.graph import roles
from fastcnn.graph.classes import STATE, optimized_class, original_class
from fastcnn.graph.plans import Plan, State, make
from fastcnn.graph.rewriting import Left
from fastcnn.graph.tracer import TENSOR


class NotFusedError(RuntimeError):
    """Something of a model could not be fused, under ``strict=True``. ``left`` lists it, with reasons."""

    def __init__(self, left: Sequence[Left]) -> None:
        self.left = tuple(left)
        lines = [f"  {entry.module} ({entry.kind}): {entry.reason}" for entry in self.left]
        super().__init__("\n".join([f"{len(self.left)} parts of the model were not fused:", *lines]))


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """The same model, with convolution, batch norm, addition, ReLU, pooling ... as fastcnn's fused operators.

    The result has the same class name, children, parameters, state-dict keys and hooks, trains, switches between
    ``train()`` and ``eval()``, moves with ``.to()``, and can be copied, pickled and restored (:func:`restore`). Only
    its ``forward``, or the forward of those submodules that torch.fx can trace, runs a rewritten graph, which calls the
    fused operators with the model's own layers. Graphs are made for train and eval mode, and anew when a Python
    attribute that forward may depend on changes. What cannot be fused runs as it was; :func:`fastcnn.report` lists it.

    Args:
        model: any module, in either mode.
        example_inputs: its input, or a sequence of its positional inputs. Default: every parameter of ``forward``
            without a default is taken for a tensor. Other calls work too: they are traced when they first happen.
        inplace: change ``model`` itself; the very Parameters stay, and an optimizer that has them goes on. Otherwise a
            deep copy is changed and returned, and ``model`` stays as it was.
        strict: raise where something is not fused. A model that is changed in place is restored first.

    Returns:
        The optimized model.

    Raises:
        TypeError: ``model`` is no module.
        NotFusedError: under ``strict``, the list of what was not fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, is {type(model).__name__}")
    target = model if inplace else copy.deepcopy(model)
    restore(target)
    arguments = None if example_inputs is None else _as_arguments(example_inputs)
    _optimize(target, arguments)
    if strict:
        left = list(dict.fromkeys(left_in(target, in_force=False)))
        if left:
            restore(target)
            raise NotFusedError(left)
    return target


def restore(model: nn.Module) -> nn.Module:
    """The model as it was before :func:`optimize`, with its parameters' current values: ``model`` itself, changed."""
    for module in model.modules():
        if STATE in module.__dict__:
            del module.__dict__[STATE]
            module.__class__ = original_class(module)
    return model


def is_fastcnn(module: nn.Module) -> bool:
    """Whether a module is made of fastcnn's operators already."""
    return original_class(module).__module__.startswith("fastcnn.")


def plans_of(module: nn.Module, *, in_force: bool) -> Iterator[Plan]:
    """The plans of an optimized module, as far as they were made: those for its present state, or all."""
    state: State | None = module.__dict__.get(STATE)
    for plans in [] if state is None else state.plans.values():
        for plan in plans:
            if not in_force or plan.holds():
                yield plan


def _optimize(module: nn.Module, arguments: tuple[Any, ...] | None) -> None:
    """Exchange a module's class and trace it in both modes; where that fails, go on with its children."""
    if is_fastcnn(module) or isinstance(module, torch.jit.ScriptModule):
        return
    if "forward" in module.__dict__:
        _optimize_children(module)
        return
    shapes = None
    if arguments is not None:
        shapes = tuple((tuple(a.shape), a.dtype) for a in arguments if isinstance(a, Tensor))
    try:
        module.__class__ = optimized_class(original_class(module))
    except TypeError:  # another memory layout or a class that cannot be inherited from
        return
    state = State(shapes)
    module.__dict__[STATE] = state
    plans = []
    for training in (not module.training, module.training):
        with _mode(module, training):
            plan = _first_plan(state, module, arguments)
            if plan is not None:
                plans.append(plan)
    inside: set[str] = set()
    for plan in plans:
        inside |= plan.opaque.keys()
    refused = not plans or any(plan.function is None for plan in plans)
    submodules = dict(module.named_modules())
    for name in sorted(inside):
        if name in submodules and len(list(submodules[name].children())):
            _optimize(submodules[name], None)
    if refused:
        _optimize_children(module)


def _optimize_children(module: nn.Module) -> None:
    for child in list(module.children()):
        if STATE in child.__dict__ or ("forward" in child.__dict__ and _is_leaf(child)):
            continue
        if not _is_leaf(child):
            _optimize(child, None)
        elif roles.MODULES.get(type(child)) in _ALONE:
            _optimize(child, None)
            if not any(plan.sites for plan in plans_of(child, in_force=False)):
                restore(child)


# What is worth a call of its own inside a forward that cannot be traced.
_ALONE = ("conv", "linear", "max_pool", "avg_pool", "adaptive_pool", "lrn")


def _first_plan(state: State, module: nn.Module, arguments: tuple[Any, ...] | None) -> Plan | None:
    if arguments is not None:
        return state.find(module, arguments, {})
    count = _tensors_expected(module)
    if count is None:
        return None
    _, spec = pytree.tree_flatten(((0,) * count, {}))
    plan = make(module, spec, [TENSOR] * count)
    state.plans.setdefault(count, []).append(plan)
    return plan


def _tensors_expected(module: nn.Module) -> int | None:
    """How many arguments forward asks for; None where that cannot be told."""
    parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.default is p.empty and p.kind not in kinds for p in parameters):
        return None if not any(p.kind in kinds for p in parameters) else sum(p.kind in kinds for p in parameters)
    return sum(p.default is p.empty for p in parameters)


def _is_leaf(module: nn.Module) -> bool:
    kind = original_class(module)
    own = kind.forward.__module__.startswith("torch.nn") and kind.forward is not nn.Sequential.forward
    return own and not len(list(module.children()))


def _as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every submodule in train or eval mode, and afterwards in its own again."""
    before = [(m, m.training) for m in module.modules()]
    try:
        if training != module.training:
            for m, _ in before:
                m.training = training
        yield
    finally:
        for m, mode in before:
            m.training = mode


def left_in(model: nn.Module, *, in_force: bool) -> Iterator[Left]:
    """What was not fused in a model and its submodules, by full names; arguments as of :func:`plans_of`."""
    found = False
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        plans = list(plans_of(module, in_force=in_force))
        found |= any(plan.function is not None for plan in plans)
        for plan in plans:
            if plan.refused is not None:
                yield Left(name or "(model)", original_class(module).__name__, plan.refused)
            for entry in plan.left:
                yield Left(prefix + entry.module, entry.kind, entry.reason)
    if not found and not is_fastcnn(model):
        yield Left("(model)", original_class(model).__name__, "nothing of it was rewritten")
