"""Loading checkpoints: finding the state dict in a file, matching its keys, and saying clearly why one does not fit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
# What other code calls the same layer: tried where a key does not exist in the model.
ALIASES = (
    ("linear.", "fc."),
    ("fc.", "linear."),
    (".shortcut.", ".downsample."),
    # DenseNet checkpoints from before PyTorch forbade dots in names
    (".norm.1.", ".norm1."),
    (".norm.2.", ".norm2."),
    (".conv.1.", ".conv1."),
    (".conv.2.", ".conv2."),
)
# Where a checkpoint shows its number of classes and of input channels.
LAST_BIASES = ("fc.bias", "linear.bias", "classifier.bias", "classifier.6.bias", "fc8.bias", "output.bias")
FIRST_WEIGHTS = ("conv1.weight", "features.conv0.weight", "features.0.weight", "conv1.conv.weight", "c1.weight")
_SHOWN = 6


@runtime_checkable
class MadeWithoutParts(Protocol):
    """A model that may be built without parts that its checkpoints have."""

    def left_out_keys(self) -> frozenset[str]:
        """The state-dict keys of the parts that this model was built without."""


def load_weights(
    model: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor], name: str, kwargs: dict[str, Any]
) -> None:
    """Copy a checkpoint's tensors into the model, all or none.

    Raises:
        ValueError: the keys or shapes do not fit; nothing was changed.
    """
    if isinstance(weights, Mapping):
        where, state = "weights", _state_dict(weights, "weights")
    else:
        where, state = str(weights), _state_dict(_read(Path(weights)), str(weights))
    state = _matched(state, model)
    problems = _problems(state, model)
    if problems:
        hints = [f"  {hint}" for hint in _suggestions(state, model, name, kwargs)]
        raise ValueError("\n".join([f"{where} does not fit {name}:", *problems, *hints]))
    model.load_state_dict(state)


def _read(path: Path) -> object:
    if not path.exists():
        raise FileNotFoundError(f"there is no weights file {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from error
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors (torch.load with weights_only=True). A file that "
            f"holds a whole pickled model must be saved again as model.state_dict(). ({error})"
        ) from error


def _state_dict(checkpoint: object, where: str) -> dict[str, Tensor]:
    """The tensors by name, without wrappers around and prefixes before them."""
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise ValueError(f"{where} holds no state dict, but {type(checkpoint).__name__}")
    wrong = [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{where} holds no state dict: {_listed(wrong)} not tensors")
    state = {str(key): value for key, value in checkpoint.items()}
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _matched(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the model's names for them, less those of parts that it was built without."""
    own = model.state_dict().keys()
    left_out = model.left_out_keys() if isinstance(model, MadeWithoutParts) else frozenset()
    return {_own_name(key, own, state): value for key, value in state.items() if key not in left_out}


def _own_name(key: str, own: Any, state: dict[str, Tensor]) -> str:
    if key in own:
        return key
    for theirs, ours in ALIASES:
        if theirs.startswith("."):
            renamed = key.replace(theirs, ours)
        else:
            renamed = ours + key.removeprefix(theirs) if key.startswith(theirs) else key
        if renamed != key and renamed in own and renamed not in state:
            return renamed
    return key


def _differences(state: dict[str, Tensor], model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Keys that are missing, unexpected, and of another shape."""
    own = model.state_dict()
    # Checkpoints from before PyTorch 0.4.1 do not count batches; load_state_dict fills the counters in.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshaped = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    return missing, unexpected, misshaped


def _problems(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    own = model.state_dict()
    missing, unexpected, misshaped = _differences(state, model)
    shapes = [f"{key} {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}" for key in misshaped]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return [f"  {len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]


def _listed(keys: list[str]) -> str:
    shown = "; ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown}; and {len(keys) - _SHOWN} more"


def _suggestions(state: dict[str, Tensor], model: nn.Module, name: str, kwargs: dict[str, Any]) -> list[str]:
    """The first way of building a registered model that this state dict would fit, if there is one."""
    from fastcnn.models._registry import _models

    sizes = {}
    classes = [state[key].shape[0] for key in LAST_BIASES if key in state]
    channels = [state[key].shape[1] for key in FIRST_WEIGHTS if key in state and state[key].dim() == 4]
    if classes:
        sizes["num_classes"] = classes[0]
    if channels:
        sizes["in_channels"] = channels[0]
    same_name: list[tuple[str, dict[str, Any]]] = [(name, {**kwargs, **sizes})]
    same_name += [(name, {**kwargs, **sizes, "shortcut": option}) for option in "ABC"]
    same_name += [(name, {**kwargs, **sizes, "aux_logits": False})]
    for other, options in (*same_name, *((other, sizes) for other in _models if other != name)):
        try:
            with torch.device("meta"):
                candidate = _models[other].build(**options)
        except (TypeError, ValueError):  # an option or a value that this architecture does not have
            continue
        if not any(_differences(_matched(state, candidate), candidate)):
            defaults = {"num_classes": _default_classes(other), "in_channels": _models[other].input_size[0]}
            arguments = [repr(other)]
            arguments += [f"{k}={v!r}" for k, v in options.items() if k not in defaults or v != defaults[k]]
            return [f"It would fit create_model({', '.join(arguments)}, weights=...)"]
    return []


def _default_classes(name: str) -> int:
    return 10 if name.endswith("_cifar") or name.startswith("lenet") else 1000
