"""Memory for arithmetic: intermediate tensors that the backward pass computes again instead of keeping.

As in Pleiss et al., "Memory-Efficient Implementation of DenseNets" (arXiv:1707.06990), on
:func:`torch.utils.checkpoint.checkpoint`, with two additions: batch norms count a mini-batch once, not again when it is
computed again, and that runs on the backend that was in force the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastcnn.backends import current_choice, use_backend


def may_recompute() -> bool:
    """Whether a backward pass is to come that can compute things again.

    Not under torch.compile, which decides itself what to keep, nor under torch.func, which allows no hooks on what
    autograd saves.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def recomputed(function: Callable[..., Tensor], *inputs: Tensor, norms: Iterable[nn.Module]) -> Tensor:
    """``function(*inputs)``, of which autograd keeps the inputs and the result and nothing in between.

    As with :func:`torch.utils.checkpoint.checkpoint`, parameters must not change between forward and backward pass:
    what is computed again reads them as they are then.

    Args:
        function: of tensors and parameters; called a second time, in the backward pass.
        inputs: what it reads, besides parameters.
        norms: the modules in it that are, or may be, batch norms: their running statistics are updated once.
    """
    contexts = contextlib.nullcontext(), _SecondTime(norms)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)
    return result


class _SecondTime:
    """The context in which a function is computed again: entered once for each backward pass over the same graph."""

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        self._choice, self._norms = current_choice(), tuple(norms)
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        backend, strict = self._choice
        stack = contextlib.ExitStack()
        stack.enter_context(use_backend(backend, strict=strict))
        stack.enter_context(_statistics_untouched(self._norms))
        self._entered.append(stack)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextlib.contextmanager
def _statistics_untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norms compute the same inside, and update neither running statistics nor their count of batches."""
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
