"""Whole networks on a GPU, the ways to run them (`measure_gpu_networks.py` says which), and what they must compute."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.models import model_info
from fastcnn.verification import calibrate, torchvision_twin

# In the order of importance. alexnet_owt is torchvision's alexnet.
NETWORKS = [
    "resnet50", "densenet121", "googlenet", "vgg16", "resnext50_32x4d", "wide_resnet50_2", "resnet18", "resnet152",
    "alexnet_owt",
]  # fmt: skip
QUICK = ["eager", "eager_graph", "fastcnn_eager", "fastcnn_frozen"]
ONE_BACKEND = {"fastcnn_frozen_cuda": "cuda", "fastcnn_frozen_triton": "triton"}
COMPILED = ["compile", "compile_graphs", "compile_max_autotune", "compile_freezing"]
COMPILE_MODES = {"compile": None, "compile_graphs": "reduce-overhead"}  # the others': max-autotune
TINY = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2.5e-7}  # the accuracy rule's

Runner = Callable[[], Tensor]


class Network(NamedTuple):
    name: str
    ours: nn.Module
    twin: nn.Module  # torchvision's
    size: tuple[int, ...]  # of an image


@torch.no_grad()
def network(name: str, device: torch.device, dtype: torch.dtype, size: int | None) -> Network:
    """Both networks with the same weights, in the dtype, channels-last."""
    torch.manual_seed(0)
    channels, height, width = model_info(name).input_size
    shape = (channels, size or height, size or width)
    with torch.device(device):  # initialised there, which is quicker
        model = fastcnn.create_model(name).eval()
    calibrate(model, torch.randn(8, *shape, device=device))
    with torch.device(device):
        twin = torchvision_twin(name, model)
    if twin is None:
        raise SystemExit(f"torchvision has no network of {name}'s state dict")
    ours, twin = (m.to(dtype=dtype, memory_format=torch.channels_last) for m in (model, twin.eval()))
    return Network(name, ours, twin, shape)


class Expected:
    """What a candidate has to compute: the result for a few images of the batch, and how far off eager mode is."""

    def __init__(self, twin: nn.Module, x: Tensor) -> None:
        self._few = sorted({*range(min(4, len(x))), *range(max(0, len(x) - 4), len(x))})
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        with _exactly():
            self._exact = copy.deepcopy(twin).to(wide)(x[self._few].to(wide)).double()
        self.eager_error = self.error(twin(x))
        self.bound = 2 * self.eager_error + TINY[x.dtype]

    def error(self, result: Tensor) -> float:
        """Relative distance, infinite where a value is not finite."""
        off = float((result[self._few].double() - self._exact).norm() / self._exact.norm())
        return off if off == off else float("inf")


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Without TF32, and without trying algorithms for a single run."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def build(candidate: str, net: Network, x: Tensor, note: dict[str, Any]) -> Runner:
    """A function without arguments that runs a batch; what is to be known of it goes into ``note``."""
    if candidate == "eager":
        return lambda: net.twin(x)
    if candidate == "eager_graph":
        return _in_graph(net.twin, x)
    if candidate == "fastcnn_eager":
        return lambda: net.ours(x)
    if candidate == "fastcnn_frozen" or candidate in ONE_BACKEND:
        one = ONE_BACKEND.get(candidate)
        with fastcnn.use_backend(one, strict=True) if one else contextlib.nullcontext():
            frozen = fastcnn.freeze(net.ours, x)
        note["frozen"] = {"memory": frozen.memory()._asdict()}
        if x.is_cuda:
            note["frozen"] |= {
                "branches": frozen.branches, "streams": frozen.lanes, "recomputed": frozen.recomputed,
                "early_starts": frozen.early_starts, "fusions": list(frozen.fusions),
            }  # fmt: skip
        return lambda: frozen(x)
    faster = torch.compile(copy.deepcopy(net.twin), dynamic=False, mode=COMPILE_MODES.get(candidate, "max-autotune"))
    if candidate != "compile_freezing":
        return lambda: faster(x)
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        faster(x)
    return lambda: faster(x)


def _in_graph(model: nn.Module, x: Tensor) -> Runner:
    """The model in a CUDA graph; on the CPU, the model."""
    if not x.is_cuda:
        return lambda: model(x)
    static = x.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(static)

    def run() -> Tensor:
        static.copy_(x)
        graph.replay()
        return result.clone()

    return run
