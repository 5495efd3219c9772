"""A network, and its training in one of several processes: a process that starts afresh can import this module."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from support.plain_twin import randomise_batch_norms

C = 8


class Net(nn.Module):
    """A stem, a residual unit, two branches that are concatenated, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.left, self.right = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.fc = nn.Linear(2 * C, 5)
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn(self.conv(x)) + x)
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 7, generator=torch.Generator().manual_seed(3))


def train_in_a_process(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = Net().train()
    results = []
    for model in (fastcnn.optimize(net), net, copy.deepcopy(net).double()):
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
        for step in range(2):
            optimizer.zero_grad()
            x = (image(4).chunk(2)[rank] + step).to(model.fc.weight.dtype)
            wrapped(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            after = wrapped.eval()(image().to(model.fc.weight.dtype))
        results.append([after, *(p.detach() for p in model.parameters())])
    torch.save(results, f"{result}{rank}")
    torch.distributed.destroy_process_group()
