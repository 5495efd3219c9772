"""Whether a model is being captured by :func:`fastcnn.freeze`.

Under tracers, graphs take none of the ways that depend on the memory of a call's tensors. A freeze traces too, but its
fake tensors have the shapes and strides of every later call: what holds for them holds then.
"""

from __future__ import annotations

from contextvars import ContextVar

from fastcnn.backends.derived import operations_are_replaced

capturing: ContextVar[bool] = ContextVar("fastcnn_capturing", default=False)


def memory_is_unknown() -> bool:
    """Whether layouts seen now may not be those of the call that will run."""
    return operations_are_replaced() and not capturing.get()
