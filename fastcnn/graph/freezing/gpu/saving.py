"""The content of a frozen model's file: the model traced, and the trace tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastcnn.graph.freezing.capture import capture
from fastcnn.graph.freezing.gpu.comparing import near
from fastcnn.graph.freezing.gpu.interpreting import Interpreted
from fastcnn.graph.freezing.gpu.making import make_program, placed
from fastcnn.graph.freezing.gpu.program import Program
from fastcnn.graph.freezing.gpu.settings import Settings
from fastcnn.graph.freezing.gpu.storage import as_bytes, as_loaded
from fastcnn.nn.merging import traced_as_run


def content_of(
    model: nn.Module, inputs: Sequence[Tensor], settings: Settings, replay: Callable[[], Sequence[Tensor]]
) -> bytes:
    """For a model that was frozen with these inputs, under these settings; ``replay`` gives its graph's results.

    Raises:
        ValueError: no file can hold it, or what would be in the file gives another result.
    """
    device = inputs[0].device
    with torch.inference_mode(False), torch.no_grad():
        try:
            with settings.applied(device):
                program, parts = program_of(model, inputs)
                expected = replay()
            with settings._replace(autocast=None).applied(device):
                found = tree_flatten(as_loaded(program, parts, device)(*inputs))[0]
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise ValueError(f"the frozen model cannot be saved: {str(error) or type(error).__name__}") from error
        if not all(map(near, found, expected)):
            raise ValueError(
                "the frozen model cannot be saved: its operators, as PyTorch shows them, give another result than its "
                "graph; it may launch kernels that PyTorch does not see, or have changed since it was frozen"
            )
        return as_bytes(program, parts, settings, device)


def program_of(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Program, list[Tensor]]:
    """A model as a program, and the memory in which its constants lie. Raises whatever tracing its code raises."""
    if isinstance(model, Interpreted):
        constants, parts = placed(model.constants)
        return dataclasses.replace(model.program, constants=constants), parts
    blank = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
    with traced_as_run():
        captured = capture(model, blank)
    return make_program(captured, inputs[0].device)
