"""How far a frozen network's result is from float64's, with fastcnn's default settings."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.backends import use_backend
from fastcnn.graph.freezing import freeze

LIMIT = 1e-5  # relative, of fp32 logits: what fast algorithms may cost (docs/internals.md)


@dataclass(frozen=True)
class LogitError:
    """Relative errors, ``||result - float64|| / ||float64||`` over all logits of a batch."""

    frozen: float
    pytorch: float  # PyTorch's own operators in fp32
    agreeing: int  # images whose largest logit is float64's
    images: int

    @property
    def passed(self) -> bool:
        return self.frozen <= LIMIT

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


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
        exact = copy.deepcopy(model).double()(images.double())

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    agreeing = int((ours.argmax(1) == exact.argmax(1)).sum())
    return LogitError(error(ours), error(pytorch), agreeing, images.shape[0])
