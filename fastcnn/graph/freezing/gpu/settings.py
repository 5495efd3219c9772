"""What decides which kernels a model launches, noted when it is frozen and applied again where its file is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastcnn.backends import BACKENDS, allows_fast_algorithms, current_choice, exact, use_backend
from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

_CUDNN: Any = torch.backends.cudnn
_MATMUL: Any = torch.backends.cuda.matmul


class Settings(NamedTuple):
    exact: bool
    backend: str | None  # of use_backend
    strict: bool
    tf32_convolutions: bool | None  # None: PyTorch's older and newer flags contradict each other
    tf32_products: bool | None
    autocast: str | None = None  # dtype; not in files, whose operators are those that autocast called

    @classmethod
    def now(cls, device: torch.device) -> Settings:
        backend, strict = current_choice()
        autocast = None
        if torch.is_autocast_enabled(device.type):
            autocast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        return cls(
            not allows_fast_algorithms(),
            backend,
            strict,
            _asked(convolutions_use_tf32),
            _asked(matrix_products_use_tf32),
            autocast,
        )

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if key != "autocast"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Raises KeyError, TypeError or ValueError for data that no settings gave."""
        backend = data["backend"]
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}")
        flags = [data[key] for key in ("exact", "strict", "tf32_convolutions", "tf32_products")]
        if not all(type(flag) is bool for flag in flags[:2]) or not all(flag in (True, False, None) for flag in flags):
            raise ValueError("a setting is no truth value")
        return cls(flags[0], backend, *flags[1:])

    @contextlib.contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Inside, in this thread, they hold; TF32 is a setting of the process.

        Raises:
            RuntimeError: the backend cannot be used here.
        """
        dtype = None if self.autocast is None else getattr(torch, self.autocast)
        with (
            torch.autocast(device.type, dtype, enabled=dtype is not None),
            exact(self.exact),
            use_backend(self.backend, strict=self.strict),
            _tf32(_CUDNN, _CUDNN.conv, convolutions_use_tf32, self.tf32_convolutions),
            _tf32(_MATMUL, _MATMUL, matrix_products_use_tf32, self.tf32_products),
        ):
            yield


def _asked(use_tf32: Callable[[], bool]) -> bool | None:
    try:
        return use_tf32()
    except RuntimeError:
        return None


@contextlib.contextmanager
def _tf32(old: Any, new: Any, use_tf32: Callable[[], bool], wanted: bool | None) -> Iterator[None]:
    """By PyTorch's older flag where that is in force, since what reads it fails once only the newer one is set."""
    if wanted is None or _asked(use_tf32) == wanted:
        yield
        return
    precision = new.fp32_precision
    try:
        legacy = old.allow_tf32
    except RuntimeError:
        legacy = None
    with torch.backends.__allow_nonbracketed_mutation():
        if legacy is not None:
            old.allow_tf32 = wanted
        if _asked(use_tf32) != wanted:
            new.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        with torch.backends.__allow_nonbracketed_mutation():
            if legacy is not None:
                old.allow_tf32 = legacy
            if new.fp32_precision != precision:
                new.fp32_precision = precision
