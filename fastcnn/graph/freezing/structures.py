"""The structure of a model's result in a file: nested tuples, lists and dictionaries; nothing that needs a class."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.utils._pytree import TreeSpec, tree_unflatten

_SEQUENCES: dict[str, Any] = {"tuple": tuple, "list": list}
_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict}


def structure_as_data(spec: TreeSpec) -> Any:
    """For JSON: a leaf's number, ``[kind, children]``, or ``[kind, keys, children]``.

    Raises:
        ValueError: the result holds another kind of container.
    """
    return _described(tree_unflatten(list(range(spec.num_leaves)), spec))


def _described(value: Any) -> Any:
    kind = type(value)
    if kind is int:
        return value
    for name, sequence in _SEQUENCES.items():
        if kind is sequence:
            return [name, [_described(child) for child in value]]
    for name, mapping in _MAPPINGS.items():
        if kind is mapping and all(type(key) is str for key in value):
            return [name, list(value), [_described(child) for child in value.values()]]
    what = f"a {kind.__name__} with keys other than strings" if kind in _MAPPINGS.values() else f"a {kind.__name__}"
    raise ValueError(f"the model returns {what}; a file can hold tuples, lists, and dictionaries with strings as keys")


def filled(data: Any, leaves: list[Any]) -> Any:
    """A file's structure with these leaves.

    Raises:
        ValueError, TypeError: it is no structure, or not one of so many leaves.
    """
    used: list[int] = []
    result = _filled(data, leaves, used)
    if sorted(used) != list(range(len(leaves))):
        raise ValueError("the result's structure does not fit its tensors")
    return result


def _filled(data: Any, leaves: list[Any], used: list[int]) -> Any:
    if type(data) is int:
        if not 0 <= data < len(leaves):
            raise ValueError("the result's structure does not fit its tensors")
        used.append(data)
        return leaves[data]
    if type(data) is list and len(data) == 2 and data[0] in _SEQUENCES:
        return _SEQUENCES[data[0]]([_filled(child, leaves, used) for child in data[1]])
    if type(data) is list and len(data) == 3 and data[0] in _MAPPINGS:
        kind, keys, children = data
        if not all(type(key) is str for key in keys):
            raise ValueError("a key of the result is no string")
        children = [_filled(child, leaves, used) for child in children]
        return _MAPPINGS[kind](zip(keys, children, strict=True))
    raise ValueError("the result's structure is none")
