"""Tensors in awkward memory, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 12345.0


class GuardedSlice:
    """A poisoned channel slice of a wider channels-last buffer, whose surroundings must stay untouched."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str | torch.device = "cpu", before: int = 3,
        after: int = 5,
    ) -> None:  # fmt: skip
        n, c, h, w = shape
        self.before, self.channels = before, c
        wider = (n, before + c + after, h, w)
        self.buffer = torch.empty(wider, dtype=dtype, device=device, memory_format=torch.channels_last).fill_(GUARD)
        self.view = self.buffer[:, before : before + c]
        self.view.fill_(float("nan"))

    def assert_guards_intact(self) -> None:
        guard = torch.tensor(GUARD, dtype=self.buffer.dtype, device=self.buffer.device)
        assert (self.buffer[:, : self.before] == guard).all()
        assert (self.buffer[:, self.before + self.channels :] == guard).all()


def sliced(tensor: Tensor, before: int = 2, after: int = 3) -> Tensor:
    """The same values as a channel slice of a wider channels-last buffer full of NaN."""
    n, c, h, w = tensor.shape
    buffer = torch.full((n, before + c + after, h, w), float("nan"), dtype=tensor.dtype, device=tensor.device)
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    buffer[:, before : before + c] = tensor
    return buffer[:, before : before + c]


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channel_slice": sliced,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}
