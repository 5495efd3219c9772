"""``fastcnn.verify``."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastcnn.backends import Call, allows_fast_algorithms, current_choice, intercept, use_backend
from fastcnn.backends import exact as keep_exact
from fastcnn.verification.accuracy import FAST_ALGORITHM_ALLOWANCE, Judgement, judge
from fastcnn.verification.calls import fast_algorithm, isolated, judge_outputs, outputs_of
from fastcnn.verification.naming import CallNames
from fastcnn.verification.result import Check, Verification
from fastcnn.verification.tf32 import fill_in_tf32, less_precise, may_use_tf32


@torch.no_grad()
def verify(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    reference: nn.Module | None = None,
    backend: str | None = None,
    per_layer: bool = True,
    exact: bool = False,
    strict: bool = False,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare a network with PyTorch's own operators and with float64.

    The network runs in eval mode on fastcnn's kernels, on PyTorch's operators in the same dtype, and on PyTorch's
    operators in float64. Its outputs must keep to the accuracy rule

        err(ours, float64) <= 2 * err(reference in the same dtype, float64) + tiny

    (:mod:`fastcnn.verification.accuracy` has ``tiny`` and the rule for single elements,
    :mod:`fastcnn.verification.tf32` what the reference is where TF32 is allowed on a GPU). So must every operator call,
    judged on its own inputs; its output is filled with NaN first, so that an element left unwritten shows.

    Args:
        model: the network; its parameters' dtype and device are the ones verified.
        inputs: its input, or a sequence of its inputs.
        reference: a module that computes the same with the same state, such as torchvision's; default: ``model`` itself
            on the backend ``"reference"``.
        backend: the backend to verify; default: the choice in force.
        per_layer: check every operator call too.
        exact: use no fast algorithm (Winograd, Strassen) and grant no allowance.
        strict: raise :class:`fastcnn.backends.UnsupportedError` where a kernel does not cover a call.
        name: what to call the network in the result; default: its class.
        progress: called with the name of each stage and layer as it begins.

    Returns:
        A :class:`Verification`; print it for a table.

    Raises:
        TypeError: the network's output holds no floating-point tensor.
    """
    started = time.perf_counter()
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    chosen, already_strict = current_choice()
    chosen = backend or chosen
    tell = progress or (lambda text: None)
    watcher = _Watcher(model, per_layer=per_layer, exact=exact, tell=tell)
    keeps_exact = exact or not allows_fast_algorithms()
    with _evaluating(model), use_backend(chosen, strict=strict or already_strict), keep_exact(keeps_exact):
        tell("fastcnn")
        with intercept(watcher):
            ours = _tensors(model(*arguments))
    twin = model if reference is None else reference
    with use_backend("reference"), _evaluating(twin):
        tell("reference")
        theirs = _tensors(twin(*arguments))
        tell("float64")
        wide = copy.deepcopy(twin).double()
        exactly = _tensors(wide(*pytree.tree_map_only(Tensor, _widened, arguments)))
    if watcher.saw_tf32:
        tell("TF32")
        with use_backend("reference"), _evaluating(model), intercept(_in_tf32):
            emulated = _tensors(model(*arguments))
        theirs = [less_precise(e, one, other) for e, one, other in zip(exactly, theirs, emulated, strict=True)]
    outputs = []
    allowance = FAST_ALGORITHM_ALLOWANCE if watcher.saw_fast_algorithm else 0.0
    for i, (mine, reference_output, exact_output) in enumerate(zip(ours, theirs, exactly, strict=True)):
        if mine.shape != reference_output.shape or mine.dtype != reference_output.dtype:
            raise TypeError(
                f"output {i} is {mine.dtype} {tuple(mine.shape)}, the reference's is "
                f"{reference_output.dtype} {tuple(reference_output.shape)}"
            )
        judged = judge(mine, reference_output, exact_output, allowance=allowance)
        label = "output" if len(ours) == 1 else f"output {i}"
        outputs.append(Check(label, None, tuple(mine.shape), chosen or "default", judged))
    first = ours[0]
    agreement = None
    if first.dim() == 2 and first.shape[1] > 1:
        agreement = (int((first.argmax(1) == theirs[0].argmax(1)).sum()), first.shape[0])
    return Verification(
        model=name or type(model).__name__,
        reference="PyTorch's operators" if reference is None else _description(reference),
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        input_shapes=tuple(tuple(t.shape) for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)),
        backend=chosen or "default",
        outputs=tuple(outputs),
        layers=tuple(watcher.checks),
        agreement=agreement,
        seconds=time.perf_counter() - started,
        notes=(*watcher.notes(), *_reservations([check.judgement for check in outputs], exactly)),
    )


class _Watcher:
    """Checks each operator call as it passes."""

    def __init__(self, model: nn.Module, *, per_layer: bool, exact: bool, tell: Callable[[str], None]) -> None:
        self.names = CallNames(model)
        self.checks: list[Check] = []
        self.calls = 0
        self.saw_fast_algorithm = self.saw_tf32 = False
        self._per_layer, self._exact, self._tell = per_layer, exact, tell

    def __call__(self, call: Call) -> None:
        self.calls += 1
        algorithm = None if self._exact else fast_algorithm(call)
        self.saw_fast_algorithm |= algorithm is not None
        self.saw_tf32 |= may_use_tf32(call)
        if not self._per_layer:
            call.run()
            return
        name = self.names.name(call)
        self._tell(name)
        repeatable = isolated(call)
        outputs = outputs_of(call)
        if all(kept is given for kept, given in zip(repeatable.args, call.args, strict=True)):
            for out in outputs:
                out.fill_(float("nan"))
        call.run()
        judged = judge_outputs(outputs, repeatable, allow_fast=algorithm is not None)
        fallback = None if call.refused is None else f"{call.refused.backend}: {call.refused.reason}"
        self.checks.append(
            Check(name, call.operator, tuple(outputs[0].shape), call.backend, judged, fallback, algorithm)
        )

    def notes(self) -> list[str]:
        notes = []
        if self.calls == 0:
            notes.append("no operator of fastcnn was called: nothing of fastcnn was verified")
        if self.saw_tf32:
            notes.append("TF32 is allowed: the reference is the worse of PyTorch's result and one emulated in TF32")
        if self.saw_fast_algorithm:
            notes.append(f"fast algorithms were granted a relative error of {FAST_ALGORITHM_ALLOWANCE:.0e}")
        return notes


def _in_tf32(call: Call) -> None:
    if may_use_tf32(call):
        fill_in_tf32(call)
    else:
        call.run()


def _reservations(judgements: Sequence[Judgement], exact: Sequence[Tensor]) -> list[str]:
    """What keeps a result from meaning much."""
    notes = []
    if any(judgement.reference.norm == float("inf") for judgement in judgements):
        notes.append("PyTorch's own result overflows where float64 does not: fastcnn's cannot be judged by it")
    if not all(bool(output.isfinite().all()) for output in exact):
        notes.append("the float64 result is not finite everywhere: there, fastcnn's only had to be the same")
    return notes


def _tensors(output: Any) -> list[Tensor]:
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise TypeError(f"the network must return a floating-point tensor, returned {type(output).__name__}")
    return found


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double().contiguous() if tensor.is_floating_point() else tensor


def _description(module: nn.Module) -> str:
    top = type(module).__module__.partition(".")[0]
    return f"{top} {type(module).__name__}" if top != "__main__" else type(module).__name__


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
