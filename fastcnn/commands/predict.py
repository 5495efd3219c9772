"""``fastcnn predict``: image files in, labels out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn._table import text_table
from fastcnn.backends import use_backend
from fastcnn.commands import _common as common
from fastcnn.commands._images import labels_for, normalised, read_archive, read_image

DESCRIPTION = """Classify image files, or the images of an .npz archive (`images`, uint8, and perhaps `labels`: then the
accuracy is reported). Inputs up to 64 pixels: the whole image resized; larger: shorter side to 256, then the centre.
Values are normalised with ImageNet's mean and deviation; one-channel networks take grey values in [0, 1]."""


@dataclass(frozen=True)
class Source:
    """A file's images, as uint8 (N, C, H, W), and their labels where it has them."""

    path: Path
    images: Tensor
    labels: list[int] | None
    is_archive: bool


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "predict", run, "classify images with a trained network", DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="a network")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or .npz archives")
    common.add_network_options(parser, batch=64)
    common.add_backend_option(parser)
    parser.add_argument("--labels", metavar="FILE", help="the classes' names, one a line")
    parser.add_argument("--topk", type=common.positive, default=1, help="how many classes to show (%(default)s)")


def run(options: argparse.Namespace) -> int:
    name = common.known_name(options.name)
    if options.weights is None:
        raise common.UsageError("predict needs --weights PATH: an untrained network's labels would mean nothing")
    common.check_backend(options.backend)
    device = common.chosen_device(options)
    size = common.input_shape(name, 1, options.size)[1:]
    sources = [_read(Path(path), size) for path in options.images]  # before the network: bad files fail at once
    model = common.build(name, options, device, shape=None)
    results = []
    with common.progress() as shown:
        for source in sources:
            shown.stage(f"classifying {source.path}")
            with common.refusing_sizes(name, options):
                scores = _scores(model, source.images, options, device, shown)
            results.append((source, scores))
    classes = results[0][1].shape[1]
    labels = labels_for(name, classes, options.labels)
    documents = [_document(source, scores, labels, min(options.topk, classes)) for source, scores in results]
    if options.json:
        common.print_json({"model": name, "weights": options.weights, "files": documents})
    else:
        _print(documents)
    return 0


def _read(path: Path, size: tuple[int, int, int]) -> Source:
    if path.suffix.lower() == ".npz":
        archive = read_archive(path, size)
        labels = None if archive.labels is None else [int(label) for label in archive.labels]
        return Source(path, torch.from_numpy(archive.images), labels, True)
    return Source(path, read_image(path, size).unsqueeze(0), None, False)


@torch.inference_mode()
def _scores(
    model: nn.Module, images: Tensor, options: argparse.Namespace, device: torch.device, shown: common.Progress
) -> Tensor:
    """Probabilities (N, classes)."""
    found = []
    for start in range(0, len(images), options.batch):
        shown.detail(f"{start} of {len(images)}")
        batch = normalised(images[start : start + options.batch]).to(device, common.DTYPES[options.dtype])
        with use_backend(options.backend):
            found.append(model(batch).float().softmax(1).cpu())
    return torch.cat(found)


def _document(source: Source, scores: Tensor, labels: list[str] | None, topk: int) -> dict[str, Any]:
    values, indices = scores.topk(topk, dim=1)
    predictions = [
        [
            {"class": int(c), "label": labels[int(c)] if labels else None, "probability": float(p)}
            for p, c in zip(row_values, row_classes, strict=True)
        ]
        for row_values, row_classes in zip(values, indices, strict=True)
    ]
    document: dict[str, Any] = {"file": str(source.path), "archive": source.is_archive, "predictions": predictions}
    if source.labels is not None:
        right = sum(row[0]["class"] == label for row, label in zip(predictions, source.labels, strict=True))
        document |= {"right": right, "count": len(predictions), "accuracy": right / len(predictions)}
    return document


def _print(documents: list[dict[str, Any]]) -> None:
    rows = []
    for document in documents:
        if "right" in document:
            continue
        for i, row in enumerate(document["predictions"]):
            where = f"{document['file']}[{i}]" if document["archive"] else document["file"]
            for rank, guess in enumerate(row):
                label = guess["label"] or f"class {guess['class']}"
                rows.append((where if rank == 0 else "", label, f"{guess['probability']:.1%}"))
    if rows:
        print(text_table(("image", "label", "probability"), rows, left=(0, 1)))
    for document in documents:
        if "right" in document:
            print(f"{document['file']}: {document['right']} of {document['count']} right ({document['accuracy']:.2%})")
