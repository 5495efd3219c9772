"""Where a network's time goes: each of its operator calls timed while the network runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn._table import text_table
from fastcnn.backends import Call, intercept, use_backend
from fastcnn.measurement.flops import call_flops
from fastcnn.verification.calls import fast_algorithm
from fastcnn.verification.naming import CallNames


@dataclass(frozen=True)
class LayerTime:
    """One operator call of a network."""

    name: str  # of the module that makes the call or whose weight it reads
    operator: str
    backend: str
    algorithm: str | None  # a fast one (Winograd), as the backend says; None: the ordinary one
    out_shape: tuple[int, ...]
    median_ms: float
    flops: int  # of a direct convolution or matrix product; 0 for all else
    bytes: int  # of the tensors it reads and writes, each counted once

    @property
    def gflops_per_second(self) -> float:
        return self.flops / self.median_ms / 1e6

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.median_ms / 1e6

    def share_of(self, peak: float) -> float:
        """Of the processor's peak (FLOP/s), as if it were a direct convolution: a fast algorithm may pass 1."""
        return self.gflops_per_second * 1e9 / peak

    def to_dict(self) -> dict[str, Any]:
        rates = {"gflops_per_second": self.gflops_per_second, "gigabytes_per_second": self.gigabytes_per_second}
        return {**asdict(self), "out_shape": list(self.out_shape), **rates}


@torch.no_grad()
def layer_times(model: nn.Module, input: Tensor, *, backend: str | None = None, rounds: int = 10) -> list[LayerTime]:
    """Time every operator call of a network's inference, in place: with the caches as the calls before it left them.

    The sum is less than the network's time: what Python does between calls, and PyTorch's own operators, are not in it.

    Args:
        model: a network of fastcnn's operators, in eval mode.
        input: one batch, (N, C, H, W); run in channels-last memory.
        backend: fastcnn's backend; default: the choice in force.
        rounds: runs of the network; times are medians over them.

    Raises:
        ValueError: fewer than one round; or the network makes other calls in one run than in another.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, is {rounds}")
    nhwc = input.contiguous(memory_format=torch.channels_last)
    names = CallNames(model)
    described: list[dict[str, Any]] = []

    def describe(call: Call) -> None:
        described.append(_described(names.name(call), call))
        call.run()

    samples: list[list[float]] = []

    def measure(call: Call) -> None:
        samples[-1].append(_milliseconds(call.run, input.is_cuda))

    with use_backend(backend) if backend is not None else contextlib.nullcontext():
        with intercept(describe):
            model(nhwc)
        for _ in range(rounds):
            samples.append([])
            with intercept(measure):
                model(nhwc)
    if any(len(times) != len(described) for times in samples):
        raise ValueError(f"{type(model).__name__} does not make the same operator calls every time")
    return [
        LayerTime(**facts, median_ms=median(times[index] for times in samples)) for index, facts in enumerate(described)
    ]


def _described(name: str, call: Call) -> dict[str, Any]:
    tensors = [argument for argument in call.args if isinstance(argument, Tensor)]
    return {
        "name": name,
        "operator": call.operator,
        "backend": call.backend,
        "algorithm": fast_algorithm(call),
        "out_shape": tuple(tensors[0].shape),
        "flops": call_flops(call),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def _milliseconds(run: Callable[[], None], on_gpu: bool) -> float:
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def layers_table(layers: list[LayerTime], peak: float | None = None) -> str:
    """A readable table, one row a call, and their sum. ``peak``: the processor's, in FLOP/s."""

    def rates(flops: int, milliseconds: float) -> tuple[str, ...]:
        if not flops:
            return ("-",) if peak is None else ("-", "-")
        rate = flops / milliseconds * 1e3
        return (f"{rate / 1e9:.0f}",) if peak is None else (f"{rate / 1e9:.0f}", f"{rate / peak:.0%}")

    total = sum(layer.median_ms for layer in layers)
    rows = [
        (
            layer.name,
            layer.operator,
            layer.algorithm or layer.backend,
            "x".join(map(str, layer.out_shape)),
            f"{layer.median_ms:.3f}",
            f"{layer.median_ms / total:.1%}",
            *rates(layer.flops, layer.median_ms),
            f"{layer.gigabytes_per_second:.1f}",
        )
        for layer in layers
    ]
    flops = sum(layer.flops for layer in layers)
    rows.append(("all", "", "", "", f"{total:.3f}", "100.0%", *rates(flops, total), ""))
    of_peak = () if peak is None else ("of peak",)
    headings = ("layer", "operator", "algorithm", "output", "ms", "share", "GFLOP/s", *of_peak, "GB/s")
    return text_table(headings, rows, left=(0, 1, 2, 3))
