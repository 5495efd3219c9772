"""Draws docs/images/block-*.svg, the pictures of docs/architectures.md, from the descriptions at the end of this file.

    python docs/draw_blocks.py            writes the pictures
    python docs/draw_blocks.py --check    exits 1 when a picture on disk is not what would be written

A picture is a grid of boxes. A line describes one box: name, column, row, kernel, text. The column is a number, or
``first:last`` for a box as wide as several columns. Boxes with the same kernel letter lie in one coloured outline,
which is what fastcnn runs as one kernel in evaluation; ``-`` is none. Text ``+`` or ``×`` is drawn as a circle, text in
parentheses as a dashed box (nothing runs there), and what follows ``|`` stands to the right of the box.

Arrows: ``a b c`` connects a to b and b to c, ``;`` separates chains. ``a>b@2`` goes by way of column 2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
COLOURS = ("#4e79a7", "#59a14f", "#e15759", "#b07aa1", "#f28e2b", "#76b7b2", "#9c755f", "#edc948")
COLUMN_GAP, BOX_HEIGHT, ROW, MARGIN, TOP, RADIUS = 26, 26, 42, 24, 52, 12
GREY, INK = "#888888", "#222222"


@dataclass(frozen=True)
class Block:
    title: str
    boxes: str
    arrows: str
    box_width: int = 150
    extra_width: int = 0  # for notes, or an arrow beyond the last column


@dataclass(frozen=True)
class Box:
    first: float
    last: float
    row: float
    kernel: str
    text: str
    note: str


def parse_boxes(lines: str) -> dict[str, Box]:
    boxes = {}
    for line in lines.strip().splitlines():
        name, column, row, kernel, text = line.split(None, 4)
        text, _, note = text.partition("|")
        first, _, last = column.partition(":")
        boxes[name] = Box(float(first), float(last or first), float(row), kernel, text.strip(), note.strip())
    return boxes


class Drawing:
    """The SVG of one block; positions in pixels."""

    def __init__(self, block: Block) -> None:
        self.block, self.boxes = block, parse_boxes(block.boxes)
        columns = max(box.last for box in self.boxes.values()) + 1
        rows = max(box.row for box in self.boxes.values()) + 1
        needed = columns * (block.box_width + COLUMN_GAP) - COLUMN_GAP + block.extra_width
        self.width = round(max(needed, 7.6 * len(block.title)) + 2 * MARGIN)
        self.left = (self.width - needed) / 2
        self.height = round(TOP + rows * ROW - (ROW - BOX_HEIGHT) + MARGIN)

    def column(self, column: float) -> float:
        """The middle of a column."""
        return self.left + column * (self.block.box_width + COLUMN_GAP) + self.block.box_width / 2

    def extent(self, box: Box) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        top = TOP + box.row * ROW
        if box.text in "+×":
            x = self.column(box.first)
            return x - RADIUS, top + BOX_HEIGHT / 2 - RADIUS, x + RADIUS, top + BOX_HEIGHT / 2 + RADIUS
        half = self.block.box_width / 2
        return self.column(box.first) - half, top, self.column(box.last) + half, top + BOX_HEIGHT

    def svg(self) -> str:
        title = escape(self.block.title)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="Helvetica, Arial, sans-serif" font-size="13" '
            f'fill="{INK}">',
            f"<title>{title}</title>",
            f'<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker></defs>',
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
            f'<text x="{self.width / 2:g}" y="26" text-anchor="middle" font-weight="bold">{title}</text>',
            *self.outlines(),
            *self.lines(),
        ]
        for box in self.boxes.values():
            parts += self.box(box)
        return "\n".join([*parts, "</svg>", ""])

    def outlines(self) -> list[str]:
        kernels = sorted({box.kernel for box in self.boxes.values()} - {"-"})
        parts = []
        for kernel in kernels:
            colour = COLOURS[(ord(kernel) - ord("A")) % len(COLOURS)]
            extents = [self.extent(box) for box in self.boxes.values() if box.kernel == kernel]
            left, top = min(e[0] for e in extents) - 7, min(e[1] for e in extents) - 6
            right, bottom = max(e[2] for e in extents) + 7, max(e[3] for e in extents) + 6
            parts.append(
                f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" rx="7" '
                f'fill="{colour}" fill-opacity="0.16" stroke="{colour}" stroke-width="2"/>'
            )
        return parts

    def lines(self) -> list[str]:
        paths: list[str] = []
        for chain in self.block.arrows.split(";"):
            if "@" in chain:
                ends, column = chain.strip().split("@")
                start, end = (self.boxes[name] for name in ends.split(">"))
                paths.append(self.detour(start, end, float(column)))
                continue
            names = chain.split()
            paths += [self.straight(self.boxes[a], self.boxes[b]) for a, b in pairwise(names)]
        return [f'<path d="{d}" fill="none" stroke="{INK}" marker-end="url(#head)"/>' for d in paths]

    def straight(self, start: Box, end: Box) -> str:
        """Down from one box to the next: in the narrower one's middle; to another column, into the box's side."""
        narrow = min(start, end, key=lambda box: box.last - box.first)
        x = self.column((narrow.first + narrow.last) / 2)
        left, top, right, bottom = self.extent(end)
        y = self.extent(start)[3]
        if narrow is start and not left <= x <= right:
            return f"M{x:g} {y:g} V{(top + bottom) / 2:g} H{right if x > right else left:g}"
        return f"M{x:g} {y:g} V{top:g}"

    def detour(self, start: Box, end: Box, column: float) -> str:
        """Out of one box's side (or bottom, where it is as wide), along a column, into the other's side."""
        x = self.column(column)
        left, top, right, bottom = self.extent(start)
        end_left, end_top, end_right, end_bottom = self.extent(end)
        from_below = left <= x <= right
        begin = f"M{x:g} {bottom:g}" if from_below else f"M{right if x > right else left:g} {(top + bottom) / 2:g}"
        if end_left <= x <= end_right:
            return f"{begin} H{x:g} V{end_top:g}"
        return f"{begin} H{x:g} V{(end_top + end_bottom) / 2:g} H{end_right if x > end_right else end_left:g}"

    def box(self, box: Box) -> list[str]:
        left, top, right, bottom = self.extent(box)
        middle = (left + right) / 2
        baseline = (top + bottom) / 2 + 4.5
        if box.text in "+×":
            shape = f'<circle cx="{middle:g}" cy="{(top + bottom) / 2:g}" r="{RADIUS}" fill="#ffffff" stroke="{INK}"/>'
        else:
            dashes = ' stroke-dasharray="4 3"' if box.text.startswith("(") else ""
            shape = (
                f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" rx="4" '
                f'fill="#ffffff" stroke="{GREY}"{dashes}/>'
            )
        text = escape(box.text.strip("()") if box.text.startswith("(") else box.text)
        parts = [shape, f'<text x="{middle:g}" y="{baseline:g}" text-anchor="middle">{text}</text>']
        if box.note:
            parts.append(f'<text x="{right + 14:g}" y="{baseline:g}" fill="#555555">{escape(box.note)}</text>')
        return parts


def network(title: str, layers: str) -> Block:
    """A chain of layers, each one kernel, from lines ``layer | its output volume``; the first is the input."""
    lines = layers.strip().splitlines()
    kinds = {"conv": "A", "max pool": "B", "norm": "C", "linear": "D"}
    boxes = []
    for i, line in enumerate(lines):
        text = line.strip()
        kernel = next((letter for kind, letter in kinds.items() if text.startswith(kind)), "-")
        boxes.append((f"l{i}", 0, i, kernel, text))
    described = "\n".join(" ".join(map(str, box)) for box in boxes)
    return Block(title, described, " ".join(box[0] for box in boxes), box_width=190, extra_width=110)


class Network(Drawing):
    """As a drawing, with an outline around every box of its own; the colour tells the kind of kernel."""

    def outlines(self) -> list[str]:
        boxes, parts = self.boxes, []
        for name, box in boxes.items():
            self.boxes = {name: box}
            parts += super().outlines()
        self.boxes = boxes
        return parts


NETWORKS = {
    "lenet": network(
        "LeNet-5 (lenet5): output volumes, and one kernel an outline",
        """
        input | 32x32x1
        conv 5x5, 6 · relu | 28x28x6
        max pool 2x2 | 14x14x6
        conv 5x5, 16 · relu | 10x10x16
        max pool 2x2 | 5x5x16
        conv 5x5, 120 · relu | 1x1x120
        linear 84 · relu | 84
        linear 10 | 10
        """,
    ),
    "alexnet": network(
        "AlexNet (alexnet): output volumes, and one kernel an outline",
        """
        input | 227x227x3
        conv 11x11/4, 96 · relu | 55x55x96
        max pool 3x3/2 | 27x27x96
        norm (LRN over 5 channels) | 27x27x96
        conv 5x5, 256 · relu | 27x27x256
        max pool 3x3/2 | 13x13x256
        norm (LRN over 5 channels) | 13x13x256
        conv 3x3, 384 · relu | 13x13x384
        conv 3x3, 384 · relu | 13x13x384
        conv 3x3, 256 · relu | 13x13x256
        max pool 3x3/2 | 6x6x256
        linear 4096 · relu | 4096
        linear 4096 · relu | 4096
        linear 1000 | 1000
        """,
    ),
    "zfnet": network(
        "ZFNet (zfnet): output volumes, and one kernel an outline",
        """
        input | 224x224x3
        conv 7x7/2, 96 · relu | 110x110x96
        max pool 3x3/2 | 55x55x96
        norm (LRN over 5 channels) | 55x55x96
        conv 5x5/2, 256 · relu | 26x26x256
        max pool 3x3/2 | 13x13x256
        norm (LRN over 5 channels) | 13x13x256
        conv 3x3, 384 · relu | 13x13x384
        conv 3x3, 384 · relu | 13x13x384
        conv 3x3, 256 · relu | 13x13x256
        max pool 3x3/2 | 6x6x256
        linear 4096 · relu | 4096
        linear 4096 · relu | 4096
        linear 1000 | 1000
        """,
    ),
}

BLOCKS = {
    "vgg": Block(
        "The third stage of VGG-16: four kernels",
        """
        x   0 0 - input | 56x56x128
        c1  0 1 A conv 3x3, 256
        r1  0 2 A relu | 56x56x256
        c2  0 3 B conv 3x3, 256
        r2  0 4 B relu | 56x56x256
        c3  0 5 C conv 3x3, 256
        r3  0 6 C relu | 56x56x256
        p   0 7 D max pool 2x2 | 28x28x256
        """,
        "x c1 r1 c2 r2 c3 r3 p",
        extra_width=80,
    ),
    "inception-naive": Block(
        "Inception, naive: four kernels, no concatenation",
        """
        x     0:3 0 - input
        c1    0   1 A conv 1x1 · relu
        c3    1   1 B conv 3x3 · relu
        c5    2   1 C conv 5x5 · relu
        pool  3   1 D max pool 3x3
        cat   0:3 2 - (concat: each branch writes its channels of one buffer)
        """,
        "x c1 cat; x c3 cat; x c5 cat; x pool cat",
        box_width=128,
    ),
    "inception": Block(
        "Inception with bottlenecks: five kernels, no concatenation",
        """
        x     0:3 0 - input
        c1    0   1 A conv 1x1 · relu
        red3  1   1 A conv 1x1 · relu
        red5  2   1 A conv 1x1 · relu
        pool  3   1 B max pool 3x3
        c3    1   2 C conv 3x3 · relu
        c5    2   2 D conv 5x5 · relu
        proj  3   2 E conv 1x1 · relu
        cat   0:3 3 - (concat: each branch writes its channels of one buffer)
        """,
        "x c1 cat; x red3 c3 cat; x red5 c5 cat; x pool proj cat",
        box_width=128,
    ),
    "plain": Block(
        "Plain block: two kernels",
        """
        x   0 0 - input
        c1  0 1 A conv 3x3
        b1  0 2 A batch norm
        r1  0 3 A relu
        c2  0 4 B conv 3x3
        b2  0 5 B batch norm
        r2  0 6 B relu
        y   0 7 - output
        """,
        "x c1 b1 r1 c2 b2 r2 y",
    ),
    "resnet-basic": Block(
        "ResNet basic block: two kernels",
        """
        x    0 0 - input
        c1   0 1 A conv 3x3
        b1   0 2 A batch norm
        r1   0 3 A relu
        c2   0 4 B conv 3x3
        b2   0 5 B batch norm
        add  0 6 B +
        r2   0 7 B relu
        y    0 8 - output
        """,
        "x c1 b1 r1 c2 b2 add r2 y; x>add@0.62",
        extra_width=40,
    ),
    "resnet-bottleneck": Block(
        "ResNet bottleneck: three kernels, a projection is a fourth",
        """
        x    0:1 0  - input
        c1   0   1  A conv 1x1, C
        b1   0   2  A batch norm
        r1   0   3  A relu
        c2   0   4  B conv 3x3, C
        b2   0   5  B batch norm
        r2   0   6  B relu
        c3   0   7  C conv 1x1, 4C
        b3   0   8  C batch norm
        add  0   9  C +
        r3   0   10 C relu
        y    0   11 - output
        s1   1   4  D conv 1x1, 4C
        s2   1   5  D batch norm
        """,
        "x c1 b1 r1 c2 b2 r2 c3 b3 add r3 y; x s1 s2 add",
    ),
    "preactivation": Block(
        "Pre-activation: two kernels; where the size changes, four",
        """
        x    0   0 - input
        b1   0   1 A batch norm
        r1   0   2 A relu
        c1   0   3 A conv 3x3
        b2   0   4 A batch norm
        r2   0   5 A relu
        c2   0   6 B conv 3x3
        add  0   7 B +
        y    0   8 - output
        x'   1.6 0 - input
        b1'  1.6 1 C batch norm
        r1'  1.6 2 C relu
        c1'  1.6 3 D conv 3x3/2
        b2'  1.6 4 D batch norm
        r2'  1.6 5 D relu
        c2'  1.6 6 E conv 3x3
        add' 1.6 7 E +
        y'   1.6 8 - output
        s'   2.6 4 F conv 1x1/2
        """,
        "x b1 r1 c1 b2 r2 c2 add y; x>add@0.62; x' b1' r1' c1' b2' r2' c2' add' y'; r1'>s'@2.6; s' add'",
    ),
    "wide": Block(
        "Wide block with k times the channels: two kernels",
        """
        x     0 0 - input
        b1    0 1 A batch norm
        r1    0 2 A relu
        c1    0 3 A conv 3x3, k·C
        b2    0 4 A batch norm
        r2    0 5 A relu
        drop  0 6 - (dropout: training only)
        c2    0 7 B conv 3x3, k·C
        add   0 8 B +
        y     0 9 - output
        """,
        "x b1 r1 c1 b2 r2 drop c2 add y; x>add@0.62",
        box_width=168,
        extra_width=44,
    ),
    "resnext": Block(
        "ResNeXt bottleneck, 32x4d: three kernels",
        """
        x    0 0  - input, 256 channels
        c1   0 1  A conv 1x1, 128
        b1   0 2  A batch norm
        r1   0 3  A relu
        c2   0 4  B conv 3x3, 32 groups of 4
        b2   0 5  B batch norm
        r2   0 6  B relu
        c3   0 7  C conv 1x1, 256
        b3   0 8  C batch norm
        add  0 9  C +
        r3   0 10 C relu
        y    0 11 - output
        """,
        "x c1 b1 r1 c2 b2 r2 c3 b3 add r3 y; x>add@0.62",
        box_width=178,
        extra_width=44,
    ),
    "stochastic-depth": Block(
        "Stochastic depth, in evaluation: two kernels",
        """
        x     0   0 - input
        c1    0   1 A conv 3x3
        b1    0   2 A batch norm
        r1    0   3 A relu
        c2    0   4 B conv 3x3
        b2    0   5 B batch norm
        p     0   6 B × | p
        add   0   7 B +
        r2    0   8 B relu
        y     0   9 - output
        """,
        "x c1 b1 r1 c2 b2 p add r2 y; x>add@0.62",
        extra_width=40,
    ),
    "dense": Block(
        "Two layers of a dense block (DenseNet-BC): two kernels each, no concatenation",
        """
        x    0:1   0  - input | the buffer's first C channels
        b1   0     1  A batch norm · relu
        c1   0     2  A conv 1x1, 4k
        n1   0     3  A batch norm · relu
        d1   0     4  B conv 3x3, k
        cat1 0:1   5  - (concat: C + k) | k written behind them
        b2   0     6  C batch norm · relu
        c2   0     7  C conv 1x1, 4k
        n2   0     8  C batch norm · relu
        d2   0     9  D conv 3x3, k
        cat2 0:1   10 - (concat: C + 2k) | k more
        """,
        "x b1 c1 n1 d1 cat1; x>cat1@1; cat1 b2 c2 n2 d2 cat2; cat1>cat2@1",
        extra_width=210,
    ),
}


def main() -> int:
    pictures = {name: Network(block).svg() for name, block in NETWORKS.items()}
    pictures |= {name: Drawing(block).svg() for name, block in BLOCKS.items()}
    files = {IMAGES / f"block-{name}.svg": svg for name, svg in pictures.items()}
    if "--check" in sys.argv[1:]:
        stale = [path for path, svg in files.items() if not path.exists() or path.read_text("utf-8") != svg]
        stale += sorted(set(IMAGES.glob("block-*.svg")) - set(files))
        for path in stale:
            print(f"{path}: not what docs/draw_blocks.py draws; run it", file=sys.stderr)
        return 1 if stale else 0
    for path, svg in files.items():
        path.write_text(svg, "utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
