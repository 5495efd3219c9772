"""Whether a model may launch work that PyTorch's dispatcher does not show.

A forward may launch Triton kernels directly, or call an extension with bare pointers. Such work is on the current
stream and waits for no other, so that nothing may run beside it. What a model is made of tells: fastcnn's and PyTorch's
own modules launch by operators alone, and of other code what torch.fx has traced holds nothing but calls.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fastcnn.graph.classes import original_class
from fastcnn.graph.optimizing import plans_of
from fastcnn.graph.tracer import has_hooks

_KNOWN = ("torch", "torchvision", "fastcnn", "_operator", "builtins", "math")


def hidden_code(model: nn.Module) -> str | None:
    """A part of the model that may launch unseen, or None where there is none. Its graphs must have been made."""
    looked_into: set[int] = set()
    for name, module in model.named_modules():
        for plan in plans_of(module, in_force=True):
            if plan.graph is None:
                continue
            looked_into |= {id(guard.module) for guard in plan.guards}
            for node in plan.graph.nodes:
                if node.op == "call_function" and not _is_known(node.target):
                    return f"{name or 'the model'} calls {getattr(node.target, '__name__', node.target)}"
    for name, module in model.named_modules():
        if id(module) in looked_into and not has_hooks(module):
            continue
        kind = original_class(module)
        if has_hooks(module) or kind.__module__.split(".")[0] not in _KNOWN:
            return f"{name or 'the model'} ({kind.__name__}) is code that was not looked into"
    return None


def _is_known(function: Any) -> bool:
    if isinstance(function, fx.node.Node):
        return False
    origin = getattr(function, "__module__", None) or "torch"  # PyTorch's own built-in functions name none
    return str(origin).split(".")[0] in _KNOWN
