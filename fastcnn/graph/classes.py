"""How a module becomes an optimized one and back: its class is exchanged for a subclass that overrides ``forward``.

Nothing else of the module changes: children, parameters, hooks and state-dict keys stay, and ``isinstance`` and
``repr`` answer as before. Copies and pickles carry the original class and a mark, so that they need no generated code.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any, cast

from torch import nn

STATE = "_fastcnn"  # the attribute that holds what is known of an optimized module


def original_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_fastcnn_original", type(module))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def optimized_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class whose ``forward`` runs the rewritten graph: always the same one."""
    if original not in _classes:
        _classes[original] = _make_class(original)
    return _classes[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        plan = None if state is None else state.plan(self, args, kwargs)
        if plan is None:
            return original.forward(self, *args, **kwargs)
        return plan.run(self, args, kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        function, args, *rest = cast(tuple[Any, ...], original.__reduce_ex__(self, protocol))
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_remake, (original, *args[1:]), *rest)
        return (function, args, *rest)

    body = {
        "forward": functools.wraps(original.forward)(forward),
        "__reduce_ex__": reduce_ex,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastcnn_original": original,
    }
    return type(original.__name__, (original,), body)


def _remake(original: type[nn.Module], *args: Any) -> nn.Module:
    kind = optimized_class(original)
    return kind.__new__(kind, *args)
