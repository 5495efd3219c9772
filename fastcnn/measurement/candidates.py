"""Who takes part in a comparison: fastcnn, eager and frozen, and everything else that could run the network.

A candidate is a function without arguments that runs one batch and returns the output. All but eager mode's are checked
against the network's float64 result before they are handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.backends import use_backend
from fastcnn.graph.freezing import freeze
from fastcnn.measurement.peers import PEERS, Expected, Network, cpu_peers

Candidate = Callable[[], Any]

OURS, FROZEN = "fastcnn", "fastcnn_frozen"
EAGER, CHANNELS_LAST, COMPILED = "eager", "channels_last", "compile"


@torch.no_grad()
def candidates(
    model: nn.Module,
    input: Tensor,
    *,
    reference: nn.Module | None = None,
    backend: str | None = None,
    compiled: bool = False,
    engines: bool = False,
    frozen: bool = False,
    only: Collection[str] | None = None,
    check: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Candidate], list[str]]:
    """Build candidates; the arguments are those of :func:`fastcnn.measurement.compare`.

    Args:
        only: names to build, and nothing else, so that a process can hold a single one.
        check: False leaves the comparison of results out, and the memory that it takes.

    Returns:
        The candidates by name, and a line for each left out that says why.
    """
    nhwc = input.contiguous(memory_format=torch.channels_last)
    nchw = input.contiguous()
    found: dict[str, Candidate] = {}
    left_out: list[str] = []

    def wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    expected: Expected | None = None
    network: Network | None = None
    if engines and wanted(*PEERS):
        network = Network.of(model, nchw)
    if check and (network is not None or (frozen and wanted(FROZEN))):
        expected = _expected(model, nhwc)
    if wanted(OURS):
        found[OURS] = _on_backend(model, nhwc, backend) if backend is not None else lambda: model(nhwc)
    if frozen and wanted(FROZEN):
        tell("freezing")
        try:
            plan = freeze(model, nhwc)
            fault = None if expected is None else expected.fault(plan(nhwc))
        except ValueError as error:
            fault = f"cannot be frozen ({next(iter(str(error).splitlines()), '')})"
        if fault is None:
            found[FROZEN] = lambda: plan(nhwc)
        else:
            left_out.append(f"{FROZEN}: {fault}")
    found.update(_pytorch(model, reference, nchw, nhwc, compiled, wanted, tell))
    if network is not None:
        runners, missing = cpu_peers(network, expected, tell, only)
        found.update(runners)
        left_out += missing
    return found, left_out


def _on_backend(model: nn.Module, x: Tensor, backend: str) -> Candidate:
    def run() -> object:
        with use_backend(backend):
            return model(x)

    return run


def _expected(model: nn.Module, x: Tensor) -> Expected:
    with use_backend("reference"):
        return Expected.of(copy.deepcopy(model).double()(x.double()), model(x))


def _pytorch(
    model: nn.Module,
    reference: nn.Module | None,
    nchw: Tensor,
    nhwc: Tensor,
    compiled: bool,
    wanted: Callable[..., bool],
    tell: Callable[[str], None],
) -> dict[str, Candidate]:
    """PyTorch in eager mode, in both memory formats, and torch.compile as it comes."""
    found: dict[str, Candidate] = {}
    if reference is None:
        # One module serves both: its operators decide the layout, from the input's.
        found[EAGER] = _on_backend(model, nchw, "reference")
        found[CHANNELS_LAST] = _on_backend(model, nhwc, "reference")
        return {name: run for name, run in found.items() if wanted(name)}
    plain = reference.eval()
    if wanted(EAGER):
        found[EAGER] = lambda: plain(nchw)
    if wanted(CHANNELS_LAST, COMPILED):
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if wanted(CHANNELS_LAST):
            found[CHANNELS_LAST] = lambda: last(nhwc)
        if compiled and wanted(COMPILED):
            faster = torch.compile(copy.deepcopy(last))
            found[COMPILED] = lambda: faster(nhwc)
            tell("compiling")
            faster(nhwc)
    return found
