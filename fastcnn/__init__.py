"""fastcnn: fused CUDA, Triton and C++ kernels for the classic convolutional networks in PyTorch."""

# torch comes first: the native module must find torch's OpenMP runtime already loaded and share it.
import torch  # noqa: F401

try:
    from fastcnn import _native  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastcnn's native module cannot be loaded ({error}). In a source checkout: 'pip install .' and run from "
        "another folder, or 'pip install -e .'"
    ) from error

from fastcnn import models, nn, ops
from fastcnn.analysis import summary
from fastcnn.backends import exact, fallbacks, reset_fallbacks, use_backend
from fastcnn.graph import NotFusedError, Report, optimize, report, restore
from fastcnn.graph.freezing import freeze, load_frozen
from fastcnn.models import create_model, list_models
from fastcnn.verification import verify

__version__ = "0.1.0"

__all__ = [
    "NotFusedError",
    "Report",
    "__version__",
    "create_model",
    "exact",
    "fallbacks",
    "freeze",
    "list_models",
    "load_frozen",
    "models",
    "nn",
    "ops",
    "optimize",
    "report",
    "reset_fallbacks",
    "restore",
    "summary",
    "use_backend",
    "verify",
]
