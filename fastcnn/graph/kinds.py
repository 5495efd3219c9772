"""What the values of a graph under construction will be when it runs: tensors, several of them, or plain numbers.

``isinstance`` has to be answered while a graph is traced, when a value is only a name. What is not known here is None,
and a forward that asks for it is not traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

TENSOR, TENSORS, PLAIN = "tensor", "tensors", "plain"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN_METHODS = _words(
    "size dim ndimension numel nelement stride item tolist is_contiguous element_size storage_offset get_device "
    "is_floating_point is_complex data_ptr type __len__"
)
_PLAIN_ATTRIBUTES = _words("shape ndim dtype device layout is_cuda is_mkldnn requires_grad names nbytes")
_SEVERAL = _words(
    "chunk split unbind tensor_split hsplit vsplit dsplit split_with_sizes topk sort max min median mode aminmax "
    "var_mean std_mean unique meshgrid broadcast_tensors kthvalue cummax cummin"
)
_SEVERAL_MODULES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)


def kind(node: fx.Node, module: nn.Module | None = None) -> str | None:
    """:data:`TENSOR`, :data:`TENSORS` (a tuple of them), :data:`PLAIN` (no tensor in it), or None: not known.

    ``module``: of a ``call_module`` node, if it is one of torch.nn.
    """
    known = node.meta.get("fastcnn_kind")
    if known is None:
        known = node.meta["fastcnn_kind"] = _kind(node, module)
    return known  # type: ignore[no-any-return]


def _kind(node: fx.Node, module: nn.Module | None) -> str | None:
    if node.op in ("placeholder", "get_attr"):
        return TENSOR
    if node.op == "call_module":
        if module is None or isinstance(module, _SEVERAL_MODULES) or getattr(module, "return_indices", False):
            return None
        return TENSOR
    if node.op == "call_method":
        name = str(node.target)
        return PLAIN if name in _PLAIN_METHODS else _unless_several(name, node)
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if node.target is getattr:
        attribute = node.args[1]
        if attribute in _PLAIN_ATTRIBUTES:
            return PLAIN
        return TENSOR if attribute in ("T", "mT", "data", "real", "imag") else None
    given = {kind(argument) for argument in node.all_input_nodes}
    if name == "getitem":
        of = kind(node.args[0])  # type: ignore[arg-type]
        return (TENSOR if isinstance(node.args[1], int) else TENSORS) if of == TENSORS else of
    origin = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]
    if origin in ("_operator", "operator", "builtins", "math"):
        return PLAIN if given <= {PLAIN} else TENSOR if given <= {PLAIN, TENSOR} else None
    if origin == "torch":
        return PLAIN if name.startswith("is_") else _unless_several(name, node)
    return None


def _unless_several(name: str, node: fx.Node) -> str | None:
    if name not in _SEVERAL:
        return TENSOR
    # ``x.max()`` is a tensor, ``x.max(1)`` is two.
    one = name in ("max", "min", "median") and len(node.args) + len(node.kwargs) == 1
    return TENSOR if one else TENSORS


def includes_tensor(kinds: Any) -> bool:
    """Whether the second argument of ``isinstance`` names :class:`torch.Tensor`."""
    if kinds is torch.Tensor:
        return True
    members = kinds if type(kinds) is tuple else getattr(kinds, "__args__", ())
    return any(includes_tensor(member) for member in members)
