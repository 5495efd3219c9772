"""Freezing: capture a model's graph, lower it to native steps, plan its memory, and run it as one native call."""

from fastcnn.graph.freezing.frozen import FrozenModel, Memory, freeze, load_frozen
from fastcnn.graph.freezing.gpu import FrozenOnGpu, MemoryOnGpu

__all__ = ["FrozenModel", "FrozenOnGpu", "Memory", "MemoryOnGpu", "freeze", "load_frozen"]
