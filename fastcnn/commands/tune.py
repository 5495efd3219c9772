"""``fastcnn tune``: choose kernels for a network's operator calls, or show and clear the choices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastcnn._table import text_table
from fastcnn.commands import _common as common
from fastcnn.tuning import store, tune
from fastcnn.tuning.key import describe, to_json

DESCRIPTION = """For every distinct operator call of the networks: check each kernel that covers it against PyTorch and
float64, time the right ones, and store the fastest. Later runs use the stored choices by themselves."""


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "tune", run, "choose the fastest right kernels", DESCRIPTION)
    common.add_names(parser)
    common.add_network_options(parser, batch=1)
    parser.add_argument("--again", action="store_true", help="tune calls that were tuned before too")
    parser.add_argument("--show", action="store_true", help="show the stored choices")
    parser.add_argument("--clear", action="store_true", help="delete the stored choices")


def run(options: argparse.Namespace) -> int:
    if options.show or options.clear:
        if options.names or (options.show and options.clear):
            raise common.UsageError("--show and --clear go alone, without networks")
        return _show(options) if options.show else _clear(options)
    names = common.chosen_names(options.names)
    device = common.chosen_device(options)
    reports = {}
    with common.progress() as shown:
        for name in names:
            shown.stage(f"tuning {name}")
            shape = common.input_shape(name, options.batch, options.size)
            model = common.build(name, options, device, shape=shape)
            images = common.random_images(shape, device, common.DTYPES[options.dtype])
            try:
                reports[name] = tune(
                    model, images, again=options.again,
                    progress=lambda done, all, call: shown.detail(f"{done + 1} of {all}: {call}"),
                )  # fmt: skip
            except OSError as error:
                raise common.UsageError(f"the cache folder cannot be written: {error}") from None
    if options.json:
        common.print_json({name: report.to_dict() for name, report in reports.items()})
    else:
        print("\n\n".join(f"{name}\n{report}" if len(reports) > 1 else str(report) for name, report in reports.items()))
    return 0


def _show(options: argparse.Namespace) -> int:
    found = [(path, *_read(path)) for path in store.files()]
    if options.json:
        common.print_json({
            "folder": str(store.cache_folder()),
            "files": [
                {
                    "file": path.name, "environment": environment,
                    "choices": [{"call": describe(e.key), **e.to_dict(), "key": to_json(e.key)} for e in entries],
                }
                for path, environment, entries in found
            ],
        })  # fmt: skip
        return 0
    if not found:
        print(f"nothing was tuned yet ({store.cache_folder()} has no choices)")
    for path, environment, entries in found:
        print(path)
        print("  " + ", ".join(f"{name} {value}" for name, value in environment.items()))
        rows = [
            (describe(e.key), e.choice, ", ".join(f"{n} {ms:.3f}" for n, ms in e.milliseconds.items()),
             ", ".join(e.rejected) or "-")
            for e in entries
        ]  # fmt: skip
        print(text_table(("call", "choice", "ms", "rejected"), rows, left=(0, 1, 2, 3)))
    return 0


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
