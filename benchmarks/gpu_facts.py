"""What each row of a GPU measurement says of where, when and with what it was taken."""

from __future__ import annotations

import datetime
import functools
import os
import subprocess
from pathlib import Path

import torch
from raw_rows import Row

from fastcnn.measurement.conditions import conditions


def gpu_facts(device: torch.device, dtype: torch.dtype) -> Row:
    """Device, versions, commit, driver and date; ``rehearsal`` where the device is no GPU."""
    facts = conditions(device, dtype).to_dict()
    del facts["batch"]
    facts |= {
        "commit": commit(),
        "driver": nvidia_smi("driver_version"),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    return facts if device.type == "cuda" else facts | {"rehearsal": True}


def commit() -> str:
    """FASTCNN_COMMIT, where the checkout is no repository; else what git says."""
    given = os.environ.get("FASTCNN_COMMIT")
    if given:
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


@functools.cache
def nvidia_smi(field: str) -> str | None:
    """One fact about the first GPU, without using CUDA in this process."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return lines[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
