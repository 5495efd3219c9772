"""``fastcnn tune``: choose kernels for a network's operator calls, or show and clear the choices."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcnn._table import text_table
from fastcnn.commands import _common as common
from fastcnn.tuning import TuningReport, shipping, store, tune
from fastcnn.tuning.key import describe, to_json
from fastcnn.tuning.tuner import EFFORTS

DESCRIPTION = """For every distinct operator call of the networks: check each kernel that covers it against PyTorch and
float64, time the right ones, and store the fastest. Later runs use the stored choices by themselves."""


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "tune", run, "choose the fastest right kernels", DESCRIPTION)
    common.add_names(parser)
    common.add_network_options(parser, batch=1, several_batches=True)
    parser.add_argument(
        "--effort", choices=EFFORTS, default="full",
        help="full: all variants of kernels (tiles, algorithms); quick: none that Triton must compile (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="tune calls that were tuned before too")
    parser.add_argument("--show", action="store_true", help="show the stored choices, and those of the package")
    parser.add_argument("--clear", action="store_true", help="delete the stored choices")
    parser.add_argument(
        "--export", metavar="FILE", help="then write the device's stored choices to a file that can ship with fastcnn"
    )


def run(options: argparse.Namespace) -> int:
    alone = [name for name in ("show", "clear") if getattr(options, name)]
    if alone and (options.names or options.export or len(alone) > 1):
        raise common.UsageError("--show and --clear go alone, without networks")
    if alone:
        return _show(options) if options.show else _clear(options)
    if options.export and not options.names:
        return _export(options)
    names = common.chosen_names(options.names)
    device = common.chosen_device(options)
    reports = {}
    with common.progress() as shown:
        for name in names:
            shapes = [common.input_shape(name, batch, options.size) for batch in options.batch]
            model = common.build(name, options, device, shape=min(shapes))
            for shape in shapes:
                title = name if len(shapes) == 1 else f"{name} batch {shape[0]}"
                shown.stage(f"tuning {title}")
                reports[title] = _tune(options, model, shape, device, shown)
    if options.json:
        common.print_json({title: report.to_dict() for title, report in reports.items()})
    else:
        titled = len(reports) > 1
        print("\n\n".join(f"{title}\n{report}" if titled else str(report) for title, report in reports.items()))
    return _export(options) if options.export else 0


def _tune(
    options: argparse.Namespace, model: nn.Module, shape: tuple[int, ...], device: torch.device,
    shown: common.Progress,
) -> TuningReport:  # fmt: skip
    images = common.random_images(shape, device, common.DTYPES[options.dtype])
    try:
        return tune(
            model, images, again=options.again, effort=options.effort,
            progress=lambda done, all, call: shown.detail(f"{done + 1} of {all}: {call}"),
        )  # fmt: skip
    except OSError as error:
        raise common.UsageError(f"the cache folder cannot be written: {error}") from None


def _export(options: argparse.Namespace) -> int:
    device = common.chosen_device(options)
    entries = store.load(device)
    if not entries:
        raise common.UsageError(f"nothing to export: {store.path_for(device)} has no choices")
    path = Path(options.export)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.replace_file(path, shipping.exported(store.environment(device), entries))
    except OSError as error:
        raise common.UsageError(f"--export: {error}") from None
    print(
        f"{len(entries)} choices exported to {path}; as fastcnn/tuning/shipped/"
        f"{shipping.name_for(store.environment(device)['device'])} they ship",
        file=sys.stderr,
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    found = [(path, *_read(path)) for path in store.files()]
    shipped = [(path, *shipping.read(path.read_text(encoding="utf-8"), path)) for path in shipping.files()]
    if options.json:
        common.print_json({
            "folder": str(store.cache_folder()),
            "files": [
                {"file": path.name, "environment": environment, "choices": _choices(entries)}
                for path, environment, entries in found
            ],
            "shipped": [
                {"file": path.name, "for": header._asdict(), "choices": _choices(entries)}
                for path, header, entries in shipped
                if header is not None
            ],
        })  # fmt: skip
        return 0
    if not found:
        print(f"nothing was tuned yet ({store.cache_folder()} has no choices)")
    for path, environment, entries in found:
        print(path)
        print("  " + ", ".join(f"{name} {value}" for name, value in environment.items()))
        print(_table(entries))
    for path, header, entries in shipped:
        if header is None:  # a warning said why
            continue
        print(f"\n{path.name}, with the package")
        versions = ", ".join(f"{name} from {first}, below {end}" for name, (first, end) in header.versions.items())
        print(f"  for {header.device}, {header.architecture}; {versions}")
        print(_table(entries))
    return 0


def _choices(entries: list[store.Entry]) -> list[dict[str, Any]]:
    return [{"call": describe(e.key), **e.to_dict(), "key": to_json(e.key)} for e in entries]


def _table(entries: list[store.Entry]) -> str:
    rows = [
        (describe(e.key), e.choice, ", ".join(f"{n} {ms:.3f}" for n, ms in e.milliseconds.items()),
         ", ".join(e.rejected) or "-")
        for e in entries
    ]  # fmt: skip
    return text_table(("call", "choice", "ms", "rejected"), rows, left=(0, 1, 2, 3))


def _read(path: Path) -> tuple[dict[str, str], list[store.Entry]]:
    try:
        return store.read(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise common.UsageError(f"{path}: {error}") from None


def _clear(options: argparse.Namespace) -> int:
    removed = store.clear()
    if options.json:
        common.print_json({"removed": [str(path) for path in removed]})
    else:
        print(f"removed {len(removed)} files from {store.cache_folder()}")
    return 0
