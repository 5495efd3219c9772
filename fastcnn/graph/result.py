"""What a report says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastcnn._table import text_table
from fastcnn.graph.rewriting import Left


@dataclass(frozen=True)
class FusedSite:
    """One fused call: the layers it stands for, and, where the model was run, what served it."""

    modules: tuple[str, ...]  # paths of modules; names of functions for what is no module
    pattern: str  # "conv+bn+add+relu"; of a fastcnn model the operator and what is fused into it
    call: str  # the function or operator that is called
    operators: tuple[str, ...] = ()  # that ran, such as "conv2d"
    backends: tuple[str, ...] = ()  # that served them
    macs: int | None = None
    fallback: str | None = None  # why an operator took the reference path

    @property
    def on_kernels(self) -> bool:
        """Whether fastcnn's kernels served all of it."""
        return bool(self.backends) and "reference" not in self.backends

    def to_dict(self) -> dict[str, Any]:
        return {
            "modules": list(self.modules),
            "pattern": self.pattern,
            "call": self.call,
            "operators": list(self.operators),
            "backends": list(self.backends),
            "macs": self.macs,
            "fallback": self.fallback,
        }


@dataclass(frozen=True)
class Report:
    """What was fused into what, which kernels serve it, and what was left alone and why."""

    model: str
    optimized: bool  # by fastcnn.optimize; a model of fastcnn's own is fused from the start
    input_shapes: tuple[tuple[int, ...], ...] | None  # None: the model was not run, so that nothing is known of kernels
    device: str
    dtype: str
    sites: tuple[FusedSite, ...]
    left: tuple[Left, ...]
    macs: int | None

    @property
    def fused_macs(self) -> int | None:
        """Multiply-accumulates on fastcnn's kernels."""
        return None if self.macs is None else sum(site.macs or 0 for site in self.sites if site.on_kernels)

    @property
    def fused_fraction(self) -> float | None:
        """Of all multiply-accumulates; None where the model was not run or has none."""
        return self.fused_macs / self.macs if self.macs and self.fused_macs is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimized": self.optimized,
            "input_shapes": None if self.input_shapes is None else [list(shape) for shape in self.input_shapes],
            "device": self.device,
            "dtype": self.dtype,
            "macs": self.macs,
            "fused_macs": self.fused_macs,
            "fused_fraction": self.fused_fraction,
            "sites": [site.to_dict() for site in self.sites],
            "left": [{"module": e.module, "kind": e.kind, "reason": e.reason} for e in self.left],
        }

    def __str__(self) -> str:
        shapes = "" if self.input_shapes is None else ", ".join("x".join(map(str, s)) for s in self.input_shapes) + " "
        lines = [f"{self.model}, {shapes}{self.dtype} on {self.device}"]
        rows = [
            (
                " ".join(s.modules),
                s.pattern,
                " ".join(dict.fromkeys(s.operators)),
                " ".join(dict.fromkeys(s.backends)) + (f" ({s.fallback})" if s.fallback else ""),
                "" if s.macs is None else f"{s.macs:,}",
            )
            for s in self.sites
        ]
        if rows:
            lines.append(text_table(("layers", "fused", "operator", "backend", "MACs"), rows, left=(0, 1, 2, 3)))
        if self.left:
            lines.append(f"{len(self.left)} left as they were:")
            lines.append(
                text_table(("where", "what", "why"), [(e.module, e.kind, e.reason) for e in self.left], left=(0, 1, 2))
            )
        if self.fused_fraction is not None:
            lines.append(f"{self.fused_macs:,} of {self.macs:,} MACs ({self.fused_fraction:.2%}) on fastcnn's kernels")
        elif self.input_shapes is None:
            lines.append("not run: give input_size to see kernels and MACs")
        return "\n".join(lines)
