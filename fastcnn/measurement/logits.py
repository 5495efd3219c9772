"""How far a frozen network's result is from float64's, with fastcnn's default settings, and how far it must be."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcnn.backends import use_backend
from fastcnn.graph.freezing import freeze

LIMIT = 1e-5  # relative, of fp32 logits: what fast algorithms may cost (docs/internals.md)


@dataclass(frozen=True)
class LogitError:
    """Relative errors, ``||result - float64|| / ||float64||`` over all logits of a batch."""

    frozen: float
    pytorch: float  # PyTorch's own operators in fp32
    rounded: float  # float64 arithmetic whose layers keep their results in fp32: no engine that does so can do better
    agreeing: int  # images whose largest logit is float64's
    images: int

    @property
    def passed(self) -> bool:
        return self.frozen <= LIMIT

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class _ResultsKeptInFp32(TorchDispatchMode):
    """Every operator computes in float64, and what it wrote is rounded to the nearest fp32 value.

    Of vectors and numbers nothing is rounded: those are batch norms being folded, not what lies between layers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in tree_leaves([result, written, kwargs.get("out") if kwargs else None]):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.dim() > 1:
                tensor.copy_(tensor.float())
        return result


@torch.no_grad()
def logit_error(model: nn.Module, images: Tensor) -> LogitError:
    """Freeze an fp32 network in eval mode, and compare its logits for ``images`` with the same network in float64.

    Raises:
        ValueError: ``model`` or ``images`` are not fp32; or the network cannot be frozen.
    """
    parameters = {parameter.dtype for parameter in model.parameters()}
    if parameters - {torch.float32} or images.dtype != torch.float32:
        raise ValueError("the network and its images must be float32")
    images = images.contiguous(memory_format=torch.channels_last)
    ours = freeze(model, images)(images)
    with use_backend("reference"):
        pytorch = model(images)
        wide = copy.deepcopy(model).double()
        exact = wide(images.double())
        with _ResultsKeptInFp32():
            rounded = wide(images.double())

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    agreeing = int((ours.argmax(1) == exact.argmax(1)).sum())
    return LogitError(error(ours), error(pytorch), error(rounded), agreeing, images.shape[0])
