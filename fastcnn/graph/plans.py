"""A module's rewritten graphs: one for each structure of arguments and each state that its forward depends on."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import _pop_mode_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fastcnn.graph.rewriting import Left, Site, rewrite
from fastcnn.graph.tracer import _CONSTANTS, TENSOR, Traced, Untraceable, trace
from fastcnn.nn.fusing import _is_watched

_MOST = 16  # plans of a module; beyond, its own forward runs
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_fastcnn"}
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


# Told (module, site) before each fused call, and (module, None) after it: how a report sees a plan at work.
Observer = Callable[[nn.Module, "Site | None"], None]
watching: ContextVar[Observer | None] = ContextVar("fastcnn_watching", default=None)


@dataclass(frozen=True)
class Guard:
    """What a graph took for granted of a module whose forward it holds."""

    module: nn.Module
    children: tuple[nn.Module | None, ...]
    lazy: tuple[tuple[nn.Module, type], ...]  # children that become others when they are first called
    attributes: tuple[tuple[str, Any], ...]
    is_root: bool

    @classmethod
    def of(cls, module: nn.Module, is_root: bool) -> Guard:
        attributes = tuple(
            (name, value.copy() if isinstance(value, (list, set, dict)) else value)
            for name, value in module.__dict__.items()
            if name not in _INTERNAL and _is_guarded(value)
        )
        children = tuple(module._modules.values())
        lazy = tuple((c, type(c)) for c in children if c is not None and isinstance(c, LazyModuleMixin))
        return cls(module, children, lazy, attributes, is_root)

    def holds(self) -> bool:
        own = self.module.__dict__
        if tuple(own["_modules"].values()) != self.children:
            return False
        for child, kind in self.lazy:
            if type(child) is not kind:
                return False
        for name, value in self.attributes:
            now = own.get(name, self)
            if now is not value and not _equal(now, value):
                return False
        return self.is_root or not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        )


def _is_guarded(value: Any) -> bool:
    """Whether a value can be compared later; containers of other objects cannot."""
    if isinstance(value, (list, set, dict)):
        return all(_is_simple(item) for item in (value.values() if isinstance(value, dict) else value))
    return True


def _is_simple(value: Any) -> bool:
    return isinstance(value, (*_SIMPLE, types.FunctionType)) or (
        isinstance(value, tuple) and all(_is_simple(v) for v in value)
    )


def _equal(now: Any, value: Any) -> bool:
    if type(now) is not type(value):
        return False
    if _is_simple(value) or isinstance(value, (list, set, dict)):
        try:
            return bool(now == value)
        except Exception:
            return False
    return False


@dataclass
class Plan:
    """One rewritten graph, ready to run."""

    guards: tuple[Guard, ...]
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    left: tuple[Left, ...] = ()
    refused: str | None = None
    opaque: dict[str, str] = field(default_factory=dict)
    graph: fx.Graph | None = None
    function: Callable[..., Any] | None = None  # of the module and the tensors
    function_of_owner: Callable[..., Any] | None = None  # the same, faster, for the module that was traced
    rebuild: Callable[[list[Any]], Any] | None = None
    layers: tuple[nn.Module, ...] = ()  # of whose weights the memory layout is taken for granted, and
    layouts: list[tuple[int, ...]] = field(default_factory=list)  # the weights' strides

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or not all(type(a) is Tensor for a in args):
            args = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        observer = watching.get()
        if observer is None:
            function = self.function_of_owner if module is self.guards[0].module else self.function
            assert function is not None
            result = function(module, *args)
        else:
            assert self.graph is not None
            result = _Watched(module, self, observer).run(*args)
        return result if self.rebuild is None else self.rebuild(result)

    def holds(self) -> bool:
        if not all(guard.holds() for guard in self.guards):
            return False
        try:
            strides = [layer._parameters["weight"].stride() for layer in self.layers]  # type: ignore[union-attr]
        except (KeyError, AttributeError):  # a weight that is computed now, or none
            return False
        return strides == self.layouts


class _Watched(fx.Interpreter):
    """Runs a plan node by node."""

    def __init__(self, module: nn.Module, plan: Plan, observer: Observer) -> None:
        super().__init__(module, graph=plan.graph)
        self._root, self._plan, self._observer = module, plan, observer

    def run_node(self, n: fx.Node) -> Any:
        site = self._plan.sites.get(n)
        if site is None:
            return super().run_node(n)
        self._observer(self._root, site)
        try:
            return super().run_node(n)
        finally:
            self._observer(self._root, None)


class State:
    """What :func:`fastcnn.optimize` keeps on a module. Copies and pickles start without plans and trace anew."""

    def __init__(self, input_shapes: tuple[Any, ...] | None = None) -> None:
        self.plans: dict[Hashable, list[Plan]] = {}
        self.input_shapes = input_shapes  # (shape, dtype) of each example input
        self.training: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}

    def plan(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """The plan for a call, or None where the module's own forward must run."""
        if torch.compiler.is_compiling() or _is_watched():
            return None
        found = self.find(module, args, kwargs)
        return found if found is not None and found.function is not None else None

    def find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        if not kwargs and all(issubclass(type(a), Tensor) for a in args):  # fake ones too: freezing traces with them
            key: Hashable = len(args)
            structure = None
        else:
            structure = _structure(args, kwargs)
            if structure is None:
                return None
            key = structure[0]
        known = self.plans.get(key)
        if known is None:
            known = self.plans[key] = []
        for plan in known:
            if plan.holds():
                return plan
        if len(known) >= _MOST or torch._C._get_tracing_state() is not None:
            return None
        structure = structure or _structure(args, kwargs)
        assert structure is not None
        with _without_modes():
            plan = make(module, *structure[1:])
        known.append(plan)
        return plan


def _structure(args: Any, kwargs: Any) -> tuple[Hashable, pytree.TreeSpec, list[Any]] | None:
    """(key, structure, leaves with :data:`TENSOR` for tensors); None where a leaf is neither tensor nor constant."""
    given, spec = pytree.tree_flatten((args, kwargs))
    leaves = []
    for leaf in given:
        if issubclass(type(leaf), Tensor):  # not isinstance: fx's proxies pass for tensors
            leaves.append(TENSOR)
        elif type(leaf) in _CONSTANTS and type(leaf) is not slice:
            leaves.append(leaf)
        else:
            return None
    key = (spec, tuple((type(leaf), repr(leaf)) if leaf is not TENSOR else TENSOR for leaf in leaves))
    return key, spec, leaves


@contextmanager
def _without_modes() -> Iterator[None]:
    """A graph holds no values, so that it is the same one when the first call is on fake tensors; but tracing looks at
    values of its own, which their modes would hide.
    """
    with _disable_current_modes(), ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


def make(module: nn.Module, spec: pytree.TreeSpec, leaves: list[Any]) -> Plan:
    """Trace and rewrite a module's forward for arguments of a structure; a refused plan says why it cannot be done."""
    try:
        traced = trace(module, spec, leaves)
    except Untraceable as error:
        return Plan((Guard.of(module, True),), refused=str(error))
    guards = tuple(Guard.of(m, path == "") for path, m in traced.inlined.items())
    modules = dict(module.named_modules(remove_duplicate=False))
    sites, left, assumed = rewrite(traced.graph, modules, traced.opaque)
    layers = tuple(modules[path] for path in sorted(assumed))
    known = {path: m for path, m in modules.items() if _ancestors(path) <= traced.inlined.keys()}
    return Plan(
        guards, sites, tuple(left), None, traced.opaque, traced.graph, _compiled(traced, {}), _compiled(traced, known),
        traced.rebuild, layers, [layer.weight.stride() for layer in layers],
    )  # fmt: skip


def _ancestors(path: str) -> set[str]:
    """The paths of the modules that hold the one at ``path``, the root's ("") first."""
    names = path.split(".")
    return {".".join(names[:i]) for i in range(len(names))}


def _compiled(traced: Traced, known: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """The graph as a function of the module and the tensors.

    It finds submodules on the module it is given, but for those that are ``known`` to be there while the guards hold:
    to look for each would take longer than many a kernel.
    """
    code = traced.graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    names = {path: f"_module_{i}" for i, path in enumerate(known)}
    scope.update((name, known[path]) for path, name in names.items())
    lines = []
    for line in code.src.split("\n"):
        found = _FETCH.match(line)
        if found is not None and found["path"] in names:
            line = f"{found['start']}{names[found['path']]}{found['rest']}"
        lines.append(line)
    exec(compile("\n".join(lines), "<fastcnn graph>", "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


_FETCH = re.compile(r"(?P<start>    \w+ = )self\.(?P<path>[\w.]+)(?P<rest>(;.*)?)$")  # fx's way to get an attribute
