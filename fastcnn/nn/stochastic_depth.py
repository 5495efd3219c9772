"""Stochastic depth: Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth" (arXiv:1603.09382).

In training a residual block's branch is left out with probability 1 - p_l, one draw for a whole mini-batch; in
evaluation it is always computed and multiplied by p_l. The further back a block is, the less often it is kept:
p_l = 1 - (l / L)(1 - p_L). (torchvision.ops.StochasticDepth divides by p_l in training instead.)
"""

from __future__ import annotations

import torch
from torch import nn


class StochasticDepth:
    """What a residual block needs to take part: mix it in, and ask at each forward."""

    training: bool
    survival: float = 1.0  # p_l

    def is_dropped(self) -> bool:
        """Draws whether this mini-batch goes without the branch; never in evaluation.

        From PyTorch's CPU generator, wherever the block is: the answer steers Python, and asking a GPU would wait.
        """
        return self.training and self.survival < 1 and bool(torch.rand((), device="cpu") >= self.survival)

    @property
    def branch_scale(self) -> float:
        """What the branch is multiplied by: p_l in evaluation."""
        return 1.0 if self.training else self.survival

    def extra_repr(self) -> str:
        return "" if self.survival == 1 else f"survival={self.survival:.4g}"


def survival_probabilities(count: int, last: float) -> list[float]:
    """p_1 ... p_L for L = ``count`` blocks: the linear decay of section 3, down to p_L = ``last``."""
    return [1 - layer / count * (1 - last) for layer in range(1, count + 1)]


def set_stochastic_depth(model: nn.Module, last: float | None) -> None:
    """Give each residual block of ``model`` its survival probability, in the order of their registration.

    Args:
        last: p_L, the last block's; the paper's is 0.5. None changes nothing.

    Raises:
        ValueError: ``last`` is no probability above 0, or the model has no residual blocks.
    """
    if last is None:
        return
    if not 0 < last <= 1:
        raise ValueError(f"stochastic_depth must be a probability above 0 and at most 1, is {last!r}")
    blocks = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if not blocks:
        raise ValueError("stochastic_depth needs residual blocks: a network without shortcuts cannot skip any")
    for block, survival in zip(blocks, survival_probabilities(len(blocks), last), strict=True):
        block.survival = survival
