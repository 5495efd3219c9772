"""Pictures of measurements, by matplotlib (the extra ``fastcnn[bench]``)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from fastcnn.measurement.candidates import FROZEN, OURS
from fastcnn.measurement.comparison import Comparison
from fastcnn.measurement.layers import LayerTime

_OURS_COLOUR, _PEER_COLOUR, _FAST_COLOUR = "#4e79a7", "#bab0ac", "#f28e2b"


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install 'fastcnn[bench]')"
    return None


def plot_bench(
    path: str | os.PathLike[str],
    comparisons: Sequence[Comparison],
    layers: Sequence[Sequence[LayerTime]] = (),
    peak: float | None = None,
) -> None:
    """Draw one row of axes a network: its candidates' times, and its layers' shares of the peak.

    Args:
        path: the file; its ending says which format.
        layers: for each network, the calls to draw; empty: none are drawn.
        peak: the processor's, in FLOP/s; needed for layers.

    Raises:
        ValueError: a format that matplotlib does not write, or layers without a peak.
    """
    if layers and peak is None:
        raise ValueError("layers are drawn as shares of the peak, which must be given")
    from matplotlib.figure import Figure  # not pyplot: nothing is shown, and no global state is wanted

    columns = 2 if layers else 1
    figure = Figure(figsize=(7 * columns, 3.2 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), columns, squeeze=False)
    for row, comparison in enumerate(comparisons):
        _candidates(axes[row][0], comparison)
        if layers:
            assert peak is not None
            _layers(axes[row][1], layers[row], peak)
    figure.supxlabel(str(comparisons[0].conditions), fontsize=7)
    figure.savefig(path, dpi=120)


def _candidates(axes: Any, comparison: Comparison) -> None:
    names = list(comparison.timings)
    times = [comparison.timings[name] for name in names]
    spread = [[t.median_ms - t.q1_ms for t in times], [t.q3_ms - t.median_ms for t in times]]
    colours = [_OURS_COLOUR if name in (OURS, FROZEN) else _PEER_COLOUR for name in names]
    bars = axes.barh(names, [t.median_ms for t in times], xerr=spread, color=colours, ecolor="#555555")
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("ms a batch: median and quartiles")
    batch = comparison.input_shape[0]
    axes.set_title(
        f"{comparison.model}, batch {batch}, {comparison.conditions.dtype}: "
        f"{comparison.speedup():.2f}x {comparison.best_peer}"
    )


def _layers(axes: Any, layers: Sequence[LayerTime], peak: float) -> None:
    """Every call a bar as wide as its share of the time, as high as its share of the peak: area is useful work."""
    left = 0.0
    total = sum(layer.median_ms for layer in layers)
    for layer in layers:
        fast = layer.algorithm is not None and ("winograd" in layer.algorithm or "strassen" in layer.algorithm)
        axes.bar(
            left, layer.share_of(peak), layer.median_ms, align="edge", linewidth=0.3, edgecolor="white",
            color=_FAST_COLOUR if fast else _OURS_COLOUR,
        )  # fmt: skip
        left += layer.median_ms
    axes.axhline(1, color="#555555", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, total)
    axes.set_xlabel("ms, call after call (orange: Winograd, Strassen)")
    axes.set_ylabel(f"share of {peak / 1e9:.0f} GFLOP/s")
    axes.set_title("layers: FLOP/s of the plain sum, as a share of the peak")
