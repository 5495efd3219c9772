"""The names that :func:`fastcnn.create_model` knows."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from fastcnn.models._weights import load_weights

Model = TypeVar("Model", bound=nn.Module)
Weights = str | os.PathLike[str] | Mapping[str, Tensor] | None


class ModelInfo(NamedTuple):
    """A registered architecture."""

    name: str
    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]  # (C, H, W) that the architecture was designed for
    paper: str


_models: dict[str, ModelInfo] = {}


def register(input_size: tuple[int, int, int], paper: str) -> Callable[[Callable[..., Model]], Callable[..., Model]]:
    """Decorates a function that builds a model: its name becomes the model's, and it takes ``weights=`` as well."""

    def decorate(build: Callable[..., Model]) -> Callable[..., Model]:
        name = build.__name__

        @functools.wraps(build)
        def build_with_weights(*, weights: Weights = None, **kwargs: Any) -> Model:
            model = build(**kwargs)
            model.__dict__["_input_size"] = (kwargs.get("in_channels", input_size[0]), *input_size[1:])
            if weights is not None:
                load_weights(model, weights, name, kwargs)
            return model

        if name in _models:
            raise ValueError(f"a model named {name!r} is already registered")
        _models[name] = ModelInfo(name, build_with_weights, input_size, paper)
        return build_with_weights

    return decorate


def default_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) that a model built by name was designed for; None for any other module."""
    return model.__dict__.get("_input_size")


def list_models() -> list[str]:
    """The names of all architectures, for :func:`create_model`, in the order of their files."""
    return list(_models)


def model_info(name: str) -> ModelInfo:
    """What is known about an architecture without building it.

    Raises:
        ValueError: no such model; the message suggests close names.
    """
    if name not in _models:
        longer = [known for known in _models if str(name).lower() in known]
        close = (longer if name else []) + difflib.get_close_matches(str(name).lower(), _models, n=3, cutoff=0.5)
        close = list(dict.fromkeys(close))[:3]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no model is named {name!r}{hint} (fastcnn.list_models() names all {len(_models)})")
    return _models[name]


def create_model(name: str, *, weights: Weights = None, **kwargs: Any) -> nn.Module:
    """Build an architecture by name, with random weights or a checkpoint's.

    Args:
        name: one of :func:`list_models`.
        weights: a file written by ``torch.save`` (read with ``weights_only=True``) or a state dict. Wrappers
            (``state_dict``, ``model``) and prefixes (``module.``) are taken off, and other common names of the last
            layer and the shortcuts are understood.
        **kwargs: the architecture's options, such as ``num_classes`` and ``in_channels``.

    Returns:
        The model in train mode, as PyTorch's constructors leave it: call ``.eval()`` for inference.

    Raises:
        ValueError: unknown name, or weights that do not fit; the message lists the keys and what might fit.
        TypeError: an option that the architecture does not have.
        FileNotFoundError: there is no such weights file.
    """
    return model_info(name).build(weights=weights, **kwargs)
