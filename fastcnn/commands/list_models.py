"""``fastcnn list``: the networks and their sizes."""

from __future__ import annotations

import argparse
import fnmatch
from typing import Any

import torch

from fastcnn._table import text_table
from fastcnn.commands._common import UsageError, add_command, parameter_count, print_json
from fastcnn.models import create_model, list_models, model_info


def add_to(commands: Any) -> None:
    parser = add_command(commands, "list", run, "list the networks, their input and their number of parameters")
    parser.add_argument("pattern", nargs="?", default="*", help="only names that contain this, or match it ('resnet*')")


def run(options: argparse.Namespace) -> int:
    pattern = options.pattern if any(c in options.pattern for c in "*?[") else f"*{options.pattern}*"
    names = fnmatch.filter(list_models(), pattern)
    if not names:
        raise UsageError(f"no network's name matches {options.pattern!r}")
    found = []
    for name in names:
        info = model_info(name)
        with torch.device("meta"):  # shapes alone are enough to count
            parameters = parameter_count(create_model(name))
        found.append({
            "name": name, "input_size": list(info.input_size), "parameters": parameters, "paper": info.paper,
        })  # fmt: skip
    if options.json:
        print_json(found)
    else:
        rows = [(m["name"], "x".join(map(str, m["input_size"])), f"{m['parameters']:,}", m["paper"]) for m in found]
        print(text_table(("name", "input", "parameters", "paper"), rows, left=(0, 3)))
    return 0
