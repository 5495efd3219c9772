"""The self-checking tuner: every candidate kernel is checked, the right ones are timed, the fastest is chosen.

A network is run once to see which operator calls it makes, and once more to tune each distinct call where it occurs,
on the tensors it occurs with. Candidates are every backend that covers the call, the variants that a backend offers,
and ``reference``, PyTorch's own operators: so a tuned network is never slower than what it replaces. Each candidate
first computes into an output full of NaN and is held to the accuracy rule; a wrong one is recorded and never timed.

On a GPU, Triton's kernels are compiled ahead in several threads, and a time is that of a CUDA graph's replay: of the
GPU alone, without launching. Runs repeat on the same tensors, so what fits in the L2 cache is read from there: right
for activations, which the layer before has just written, too kind to the weights of a large network at batch 1.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn import tuning
from fastcnn._table import text_table
from fastcnn.backends import BACKENDS, Call, backend_module, intercept, unavailable, use_backend, variants
from fastcnn.measurement.timing import Timing, interleave
from fastcnn.tuning import store
from fastcnn.tuning.compiling import CompilingAhead
from fastcnn.tuning.key import Key, describe, key_of, to_json
from fastcnn.verification.calls import (
    Answers,
    PoisonedOutput,
    fast_algorithm,
    into,
    isolated,
    judge_outputs,
    outputs_of,
)


@dataclass(frozen=True)
class Candidate:
    """One way to serve a call: its time, or why it was rejected."""

    name: str  # a backend, or "backend:variant"
    timing: Timing | None
    rejected: str | None
    error: float | None  # norm-relative, against float64; None where it could not run

    def to_dict(self) -> dict[str, Any]:
        timing = None if self.timing is None else self.timing.to_dict()
        return {"name": self.name, "timing": timing, "rejected": self.rejected, "error": self.error}


@dataclass(frozen=True)
class CallTuning:
    """What was found for one distinct operator call."""

    key: Key
    device: torch.device
    occurrences: int
    candidates: tuple[Candidate, ...]
    choice: str

    def entry(self) -> store.Entry:
        times = {c.name: c.timing.median_ms for c in self.candidates if c.timing is not None}
        rejected = {c.name: c.rejected for c in self.candidates if c.rejected is not None}
        return store.Entry(self.key, self.choice, times, rejected)

    def to_dict(self) -> dict[str, Any]:
        return {
            "call": describe(self.key),
            "key": to_json(self.key),
            "occurrences": self.occurrences,
            "choice": self.choice,
            "candidates": [c.to_dict() for c in self.candidates],
        }


@dataclass(frozen=True)
class TuningReport:
    """What was chosen for each distinct operator call of a network."""

    calls: tuple[CallTuning, ...]
    kept: int  # calls that were tuned before and left alone
    path: Path | None  # where the choices were stored
    seconds: float = 0.0  # what it took

    @property
    def rejected(self) -> list[tuple[str, str, str]]:
        """(call, candidate, reason) of every candidate that was found wrong or failed."""
        return [(describe(c.key), k.name, k.rejected) for c in self.calls for k in c.candidates if k.rejected]

    def to_dict(self) -> dict[str, Any]:
        return {
            "calls": [call.to_dict() for call in self.calls],
            "kept": self.kept,
            "path": None if self.path is None else str(self.path),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        rows = []
        for call in self.calls:
            times = {c.name: c.timing.median_ms for c in call.candidates if c.timing is not None}
            others = sorted((ms, name) for name, ms in times.items() if name != call.choice)
            runner_up = f"{others[0][1]} {others[0][0]:.3f}" if others else "-"
            rows.append((describe(call.key), call.occurrences, call.choice, f"{times[call.choice]:.3f}", runner_up))
        lines = []
        if rows:
            lines.append(text_table(("call", "times", "choice", "ms", "next best, ms"), rows, left=(0, 2, 4)))
        lines += [f"rejected: {name} for {call}: {reason}" for call, name, reason in self.rejected]
        if self.kept:
            lines.append(f"{self.kept} calls were tuned before")
        if not rows and not self.kept:
            lines.append("the network made no call of fastcnn's operators: nothing to tune")
        if rows:
            lines.append(f"tuned in {self.seconds:.1f} s")
        if self.path is not None:
            lines.append(f"stored in {self.path}")
        return "\n".join(lines)


EFFORTS = ("quick", "full")


@torch.no_grad()
def tune(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    backends: Sequence[str] = BACKENDS,
    effort: str = "full",
    rounds: int = 15,
    seconds_per_call: float = 2.0,
    again: bool = False,
    save: bool = True,
    extra: Mapping[str, Callable[[Call], Sequence[str]]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> TuningReport:
    """Choose the kernel for every operator call that a network makes on these inputs.

    The choices serve this process at once and, stored, later ones: for calls of the same form, on the same device, with
    the same versions, wherever they occur.

    Args:
        model: the network; run in the mode it is in.
        inputs: its input, or a sequence of its inputs, of the shapes and dtype to tune for.
        backends: which backends may serve; ``"reference"`` always may.
        effort: ``"full"``, or ``"quick"``: without the variants that must be compiled first, which takes Triton a
            second or so for each.
        rounds, seconds_per_call: how often each candidate of a call is timed, and the time after which no further round
            begins.
        again: tune calls that were tuned before too.
        save: store the choices in the cache folder.
        extra: for a backend's name, what lists further variants for a call, instead of the backend's own list.
        progress: called with the number of calls tuned, of all calls to tune, and the call that begins.

    Raises:
        ValueError: a name in ``backends`` is none of a backend, or ``effort`` is none.
        OSError: the cache folder cannot be written.
    """
    started = time.perf_counter()
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, is {effort!r}")
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"backends must be of {', '.join(BACKENDS)}, has {name!r}")
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if save:
        store.cache_folder().mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    usable = ["reference", *(n for n in backends if n != "reference" and unavailable(n) is None)]
    counts: dict[tuple[torch.device, Key], int] = {}
    known: dict[torch.device, set[Key]] = {}
    candidates = functools.partial(_candidate_names, backends=usable, extra=extra or {}, effort=effort)

    def is_wanted(where: tuple[torch.device, Key]) -> bool:
        if where[0] not in known:
            known[where[0]] = {entry.key for entry in store.load(where[0])}
        return again or where[1] not in known[where[0]]

    with CompilingAhead() as ahead:

        def count(call: Call) -> None:
            where = (call.device, _key(call))
            counts[where] = counts.get(where, 0) + 1
            if counts[where] == 1 and call.device.type == "cuda" and is_wanted(where):
                ahead.compile(call, candidates(call))
            # On a GPU by the reference, which compiles nothing while others do.
            (into(call, outputs_of(call), "reference") if call.device.type == "cuda" else call).run()

        with use_backend(None), intercept(count):
            model(*arguments)
    wanted = {where for where in counts if is_wanted(where)}
    found: dict[tuple[torch.device, Key], CallTuning] = {}

    def tune_where_it_occurs(call: Call) -> None:
        where = (call.device, _key(call))
        if where in wanted and where not in found:
            if progress is not None:
                progress(len(found), len(wanted), describe(where[1]))
            found[where] = _tune_call(call, candidates(call), counts[where], rounds, seconds_per_call)
            _give_memory_back(call.device)
        # Later calls are judged on what this one leaves: a kernel just found wrong must not fill it.
        chosen = found[where].choice if where in found else call.backend
        into(call, outputs_of(call), chosen).run()

    if wanted:
        with use_backend(None), intercept(tune_where_it_occurs):
            model(*arguments)
    path = None
    for device in known:
        tuned = [call for call in found.values() if call.device == device]
        if tuned and save:
            path = store.save(device, [call.entry() for call in tuned])
        tuning._adopt(device, {call.key: call.choice for call in tuned})
    return TuningReport(tuple(found.values()), len(counts) - len(wanted), path, time.perf_counter() - started)


def _key(call: Call) -> Key:
    return key_of(call.operator, call.device, call.dtype, call.args)


def _give_memory_back(device: torch.device) -> None:
    """Captured graphs have memory of their own, which the allocator does not use for others."""
    if device.type == "cuda" and 2 * torch.cuda.memory_reserved(device) > torch.cuda.mem_get_info(device)[1]:
        torch.cuda.empty_cache()


def _candidate_names(
    call: Call, backends: Sequence[str], extra: Mapping[str, Callable[[Call], Sequence[str]]], effort: str
) -> list[str]:
    """Everything that says it covers the call, the reference first."""
    names: list[str] = []
    for name in backends:
        if backend_module(name).unsupported(call.operator, call.device, call.dtype, **call.facts) is not None:
            continue
        names.append(name)
        if name in extra:
            names += [f"{name}:{text}" for text in extra[name](call)]
        elif effort == "full" or not hasattr(backend_module(name), "compilation"):
            names += variants.names(name, call.operator, call.args)
    return names


def _tune_call(call: Call, names: Sequence[str], occurrences: int, rounds: int, seconds: float) -> CallTuning:
    repeatable = isolated(call)
    answers = Answers.of(repeatable)
    right: dict[str, Callable[[], object]] = {}
    errors: dict[str, float | None] = {}
    rejected: dict[str, str] = {}
    for name in names:
        outputs = [PoisonedOutput.like(out) for out in outputs_of(call)]
        candidate = into(repeatable, tuple(o.tensor for o in outputs), name)
        # The reference defines what is right: whatever happens, it stays a candidate.
        errors[name], reason = _check(candidate, outputs, answers)
        if reason is not None and name != "reference":
            rejected[name] = reason
        else:
            right[name] = functools.partial(_run, candidate)
    del answers
    timings = interleave(
        right, call.device, rounds=rounds, seconds=seconds, round_ms=0.5,
        warmup=3, hide_launches=True,
    )  # fmt: skip
    choice = min(timings, key=lambda name: timings[name].median_ms)
    candidates = tuple(Candidate(n, timings.get(n), rejected.get(n), errors[n]) for n in names)
    return CallTuning(_key(call), call.device, occurrences, candidates, choice)


def _run(call: Call) -> None:
    call.run()


def _check(
    candidate: Call, outputs: Sequence[PoisonedOutput], answers: Answers
) -> tuple[float | None, str | None]:  # fmt: skip
    """The candidate's error and, where it must not be used, why."""
    try:
        candidate.run()
        if candidate.device.type == "cuda":
            torch.cuda.synchronize(candidate.device)
    except Exception as error:  # a kernel may fail in any way; what matters is that it is not chosen
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if any(output.wrote_outside() for output in outputs):
        return None, "wrote outside its output"
    fast = fast_algorithm(candidate) is not None
    judged = judge_outputs(tuple(o.tensor for o in outputs), candidate, allow_fast=fast, known=answers)
    if judged.passed:
        return judged.ours.norm, None
    ours, bound = judged.ours, judged.bound
    return ours.norm, (
        f"wrong: relative error {ours.norm:.1e} (may be {bound.norm:.1e}), "
        f"largest {ours.largest:.1e} (may be {bound.largest:.1e})"
    )
