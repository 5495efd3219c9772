"""Which algorithm serves each convolution of a frozen model: by the backend's rule, or by measurement.

A measurement runs the candidates in turns as steps of plans of their own, with the weight out of the caches, as it is
in a network when its layer's turn comes, and the input in them. A candidate whose result is further from the plain
sum's than fast algorithms may be is never chosen; nor is one that gains less than what measurements scatter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native, backends
from fastcnn.backends import cpp

Pair = tuple[int, int]

# choose(output's shape, input's shape, weight, stride, padding (top, left), dilation, groups) -> algorithm
Choose = Callable[[Sequence[int], Sequence[int], Tensor, Pair, Pair, Pair, int], str]

FAST_ALGORITHM_ERROR = 1e-5  # relative, of a whole output: what DESIGN's accuracy rule grants in fp32
BF16_ROUNDING = 4e-3  # what it grants any bf16 result beside twice the plain sum's error
_ROUNDS, _WORTHWHILE = 11, 0.97
_CACHE_BYTES = 64 << 20

logger = logging.getLogger("fastcnn")


def by_rule(
    out: Sequence[int], input: Sequence[int], weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> str:
    """The backend's own choice, the same as for the unfrozen model."""
    padded = tuple(out[2:]) != tuple(input[2:])
    return cpp.conv2d_algorithm(out, weight.shape, stride, dilation, groups, weight.dtype, padded)


def plan_step(algorithm: str, stride: Pair, padding: Pair, dilation: Pair) -> tuple[str, tuple[Pair, ...]]:
    """The native plan's step that computes a convolution by an algorithm, and what it is told of the geometry."""
    if algorithm == cpp.DIRECT:
        return "conv2d", (stride, padding, dilation)
    return ("conv2d_strassen", ()) if algorithm == cpp.STRASSEN else ("conv2d_winograd", (padding,))


class ByMeasurement:
    """The fastest of the algorithms that cover a convolution, each measured once for a form.

    Weights that only have the same shape share a form: errors of Winograd's algorithm depend on the shape.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}
        self._flush = torch.zeros(_CACHE_BYTES // 4)

    def __call__(
        self,
        out: Sequence[int],
        input: Sequence[int],
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> str:
        usual = by_rule(out, input, weight, stride, padding, dilation, groups)
        padded = tuple(out[2:]) != tuple(input[2:])
        covering = cpp.algorithms(weight.shape, stride, dilation, groups, weight.dtype, padded)
        if covering == (cpp.DIRECT,) or not backends.allows_fast_algorithms():
            return usual
        key = (tuple(out), tuple(input), tuple(weight.shape), stride, padding, groups, weight.dtype)
        if key not in self._known:
            self._known[key] = self._measured(covering, out, input, weight, stride, padding, groups, usual)
        return self._known[key]

    def _measured(
        self,
        covering: Sequence[str],
        out: Sequence[int],
        input: Sequence[int],
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        groups: int,
        usual: str,
    ) -> str:
        generator = torch.Generator().manual_seed(0)
        geometry = (stride, padding, groups)
        x = torch.randn(tuple(input), generator=generator).contiguous(memory_format=torch.channels_last)
        narrow = x.to(weight.dtype)
        x, wide = narrow.float(), weight.detach().float()
        sums = _Layer(cpp.DIRECT, out, x, wide, geometry).run()
        size = sums.norm()

        def off(layer: _Layer) -> Tensor:
            return (layer.run() - sums).norm()

        bound = None
        if weight.dtype == torch.bfloat16:
            bound = 2 * off(_Layer(cpp.DIRECT, out, narrow, weight.detach(), geometry)) + BF16_ROUNDING * size
        layers = {}
        for name in covering:
            layer = _Layer(name, out, narrow, weight.detach(), geometry)
            # Judged in fp32 too, where nothing hides the algorithm's own error.
            error = off(_Layer(name, out, x, wide, geometry))
            if error > FAST_ALGORITHM_ERROR * size or not error.isfinite():
                logger.warning("%s is off by %.1e on %s: not used", name, error / size, tuple(out))
            elif bound is not None and (error := off(layer)) > bound:
                logger.warning("%s is off by %.1e in bf16 on %s: not used", name, error / size, tuple(out))
            else:
                layers[name] = layer
        if not layers:  # weights that are not finite
            return usual
        times: dict[str, list[float]] = {name: [] for name in layers}
        before = {name: _Layer(name, out, narrow, weight.detach(), geometry) for name in layers}
        for _ in range(_ROUNDS):
            for name, layer in layers.items():
                self._flush.add_(1)
                # The same with weights of its own: a network's earlier layers leave scratch memory in the caches.
                before[name].run()
                narrow.mul_(1)
                times[name].append(layer.seconds())
        # The least of each: what else runs on the machine only ever adds.
        least = {name: min(taken) for name, taken in times.items()}
        best = min(least, key=least.__getitem__)
        return usual if usual in least and least[best] > _WORTHWHILE * least[usual] else best


def is_faster(candidate: Callable[[], object], usual: Callable[[], object]) -> bool:
    """Whether a whole model is, run in turns with the other: layers alone do not show what one leaves to the next."""
    from fastcnn.measurement.timing import interleave  # its package measures frozen models

    times = interleave({"usual": usual, "candidate": candidate}, rounds=41, least=5, seconds=2.0, block_ms=5.0)
    return times["candidate"].median_ms < times["usual"].median_ms


class _Layer:
    """One convolution by one algorithm, as a plan of a single step."""

    def __init__(
        self, algorithm: str, out: Sequence[int], x: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, int]
    ) -> None:
        stride, padding, groups = geometry
        self.algorithm, self._x = algorithm, x
        self._y = torch.empty(tuple(out), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        self._weight = cpp.pack_weight(weight, groups, algorithm)
        constants = torch.empty(0, dtype=torch.uint8)
        self._plan = _native.Plan(0, constants, [x.nbytes], [self._y.nbytes])
        dtype = str(x.dtype).removeprefix("torch.")
        operands = [(region, 0, dtype, tuple(t.shape), t.stride()) for region, t in ((3, self._y), (2, x))]
        step, settings = plan_step(algorithm, stride, padding, (1, 1))
        add: Any = getattr(self._plan, step)
        add(*operands, self._weight, None, None, None, None, None, False, False, *settings)

    def run(self) -> Tensor:
        self._plan.run([self._x], [self._y], torch.get_num_threads())
        return self._y

    def seconds(self) -> float:
        return sum(taken for _, taken in self._plan.profile([self._x], [self._y], torch.get_num_threads()))
