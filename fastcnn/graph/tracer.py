"""A model's forward pass as a torch.fx graph, or the reason why it has none.

Modules are looked into as long as their forward traces. One that does not (control flow on values, random numbers
drawn in Python, ``no_grad`` blocks, hooks ...) becomes an opaque call in its parent's graph, with its reason. What
tracing would silently get wrong is refused: the graph must hold for every later call that its guards let through.

Other threads may run models meanwhile. What fx replaces for everybody (``nn.Module.__call__`` and ``__getattr__``)
passes them through, and what is watched for changes (:mod:`fastcnn.graph.draws`) is told apart from what they do.
"""

from __future__ import annotations

import builtins
import dataclasses
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fastcnn.graph import kinds
from fastcnn.graph.classes import original_class
from fastcnn.graph.draws import Draws

_LOCK = threading.RLock()  # fx replaces nn.Module.__call__ while it traces: one trace at a time
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
_CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size, slice)


class Untraceable(Exception):
    """Why a forward pass cannot be a graph."""


class _InDoubt(Exception):
    """Random numbers were drawn, perhaps by another thread: the trace is to be repeated."""


class _Proxy(fx.Proxy):
    """A value of the graph; fx's own records in-place operators wrongly (below)."""


@contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    """Let Python's ``isinstance(x, Tensor)`` take the branch that it will take when the graph runs.

    ``__class__`` would do so more quietly, but C++ would believe it too and read a Proxy as a tensor.
    """
    plain = builtins.isinstance

    def answer(value: Any, asked: Any) -> bool:
        if type(value) is not _Proxy:
            return plain(value, asked)
        known, tensor_asked = kinds.kind(value.node), kinds.includes_tensor(asked)
        if known == kinds.TENSOR:
            return tensor_asked or plain(value, asked)
        if plain(value, asked):  # for a Proxy, by fx
            return True
        if known is not None and asked is Tensor:
            return False
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return tensor_asked and known is None
        raise Untraceable("it asks for the type of a value that tracing does not know")

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = plain


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# fx would record ``x += y`` as ``x = x + y``, which leaves the first x alone and may have another dtype.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


@dataclasses.dataclass
class Traced:
    """A graph with one placeholder a tensor of the call's arguments, and what it depends on."""

    graph: fx.Graph
    inlined: dict[str, nn.Module]  # the modules whose forward was looked into; "" is the root
    opaque: dict[str, str]  # those that are called, and why
    rebuild: Callable[[list[Any]], Any] | None  # makes the result of the graph's outputs; None: it is the output


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return "forward" in module.__dict__ or any(module.__dict__.get(name) for name in _HOOKS)


def trace(root: nn.Module, spec: pytree.TreeSpec, leaves: list[Any]) -> Traced:
    """The graph of ``root.forward`` for arguments of this structure.

    Args:
        root: the module, in the mode (train, eval) that is to be traced. It is left as it was.
        spec: the structure of ``(args, kwargs)``.
        leaves: what stands in it: :data:`TENSOR` where a tensor will be, constants elsewhere.

    Raises:
        Untraceable: the root's own forward is no graph; the message says why.
    """
    opaque: dict[str, str] = {}
    earlier: list[Draws] = []
    with _LOCK:
        while True:
            tracer = _Tracer(root, spec, leaves, opaque, Draws(earlier))
            try:
                with _left_alone(root), tracer.draws, _proxies_are_tensors():
                    graph = tracer.trace(root)
                    tracer.require_unchanged()
            except _InDoubt:
                earlier.append(tracer.draws)
            except Exception as error:
                earlier.clear()
                where = tracer.running[-1]
                if where == "":
                    raise Untraceable(_reason(error)) from error
                opaque[where] = _reason(error)
            else:
                return Traced(graph, tracer.inlined, tracer.opaque, tracer.rebuild)


TENSOR = object()


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, root: nn.Module, spec: pytree.TreeSpec, leaves: list[Any], opaque: Mapping[str, str], draws: Draws
    ) -> None:  # fmt: skip
        super().__init__()
        self.root = root
        self.draws = draws
        self._thread = threading.get_ident()
        self._spec, self._leaves = spec, leaves
        self._modes = _modes()
        self._state = {id(m): _snapshot(m) for m in root.modules()}
        self.opaque = dict(opaque)
        self.running = [""]
        self.inlined: dict[str, nn.Module] = {"": root}
        self.rebuild: Callable[[list[Any]], Any] | None = None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:  # fmt: skip
        filled = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is TENSOR else leaf
            for i, leaf in enumerate(self._leaves)
        ]
        forward = original_class(self.root).forward

        def run(root: nn.Module) -> Any:
            args, kwargs = pytree.tree_unflatten(filled, self._spec)
            result = forward(root, *args, **kwargs)
            return self._outputs(result)

        return run, [self.root]

    def _outputs(self, result: Any) -> Any:
        if isinstance(result, fx.Proxy):
            return result
        kind = type(result)
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            names = [field.name for field in dataclasses.fields(result)]
            outputs, spec = pytree.tree_flatten([getattr(result, name) for name in names])

            def rebuild(values: list[Any]) -> Any:
                return kind(**dict(zip(names, pytree.tree_unflatten(values, spec), strict=True)))
        else:
            outputs, spec = pytree.tree_flatten(result)

            def rebuild(values: list[Any]) -> Any:
                return pytree.tree_unflatten(values, spec)

        for value in outputs:
            if not isinstance(value, fx.Proxy) and type(value) not in _CONSTANTS:
                raise Untraceable(f"its result holds a {type(value).__name__}")
        self.rebuild = rebuild
        return outputs

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):  # before fx asks whether it is a Parameter
            return a.node
        if issubclass(type(a), Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise Untraceable("it makes a tensor that depends on no input, or keeps one that is no buffer")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Untraceable("part of it runs under no_grad, autocast or another mode, or in an autograd Function")
        node = super().create_node(*args, **kwargs)
        module = None
        if node.op == "call_module" and str(node.target) not in self.opaque:
            module = self.root.get_submodule(str(node.target))
        kinds.kind(node, module)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:  # another thread's module
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = original_class(m)
        if module_qualified_name in self.opaque or kind.__module__.startswith("fastcnn."):
            return True
        if kind is nn.Identity and not has_hooks(m):
            return False  # nothing is left of it; its guard remembers that it had no hooks
        own = kind.forward not in (nn.Sequential.forward, nn.Module.forward)  # the latter: set on the instance
        if own and kind.forward.__module__.startswith("torch.nn"):
            return True
        if has_hooks(m):
            self.opaque[module_qualified_name] = "it has hooks or a forward of its own"
        elif any("__call__" in base.__dict__ for base in kind.__mro__[: kind.__mro__.index(nn.Module)]):
            self.opaque[module_qualified_name] = "its class overrides __call__"
        elif isinstance(m, torch.jit.ScriptModule):
            self.opaque[module_qualified_name] = "it is scripted"
        return module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.running.append(path)
        self.inlined[path] = m
        result = super().call_module(m, forward, args, kwargs)
        self._require_unchanged(m)
        self.running.pop()  # not after an exception: it names the module that failed
        return result

    def require_unchanged(self) -> None:
        """What happens while tracing happens once, and not in each call."""
        self._require_unchanged(*self.root.modules())

    def _require_unchanged(self, *modules: nn.Module) -> None:
        if self.draws.in_doubt:
            raise _InDoubt
        if self.draws.drawn:
            raise Untraceable("it draws random numbers that depend on no input")
        if any(_snapshot(m) != self._state.get(id(m)) for m in modules):
            raise Untraceable("its forward changes attributes of modules")


class _Same:
    """Equal to itself alone: what snapshots compare."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """A module's attributes: numbers and strings by value, containers by their items, everything else by identity."""
    found = {name: _frozen(value) for name, value in list(module.__dict__.items()) if name != "_fastcnn"}
    for table in (*module._parameters.values(), *module._buffers.values()):
        if table is not None and not is_lazy(table) and not table.is_inference():
            found[f"version {id(table)}"] = table._version
    return found


def _frozen(value: Any) -> Any:
    if type(value) in (int, float, bool, str, type(None)):
        return (type(value), value)
    if isinstance(value, dict):
        return {key: _Same(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return (type(value), [_Same(item) for item in value])
    return _Same(value)


@contextmanager
def _left_alone(root: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes that it had, whatever tracing its forward set."""
    before = [
        (m, dict(m.__dict__), {name: dict(m.__dict__[name]) for name in _TABLES if name in m.__dict__})
        for m in root.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, tables in before:
            for name, entries in tables.items():
                _put_back(module.__dict__[name], entries)
            _put_back(module.__dict__, attributes)


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo changes, without touching what has none: another thread may be reading it."""
    for name in [name for name in table if name not in before]:
        del table[name]
    if list(table) != list(before):
        table.clear()
    for name, value in before.items():
        if name not in table or table[name] is not value:
            table[name] = value


def _modes() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in devices),
        *(torch.get_autocast_dtype(d) for d in devices),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    text = " ".join(str(error).split())
    if "control flow" in text or "bool" in text:
        return "its control flow depends on values or shapes"
    return f"it cannot be traced ({type(error).__name__}: {text[:120]})"
