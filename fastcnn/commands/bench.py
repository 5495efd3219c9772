"""``fastcnn bench``: verify networks, then time them against PyTorch and against inference engines."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastcnn._table import text_table
from fastcnn.commands import _common as common
from fastcnn.graph.freezing import FrozenModel, freeze
from fastcnn.measurement import Comparison, compare
from fastcnn.measurement.candidates import OURS
from fastcnn.measurement.comparison import ENGINE_TURNS
from fastcnn.measurement.frozen_layers import frozen_layer_times
from fastcnn.measurement.layers import LayerTime, layer_times, layers_table
from fastcnn.measurement.limits import MachineLimits, machine_limits
from fastcnn.measurement.peers import engine_versions
from fastcnn.measurement.plots import missing as plots_missing
from fastcnn.measurement.plots import plot_bench
from fastcnn.verification import Verification, torchvision_twin, verify

DESCRIPTION = """Verify networks as `fastcnn verify` does (on one or two images), then time inference on fastcnn and on
PyTorch (eager, in both memory formats), in turns within one process; times are medians. Exit code 1 when a network does
not verify."""


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "bench", run, "verify networks and time them against PyTorch", DESCRIPTION)
    common.add_names(parser)
    common.add_network_options(parser, batch=1)
    common.add_backend_option(parser)
    parser.add_argument("--rounds", type=common.positive, default=20, help="how often each is timed (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit for a network's rounds (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of torchvision's network too")
    parser.add_argument("--frozen", action="store_true", help="CPU: time the frozen network (fastcnn.freeze) too")
    parser.add_argument(
        "--peers", action="store_true",
        help="CPU: time torch.compile with frozen weights, ONNX Runtime and OpenVINO (extra: fastcnn[bench]) against "
        "the frozen network too",
    )  # fmt: skip
    parser.add_argument(
        "--layers", action="store_true",
        help="show each operator call's time as well; on a CPU also each step of the frozen network, and the share of "
        "the processor's peak, measured in the same run",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="save a picture: .png, .svg or .pdf (extra: fastcnn[bench])")
    parser.add_argument("--no-verify", action="store_true", help="time only")


@dataclass
class Measured:
    """What was found out about one network."""

    comparison: Comparison
    verification: Verification | None
    eager: list[LayerTime] = field(default_factory=list)
    frozen: list[LayerTime] = field(default_factory=list)

    def to_dict(self, peak: float | None) -> dict[str, Any]:
        def rows(layers: list[LayerTime]) -> list[dict[str, Any]]:
            if peak is None:
                return [t.to_dict() for t in layers]
            return [{**t.to_dict(), "share_of_peak": t.share_of(peak)} for t in layers]

        return {
            **self.comparison.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
            **({"layers": rows(self.eager)} if self.eager else {}),
            **({"frozen_layers": rows(self.frozen)} if self.frozen else {}),
        }


def run(options: argparse.Namespace) -> int:
    common.check_backend(options.backend)
    names = common.chosen_names(options.names)
    device = common.chosen_device(options)
    for option in ("peers", "frozen"):
        if getattr(options, option) and device.type != "cpu":
            raise common.UsageError(f"--{option} times CPU engines; the device is {device} (give --device cpu)")
    if options.plot is not None:
        _check_plot(options.plot)
    results: list[Measured] = []
    limits: MachineLimits | None = None
    notes: list[str] = []
    with common.progress() as shown:
        for name in names:
            results.append(_measure(name, options, device, notes, shown))
        if options.layers and device.type == "cpu":
            shown.stage("measuring the processor's peak")
            limits = machine_limits()
    dtype = common.DTYPES[options.dtype]
    peak = None if limits is None else limits.peak(dtype)
    if options.plot is not None:
        plot_bench(
            options.plot,
            [found.comparison for found in results],
            [found.frozen or found.eager for found in results] if peak is not None else (),
            peak,
        )
    passed = all(found.verification is None or found.verification.passed for found in results)
    if options.json:
        documents = [found.to_dict(peak) for found in results]
        measured = {"limits": limits.to_dict()} if limits is not None else {}
        common.print_json({"passed": passed, "results": documents, "notes": notes, **measured})
    else:
        print(as_text([(found.comparison, found.verification) for found in results]))
        if options.peers:
            print("; ".join(f"{package} {version}" for package, version in engine_versions().items()))
        print("\n".join(notes), end="\n" if notes else "")
        if limits is not None:
            print(limits)
        for found in results:
            for title, layers in (("each operator call", found.eager), ("each step of the frozen plan", found.frozen)):
                if layers:
                    print(f"\n{found.comparison.model}, {title}\n{layers_table(layers, peak)}")
    return 0 if passed else 1


def _measure(
    name: str, options: argparse.Namespace, device: torch.device, notes: list[str], shown: common.Progress
) -> Measured:
    shape = common.input_shape(name, options.batch, options.size)
    shown.stage(f"building {name}")
    model = common.build(name, options, device, shape=(min(options.batch, 2), *shape[1:]))
    twin = torchvision_twin(name, model)
    if options.compile and twin is None:
        notes.append(f"{name}: not timed with torch.compile, which needs torchvision's network; it has none")
    images = common.random_images(shape, device, common.DTYPES[options.dtype])
    verification = None
    with common.refusing_sizes(name, options):
        if not options.no_verify:
            shown.stage(f"verifying {name}")
            verification = verify(
                model, images[:2], name=name, reference=twin, backend=options.backend, progress=shown.detail
            )
        shown.stage(f"timing {name}")
        comparison = compare(
            model, images, reference=twin, backend=options.backend, rounds=options.rounds,
            seconds=options.seconds, compiled=options.compile and twin is not None,
            engines=options.peers, frozen=options.peers or options.frozen, name=name, progress=shown.detail,
            **(ENGINE_TURNS if options.peers else {}),
        )  # fmt: skip
    notes += [f"{name}, {reason}" for reason in comparison.left_out]
    found = Measured(comparison, verification)
    if options.layers:
        shown.stage(f"timing {name}'s operator calls")
        found.eager = layer_times(model, images, backend=options.backend, rounds=options.rounds)
        if device.type == "cpu":
            try:
                frozen = freeze(model, images.contiguous(memory_format=torch.channels_last))
            except ValueError as error:
                notes.append(f"{name}: not shown step by step: {next(iter(str(error).splitlines()), '')}")
            else:
                assert isinstance(frozen, FrozenModel)
                found.frozen = frozen_layer_times(frozen, images, rounds=options.rounds, eager=found.eager)
    return found


def _check_plot(path: str) -> None:
    """What would fail after minutes of measuring fails at once."""
    reason = plots_missing()
    if reason is not None:
        raise common.UsageError(f"--plot: {reason}")
    target = Path(path)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise common.UsageError(f"--plot must name a .png, .svg or .pdf file, is {path!r}")
    if not target.parent.is_dir():
        raise common.UsageError(f"--plot: there is no folder {str(target.parent)!r}")


def as_text(results: list[tuple[Comparison, Verification | None]]) -> str:
    peers = list(dict.fromkeys(name for comparison, _ in results for name in comparison.timings if name != OURS))
    verified = any(v is not None for _, v in results)
    headings = ["network", "batch", *(["verified", "error", "PyTorch"] if verified else [])]
    headings += ["fastcnn ms", *(f"{peer} ms" for peer in peers), "speedup", "images/s", "GFLOP/s"]
    rows = [_row(comparison, v, peers, verified) for comparison, v in results]
    lines = [text_table(headings, rows, left=(0,))]
    for _, v in results:
        if v is not None and not v.passed:
            lines += ["", str(v)]
        elif v is not None and v.fallbacks:
            lines.append(f"{v.model}: {len(v.fallbacks)} of {len(v.layers)} operator calls took PyTorch's operators")
    sources = sorted({c.peer for c, _ in results})
    samples = sorted({c.timings[c.ours].samples for c, _ in results})
    lines += [
        f"medians of {' and '.join(map(str, samples))} interleaved runs; speedup over the best peer; peers run "
        f"{' and '.join(sources)}; error: relative, against float64",
        str(results[0][0].conditions),
    ]
    return "\n".join(lines)


def _row(comparison: Comparison, verification: Verification | None, peers: list[str], verified: bool) -> list[str]:
    ours = comparison.timings[comparison.ours]
    row = [comparison.model, str(comparison.input_shape[0])]
    if verified and verification is None:
        row += ["-", "-", "-"]
    elif verified and verification is not None:
        judgement = max(verification.outputs, key=lambda check: check.judgement.share).judgement
        calls = f"yes, {len(verification.layers)} calls" if verification.passed else "WRONG"
        row += [calls, f"{judgement.ours.norm:.1e}", f"{judgement.reference.norm:.1e}"]
    # More digits for a network of which a run takes less than a millisecond.
    digits = 2 if min(t.median_ms for t in comparison.timings.values()) >= 1 else 3
    times = {name: f"{t.median_ms:.{digits}f}" for name, t in comparison.timings.items()}
    row += [times[OURS], *(times.get(peer, "-") for peer in peers)]
    batch = comparison.input_shape[0]
    row += [
        f"{comparison.speedup():.2f}x",
        f"{ours.throughput(batch):.1f}",
        f"{ours.flops_per_second(comparison.flops) / 1e9:.0f}",
    ]
    return row
