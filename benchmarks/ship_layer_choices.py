"""Adds the fastest kernels of measured layers to the choices that ship with the package.

    python benchmarks/ship_layer_choices.py benchmarks/results/gpu-h100-layers-256.json [...]

The files are `measure_gpu_layers.py`'s, with `--variants`: every kernel was checked before it was timed, and cuDNN's
fused call is a candidate. A layer's choice takes the place of an older one of the same call. Layers with other fused
work than cuDNN's fused calls do (a BN-ReLU before them) have no cuDNN candidate here.

Not for small batches: there kernels that begin before the one ahead of them has ended save more than a faster kernel
that cannot (`docs/internals.md`), which times of single layers do not show.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_layers import Layer, layers_of
from gpu_problems import Tensors, contract_arguments
from gpu_tables import PEER, PEERS
from raw_rows import Row, read_rows

from fastcnn.tuning import shipping, store
from fastcnn.tuning.key import key_of
from fastcnn.tuning.store import Entry

LEAST_BATCH, CUDNN = 64, "cudnn:benchmark"

_layers_of = functools.cache(layers_of)


def candidates_of(row: Row) -> dict[str, float]:
    """Milliseconds by the tuner's names: fastcnn's backends and their kernels, and cuDNN's fused call.

    The latter was timed with `torch.backends.cudnn.benchmark`, and must be run so.
    """
    times = {name: timing["median_ms"] for name, timing in row["timings"].items() if name not in PEERS}
    if "cuda" in times:
        times[f"cuda:{row['kernels']['cuda']}"] = times.pop("cuda")  # whatever a later rule says
    if not row["prologue"] and PEER in row["timings"]:
        times[CUDNN] = row["timings"][PEER]["median_ms"]
    return times


def entries_of(row: Row, layer: Layer) -> Iterator[Entry]:
    """One for each memory format that the filters may have: kernels read them packed."""
    times = candidates_of(row)
    device = torch.device("cuda")  # of the key: nothing is computed
    tensors = Tensors.random(layer, row["batch"], torch.device("meta"))
    out, x, weight, *others = contract_arguments(layer, tensors)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        filters = weight.contiguous(memory_format=memory_format)
        key = key_of("conv2d", device, torch.bfloat16, (out, x, filters, *others))
        yield Entry(key, min(times, key=times.__getitem__), times)


def layer_of(row: Row) -> Layer:
    found = {layer for network in row["networks"] for layer in _layers_of(network) if layer.name == row["layer"]}
    if len(found) != 1:
        raise SystemExit(f"{len(found)} layers are called {row['layer']!r} in {', '.join(row['networks'])}")
    return found.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, help="default: the device's file in fastcnn/tuning/shipped")
    options = parser.parse_args()
    rows = [row for file in options.files for row in read_rows(file) if row.get("what") == "gpu_layer"]
    rows = [row for row in rows if row["batch"] >= LEAST_BATCH and any(":" in name for name in row["timings"])]
    devices = {row["device"] for row in rows}
    if len(devices) != 1:
        parser.error(f"the files must have layers of one device with every kernel timed; they have {len(devices)}")
    target = options.to or shipping.FOLDER / shipping.name_for(devices.pop())
    text = target.read_text("utf-8")
    header, old = shipping.read(text, target)
    if header is None:
        parser.error(f"{target} is no shipped file: begin it with `fastcnn tune --export`")
    new = [entry for row in rows for entry in entries_of(row, layer_of(row))]
    entries = {entry.key: entry for entry in (*old, *new)}
    store.replace_file(target, shipping.exported(json.loads(text)["measured_with"], entries.values()))
    ours = sum(entry.choice != CUDNN for entry in new)
    print(f"{target}: {len(entries)} choices, {len(new)} of them from these files, {ours} fastcnn's own kernels")


if __name__ == "__main__":
    main()
