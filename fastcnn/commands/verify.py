"""``fastcnn verify``: networks against PyTorch and float64."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fastcnn._table import text_table
from fastcnn.commands import _common as common
from fastcnn.commands._images import normalised_archive
from fastcnn.verification import Verification, torchvision_twin, verify

DESCRIPTION = """Run networks on fastcnn's kernels, on PyTorch's operators and in float64, and hold every output and
every operator call to err(fastcnn) <= 2 * err(PyTorch) + tiny. The reference is torchvision's network where it has the
same one. Exit code 1 when anything is off."""


def add_to(commands: Any) -> None:
    parser = common.add_command(commands, "verify", run, "check networks against PyTorch and float64", DESCRIPTION)
    common.add_names(parser)
    parser.add_argument("--all", action="store_true", help="every network")
    common.add_network_options(parser, batch=2)
    common.add_backend_option(parser)
    parser.add_argument("--data", metavar="NPZ", help="real inputs: an archive with `images` (N, 3, H, W) in uint8")
    parser.add_argument("--exact", action="store_true", help="use no fast algorithm (Winograd), grant no allowance")
    parser.add_argument("--strict", action="store_true", help="fail where a kernel does not cover a call")
    parser.add_argument("--layers", action="store_true", help="show every operator call")
    parser.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction,
        help="on a GPU, whether TF32 may serve fp32 (as PyTorch's settings say: convolutions, not matrix products)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    common.check_backend(options.backend)
    names = common.chosen_names(options.names, options.all)
    device = common.chosen_device(options)
    found: list[Verification] = []
    failures: dict[str, str] = {}
    with common.progress() as shown:
        for i, name in enumerate(names):
            shown.stage(f"verifying {name} ({i + 1} of {len(names)})")
            try:
                with allowing_tf32(options.tf32):
                    found.append(verify_network(name, options, device, shown))
            except common.UsageError:
                raise
            except Exception as error:  # one broken network must not hide the others
                failures[name] = f"{type(error).__name__}: {error}"
    passed = not failures and all(v.passed for v in found)
    if options.json:
        print_document(found, failures, passed)
    else:
        print_text(found, failures, layers=options.layers)
    return 0 if passed else 1


@contextlib.contextmanager
def allowing_tf32(allowed: bool | None) -> Iterator[None]:
    """PyTorch's settings inside; None leaves them as they are."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if allowed is None:
        yield
        return
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def verify_network(
    name: str, options: argparse.Namespace, device: torch.device, shown: common.Progress
) -> Verification:  # fmt: skip
    """Build one network as the options say, and verify it."""
    shape = common.input_shape(name, options.batch, options.size)
    dtype = common.DTYPES[options.dtype]
    if options.data is not None:  # before the network: a bad file fails at once
        images = normalised_archive(options.data, shape).to(device, dtype)
    else:
        images = common.random_images(shape, device, dtype)
    model = common.build(name, options, device, shape=shape)
    with common.refusing_sizes(name, options):
        return verify(
            model, images, name=name, reference=torchvision_twin(name, model), backend=options.backend,
            exact=options.exact, strict=options.strict, progress=shown.detail,
        )  # fmt: skip


def print_document(found: list[Verification], failures: dict[str, str], passed: bool) -> None:
    common.print_json({"passed": passed, "results": [v.to_dict() for v in found], "errors": failures})


def print_text(found: list[Verification], failures: dict[str, str], *, layers: bool) -> None:
    if len(found) + len(failures) == 1 and found:
        if layers:
            print(found[0].table() + "\n")
        print(found[0])
        return
    for v in found:
        if layers:
            print(f"{v.model}\n{v.table()}\n")
    print(text_table(HEADINGS, [summary_row(v) for v in found], left=(0, 1)) if found else "")
    for v in found:
        if not v.passed:
            print(f"\n{v}")
    for name, error in failures.items():
        print(f"{name}: could not be verified: {error}")
    right = sum(v.passed for v in found)
    print(f"{right} of {len(found) + len(failures)} networks passed")


HEADINGS = ("network", "reference", "calls", "fallbacks", "error", "PyTorch", "bound", "worst call", "same class", "")


def summary_row(v: Verification) -> tuple[object, ...]:
    output = max(v.outputs, key=lambda check: check.judgement.share).judgement
    worst = v.worst_layer
    return (
        v.model,
        v.reference,
        len(v.layers),
        len(v.fallbacks),
        f"{output.ours.norm:.1e}",
        f"{output.reference.norm:.1e}",
        f"{output.bound.norm:.1e}",
        "-" if worst is None else f"{worst.judgement.share:.0%} of bound",
        "-" if v.agreement is None else f"{v.agreement[0]}/{v.agreement[1]}",
        "ok" if v.passed else "WRONG",
    )
