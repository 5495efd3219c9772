"""Comparison with PyTorch's own operators and with float64, end to end and operator by operator."""

from fastcnn.verification.accuracy import Error, Judgement, judge, relative_error
from fastcnn.verification.calibration import calibrate
from fastcnn.verification.compare import verify
from fastcnn.verification.result import Check, Verification
from fastcnn.verification.twins import torchvision_twin

__all__ = [
    "Check", "Error", "Judgement", "Verification", "calibrate", "judge", "relative_error", "torchvision_twin", "verify",
]  # fmt: skip
