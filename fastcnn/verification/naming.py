"""Names for a network's operator calls: the parameter a call reads, else the module whose method makes it."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

from torch import Tensor, nn

from fastcnn.backends import Call


class CallNames:
    """Names the calls of a network. A second call under a name gets ``#2``, a third ``#3``.

    The module is found on Python's stack, not by hooks: a module that has hooks is not fused with its neighbours, so
    hooks would change what is to be watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._weights = {
            (p.data_ptr(), tuple(p.shape)): name.rpartition(".")[0] or name
            for name, p in model.named_parameters()
            if p.dim() >= 2
        }

    def name(self, call: Call) -> str:
        found = None
        for argument in call.args:
            if isinstance(argument, Tensor):
                found = self._weights.get((argument.data_ptr(), tuple(argument.shape)), found)
        found = found or self._running_module() or call.operator
        self._seen[found, call.operator] += 1
        count = self._seen[found, call.operator]
        return found if count == 1 else f"{found}#{count}"

    def _running_module(self) -> str | None:
        """The innermost module of the network with a method on the stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            # Only a method's own first argument: reading f_locals of every frame would copy large dictionaries.
            if frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self":
                name = self._modules.get(id(frame.f_locals.get("self")))
                if name is not None:
                    return name
            frame = frame.f_back
        return None
