"""Freezing on a GPU: a model's work for inputs of one shape as a CUDA graph.

`schedule.py` decides which operator runs on which stream, by the memory that operators touch (`accesses.py`);
`watching.py` sees the operators of a run and hands them to it; `hidden.py` asks whether it sees all; `cuda_graph.py`
makes the graph; `frozen.py` is the module.
"""

from fastcnn.graph.freezing.gpu.frozen import FrozenOnGpu, MemoryOnGpu, freeze_on_gpu

__all__ = ["FrozenOnGpu", "MemoryOnGpu", "freeze_on_gpu"]
