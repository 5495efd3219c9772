"""The command ``fastcnn``: one subcommand a module of :mod:`fastcnn.commands`.

Results go to standard output (``--json``: one JSON document), progress and errors to standard error.
Exit codes: 0 done and right, 1 a check failed, 2 wrong usage or unusable input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fastcnn
from fastcnn.commands import bench, env, list_models, predict, summary, tune, verify
from fastcnn.commands._common import UsageError

COMMANDS = (env, list_models, summary, verify, bench, tune, predict)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastcnn",
        description="Fused CUDA, Triton and C++ kernels for convolutional networks in PyTorch.",
        epilog="Exit codes: 0 done and right, 1 a check failed, 2 wrong usage or unusable input.",
    )
    top.add_argument("--version", action="version", version=f"fastcnn {fastcnn.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"fastcnn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastcnn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
