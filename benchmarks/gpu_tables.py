"""docs/performance-gpu.md and its pictures: from raw files of `measure_gpu_layers.py` and `measure_gpu_networks.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from network_tables import bars_picture, geometric_mean
from raw_rows import Row

PEER, PARTS = "cudnn_fused", "cudnn_parts"
PEERS = ("cudnn", PEER, PARTS, "pytorch")
TITLES = {
    "cudnn": "cuDNN, bare", PEER: "cuDNN, fused", PARTS: "cuDNN, in parts", "pytorch": "PyTorch", "triton": "Triton",
    "cuda": "CUDA",
}  # fmt: skip

INTRODUCTION = """# Performance on a GPU

Written by `python benchmarks/write_performance_page.py` from the raw files in `benchmarks/results/`; do not edit.
[Performance on a CPU](performance.md).
"""

LAYERS = """Time of one launch in microseconds, from CUDA graphs of several launches: no Python, no launching from the
host. *cuDNN, bare* is the convolution alone; *cuDNN, fused* also does bias, residual and ReLU by cuDNN's fused calls,
and where a layer has a BN-ReLU before it, that by one element-wise kernel. *Triton* and *CUDA* are fastcnn's kernels
with all of it fused, each by its static choice of tile. *Speed-up* is the time of cuDNN, fused, over the better of
these two: below 1 fastcnn is slower; bold where it is not. The *roof* is what the card needs at least: for the layer's
bytes at the best bandwidth or for its operations at the matrix rate, whichever takes longer, both as measured in the
same run; *of roof* is that over a time. Results were first checked; a wrong one has no time.
"""
MOST_IN_PICTURE = 40

COMPILED = {
    "compile": "is `torch.compile`",
    "compile_graphs": 'is `torch.compile(mode="reduce-overhead")`: with CUDA graphs',
    "compile_max_autotune": 'is `torch.compile(mode="max-autotune")`: with CUDA graphs, kernels chosen by their times',
    "compile_freezing": "is `compile_max_autotune` with inductor's freezing",
}


def is_gpu(rows: Sequence[Row]) -> bool:
    return any(str(row.get("what", "")).startswith("gpu_") for row in rows) or any(is_network(row) for row in rows)


def is_network(row: Row) -> bool:
    """A row of `measure_gpu_networks.py`: one candidate of one network."""
    return row.get("what") == "network"


def gpu_page(files: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """The page and its pictures, by path below docs/."""
    parts, written = [INTRODUCTION], {}

    def of_kind(test: Any) -> dict[str, list[Row]]:
        kept = {stem: [row for row in rows if test(row)] for stem, rows in files.items()}
        return {stem: rows for stem, rows in kept.items() if rows}

    for stem, rows in of_kind(is_network).items():
        text, picture = networks_section(stem, rows)
        parts.append(text)
        written |= {f"images/{stem}.svg": picture} if picture else {}
    for stem, rows in of_kind(lambda row: row.get("what") == "gpu_early_starts").items():
        parts.append(early_starts_section(stem, rows))
    for stem, rows in of_kind(lambda row: row.get("what") == "gpu_pair").items():
        parts.append(pairs_section(stem, rows))
    for stem, rows in of_kind(lambda row: row.get("what") == "gpu_layer").items():
        text, pictures = layers_section(stem, rows, ceilings(files[stem]))
        parts.append(text)
        written |= {f"images/{name}": picture for name, picture in pictures.items()}
    for stem, rows in of_kind(lambda row: row.get("what") == "gpu_operator").items():
        parts.append(operators_section(stem, rows, ceilings(files[stem])))
    return written | {"performance-gpu.md": "\n".join(parts)}


def conditions(rows: Sequence[Row]) -> str:
    """What the rows of one file were measured with; a value for each that has one."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))

    named = [
        (title, all_of(key)) for key, title in (
            ("device", ""), ("driver", "driver "), ("torch", "torch "), ("triton", "triton "), ("cuda", "CUDA "),
            ("cudnn", "cuDNN "), ("dtype", ""), ("commit", "commit "),
        )
    ]  # fmt: skip
    dates = sorted({str(row["date"])[:10] for row in rows if row.get("date")})
    parts = [f"{title}{value}" for title, value in named if value] + list(dict.fromkeys([*dates[:1], *dates[-1:]]))
    notes = dict.fromkeys(str(row["method"]) for row in rows if row.get("method"))
    rehearsed = ["**a rehearsal on a CPU: no figures**"] if any(row.get("rehearsal") for row in rows) else []
    return "; ".join([*rehearsed, *parts, *notes]) + ".\n"


def ceilings(rows: Sequence[Row]) -> str:
    """The limits measured in the run, one sentence a kind."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("what") == "gpu_ceiling":
            kind, _, name = row["name"].partition(": ")
            unit = ("TB/s", 1e12) if kind == "bytes" else ("TFLOP/s", 1e12)
            digits = 2 if kind == "bytes" else 0
            found.setdefault(kind, []).append(f"{name} {row['per_second'] / unit[1]:.{digits}f} {unit[0]}")
    titles = {"bytes": "Memory, read plus written", "flops": "Matrix product"}
    return " ".join(f"{titles.get(kind, kind)}: {', '.join(texts)}." for kind, texts in found.items()) + "\n"


# ---- early starts ----------------------------------------------------------------------------------------------------

EARLY_STARTS = """Milliseconds a replay of a CUDA graph, by fastcnn's own choice of kernels, medians: as ever, and with
early starts, where a kernel begins before the one ahead of it has ended. `freeze` measures both and keeps the faster.
*Split*: whether the rule already chose kernels that split a reduction over a cluster. All four graphs of a line gave
the same bits for other inputs in each of the compared replays.
"""


def early_starts_section(stem: str, rows: Sequence[Row]) -> str:
    text = [f"# Early starts: {stem}\n", conditions(rows), EARLY_STARTS]
    text.append("| network | batch | split | one stream | early | branches on streams | early |\n" + "|---" * 7 + "|")
    lines: dict[tuple[str, int, bool], dict[tuple[bool, bool], Row]] = {}
    for row in rows:
        key = row["model"], row["batch"], row.get("split_rule", True)
        lines.setdefault(key, {})[row["most_streams"] > 1, row["early_starts"]] = row
    for (model, batch, split), found in lines.items():
        kinds = [found.get((streams, early)) for streams in (False, True) for early in (False, True)]
        cells = [f"{row['median_ms']:.4g}" if row and "median_ms" in row else "" for row in kinds]
        text.append(f"| `{model}` | {batch} | {'yes' if split else 'no'} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


# ---- pairs of 1x1 convolutions ---------------------------------------------------------------------------------------

PAIRS = """Microseconds of an expanding 1x1 convolution with residual and ReLU and the reducing one behind it, in one
kernel and in two. *Floor*: the bytes that one kernel must move, at {rate:.1f} TB/s. *Weights*: whether a block keeps
all of them in shared memory or streams them. `freeze` measures both ways for a network and keeps the faster.
"""
FORMER_RATE = 3.0e12  # bytes a second, of rows that do not give it


def pairs_section(stem: str, rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("times", {})))
    headings = ["channels", "picture", "batch", "where", "weights", "floor", *names, "speed-up"]
    rate = rows[0].get("bytes_per_second", FORMER_RATE) / 1e12
    text = [f"# Pairs of 1x1 convolutions: {stem}\n", conditions(rows), PAIRS.format(rate=rate)]
    text.append("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    for row in rows:
        times = {name: timing["median_ms"] for name, timing in row.get("times", {}).items()}
        together = times.get("one kernel")
        apart = min((ms for name, ms in times.items() if name != "one kernel"), default=None)
        cells = [" -> ".join(map(str, row["channels"])), f"{row['size']}x{row['size']}", str(row["batch"]), row["note"]]
        cells += [row["weights"] or "not served", microseconds(row["floor_ms"])]
        cells += [microseconds(times.get(name)) for name in names]
        cells.append(f"{apart / together:.2f}x" if together and apart else "; ".join(row.get("wrong", [])))
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


# ---- layers ----------------------------------------------------------------------------------------------------------


def median(row: Row, candidate: str) -> float | None:
    timing = row["timings"].get(candidate)
    return None if timing is None else timing["median_ms"]


def best_of_ours(row: Row) -> float | None:
    """Of the backends' own choices."""
    times = [timing["median_ms"] for name, timing in row["timings"].items() if name not in PEERS and ":" not in name]
    return min(times, default=None)


def best_variant(row: Row) -> tuple[float, str] | None:
    """The fastest of all kernels and tiles, where more than the backends' own choices were timed."""
    if not any(":" in name for name in row["timings"]):
        return None
    return min((timing["median_ms"], name) for name, timing in row["timings"].items() if name not in PEERS)


def peer_time(row: Row) -> float | None:
    """cuDNN's fused call, or what stands for it."""
    return next((ms for name in (PEER, PARTS, "pytorch") if (ms := median(row, name)) is not None), None)


def speedup(row: Row) -> float | None:
    theirs, ours = peer_time(row), best_of_ours(row)
    return None if theirs is None or ours is None else theirs / ours


def networks_of(rows: Sequence[Row]) -> list[str]:
    """Those of which more was measured than one layer that they share with another."""
    layers: dict[str, set[str]] = {}
    for row in rows:
        for network in row["networks"]:
            layers.setdefault(network, set()).add(row["layer"])
    alone = {network for row in rows if len(row["networks"]) == 1 for network in row["networks"]}
    return [network for network, found in layers.items() if len(found) > 1 or network in alone]


def batches_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows}, reverse=True)


def layers_section(stem: str, rows: Sequence[Row], limits: str) -> tuple[str, dict[str, str]]:
    text = [f"# Layers: {stem}\n", conditions(rows), limits, LAYERS]
    pictures: dict[str, str] = {}
    overview, found = layers_overview(rows)
    text.append(overview)
    batches = {str(batch): f"batch {batch}" for batch in batches_of(rows)}
    if found:
        pictures[f"{stem}.svg"] = bars_picture(found, batches, "cuDNN, fused")
        text.append(f"![Speed-up over cuDNN, fused](images/{stem}.svg)\n")
    for network in networks_of(rows):
        for batch in batches_of(rows):
            members = members_of(rows, network, batch)
            if not members:
                continue
            text.append(f"## {network}, batch {batch}\n")
            shares = roof_shares(members)
            if batch == max(batches_of(rows)) and 1 < len(members) <= MOST_IN_PICTURE:
                name = f"{stem}-{network}-{batch}.svg"
                pictures[name] = bars_picture(
                    shares, {PEER: TITLES[PEER], "ours": "fastcnn, the better"}, "the roof", left=300, percent=True
                )
                text.append(f"![Share of the roof](images/{name})\n")
            text.append(layers_table(members, network))
    return "\n".join(text), pictures


def members_of(rows: Sequence[Row], network: str, batch: int) -> list[Row]:
    """A network's layers at one batch size: from large pictures to small ones."""
    found = [row for row in rows if row["batch"] == batch and network in row["networks"]]
    return sorted(found, key=lambda row: (-row["in_size"][0], row["filter"], row["in_channels"]))


def kind_of(row: Row) -> str:
    if row["groups"] > 1:
        return "grouped"
    if row["in_channels"] < 16:
        return "stem"
    if row["filter"] == [1, 1]:
        return "1x1, more channels out than in" if row["out_channels"] > row["in_channels"] else "1x1, other"
    return "larger filters"


def sums(rows: Sequence[Row], network: str) -> list[str]:
    """Runs of the layers by the network, and for all of them the roof, cuDNN's time, fastcnn's, and the speed-up.

    Empty where it is not known how often the network runs a layer.
    """
    counts = [row["networks"][network] for row in rows]
    if not rows or None in counts:
        return [""] * 5
    roof, theirs, ours = (
        sum(count * value(row) for count, row in zip(counts, rows, strict=True))
        for value in (lambda row: row["roof_ms"], peer_time, best_of_ours)
    )
    return [str(sum(counts)), *map(microseconds, (roof, theirs, ours)), f"{theirs / ours:.2f}x"]


def layers_overview(rows: Sequence[Row]) -> tuple[str, dict[tuple[str, str], float]]:
    """Sums over the layers of each network, the geometric means of speed-ups, and the sums by kind of layer."""
    of_sums = "runs | roof, us | cuDNN, fused, us | fastcnn, us | speed-up"
    lines = [
        f"| network | batch | layers | {of_sums} | geometric mean | least | most |\n" + "|---" * 11 + "|",
    ]
    kinds = [f"| network | batch | kind | layers | {of_sums} |\n" + "|---" * 9 + "|"]
    found: dict[tuple[str, str], float] = {}
    for network in networks_of(rows):
        for batch in batches_of(rows):
            members = members_of(rows, network, batch)
            compared = [row for row in members if speedup(row) is not None]
            if not compared:
                continue
            ratios = [ratio for row in compared if (ratio := speedup(row)) is not None]
            found[network, str(batch)] = geometric_mean(ratios)
            left_out = f" of {len(members)}" if len(compared) < len(members) else ""
            cells = [f"`{network}`", str(batch), f"{len(compared)}{left_out}", *sums(compared, network)]
            cells += [f"{value:.2f}x" for value in (found[network, str(batch)], min(ratios), max(ratios))]
            lines.append("| " + " | ".join(cells) + " |")
            for kind in dict.fromkeys(map(kind_of, compared)):
                of_kind = [row for row in compared if kind_of(row) == kind]
                cells = [f"`{network}`", str(batch), kind, str(len(of_kind)), *sums(of_kind, network)]
                kinds.append("| " + " | ".join(cells) + " |")
    introduction = "Sums over the measured layers, each as often as the network runs it:\n"
    return "\n".join([introduction, *lines, "\nThe same by kind of layer:\n", *kinds]) + "\n", found


def microseconds(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms * 1e3:.1f}" if ms < 1 else f"{ms * 1e3:.0f}"


def candidates_of(rows: Sequence[Row]) -> list[str]:
    every = dict.fromkeys(name for row in rows for name in (*row["timings"], *row["verdicts"]))
    named = [name for name in every if ":" not in name]
    return sorted(named, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES))


def layers_table(rows: Sequence[Row], network: str) -> str:
    names = candidates_of(rows)
    headings = ["layer", "times", "roof", *(TITLES.get(n, n) for n in names)]
    headings += ["speed-up", "of roof: ours", "cuDNN", "kernels"]
    varied = any(best_variant(row) for row in rows)
    headings += ["fastest of all kernels"] if varied else []
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in rows:
        ratio = speedup(row)
        cells = [row["layer"], str(row["networks"][network] or ""), f"{microseconds(row['roof_ms'])}, {row['bound']}"]
        cells += [cell(row, name) for name in names]
        cells.append("" if ratio is None else f"{ratio:.2f}x")
        cells += ["" if ms is None else f"{row['roof_ms'] / ms:.0%}" for ms in (best_of_ours(row), peer_time(row))]
        cells.append("; ".join(f"{TITLES.get(name, name)} {kernel}" for name, kernel in row.get("kernels", {}).items()))
        if varied:
            ms, name = best_variant(row) or (None, "")
            cells.append(f"{microseconds(ms)} {name}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + faults(rows, "layer")


def cell(row: Row, name: str) -> str:
    ms = median(row, name)
    if ms is not None:
        wins = name not in PEERS and ms == best_of_ours(row) and (speedup(row) or 0) >= 1
        return f"**{microseconds(ms)}**" if wins else microseconds(ms)
    return row["verdicts"].get(name, "").partition(":")[0]


def faults(rows: Sequence[Row], title: str) -> str:
    found = [
        f"{row[title]}, {TITLES.get(name, name)}: {verdict}"
        for row in rows for name, verdict in row["verdicts"].items() if verdict != "right"
    ]  # fmt: skip
    return f"\nWithout a time: {'; '.join(found)}.\n" if found else ""


def roof_shares(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    shares = {}
    for row in rows:
        for name, ms in ((PEER, peer_time(row)), ("ours", best_of_ours(row))):
            if ms is not None:
                shares[row["layer"], name] = row["roof_ms"] / ms
    return shares


# ---- operators -------------------------------------------------------------------------------------------------------


def operators_section(stem: str, rows: Sequence[Row], limits: str) -> str:
    names = candidates_of(rows)
    headings = ["operator", "batch", "MB", *(f"{TITLES.get(n, n)}, us" for n in names)]
    headings += [*(f"{TITLES.get(n, n)}, GB/s" for n in names), "of roof", "speed-up"]
    text = [
        f"# Memory-bound operators: {stem}\n",
        conditions(rows),
        limits,
        "Timed and checked as the layers are, against PyTorch's own operators. *MB*: every tensor once. *Of roof* is "
        "that of the better of fastcnn's two; *speed-up* is PyTorch's time over its.\n",
        "| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|",
    ]
    for row in rows:
        ours, ratio = best_of_ours(row), speedup(row)
        cells = [f"`{row['operator']}`", str(row["batch"]), f"{row['bytes'] / 1e6:.0f}"]
        cells += [cell(row, name) for name in names]
        rates = [None if (ms := median(row, name)) is None else row["bytes"] / ms / 1e6 for name in names]
        cells += ["" if rate is None else f"{rate:.0f}" for rate in rates]
        cells.append("" if ours is None else f"{row['roof_ms'] / ours:.0%}")
        cells.append("" if ratio is None else f"{ratio:.2f}x")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n" + faults(rows, "operator")


# ---- networks --------------------------------------------------------------------------------------------------------


def networks_section(stem: str, rows: Sequence[Row]) -> tuple[str, str | None]:
    """A table a batch size and dtype; candidates whose names begin with "fastcnn" are ours."""
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    text = [
        f"# Networks: {stem}\n",
        conditions(rows),
        "Milliseconds of GPU time a batch, medians; in brackets images a second. Bold: the best of all but fastcnn. "
        "*Speed-up* is its time over the best of fastcnn's. `eager_graph` is PyTorch's eager mode, channels-last, in a "
        "CUDA graph; `fastcnn_frozen` is `fastcnn.freeze`. Each result was first compared with the fp32 network's.\n",
    ]
    explained = [f"`{name}` {COMPILED[name]}" for name in names if name in COMPILED]
    if explained:
        text.append(f"{'; '.join(explained)}.\n")
    found: dict[tuple[str, str], float] = {}
    cases = sorted(dict.fromkeys((row["dtype"], row["batch"]) for row in rows), key=lambda case: -case[1])
    titles = {f"{dtype}, {batch}": f"{dtype}, batch {batch}" for dtype, batch in cases}
    for dtype, batch in cases:
        members = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        lines = ["| network | " + " | ".join(names) + " | speed-up |", "|---" * (len(names) + 2) + "|"]
        for network in dict.fromkeys(row["model"] for row in members):
            of_network = {row["candidate"]: row for row in members if row["model"] == network}
            times = {name: gpu_ms(row) for name, row in of_network.items() if gpu_ms(row) is not None}
            peers = {name: ms for name, ms in times.items() if not name.startswith("fastcnn")}
            ours = [ms for name, ms in times.items() if name.startswith("fastcnn")]
            best = min(peers, key=peers.__getitem__, default=None)
            cells = [network_cell(of_network.get(name), bold=name == best) for name in names]
            ratio = ""
            if best is not None and ours:
                found[network, f"{dtype}, {batch}"] = peers[best] / min(ours)
                ratio = f"{peers[best] / min(ours):.2f}x"
            lines.append(f"| `{network}` | " + " | ".join(cells) + f" | {ratio} |")
        text += [f"## {dtype}, batch {batch}\n", "\n".join(lines) + "\n"]
    text += [chosen(rows), *latencies(rows)]
    if not found:
        return "\n".join(text), None
    text.insert(3, f"![Speed-up over the best of the others](images/{stem}.svg)\n")
    return "\n".join(text), bars_picture(found, titles, "the best of the others")


def chosen(rows: Sequence[Row]) -> str:
    """What `freeze` chose for each network by times of its own."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["batch"]):
        if gpu_ms(row) is not None and "early_starts" in (found := row.get("frozen", {})):
            notes = "; ".join([*found["fusions"], found["branches"]])
            early = "yes" if found["early_starts"] else "no"
            lines.append(f"| `{row['model']}` | {row['batch']} | {early} | {found['streams']} | {notes} |")
    if not lines:
        return ""
    heading = "| network | batch | early starts | streams | operators in one kernel, branches |\n" + "|---" * 5 + "|"
    return "\n".join(["## What `freeze` chose, by times of its own\n", heading, *lines]) + "\n"


def gpu_ms(row: Row) -> float | None:
    timing = row.get("gpu_ms")
    return None if timing is None else timing["median_ms"]


def network_cell(row: Row | None, bold: bool) -> str:
    ms = None if row is None else gpu_ms(row)
    if row is None or ms is None:
        return "" if row is None else str(row.get("left_out") or "")[:60]
    digits = 3 if ms < 1 else 2 if ms < 10 else 1
    mark = "**" if bold else ""
    return f"{mark}{ms:.{digits}f}{mark} ({row['images_per_s']:.0f})"


def latencies(rows: Sequence[Row]) -> list[str]:
    """What a caller waits for one batch, where that was measured."""
    timed = [row for row in rows if row.get("latency_ms")]
    if not timed:
        return []
    names = list(dict.fromkeys(row["candidate"] for row in timed))
    lines = ["| network, batch | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for network, batch in dict.fromkeys((row["model"], row["batch"]) for row in timed):
        found = {row["candidate"]: row for row in timed if (row["model"], row["batch"]) == (network, batch)}
        cells = [f"{found[name]['latency_ms']['median_ms']:.3f}" if name in found else "" for name in names]
        lines.append(f"| `{network}`, {batch} | " + " | ".join(cells) + " |")
    return [
        "## Latency\n",
        "Milliseconds from the call to the end of a synchronisation, by the wall clock, medians.\n",
        "\n".join(lines) + "\n",
    ]
