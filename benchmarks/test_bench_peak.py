"""How near the plain convolutions come to the processor's peak, which is measured in the same run, in turns.

`share_of_peak` is the median time that the peak would allow over the convolution's. Other instruction sets:
FASTCNN_CPU_ISA=avx2 or portable; their peak is measured with their own instructions.
"""

from __future__ import annotations

import pytest
import torch

from fastcnn import _native
from fastcnn.backends import backend_module
from fastcnn.measurement import interleave

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU benchmark")

# (channels in, channels out, height and width, filter)
LAYERS = [(256, 256, 56, 1), (1024, 256, 28, 1), (128, 128, 56, 3), (256, 256, 28, 3)]
LOOPS = {torch.float32: _native.cpu_fma_limit, torch.bfloat16: _native.cpu_bf16_dot_limit}


@pytest.mark.parametrize("candidate", ["cpp:direct"])
@pytest.mark.parametrize("dtype", LOOPS, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: f"{s[3]}x{s[3]} {s[2]}x{s[2]}x{s[0]}-{s[1]}")
def test_share_of_the_peak(measure, benchmark, layer: tuple[int, int, int, int], dtype: torch.dtype, candidate: str):
    c, k, size, r = layer
    benchmark.group = f"peak {r}x{r} {size}x{size}x{c}-{k} {dtype}"
    threads = torch.get_num_threads()
    # A processor without bf16 arithmetic does bf16 layers in fp32.
    loop = LOOPS[dtype] if LOOPS[dtype](1, 1)[0] > 0 else LOOPS[torch.float32]
    x = torch.randn(1, c, size, size).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(k, c, r, r).to(dtype, memory_format=torch.channels_last)
    bias, out = torch.randn(k), torch.empty(1, k, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    direct = backend_module(candidate).conv2d

    def convolution() -> None:
        direct(out, x, w, None, bias, None, None, None, False, "relu", (1, 1), (r // 2, r // 2), (1, 1), 1)

    flops = 2 * size * size * c * k * r * r
    iterations = 200_000
    operations, _ = loop(iterations, threads)
    found = interleave(
        {"peak": lambda: loop(iterations, threads), "convolution": convolution}, rounds=15, round_ms=0.0, block_ms=20.0
    )
    measure(convolution, flops=flops)
    peak = operations / found["peak"].median_ms * 1e3
    benchmark.extra_info["peak_flop_per_s"] = peak
    benchmark.extra_info["share_of_peak"] = found["convolution"].flops_per_second(flops) / peak
