"""A network timed against its peers: PyTorch's own operators, eager in both memory formats, torch.compile, and, where
they are installed, the inference engines of :mod:`fastcnn.measurement.peers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn._table import text_table
from fastcnn.backends import use_backend
from fastcnn.measurement.conditions import Conditions, conditions
from fastcnn.measurement.flops import count_flops
from fastcnn.measurement.peers import cpu_peers
from fastcnn.measurement.plain import plain_program
from fastcnn.measurement.timing import Timing, interleave

OURS, EAGER, CHANNELS_LAST, COMPILED = "fastcnn", "eager", "channels_last", "compile"


@dataclass(frozen=True)
class Comparison:
    """Times of a network on fastcnn and on its peers, measured in one process in turns."""

    model: str
    peer: str  # which module the peers run
    conditions: Conditions
    input_shape: tuple[int, ...]
    flops: int  # of one run
    timings: dict[str, Timing]
    left_out: tuple[str, ...] = ()  # peers that were asked for and not timed, each with its reason

    @property
    def best_peer(self) -> str:
        return min((name for name in self.timings if name != OURS), key=lambda name: self.timings[name].median_ms)

    def speedup(self, over: str | None = None) -> float:
        """How many times faster fastcnn is than a peer, by default the best one."""
        return self.timings[over or self.best_peer].median_ms / self.timings[OURS].median_ms

    def to_dict(self) -> dict[str, Any]:
        batch = self.input_shape[0]
        return {
            "model": self.model,
            "peer": self.peer,
            "conditions": self.conditions.to_dict(),
            "input_shape": list(self.input_shape),
            "flops": self.flops,
            "best_peer": self.best_peer,
            "speedup": self.speedup(),
            "left_out": list(self.left_out),
            "timings": {
                name: {
                    **timing.to_dict(),
                    "images_per_second": timing.throughput(batch),
                    "flops_per_second": timing.flops_per_second(self.flops),
                    "ratio": timing.median_ms / self.timings[OURS].median_ms,
                }
                for name, timing in self.timings.items()
            },
        }

    def rows(self) -> list[tuple[str, ...]]:
        batch = self.input_shape[0]
        return [
            (
                name,
                f"{t.median_ms:.2f}",
                f"{t.p10_ms:.2f}",
                f"{t.p90_ms:.2f}",
                f"{t.throughput(batch):.1f}",
                f"{t.flops_per_second(self.flops) / 1e9:.0f}",
                f"{t.median_ms / self.timings[OURS].median_ms:.2f}x",
            )
            for name, t in self.timings.items()
        ]

    def __str__(self) -> str:
        headings = ("", "median ms", "p10", "p90", "images/s", "GFLOP/s", "time vs fastcnn")
        return text_table(headings, self.rows())


@torch.no_grad()
def compare(
    model: nn.Module,
    input: Tensor,
    *,
    reference: nn.Module | None = None,
    backend: str | None = None,
    compiled: bool = False,
    engines: bool = False,
    rounds: int = 20,
    seconds: float | None = None,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Time inference of a network on fastcnn and on its peers.

    Args:
        model: the network, in the dtype and on the device to measure; timed in eval mode on channels-last input.
        input: one batch, (N, C, H, W).
        reference: a module of PyTorch's own layers with the same state, such as torchvision's; default: ``model`` on
            the backend ``"reference"``.
        backend: fastcnn's backend; default: the choice in force.
        compiled: time ``torch.compile`` of the reference too (compiling takes a while); needs ``reference``.
        engines: CPU only: time torch.compile with frozen weights, ONNX Runtime and OpenVINO too, those that are
            installed, on the network taken apart into PyTorch's operators.
        rounds, seconds: how often each is timed, and the time after which no further round begins.
        name: what to call the network; default: its class.
        progress: called with what begins.

    Raises:
        ValueError: ``compiled`` without a reference that torch.compile could take apart; ``engines`` on a GPU.
    """
    if compiled and reference is None:
        raise ValueError("torch.compile needs a reference made of PyTorch's own layers; this network has none")
    if engines and input.device.type != "cpu":
        raise ValueError(f"engines are timed on a CPU only, input is on {input.device}")
    tell = progress or (lambda text: None)
    model.eval()
    nhwc = input.contiguous(memory_format=torch.channels_last)
    nchw = input.contiguous()
    candidates: dict[str, Callable[[], object]] = {}

    def ours() -> object:
        with use_backend(backend):
            return model(nhwc)

    candidates[OURS] = ours if backend is not None else lambda: model(nhwc)
    if reference is None:

        def on_reference(x: Tensor) -> Callable[[], object]:
            def run() -> object:
                with use_backend("reference"):
                    return model(x)

            return run

        # One module serves both: its operators decide the layout, from the input's.
        candidates[EAGER], candidates[CHANNELS_LAST] = on_reference(nchw), on_reference(nhwc)
    else:
        plain = reference.eval()
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        candidates[EAGER] = lambda: plain(nchw)
        candidates[CHANNELS_LAST] = lambda: last(nhwc)
        if compiled:
            faster = torch.compile(copy.deepcopy(last))
            candidates[COMPILED] = lambda: faster(nhwc)
            tell("compiling")
            faster(nhwc)
    left_out: list[str] = []
    if engines:
        runners, left_out = cpu_peers(plain_program(model, nchw), nchw, tell)
        candidates.update(runners)
    flops = count_flops(model, nhwc)
    timings = interleave(
        candidates, input.device, rounds=rounds, seconds=seconds,
        round_ms=20.0 if input.is_cuda else 0.0,  # on a GPU several runs overlap, as they do in a caller's loop
        between=lambda candidate, number: tell(f"timing {candidate}, round {number + 1} of {rounds}"),
    )  # fmt: skip
    return Comparison(
        model=name or type(model).__name__,
        peer="PyTorch's operators" if reference is None else type(reference).__module__.partition(".")[0],
        conditions=conditions(input.device, input.dtype, input.shape[0]),
        input_shape=tuple(input.shape),
        flops=flops,
        timings=timings,
        left_out=tuple(left_out),
    )
