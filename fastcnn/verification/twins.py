"""Torchvision's network of the same name, as a reference that shares no code with ours."""

from __future__ import annotations

import importlib.util
import inspect

from torch import nn

# Ours on the left where the names differ; a name that means another network in torchvision maps to None.
_NAMES: dict[str, str | None] = {"alexnet_owt": "alexnet", "alexnet": None}


def torchvision_twin(name: str, model: nn.Module) -> nn.Module | None:
    """Torchvision's network with ``model``'s state, or None where it has none of that name and those keys.

    Keys do not tell options apart that leave them alone, such as ``stride_in_1x1``: the twin is of the default network.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    import torchvision

    their_name = _NAMES.get(name, name)
    if their_name is None or their_name not in torchvision.models.list_models(module=torchvision.models):
        return None
    state = model.state_dict()
    arguments: dict[str, object] = {"weights": None}
    head = next((state[key] for key in reversed(state) if key.endswith("weight")), None)
    if head is not None:
        arguments["num_classes"] = head.shape[0]
    if their_name == "googlenet":
        arguments |= {"aux_logits": any(key.startswith("aux") for key in state), "init_weights": False}
    builder = torchvision.models.get_model_builder(their_name)
    if "init_weights" in inspect.signature(builder).parameters:
        arguments["init_weights"] = False
    try:
        twin = builder(**arguments)
        twin.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError):  # other keys or shapes: another network
        return None
    parameter = next(model.parameters())
    return twin.to(parameter.device, parameter.dtype).train(model.training)
