"""A network, eager and frozen, timed against its peers: PyTorch's own operators, eager in both memory formats,
torch.compile, and, where they are installed, the inference engines of :mod:`fastcnn.measurement.peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn._table import text_table
from fastcnn.measurement.candidates import FROZEN, OURS, candidates
from fastcnn.measurement.conditions import Conditions, conditions
from fastcnn.measurement.flops import count_flops
from fastcnn.measurement.timing import Timing, interleave

# Turns of `interleave` for candidates with threads of their own, in milliseconds. ONNX Runtime's threads were seen to
# spin for 31 ms after a run, PyTorch's for 10.
ENGINE_TURNS: dict[str, float] = {"block_ms": 100.0, "pause_ms": 60.0}


@dataclass(frozen=True)
class Comparison:
    """Times of a network on fastcnn and on its peers, measured in one process in turns."""

    model: str
    peer: str  # which module the peers run
    conditions: Conditions
    input_shape: tuple[int, ...]
    flops: int  # of one run
    timings: dict[str, Timing]
    left_out: tuple[str, ...] = ()  # candidates that were asked for and not timed, each with its reason

    @property
    def ours(self) -> str:
        """Which of fastcnn's candidates is compared: the frozen model where it was timed."""
        return FROZEN if FROZEN in self.timings else OURS

    @property
    def best_peer(self) -> str:
        peers = (name for name in self.timings if name not in (OURS, FROZEN))
        return min(peers, key=lambda name: self.timings[name].median_ms)

    def speedup(self, over: str | None = None, of: str | None = None) -> float:
        """How many times faster fastcnn (:attr:`ours`, or ``of``) is than a peer, by default the best one."""
        return self.timings[over or self.best_peer].median_ms / self.timings[of or self.ours].median_ms

    def to_dict(self) -> dict[str, Any]:
        batch = self.input_shape[0]
        return {
            "model": self.model,
            "peer": self.peer,
            "conditions": self.conditions.to_dict(),
            "input_shape": list(self.input_shape),
            "flops": self.flops,
            "ours": self.ours,
            "best_peer": self.best_peer,
            "speedup": self.speedup(),
            "left_out": list(self.left_out),
            "timings": {
                name: {
                    **timing.to_dict(),
                    "images_per_second": timing.throughput(batch),
                    "flops_per_second": timing.flops_per_second(self.flops),
                    "ratio": timing.median_ms / self.timings[self.ours].median_ms,
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
                f"{t.q1_ms:.2f}",
                f"{t.q3_ms:.2f}",
                f"{t.throughput(batch):.1f}",
                f"{t.flops_per_second(self.flops) / 1e9:.0f}",
                f"{t.median_ms / self.timings[self.ours].median_ms:.2f}x",
            )
            for name, t in self.timings.items()
        ]

    def __str__(self) -> str:
        headings = ("", "median ms", "q1", "q3", "images/s", "GFLOP/s", "time vs fastcnn")
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
    frozen: bool = False,
    rounds: int = 20,
    seconds: float | None = None,
    block_ms: float = 0.0,
    pause_ms: float = 0.0,
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
        frozen: CPU only: time the frozen model (:func:`fastcnn.freeze`) too; it is then what is compared with peers.
        rounds, seconds: how often each is timed, and the time after which no further round begins.
        block_ms, pause_ms: as :func:`interleave` takes them.
        name: what to call the network; default: its class.
        progress: called with what begins.

    Raises:
        ValueError: ``compiled`` without a reference that torch.compile could take apart; ``engines`` or ``frozen`` on
            a GPU.
    """
    if compiled and reference is None:
        raise ValueError("torch.compile needs a reference made of PyTorch's own layers; this network has none")
    if (engines or frozen) and input.device.type != "cpu":
        raise ValueError(f"engines and frozen models are timed on a CPU only, input is on {input.device}")
    tell = progress or (lambda text: None)
    model.eval()
    runners, left_out = candidates(
        model, input, reference=reference, backend=backend, compiled=compiled, engines=engines, frozen=frozen, tell=tell
    )
    nhwc = input.contiguous(memory_format=torch.channels_last)
    flops = count_flops(model, nhwc)
    timings = interleave(
        runners, input.device, rounds=rounds, seconds=seconds, block_ms=block_ms, pause_ms=pause_ms,
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
