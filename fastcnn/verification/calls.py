"""One operator call of the kernel contract, run again: into poisoned outputs, by the reference, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends import Call, backend_module
from fastcnn.ops._layout import pixel_stride
from fastcnn.verification.accuracy import FAST_ALGORITHM_ALLOWANCE, Judgement, judge
from fastcnn.verification.tf32 import fill_in_tf32, less_precise, may_use_tf32

# How many of the first arguments are outputs, where it is not one.
_OUTPUTS = {"batch_statistics": 2}


@dataclass
class PoisonedOutput:
    """An output like a given one in shape and strides, full of NaN, with NaN around it where it is a channel slice."""

    tensor: Tensor
    buffer: Tensor

    @classmethod
    def like(cls, out: Tensor) -> PoisonedOutput:
        pixel = pixel_stride(out) if out.dim() == 4 else None
        if pixel is None or pixel == out.shape[1]:
            tensor = torch.full_like(out, float("nan"))
            return cls(tensor, tensor)
        channels = out.shape[1]
        start = min(out.storage_offset() % pixel, pixel - channels)
        shape = (out.shape[0], pixel, *out.shape[2:])
        buffer = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=torch.channels_last)
        buffer.fill_(float("nan"))
        return cls(buffer[:, start : start + channels], buffer)

    def wrote_outside(self) -> bool:
        """Whether the kernel changed the channels beside its slice."""
        if self.buffer is self.tensor:
            return False
        inside = self.tensor.isnan().sum()
        outside_elements = self.buffer.numel() - self.tensor.numel()
        return bool((self.buffer.isnan().sum() - inside).item() != outside_elements)


def output_count(operator: str) -> int:
    return _OUTPUTS.get(operator, 1)


def outputs_of(call: Call) -> tuple[Tensor, ...]:
    return tuple(call.args[: output_count(call.operator)])  # type: ignore[arg-type]


def isolated(call: Call) -> Call:
    """The call with copies of those inputs that its outputs overwrite, so that it can be repeated."""
    outputs = outputs_of(call)
    rest = [
        a.clone() if isinstance(a, Tensor) and any(_native.may_overlap(out, (a,)) for out in outputs) else a
        for a in call.args[len(outputs) :]
    ]
    return call._replace(args=(*outputs, *rest))


def into(call: Call, outputs: tuple[Tensor, ...], backend: str) -> Call:
    """The same call on another backend and into other outputs."""
    return call._replace(args=(*outputs, *call.args[len(outputs) :]), backend=backend, refused=None)


def reference_outputs(call: Call) -> tuple[Tensor, ...]:
    """What PyTorch's own operators give, in the call's dtype."""
    fresh = tuple(torch.full_like(out, float("nan")) for out in outputs_of(call))
    into(call, fresh, "reference").run()
    return fresh


# Elements of an output above which float64 answers are computed some images at a time: a layer of VGG at batch 256
# takes 6.6 GB in float64, and so do its input and every step of its epilogue.
_MOST_AT_ONCE = 2**26
_WEIGHT = {"conv2d": 2, "linear": 2}  # the argument that all images share although it has their number of dimensions


def exact_outputs(call: Call) -> tuple[Tensor, ...]:
    """What PyTorch's own operators give in float64."""
    outputs = outputs_of(call)
    out = outputs[0]
    images = out.shape[0]
    at_once = max(1, images * _MOST_AT_ONCE // max(1, out.numel()))
    if len(outputs) > 1 or at_once >= images:
        return _exact_outputs(call)
    exact = torch.empty_like(out, dtype=torch.float64, memory_format=torch.contiguous_format)
    for begin in range(0, images, at_once):
        some = slice(begin, begin + at_once)
        args = tuple(
            a[some] if isinstance(a, Tensor) and a.dim() == out.dim() and i != _WEIGHT.get(call.operator) else a
            for i, a in enumerate(call.args)
        )
        exact[some] = _exact_outputs(call._replace(args=args))[0]
    return (exact,)


def _exact_outputs(call: Call) -> tuple[Tensor, ...]:
    # Contiguous: in float64 PyTorch's convolution of channels-last memory is several times slower.
    wide = [a.double().contiguous() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args]
    count = output_count(call.operator)
    fresh = tuple(torch.full_like(out, float("nan")) for out in wide[:count])  # type: ignore[arg-type]
    getattr(backend_module("reference"), call.operator)(*fresh, *wide[count:])
    return fresh


def fast_algorithm(call: Call) -> str | None:
    """The fast algorithm (Winograd, Strassen) that serves an fp32 call, as the backend says; None: an ordinary one."""
    ask: Any = getattr(backend_module(call.backend), "fast_algorithm", None)
    return ask(call.operator, *call.args) if ask is not None and call.dtype == torch.float32 else None


def judge_outputs(
    ours: tuple[Tensor, ...], call: Call, *, allow_fast: bool = False, known: Answers | None = None
) -> Judgement:
    """The accuracy rule applied to a call's outputs: the worst of them.

    Statistics are float64 but sums of fp32 terms: they are judged as fp32.
    """
    answers = known or Answers.of(call)
    allowance = FAST_ALGORITHM_ALLOWANCE if allow_fast else 0.0
    judged = [
        judge(_as_computed(mine, call), _as_computed(theirs, call), exact, allowance=allowance)
        for mine, theirs, exact in zip(ours, answers.reference, answers.exact, strict=True)
    ]
    return max(judged, key=lambda j: j.share)


def _as_computed(output: Tensor, call: Call) -> Tensor:
    return output.float() if output.dtype == torch.float64 and call.dtype != torch.float64 else output


@dataclass(frozen=True)
class Answers:
    """The right answers of a call, to judge several candidates by."""

    reference: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: Call) -> Answers:
        reference, exact = reference_outputs(call), exact_outputs(call)
        if may_use_tf32(call):
            emulated = torch.empty_like(reference[0])
            fill_in_tf32(into(call, (emulated,), "reference"))
            reference = (less_precise(exact[0], reference[0], emulated),)
        return cls(reference, exact)
