"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastcnn._table import text_table
from fastcnn.verification.accuracy import Error, Judgement


@dataclass(frozen=True)
class Check:
    """One comparison with the reference and float64: a network's output, or one operator call on its own inputs."""

    name: str
    operator: str | None  # None: a network's output
    shape: tuple[int, ...]
    backend: str
    judgement: Judgement
    fallback: str | None = None  # why it took the reference path, where a kernel was to serve it
    algorithm: str | None = None  # the fast algorithm whose stated allowance was granted

    @property
    def passed(self) -> bool:
        return self.judgement.passed

    def to_dict(self) -> dict[str, Any]:
        def errors(error: Error) -> dict[str, float]:
            return {"norm": error.norm, "largest": error.largest}

        judgement = self.judgement
        return {
            "name": self.name,
            "operator": self.operator,
            "shape": list(self.shape),
            "backend": self.backend,
            "error": errors(judgement.ours),
            "reference_error": errors(judgement.reference),
            "bound": errors(judgement.bound),
            "fallback": self.fallback,
            "algorithm": self.algorithm,
            "passed": self.passed,
        }

    def _row(self) -> tuple[object, ...]:
        j = self.judgement
        return (
            self.name,
            self.operator or "",
            "x".join(map(str, self.shape)),
            self.backend + (" (fallback)" if self.fallback else ""),
            f"{j.ours.norm:.1e}",
            f"{j.reference.norm:.1e}",
            f"{j.bound.norm:.1e}",
            f"{j.ours.largest:.1e}",
            f"{j.bound.largest:.1e}",
            "ok" if self.passed else "WRONG",
        )


_HEADINGS = ("where", "operator", "shape", "backend", "error", "PyTorch", "bound", "largest", "bound", "")


@dataclass(frozen=True)
class Verification:
    """A network's outputs and operator calls, compared with PyTorch's own operators and with float64.

    Errors are relative to the float64 result; ``passed`` is the accuracy rule (:mod:`fastcnn.verification.accuracy`).
    """

    model: str
    reference: str
    device: str
    dtype: str
    input_shapes: tuple[tuple[int, ...], ...]
    backend: str
    outputs: tuple[Check, ...]
    layers: tuple[Check, ...] = ()
    agreement: tuple[int, int] | None = None  # rows of the first output with the reference's arg max, and all rows
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(check.passed for check in (*self.outputs, *self.layers))

    @property
    def first_off(self) -> Check | None:
        """The first operator call, in the order of execution, that breaks the rule."""
        return next((layer for layer in self.layers if not layer.passed), None)

    @property
    def worst_layer(self) -> Check | None:
        return max(self.layers, key=lambda layer: layer.judgement.share, default=None)

    @property
    def fallbacks(self) -> tuple[Check, ...]:
        return tuple(layer for layer in self.layers if layer.fallback)

    def to_dict(self) -> dict[str, Any]:
        first = self.first_off
        return {
            "model": self.model,
            "reference": self.reference,
            "device": self.device,
            "dtype": self.dtype,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "backend": self.backend,
            "passed": self.passed,
            "first_off": None if first is None else first.name,
            "agreement": None if self.agreement is None else list(self.agreement),
            "outputs": [check.to_dict() for check in self.outputs],
            "layers": [check.to_dict() for check in self.layers],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Every output and every operator call, one a row."""
        return text_table(_HEADINGS, [c._row() for c in (*self.layers, *self.outputs)], left=(0, 1, 2, 3))

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        lines = [
            f"{self.model}, {shapes} {self.dtype} on {self.device}, backend {self.backend}; "
            f"reference: {self.reference}",
            text_table(_HEADINGS, self._shown(), left=(0, 1, 2, 3)),
        ]
        if self.layers:
            wrong = sum(not layer.passed for layer in self.layers)
            verdict = "each within its bound" if wrong == 0 else f"{wrong} beyond their bounds"
            lines.append(f"{len(self.layers)} operator calls checked on their own inputs: {verdict}")
        if self.fallbacks:
            reasons = sorted({f"{c.operator}: {c.fallback}" for c in self.fallbacks})
            lines.append(f"{len(self.fallbacks)} took PyTorch's operators ({'; '.join(reasons)})")
        if self.agreement is not None:
            lines.append(f"same top class as the reference: {self.agreement[0]} of {self.agreement[1]}")
        lines += self.notes
        first = self.first_off
        lines.append("PASSED" if self.passed else "FAILED" + (f", first at {first.name}" if first else ""))
        return "\n".join(lines)

    def _shown(self) -> list[tuple[object, ...]]:
        """The outputs and the wrong layers; where none is wrong, the one nearest to its bound."""
        wrong = [layer for layer in self.layers if not layer.passed]
        worst = self.worst_layer
        shown = wrong[:10] if wrong else [worst] if worst else []
        return [check._row() for check in (*shown, *self.outputs)]
