"""Freezing on a GPU: a model's work for inputs of one shape as a CUDA graph.

`schedule.py` decides which operator runs on which stream, by the memory that operators touch (`accesses.py`);
`watching.py` sees the operators of a run and hands them to it; `hidden.py` asks whether it sees all; `cuda_graph.py`
makes the graph; `frozen.py` is the module.

A file holds what the graph was captured from: a program (`program.py`, of operators that `operators.py` lists), which
`making.py` makes of a captured model and `interpreting.py` checks and runs; `saving.py` tries it, and `storage.py`
writes and reads; `settings.py` says what else decides on kernels.
"""

from fastcnn.graph.freezing.gpu.frozen import FrozenOnGpu, MemoryOnGpu, freeze_on_gpu

__all__ = ["FrozenOnGpu", "MemoryOnGpu", "freeze_on_gpu"]
