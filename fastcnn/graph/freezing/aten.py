"""The rules for ATen's operators: those that networks use between fastcnn's, and those that were not replaced."""

from __future__ import annotations

from typing import Any

from fastcnn.graph.freezing.copies import copy_rules
from fastcnn.graph.freezing.elementwise import elementwise_rules
from fastcnn.graph.freezing.layers import layer_rules
from fastcnn.graph.freezing.lowering import Rule
from fastcnn.graph.freezing.reductions import reduction_rules


def aten_rules() -> dict[Any, Rule]:
    return {**copy_rules(), **elementwise_rules(), **reduction_rules(), **layer_rules()}
