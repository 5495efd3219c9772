"""Models that move between devices, lie on several, or are copied to them. ``meta`` stands for a second device."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.data_parallel import Net, image, train_in_a_process
from torch import Tensor, nn

import fastcnn


class Split(Net):
    """Its head is on another device."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn(self.conv(x)) + x)
        x = x.to(self.left.weight.device)
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_there_and_back(training: bool) -> None:
    net = Net().train(training)
    model = fastcnn.optimize(net)
    model(image())  # graphs and folded vectors of the first device
    state = copy.deepcopy(net.state_dict())
    model.to("meta")
    result = model(image().to("meta"))
    assert result.is_meta
    assert result.shape == (2, 5)
    model.to_empty(device="cpu").load_state_dict(state)
    net.load_state_dict(state)
    exact = copy.deepcopy(net).double()
    assert_accurate(*(m(image().to(m.fc.weight.dtype)) for m in (model, net, exact)))


@torch.no_grad()
def test_a_model_on_two_devices() -> None:
    net = Split().eval()
    for part in (net.left, net.right, net.fc):
        part.to("meta")
    model = fastcnn.optimize(net)
    assert [m.device.type for m in model.parameters()] == [m.device.type for m in net.parameters()]
    result = model(image())
    assert result.is_meta
    assert result.shape == (2, 5)
    assert ("conv", "bn", "add", "relu") in [site.modules for site in fastcnn.report(model).sites]


@pytest.mark.parametrize("where", ["input", "conv", "bn"])
@torch.no_grad()
def test_operands_on_different_devices_are_refused(where: str) -> None:
    net = Net().eval()
    model = fastcnn.optimize(net)
    x = image()
    if where == "input":
        x = x.to("meta")
    else:
        model.get_submodule(where).to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
        model(x)


def _replica(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """As :class:`torch.nn.DataParallel` copies a module to a device: tensors for parameters, the rest is shared."""
    if module in made:
        return made[module]
    copied = made[module] = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None:
            setattr(copied, name, _replica(child, made))
    copied._parameters = {name: None for name, parameter in module._parameters.items() if parameter is None}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(copied, name, parameter.clone())
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copied._buffers[name] = buffer.detach().clone()
    copied._former_parameters = dict(module._parameters)
    return copied


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_replicas_of_data_parallel(training: bool) -> None:
    """Each in its thread, on its part of the batch; gradients come together in the one set of parameters.

    Compared with PyTorch in both memory formats: its batch norms' gradients in channels-last, which are ours too, are
    less accurate, the more so the fewer the threads.
    """
    results = []
    net = Net().train(training)
    channels_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    for model in (fastcnn.optimize(net), net, channels_last, copy.deepcopy(net).double()):
        replicas = [_replica(model, {}) for _ in range(2)]
        x = image(6).to(model.fc.weight.dtype)
        parts = (x.contiguous(memory_format=torch.channels_last) if model is channels_last else x).chunk(2)
        outputs: dict[int, Any] = {}

        def run(i: int, replicas: Any = replicas, parts: Any = parts, outputs: Any = outputs) -> None:
            outputs[i] = replicas[i](parts[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = torch.cat([outputs[0], outputs[1]])
        together.square().sum().backward()
        results.append([together.detach(), *(p.grad for p in model.parameters())])
    for ours, *theirs, exact in zip(*results, strict=True):
        assert_accurate(ours, max(theirs, key=lambda result: relative_error(result, exact)), exact)


def test_data_parallel_without_a_gpu_is_the_model() -> None:
    net = Net().eval()
    wrapped = nn.DataParallel(fastcnn.optimize(net))
    with torch.no_grad():
        assert_accurate(wrapped(image()), net(image()), copy.deepcopy(net).double()(image().double()))


def test_distributed_data_parallel_in_two_processes(tmp_path: Path) -> None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    arguments = (str(tmp_path / "store"), str(tmp_path / "result"))
    torch.multiprocessing.spawn(train_in_a_process, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"result{rank}") for rank in range(2))
    for ours, theirs, exact in zip(*first, strict=True):
        assert_accurate(ours, theirs, exact)
    for ours, of_the_other in zip(first[0][1:], second[0][1:], strict=True):
        assert torch.equal(ours, of_the_other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_two_gpus() -> None:
    net = Net().eval()
    exact = copy.deepcopy(net).double()(image().double())
    model = fastcnn.optimize(net)
    for device in ("cuda:0", "cuda:1", "cpu", "cuda:1"):
        assert_accurate(model.to(device)(image().to(device)).cpu(), net.to(device)(image().to(device)).cpu(), exact)
    split = Split().eval().to("cuda:0")
    for part in (split.left, split.right, split.fc):
        part.to("cuda:1")
    result = fastcnn.optimize(split)(image().to("cuda:0"))
    assert result.device == torch.device("cuda:1")
    assert_accurate(result.cpu(), split(image().to("cuda:0")).cpu(), exact)
    parallel = nn.DataParallel(fastcnn.optimize(net.to("cuda:0")))
    assert_accurate(parallel(image().to("cuda:0")).cpu(), net(image().to("cuda:0")).cpu(), exact)
