"""The part of docs/performance.md on whole networks: tables and pictures from `measure_cpu_networks.py`'s raw files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

OURS, FROZEN = "fastcnn", "fastcnn_frozen"
TITLES = {
    FROZEN: "fastcnn, frozen", OURS: "fastcnn, eager", "channels_last": "PyTorch, eager",
    "compile_frozen": "torch.compile, frozen", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip
LOGIT_LIMIT = 1e-5
CASES = {"fp32x1": "fp32, batch 1", "fp32x8": "fp32, batch 8", "bf16x1": "bf16, batch 1"}

METHOD = """Medians of runs in one process a network; in brackets the quartiles. Candidates take turns: a pause of
{pause:.0f} ms (the threads of engines go on spinning for up to 31 ms after a run), an untimed run, and runs for about
{block:.0f} ms. Each candidate's result is first checked {checked}.

*Speed-up* is the best peer's time over the frozen network's; the best peer (bold) is the fastest of all but
fastcnn. *Of peak* counts the operations of direct convolution, against the multiply-adds a second
that a loop in registers reaches in the same process: Winograd's algorithm may pass 100 %. PyTorch is torchvision's
network in channels-last memory where it has the network, else this network on PyTorch's operators. OpenVINO runs bf16
by a precision hint to an fp32 model; ONNX Runtime has no bf16 on a CPU. Weights and input are random: of
AlexNet's and VGG16's fully connected weights 38 and 40 % meet zeros, which a frozen fp32 network does not read. A
network whose frozen form was left out has no speed-up.
"""


def sections(stem: str, rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The Markdown for one raw file, and its pictures by file name."""
    times = [row for row in rows if row["what"] == "times" and "speedup" in row]
    text = [f"## {stem}\n"]
    pictures: dict[str, str] = {}
    if times:
        text += [conditions(times), method(times)]
        text.append(overview(times))
        compared = [row for row in times if is_compared(row)]
        if compared:
            pictures[f"{stem}.svg"] = speedup_picture(compared)
            text.append(f"![Speed-up over the best peer](images/{stem}.svg)\n")
        for case in ordered_cases(times):
            text.append(f"### {CASES.get(case, case)}\n")
            text.append(case_table([row for row in times if row["case"] == case]))
    alone = alone_table(times, [row for row in rows if row["what"] == "alone" and row.get("timings")])
    memory = memory_table([row for row in rows if row["what"] == "memory" and "peak_mib" in row])
    return "\n".join(part for part in [*text, alone, memory] if part), pictures


def method(rows: Sequence[dict[str, Any]]) -> str:
    turns, checks = rows[0]["turns"], dict.fromkeys(row["checked"] for row in rows)
    return METHOD.format(pause=turns["pause_ms"], block=turns["block_ms"], checked=" (some) or ".join(checks))


def ordered_cases(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = dict.fromkeys(row["case"] for row in rows)
    return [case for case in CASES if case in found] + [case for case in found if case not in CASES]


def conditions(rows: Sequence[dict[str, Any]]) -> str:
    def all_of(key: str) -> str:
        return ", ".join(str(value) for value in dict.fromkeys(row[key] for row in rows))

    engines = dict.fromkeys(f"{name} {version}" for row in rows for name, version in row["engines"].items())
    loads, elsewhere = [row["load_average"] for row in rows], [row["busy_elsewhere"] for row in rows]
    dates = sorted({row["date"][:10] for row in rows})
    policy = all_of("OMP_WAIT_POLICY").replace("None", "not set")
    return (
        f"{all_of('device')}; {all_of('threads')} threads, {all_of('instruction_set')}; torch {all_of('torch')}, "
        f"{', '.join(engines)}; commit {all_of('commit')}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; "
        f"OMP_WAIT_POLICY {policy}; load average before timing {min(loads):.1f} to {max(loads):.1f}; other processes "
        f"took {min(elsewhere):.1%} to {max(elsewhere):.1%} of the processors' time meanwhile.\n"
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def is_compared(row: dict[str, Any]) -> bool:
    """Whether a row says how the frozen network compares: not where its result was refused."""
    return FROZEN in row["timings"]


def overview(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | networks | speed-up over the best peer, geometric mean | least | most |", "|---|---|---|---|---|"]
    for case in ordered_cases(rows):
        of_case = sorted((row for row in rows if row["case"] == case and is_compared(row)), key=lambda r: r["speedup"])
        if not of_case:
            continue
        mean = geometric_mean([row["speedup"] for row in of_case])
        ends = [f"{row['model']} {row['speedup']:.2f}x" for row in (of_case[0], of_case[-1])]
        lines.append(f"| {CASES.get(case, case)} | {len(of_case)} | {mean:.2f}x | {ends[0]} | {ends[1]} |")
    return "\n".join(lines) + "\n"


def case_table(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in TITLES if any(name in row["timings"] for row in rows)]
    lines = ["| network | " + " | ".join(f"{TITLES[name]}, ms" for name in names) + " | speed-up | of peak |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        cells = [time(row["timings"].get(name), bold=name == row["best_peer"]) for name in names]
        ours = row["timings"][FROZEN if FROZEN in row["timings"] else OURS]["median_ms"]
        share = row["flops"] / ours * 1e3 / row["peak_flops_per_second"]
        speedup = f"{row['speedup']:.2f}x" if is_compared(row) else ""
        lines.append(f"| `{row['model']}` | " + " | ".join(cells) + f" | {speedup} | {share:.0%} |")
    reasons = [(row["model"], reason) for row in rows for reason in row["left_out"] if "not timed in" not in reason]
    left_out = [f"`{model}`, {reason}" for model, reason in reasons]
    notes = f"\nLeft out: {'; '.join(left_out)}.\n" if left_out else ""
    compared = [row["speedup"] for row in rows if is_compared(row)]
    if compared:
        lines.append("| geometric mean | " + " | ".join("" for _ in names) + f" | {geometric_mean(compared):.2f}x | |")
    return "\n".join(lines) + "\n" + notes


def time(timing: dict[str, Any] | None, bold: bool) -> str:
    if timing is None:
        return ""
    digits = 3 if timing["median_ms"] < 1 else 2 if timing["median_ms"] < 10 else 1
    median, low, high = (f"{timing[key]:.{digits}f}" for key in ("median_ms", "q1_ms", "q3_ms"))
    return f"{'**' if bold else ''}{median}{'**' if bold else ''} ({low} .. {high})"


def alone_table(times: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """What the same candidates take in processes of their own."""
    in_turns = {(row["model"], row["case"]): row["timings"] for row in times}
    lines = []
    for row in rows:
        ((name, timing),) = row["timings"].items()
        together = in_turns.get((row["model"], row["case"]), {}).get(name)
        if together is not None:
            a, b = timing["median_ms"], together["median_ms"]
            case = CASES.get(row["case"], row["case"])
            lines.append(f"| `{row['model']}`, {case} | {TITLES[name]} | {b:.3g} | {a:.3g} | {b / a:.2f} |")
    if not lines:
        return ""
    head = "### In turns and alone\n\nThe same times in processes that hold nothing but the candidate.\n\n"
    table = ["| network | candidate | in turns, ms | alone, ms | ratio |", "|---|---|---|---|---|", *lines]
    return head + "\n".join(table) + "\n"


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = [name for name in TITLES if any(row["candidate"] == name for row in rows)]
    imported = sorted(row["imported_mib"] for row in rows)
    text = (
        "### Peak memory\n\nHigh-water mark of the resident memory, MiB, of a process that builds the network in "
        "PyTorch, makes the candidate of it and runs it five times; in brackets what is resident after the runs. Of it "
        f"{imported[0]:.0f} to {imported[-1]:.0f} MiB are there when PyTorch and fastcnn are imported. The smallest "
        "peer is bold.\n"
    )
    lines = ["| network | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in rows):
        found = {row["candidate"]: row for row in rows if (row["model"], row["case"]) == (model, case)}
        peers = [name for name in found if name not in (OURS, FROZEN)]
        smallest = min(peers, key=lambda name: found[name]["peak_mib"], default=None)
        cells = []
        for name in names:
            row = found.get(name)
            mark = "**" if name == smallest else ""
            cells.append("" if row is None else f"{mark}{row['peak_mib']:.0f}{mark} ({row['after_mib']:.0f})")
        lines.append(f"| `{model}`, {CASES.get(case, case)} | " + " | ".join(cells) + " |")
    return text + "\n" + "\n".join(lines) + "\n"


def logits_section(stem: str, rows: Sequence[dict[str, Any]]) -> str:
    """Logits of frozen networks against float64."""
    worst = max(rows, key=lambda row: row["frozen"])
    within, pytorch = (sum(row[key] <= LOGIT_LIMIT for row in rows) for key in ("frozen", "pytorch"))
    first = rows[0]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    text = [
        f"## {stem}\n",
        "Relative error of frozen networks' fp32 logits against float64, default settings, random weights; images: "
        f"{first['images_are']}; "
        f"{first['device']}, {first['instruction_set']}, torch {first['torch']}, commit {commits}. "
        f"{within} of {len(rows)} networks are within the stated limit of 1e-5, of PyTorch's own results {pytorch}; "
        f"largest {worst['frozen']:.1e} (`{worst['model']}`, PyTorch {worst['pytorch']:.1e}).\n",
    ]
    bounds = [row for row in rows if "rounded" in row]
    if bounds:
        hopeless = sum(row["rounded"] > LOGIT_LIMIT for row in bounds)
        text.append(
            'The column "rounded" is float64 arithmetic whose operators keep their results in fp32: the least that an '
            f"engine with fp32 activations can be off. {hopeless} of {len(bounds)} networks are beyond 1e-5 even so.\n"
        )
    text.append("| network | frozen | PyTorch fp32 | rounded | same largest logit |\n|---|---|---|---|---|")
    for row in rows:
        rounded = f"{row['rounded']:.1e}" if "rounded" in row else ""
        text.append(
            f"| `{row['model']}` | {row['frozen']:.1e} | {row['pytorch']:.1e} | {rounded} "
            f"| {row['agreeing']} of {row['images']} |"
        )
    return "\n".join(text) + "\n"


def instruction_sets_section(stem: str, rows: Sequence[dict[str, Any]]) -> str:
    """Frozen networks with each instruction set, and how much slower the others are than the best."""
    first = rows[0]
    names = list(dict.fromkeys(isa for row in rows for isa in row["median_ms"]))
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    text = [
        f"## {stem}\n",
        f"Frozen networks at batch 1 with each instruction set forced, ms; in brackets the time over {names[0]}'s. "
        f"Processes that take turns, medians; {first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"commit {commits}.\n",
        "| network | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        times = row["median_ms"]
        cells = [f"{times[isa]:.3g} ({times[isa] / times[names[0]]:.2f}x)" if isa in times else "" for isa in names]
        text.append(f"| `{row['model']}`, {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


# ---- the picture -----------------------------------------------------------------------------------------------------

BAR, GAP, LEFT, WIDTH, TOP = 13, 12, 150, 760, 34
COLOURS = ("#4e79a7", "#a0cbe8", "#f28e2b", "#b07aa1")


def speedup_picture(rows: Sequence[dict[str, Any]]) -> str:
    """A group a network, a colour a case; a line where the best peer is."""
    found = {(row["model"], row["case"]): row["speedup"] for row in rows}
    return bars_picture(found, {case: CASES.get(case, case) for case in ordered_cases(rows)}, "the best peer")


def bars_picture(
    found: Mapping[tuple[str, str], float], colours: Mapping[str, str], mark: str, *,
    left: int = LEFT, percent: bool = False,
) -> str:  # fmt: skip
    """Horizontal bars, a group for each first part of a key, a colour for each second part; a line at 1.

    Args:
        found: the values.
        colours: the titles of the second parts, in order.
        mark: what stands under the line.
        left: room for the groups' names.
        percent: write values as shares instead of factors.
    """
    groups = list(dict.fromkeys(group for group, _ in found))
    scale = (WIDTH - left - 60) / max(1.0, *found.values())
    height = TOP + len(groups) * (len(colours) * BAR + GAP) + 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, title in enumerate(colours.values()):
        x = left + 140 * i
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 17}" y="20">{escape(title)}</text>')
    y = TOP
    for group in groups:
        middle = y + len(colours) * BAR / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end">{escape(group)}</text>')
        for i, name in enumerate(colours):
            value = found.get((group, name))
            if value is not None:
                length, colour = value * scale, COLOURS[i % len(COLOURS)]
                text = f"{value:.0%}" if percent else f"{value:.2f}x"
                parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
                parts.append(f'<text x="{left + length + 5:.1f}" y="{y + BAR - 4}" font-size="10">{text}</text>')
            y += BAR
        y += GAP
    line = left + scale
    dashes = 'stroke="#222222" stroke-dasharray="3 3"'
    parts.append(f'<line x1="{line:.1f}" y1="{TOP - 4}" x2="{line:.1f}" y2="{y}" {dashes}/>')
    parts.append(f'<text x="{line:.1f}" y="{y + 14}" text-anchor="middle">{escape(mark)}</text>')
    return "\n".join([*parts, "</svg>", ""])
