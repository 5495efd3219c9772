"""What a node of a graph does, in the words of the pattern table; and why a layer may not be fused."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fastcnn import nn as fnn
from fastcnn.graph.tracer import has_hooks

# Exact classes: a subclass may compute something else.
MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "bn",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool2d: "adaptive_pool",
    nn.LocalResponseNorm: "lrn",
    fnn.Conv2d: "conv",
    fnn.BatchNorm2d: "bn",
    fnn.Linear: "linear",
    fnn.MaxPool2d: "max_pool",
    fnn.AvgPool2d: "avg_pool",
    fnn.AdaptiveAvgPool2d: "adaptive_pool",
    fnn.LocalResponseNorm: "lrn",
}

FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    F.conv2d: "conv", torch.conv2d: "conv", F.batch_norm: "bn", F.linear: "linear",
    F.max_pool2d: "max_pool", torch.max_pool2d: "max_pool", F.avg_pool2d: "avg_pool",
    F.adaptive_avg_pool2d: "adaptive_pool", F.local_response_norm: "lrn",
}  # fmt: skip

METHODS = {"relu": "relu", "relu_": "relu", "add": "add", "add_": "add"}

# The names of their arguments, where a graph passes them by position.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "bn": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "linear": ("input", "weight", "bias"),
    "relu": ("input", "inplace"),
    "add": ("input", "other"),
}

# Move, drop or copy values, and compute nothing: not worth a word in a report.
_MOVERS = (
    "cat concat flatten view reshape permute transpose contiguous getattr getitem size chunk split unbind "
    "stack dim squeeze unsqueeze dropout dropout_ Dropout Dropout2d Identity Flatten Unflatten "
    "_assert channel_shuffle clone detach to pad type_as expand expand_as float half floordiv"
)
MOVERS = frozenset(_MOVERS.split())

_ACTIVATIONS = (
    "ReLU6 LeakyReLU PReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh "
    "Softplus Softmax LogSoftmax LogSigmoid Softsign RReLU GLU relu6 leaky_relu prelu elu selu celu gelu "
    "silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softmax log_softmax relu6_ "
    "leaky_relu_ elu_ sigmoid_ tanh_"
)
ACTIVATIONS = frozenset(_ACTIVATIONS.split())


def role(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The node's name in patterns, or None where no pattern speaks of it."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if refusal(module) else MODULES.get(type(module))
    if node.op == "call_function":
        name = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        name = METHODS.get(str(node.target))
    else:
        return None
    if name == "add":
        two = len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
        return name if two else None
    return name


def refusal(module: nn.Module) -> str | None:
    """Why a layer that patterns speak of must stay a plain call, or None."""
    layer = next((name for kind, name in MODULES.items() if isinstance(module, kind)), None)
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm: its statistics are exchanged between processes"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(
        is_lazy(t) for t in (*module.parameters(), *module.buffers())
    ):
        return "lazy: it has no parameters yet"
    if "quantized" in type(module).__module__ or type(module).__module__.startswith("torch.ao."):
        return "quantized"
    if layer is None:
        return None
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its weight is computed in each call"
    if has_hooks(module):
        return "it has hooks or a forward of its own"
    if type(module) not in MODULES:
        return f"{type(module).__name__} is a class of its own"
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
        return "it keeps no running statistics"
    return None


def bound(node: fx.Node, name: str) -> dict[str, Any]:
    """A functional node's arguments by name."""
    return {**dict(zip(SIGNATURES[name], node.args, strict=False)), **node.kwargs}


def first_argument(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def statistics(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    """Whose running statistics a batch norm updates: a key that is the same for two calls that update the same ones."""
    if node.op == "call_module":  # one module under two names is still one, and two may share a buffer
        module = modules[str(node.target)]
        mean = getattr(module, "running_mean", None)
        return id(module if mean is None else mean)
    given = bound(node, "bn").get("running_mean")
    if not isinstance(given, fx.Node) or given.op != "get_attr":
        return given
    path, _, name = str(given.target).rpartition(".")  # a layer's, in a function: the same as the layer's own call
    mean = getattr(modules.get(path), name, None)
    return given.target if mean is None else id(mean)


def drops_out(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it draws a random mask, of dropout in train mode."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module.training and "Dropout" in type(module).__name__ and getattr(module, "p", 1) != 0
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    if "dropout" not in name:
        return False
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return training is not False


def makes_a_new_tensor(node: fx.Node, modules: Mapping[str, nn.Module] | None = None) -> bool:
    """Whether the result certainly shares no memory with another value. ``modules``: to ask for those of torch.nn."""
    if node.op == "call_module":
        module = None if modules is None else modules[str(node.target)]
        known = type(module).__name__ in NEW and type(module).__module__.startswith("torch.nn.")
        return known and module is not None and not has_hooks(module) and not getattr(module, "inplace", False)
    if node.op == "call_method":
        return str(node.target) in NEW
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in NEW:
        return False
    if str(getattr(node.target, "__module__", "")).startswith("fastcnn."):
        return True
    return not node.kwargs.get("out") and not node.kwargs.get("inplace") and not any(a is True for a in node.args)


_NEW = (
    "conv_bn conv_act bn_act bn_act_conv linear_act add_act begin target pointwise "  # fastcnn's
    "add sub mul truediv neg pow exp sqrt rsqrt mean sum matmul conv2d linear batch_norm layer_norm group_norm "
    "max_pool2d avg_pool2d adaptive_avg_pool2d local_response_norm cat concat stack "
    "Conv2d Linear BatchNorm2d LayerNorm GroupNorm MaxPool2d AvgPool2d LocalResponseNorm"
)
NEW = frozenset(_NEW.split()) | {name for name in ACTIVATIONS if not name.endswith("_")}


def may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may change a value that another node made."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = type(module).__module__.startswith(("torch.nn.", "fastcnn.")) and not has_hooks(module)
        return not plain or bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if str(getattr(node.target, "__module__", "")).startswith("fastcnn."):
        return False  # into buffers of its own
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") or any(a is True for a in node.args):
        return True
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", None) in ("_operator", "operator"):
        return name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, name[1:]))
    known = str(getattr(node.target, "__module__", "") or "torch").split(".")[0]
    return name.endswith("_") or known not in ("torch", "fastcnn", "builtins", "math")


def label(node: fx.Node) -> str:
    """What the node is called in reports."""
    if node.op == "call_module":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
