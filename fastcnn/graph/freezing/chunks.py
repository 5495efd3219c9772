"""Runs parts of a program on a few images of the batch at a time, so that activations stay in the caches.

At batch 8 the activations of early layers take tens of MiB: each layer would write them to memory and the next one read
them back. A *segment* of the program runs chunk by chunk instead, all its steps on the first images, then on the next.
Weights are then read once a chunk, so late layers, with many weights and small images, run on the whole batch.

Segments and chunks are chosen by bytes from and to memory, as a shortest path over the steps: the state is the chunk's
size, a step costs its activations where a chunk of them does not fit the cache, and its weights once a chunk; a change
of state costs the activations that cross it.

A step may be split where every tensor's first dimension is the batch and outermost in its buffer, since every step but
a product of two activations computes an image from the same image.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from fastcnn.graph.freezing.program import Buffer, Program, Step, View, row_of

CACHE_BYTES = 16 << 20  # what a step reads and writes stays for the next one: half of a usual last-level cache


def run_in_chunks(program: Program) -> None:
    """Replace the program's steps by those of its segments, where that saves traffic."""
    batch = batch_of(program)
    if batch < 2:
        return
    splittable = splittable_steps(program, batch)
    sizes = _chunk_sizes(program, batch, splittable)
    steps: list[Step] = []
    borders = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(sizes)) if a != b), len(sizes)]
    for first, last in pairwise(borders):
        segment = program.steps[first:last]
        if sizes[first] == batch:
            steps += segment
            continue
        inside = _touched_only_in(program, first, last)
        for start in range(0, batch, sizes[first]):
            chunk = Chunk(batch, start, min(sizes[first], batch - start), inside)
            steps += [chunk.step(step) for step in segment]
    program.steps = steps


def batch_of(program: Program) -> int:
    """The first dimension of all inputs, else 1."""
    sizes = {view.shape[0] if view.shape else 1 for view in program.inputs}
    return sizes.pop() if len(sizes) == 1 else 1


def activations_of(step: Step) -> list[View]:
    return [view for view in step.views() if view.buffer.kind != "constant"]


def splittable_steps(program: Program, batch: int) -> list[bool]:
    """Of each step, whether images are apart in all that it touches."""
    whole: set[Buffer] = set()  # buffers that some view does not let one see as a row of images
    for step in program.steps:
        whole.update(view.buffer for view in activations_of(step) if not _is_row_of_images(view, batch))
    whole.update(view.buffer for view in program.outputs if not _is_row_of_images(view, batch))
    return [
        not any(view.buffer in whole for view in activations_of(step))
        and not _multiplies_activations(step)
        and all(view.shape[:1] == step.out.shape[:1] == (batch,) for view in _constants_by_image(step))
        for step in program.steps
    ]


def _multiplies_activations(step: Step) -> bool:
    """Whether a matrix product's second factor is an activation too: every row of the first meets all of it."""
    weight = step.inputs[1] if step.operator == "linear" else None
    return weight is not None and weight.buffer.kind != "constant"


def _constants_by_image(step: Step) -> list[View]:
    """Constants that have a value for every value of the result, images included; of others each image needs all."""
    return [v for v in step.views() if v.buffer.kind == "constant" and step.operator in ("copy", "map")]


def _is_row_of_images(view: View, batch: int) -> bool:
    length = view.buffer.length
    if length % batch != 0:
        return False
    if view.shape[:1] == (batch,) and view.strides[0] * batch == length:
        return view.offset + replace(view, shape=(1, *view.shape[1:])).extent <= view.strides[0]
    return _is_flat(view)


def _is_flat(view: View) -> bool:
    """Whether a view is all values of its buffer, in memory order (:meth:`View.as_row`)."""
    return view == row_of(view.buffer, 0, view.buffer.length)


def _touched_only_in(program: Program, first: int, last: int) -> set[Buffer]:
    """Activations that no step outside of a segment touches."""
    outside = {v.buffer for i, s in enumerate(program.steps) if not first <= i < last for v in s.views()}
    inside = {v.buffer for s in program.steps[first:last] for v in s.views() if v.buffer.kind == "activation"}
    return inside - outside


class Chunk:
    """A segment's steps on the images from ``start`` on. What lives only in the segment gets memory of its own."""

    def __init__(self, batch: int, start: int, images: int, inside: set[Buffer]) -> None:
        self._batch, self._start, self._images = batch, start, images
        self._own = {b: Buffer(b.length // batch * images, b.dtype) for b in inside}

    def step(self, step: Step) -> Step:
        by_image = _constants_by_image(step)

        def part(view: View | None) -> View | None:
            if view is None or (view.buffer.kind == "constant" and view not in by_image):
                return view
            if view.buffer.kind == "constant":
                return view.narrowed(0, self._start, self._images)
            return self._view(view)

        return replace(step, out=self._view(step.out), inputs=tuple(part(view) for view in step.inputs))

    def _view(self, view: View) -> View:
        own = self._own.get(view.buffer)
        image = view.buffer.length // self._batch
        offset = view.offset + (0 if own is not None else self._start * image)
        buffer = own if own is not None else view.buffer
        if _is_flat(view):
            return row_of(buffer, offset, image * self._images)
        return View(buffer, offset, (self._images, *view.shape[1:]), view.strides)


def _chunk_sizes(program: Program, batch: int, splittable: list[bool]) -> list[int]:
    """The cheapest sequence of chunk sizes, one a step."""
    choices = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < batch] + [batch]
    read_later = _bytes_read_later(program)
    best: dict[int, tuple[float, list[int]]] = {k: (0.0, []) for k in choices}
    for index, step in enumerate(program.steps):
        cheapest = min(best.values(), key=lambda found: found[0])
        crossing = 2 * read_later[index]
        now: dict[int, tuple[float, list[int]]] = {}
        for k in choices:
            if k != batch and not splittable[index]:
                continue
            cost, path = best.get(k, (float("inf"), []))
            if cheapest[0] + crossing < cost:
                cost, path = cheapest[0] + crossing, cheapest[1]
            now[k] = (cost + _traffic(program, step, batch, k), [*path, k])
        best = now
    return min(best.values(), key=lambda found: found[0])[1]


def _traffic(program: Program, step: Step, batch: int, k: int) -> float:
    """Bytes between memory and caches when a step runs on ``k`` images at a time."""
    activations = sum(view.values * view.dtype.itemsize for view in activations_of(step))
    weights = sum(view.buffer.bytes for view in step.views() if view.buffer.kind == "constant")
    if step.weight is not None:
        weights += program.weights[step.weight].packed.bytes
    return weights * -(-batch // k) + (activations if activations / batch * k > CACHE_BYTES else 0)


def _bytes_read_later(program: Program) -> list[int]:
    """Before each step: bytes of activations that were written and are still to be read."""
    alive = [0] * (len(program.steps) + 1)
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, step in enumerate(program.steps):
        for view in activations_of(step):
            first.setdefault(view.buffer, index)
            last[view.buffer] = index
    for buffer, start in first.items():
        if buffer.kind == "activation":
            for index in range(start + 1, last[buffer] + 1):
                alive[index] += buffer.bytes
    return alive
