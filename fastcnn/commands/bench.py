"""``fastcnn bench``: verify networks, then time them against PyTorch."""

from __future__ import annotations

import argparse
from typing import Any

from fastcnn._table import text_table
from fastcnn.commands import _common as common
from fastcnn.measurement import Comparison, compare
from fastcnn.measurement.comparison import OURS
from fastcnn.measurement.layers import LayerTime, layer_times, layers_table
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
    parser.add_argument(
        "--peers", action="store_true",
        help="CPU: time torch.compile with frozen weights, ONNX Runtime and OpenVINO too (extra: fastcnn[bench])",
    )  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="show each operator call's time as well")
    parser.add_argument("--no-verify", action="store_true", help="time only")


def run(options: argparse.Namespace) -> int:
    common.check_backend(options.backend)
    names = common.chosen_names(options.names)
    device = common.chosen_device(options)
    if options.peers and device.type != "cpu":
        raise common.UsageError(f"--peers times CPU engines; the device is {device} (give --device cpu)")
    results: list[tuple[Comparison, Verification | None]] = []
    layers: dict[str, list[LayerTime]] = {}
    notes: list[str] = []
    with common.progress() as shown:
        for name in names:
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
                    engines=options.peers, name=name, progress=shown.detail,
                )  # fmt: skip
            if options.layers:
                shown.stage(f"timing {name}'s operator calls")
                layers[name] = layer_times(model, images, backend=options.backend, rounds=options.rounds)
            notes += [f"{name}, {reason}" for reason in comparison.left_out]
            results.append((comparison, verification))
    passed = all(v is None or v.passed for _, v in results)
    if options.json:
        documents = [
            {
                **comparison.to_dict(),
                "verification": None if v is None else v.to_dict(),
                **({"layers": [t.to_dict() for t in layers[comparison.model]]} if options.layers else {}),
            }
            for comparison, v in results
        ]
        common.print_json({"passed": passed, "results": documents, "notes": notes})
    else:
        print(as_text(results))
        print("\n".join(notes), end="\n" if notes else "")
        for name, times in layers.items():
            print(f"\n{name}, each operator call\n{layers_table(times)}")
    return 0 if passed else 1


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
    rounds = sorted({c.timings[OURS].rounds for c, _ in results})
    lines += [
        f"medians of {' and '.join(map(str, rounds))} interleaved rounds; speedup over the best peer; peers run "
        f"{' and '.join(sources)}; error: relative, against float64",
        str(results[0][0].conditions),
    ]
    return "\n".join(lines)


def _row(comparison: Comparison, verification: Verification | None, peers: list[str], verified: bool) -> list[str]:
    ours = comparison.timings[OURS]
    row = [comparison.model, str(comparison.input_shape[0])]
    if verified and verification is None:
        row += ["-", "-", "-"]
    elif verified and verification is not None:
        judgement = max(verification.outputs, key=lambda check: check.judgement.share).judgement
        calls = f"yes, {len(verification.layers)} calls" if verification.passed else "WRONG"
        row += [calls, f"{judgement.ours.norm:.1e}", f"{judgement.reference.norm:.1e}"]
    row.append(f"{ours.median_ms:.2f}")
    row += [f"{comparison.timings[p].median_ms:.2f}" if p in comparison.timings else "-" for p in peers]
    batch = comparison.input_shape[0]
    row += [
        f"{comparison.speedup():.2f}x",
        f"{ours.throughput(batch):.1f}",
        f"{ours.flops_per_second(comparison.flops) / 1e9:.0f}",
    ]
    return row
