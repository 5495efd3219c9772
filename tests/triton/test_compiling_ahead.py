"""Kernels compiled from a description of their tensors are those that the launch looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")


def test_a_launch_finds_what_was_compiled_ahead_in_threads(tmp_path):
    """In a process of its own, under a driver that stands for an sm_90 GPU: only compilation needs none."""
    script = """
        from concurrent.futures import ThreadPoolExecutor
        import torch, triton
        from triton.backends.compiler import GPUTarget

        class Driver:
            def get_current_target(self): return GPUTarget("cuda", 90, 32)
            def get_current_device(self): return 0
            def get_current_stream(self, device=None): return 0

        triton.runtime.driver.set_active(Driver())
        from fastcnn.backends import triton as backend, variants
        from fastcnn.triton_kernels import conv2d

        def nhwc(*shape):
            return torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

        weight, vector = torch.randn(64, 64, 1, 1, dtype=torch.bfloat16), torch.randn(64)
        rest = (vector, vector, None, None, None, False, "relu", (1, 1), (0, 0), (1, 1), 1)
        calls = [
            (nhwc(1, 64, 8, 8), nhwc(1, 64, 8, 8), weight, *rest),
            (nhwc(1, 64, 8, 8), nhwc(1, 72, 8, 8)[:, 3:67], weight, *rest),  # a slice off the 16-byte boundary
        ]
        name = variants.names("triton", "conv2d", calls[0])[0]
        jobs = [variants.compilation(n, "conv2d", call) for n in ("triton", name) for call in calls]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

        def refuse(*args):
            raise AssertionError("compiled again")

        triton.runtime.jit.JITFunction._do_compile = refuse
        for config in (None, variants.variant(name)._tile()):
            for out, x, weight, *others in calls:
                launch = conv2d.plan_conv2d(out, x, backend.prepared_weight(weight, 1), *others, config=config)
                launch.kernel.run(
                    **launch.arguments, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages,
                    warmup=True,
                )
        print("found", len(jobs))
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["found", "4"]
