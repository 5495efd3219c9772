"""Captured results have the real strides, so that what is written through a view goes where PyTorch writes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from fastcnn.graph.freezing import capture, real_strides


class Normed(nn.Module):
    """``after(y)`` for y of a layer whose fake result has not the real one's strides."""

    def __init__(self, layer: Callable[[Tensor], Tensor], after: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *_, _ = x.shape  # no graph of fx can unpack this: nothing is replaced
        return self.after(self.layer(x))


def _written(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    z.mul_(2)
    return y, z


def _written_partly(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    z[..., :3].add_(1)
    return y + 0.5, z


def _norm(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor.detach(), 0.5, 2)
    return layer.eval()


LAYERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "group norm": lambda: _norm(nn.GroupNorm(3, 12)),
    "one group": lambda: _norm(nn.GroupNorm(1, 12)),
    "channel shuffle": lambda: nn.ChannelShuffle(4),
    "batch norm": lambda: _norm(nn.BatchNorm2d(12)),
}
AFTER: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "nothing": lambda y: (y,),
    "contiguous": lambda y: _written(y, y.contiguous()),
    "channels last": lambda y: _written(y, y.contiguous(memory_format=torch.channels_last)),
    "reshape": lambda y: _written_partly(y, y.reshape(y.shape[0], -1)),
    "pixels": lambda y: _written_partly(y, y.flatten(2)),
    "rows": lambda y: _written(y, y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])),
    "relu, contiguous": lambda y: _written(y.relu(), y.relu().contiguous()),
    "copied by the model": lambda y: (torch.empty_strided(y.shape, (420, 1, 12, 84)).copy_(y),),
    "twice": lambda y: _written(y, F.group_norm(y, 2).reshape(y.shape[0], -1)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_what_is_written_through_a_view(layer: str, after: str, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(1)))
    model = Normed(LAYERS[layer](), AFTER[after]).eval()
    expected = model(x.clone(memory_format=torch.preserve_format))
    frozen = fastcnn.freeze(model, x)
    frozen._plan.fill_arena(0xFF)
    for ours, theirs in zip(frozen(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@torch.no_grad()
def test_strides_of_one_image_mean_nothing() -> None:
    """The fake view has another stride between images than the real one; of one image there is none."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (F.pad((x.flatten(2) * x.flatten(2).softmax(2)).view_as(x), (1, 2, 1, 2)),)

    x = torch.randn(1, 6, 4, 3).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fastcnn.freeze(Normed(lambda x: x, function), x)(x), function(x))


def test_a_model_whose_strides_stay_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "RealStrides", lambda suspects: real_strides.RealStrides(set()))
    x = torch.randn(2, 12, 7, 5).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"fake results of aten.native_group_norm.default have other strides"):
        fastcnn.freeze(_norm(nn.GroupNorm(3, 12)), x)


def test_freezing_draws_no_random_numbers_and_changes_no_example() -> None:
    x = torch.randn(2, 12, 7, 5)
    kept, state = x.clone(), torch.random.get_rng_state()
    fastcnn.freeze(Normed(lambda x: x.relu(), lambda y: (y.mul_(2), y.mean())), x)
    assert torch.equal(x, kept)
    assert torch.equal(torch.random.get_rng_state(), state)
