"""Watches one forward pass: every module's call, every operator, and what each tensor sees of the input.

Modules are watched by PyTorch's global hooks, so that nothing is put on the model; under them fastcnn's modules call
their children one by one instead of fusing them, and every layer shows. Operators are watched by a TorchDispatchMode,
below functions, methods and scripted code alike.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from fastcnn.analysis.receptive_field import (
    UNKNOWN,
    Operation,
    Seen,
    Window,
    after_linear,
    at_input,
    merge,
)
from fastcnn.analysis.result import Layer, ReceptiveField
from fastcnn.analysis.rules import after, is_pointwise
from fastcnn.measurement.flops import conv_flops

_OVERWRITTEN = {"copy_", "fill_", "zero_"}  # what these had before does not matter


class _Owner(NamedTuple):
    """Whose parameter a tensor is."""

    name: str  # of the module, if it is a layer, else of the parameter
    module: nn.Module | None  # the layer's
    parameter: Tensor


class _Frame:
    """A module's call that has not ended."""

    def __init__(self, module: nn.Module, name: str, time: int) -> None:
        self.module, self.name, self.time = module, name, time
        self.is_layer = is_layer(module)
        self.macs = 0
        self.bytes = 0  # of the layers in it


class _Mark(NamedTuple):
    """What a tensor sees, since when."""

    time: int
    dim: int
    seen: Seen


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a row of the table: it has no children but parametrizations."""
    return all(name == "parametrizations" for name, _ in module.named_children())


class Trace:
    """The record of a pass, while ``watching``. ``parameters``: the tensors that take the place of the model's own."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.layers: list[Layer] = []
        self.blocks: list[Layer] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._model_name = type(model).__name__
        self._stack: list[_Frame] = []
        self._times_named: Counter[str] = Counter()
        self._counted: set[int] = set()
        self._thread = threading.get_ident()
        self._time = 0
        self._born: dict[StorageWeakRef, int] = {}
        self._marks: Any = WeakIdKeyDictionary()  # Tensor -> _Mark
        self._writes: dict[StorageWeakRef, _Mark] = {}
        self._owners: dict[StorageWeakRef, _Owner] = {}
        modules = dict(model.named_modules())
        for name, parameter in parameters.items():
            prefix = name.rpartition(".")[0]
            owner = modules.get(prefix)
            layer = owner if owner is not None and prefix and is_layer(owner) else None
            storage = StorageWeakRef(parameter.untyped_storage())
            self._owners[storage] = _Owner(prefix if layer is not None else name, layer, parameter)

    @contextmanager
    def watching(self, inputs: list[Tensor]) -> Iterator[None]:
        for tensor in inputs:
            self._born[StorageWeakRef(tensor.untyped_storage())] = self._time
            self._mark(tensor, at_input(tensor))
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    # ---- modules -----------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            name = self._names.get(id(module), type(module).__name__) or self._model_name
            self._stack.append(_Frame(module, name, self._time))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread or all(frame.module is not module for frame in self._stack):
            return
        frame = self._stack.pop()
        while frame.module is not module:  # calls that raised
            frame = self._stack.pop()
        if self._layer() is not None or output is None:  # within a layer: a parametrization; or it raised
            return
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if frame.is_layer:
            fresh = {id(t): t for t in tensors if self._born_at(t) > frame.time}
            self._add_layer(frame.name, type(module).__name__, tensors, list(fresh.values()), frame.macs,
                            list(module.parameters()))  # fmt: skip
        else:
            unique = sum(p.numel() for p in module.parameters())
            name = self._numbered(frame.name)
            self.blocks.append(self._row(name, type(module).__name__, tensors, unique, frame.macs, frame.bytes))

    def _layer(self) -> _Frame | None:
        return next((frame for frame in self._stack if frame.is_layer), None)

    def _add_layer(
        self, name: str, kind: str, outputs: list[Tensor], fresh: list[Tensor], macs: int, parameters: Sequence[Tensor]
    ) -> None:
        new = {id(p): p for p in parameters if id(p) not in self._counted}
        self._counted |= new.keys()
        size = sum(t.numel() * t.element_size() for t in fresh)
        for frame in self._stack:
            frame.bytes += size
        count = sum(p.numel() for p in new.values())
        self.layers.append(self._row(self._numbered(name), kind, outputs, count, macs, size))

    def _numbered(self, name: str) -> str:
        self._times_named[name] += 1
        count = self._times_named[name]
        return name if count == 1 else f"{name}#{count}"

    def _row(self, name: str, kind: str, outputs: list[Tensor], parameters: int, macs: int, size: int) -> Layer:
        seen = merge([self.seen(t) for t in outputs[:1]])
        field = None
        if isinstance(seen, Window):
            sizes, strides, offsets = zip(*seen.fields, strict=True)
            field = ReceptiveField(sizes, strides, offsets)
        shapes = tuple(tuple(int(n) for n in t.shape) for t in outputs)
        whole = field is None and seen is not None and seen is not UNKNOWN
        return Layer(name, kind, shapes, parameters, macs, size, field, whole)

    # ---- operators ---------------------------------------------------------------------------------------------

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """After an operator has run."""
        self._time += 1
        names = [a.name for a in func._schema.arguments]
        arguments = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        arguments |= dict(zip(names, args, strict=False)) | kwargs
        written = [
            arguments[a.name] for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and isinstance(arguments.get(a.name), Tensor)
        ]  # fmt: skip
        outputs = written or [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not outputs:
            return
        name = func._overloadpacket.__name__
        if name.endswith("_into") or name in _OVERWRITTEN:
            arguments.pop("out" if name.endswith("_into") else "self", None)
        plain = name.removesuffix("_into") if func.namespace == "fastcnn" else name.rstrip("_")
        operation = Operation(plain, is_pointwise(func), arguments, tuple(outputs[0].shape), self.seen)
        seen = after(operation)
        for tensor in outputs:
            self._born.setdefault(StorageWeakRef(tensor.untyped_storage()), self._time)
            if written and seen is not None and seen != self.seen(tensor):
                self._write(tensor, seen)
            self._mark(tensor, seen)
        self._count(operation, func, args, kwargs, result, outputs)

    def _count(
        self, operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any,
        outputs: list[Tensor],
    ) -> None:  # fmt: skip
        macs = _macs(operation, func, args, kwargs, result)
        for frame in self._stack:
            frame.macs += macs
        if self._layer() is not None or not (macs or "pool" in operation.name or operation.name == "cat"):
            return
        owners = [self._owners.get(StorageWeakRef(t.untyped_storage())) for t in operation.tensors()]
        found = [owner for owner in owners if owner is not None]
        weights = [owner for owner in found if owner.parameter.dim() >= 2]
        if weights:
            owner = weights[0]
            kind = operation.name if owner.module is None else type(owner.module).__name__
            used = list(owner.module.parameters()) if owner.module else [o.parameter for o in found]
            self._add_layer(owner.name, kind, outputs, outputs[:1], macs, used)
        else:
            where = self._stack[-1].name + "." if self._stack and len(self._stack) > 1 else ""
            short = operation.name.removesuffix("_with_indices").lstrip("_")
            self._add_layer(where + short, short, outputs[:1], outputs[:1], macs, [])

    def _born_at(self, tensor: Tensor) -> int:
        return self._born.get(StorageWeakRef(tensor.untyped_storage()), 0)

    # ---- what tensors see --------------------------------------------------------------------------------------

    def seen(self, tensor: Tensor) -> Seen | None:
        """A tensor's own mark, and what was later written into its memory through other tensors."""
        mark = self._marks.get(tensor)
        written = self._writes.get(StorageWeakRef(tensor.untyped_storage()))
        if written is None or (mark is not None and mark.time >= written.time):
            return None if mark is None else mark.seen
        later = written.seen if written.dim == tensor.dim() or not isinstance(written.seen, Window) else UNKNOWN
        return merge([None if mark is None else mark.seen, later])

    def _mark(self, tensor: Tensor, seen: Seen | None) -> None:
        if seen is None:
            return
        fits = not isinstance(seen, Window) or all(d < tensor.dim() for d in seen.dims)
        self._marks[tensor] = _Mark(self._time, tensor.dim(), seen if fits else UNKNOWN)

    def _write(self, tensor: Tensor, seen: Seen) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        before = self._writes.get(storage)
        merged = seen if before is None else merge([before.seen, seen])
        self._writes[storage] = _Mark(self._time, tensor.dim(), merged or UNKNOWN)


def _macs(operation: Operation, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of convolutions and matrix products, in fastcnn's operators and in PyTorch's (as ``count_flops``)."""
    if func.namespace == "fastcnn":
        weight = operation.arguments.get("weight")
        if operation.name == "conv2d" and weight is not None:
            return conv_flops(operation.shape, weight.shape) // 2
        if operation.name == "linear" and weight is not None:
            return int(operation.arguments["input"].numel()) * int(weight.shape[0])
        return 0
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result)) // 2


class _Operators(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._trace.operator(func, args, kwargs or {}, result)
        return result


class _Functions(TorchFunctionMode):
    """linear as one function: its operators flatten the leading dimensions, among them those of an image."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        tensor = args[0] if args else (kwargs or {})["input"]
        seen = self._trace.seen(tensor)
        result = func(*args, **(kwargs or {}))
        self._trace._mark(result, after_linear(seen, tensor.dim()))
        return result
