"""What a model and its twin of torch.nn must have in common: results in eval mode, and one step of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import fastcnn
from support.accuracy import assert_accurate, relative_error


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


Loss = Callable[..., Tensor]


def assert_eval_equal(ours: nn.Module, twin: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """On the C++ backend without fallback; input in either memory layout."""
    ours.eval()
    twin.eval()
    with torch.no_grad(), fastcnn.use_backend("cpp", strict=True):
        expected = twin(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = ours(x.contiguous(memory_format=layout))
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) <= tolerance


def assert_bf16_accurate(ours: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """The accuracy rule for a copy of the model in bf16."""
    low, twin, x = copy.deepcopy(ours).bfloat16().eval(), copy.deepcopy(twin).bfloat16().eval(), x.bfloat16()
    with torch.no_grad(), fastcnn.use_backend("cpp", strict=True):
        assert_accurate(low(x), twin(x), copy.deepcopy(twin).double()(x.double()))


def training_step(model: nn.Module, x: Tensor, target: Tensor, loss_of: Loss = cross_entropy) -> dict[str, Tensor]:
    """The loss, all gradients in one vector, running statistics in another, and the state after one step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(7)  # dropout
    loss = loss_of(model(x), target)
    loss.backward()
    optimizer.step()
    return {
        "loss": loss.detach(),
        "gradients": _joined(p.grad for p in model.parameters()),
        "buffers": _joined(b for b in model.buffers() if b.is_floating_point()),
        "parameters": _joined(p.detach() for p in model.parameters()),
    }


def _joined(tensors: Iterable[Tensor | None]) -> Tensor:
    flat = [t.flatten() for t in tensors if t is not None]
    return torch.cat(flat) if flat else torch.zeros(1)


def assert_step_equal(
    ours: nn.Module, twin: nn.Module, x: Tensor, target: Tensor, loss_of: Loss = cross_entropy
) -> None:
    """One training step in float64 on the reference backend, and a finite loss and gradients in fp32 on the C++ one."""
    wide, exact = copy.deepcopy(ours).double().train(), copy.deepcopy(twin).double().train()
    with fastcnn.use_backend("reference"):
        actual = training_step(wide, x.double(), target, loss_of)
    expected = training_step(exact, x.double(), target, loss_of)
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= 1e-11, key
    with fastcnn.use_backend("cpp", strict=True):
        single = training_step(copy.deepcopy(ours).train(), x, target, loss_of)
    # A value that rounding moves across ReLU's kink switches its gradient on or off: a loose bound in fp32.
    assert relative_error(single["loss"], expected["loss"]) <= 1e-5
    assert relative_error(single["gradients"], expected["gradients"]) <= 1e-2


class FunctionTwin(nn.Module):
    """A network written as a function of its tensors (by name) and an input, on a copy of a model's parameters."""

    def __init__(self, model: nn.Module, function: Callable[[dict[str, Tensor], Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.model, self.function = copy.deepcopy(model), function

    def forward(self, x: Tensor) -> Tensor:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return self.function(tensors, x, self.training)
