"""The pattern table: which chains of layers become one call. To teach the rewriter another, add a row.

A chain is a path through the graph on which each value has one reader: the next step. ``add`` takes its other operand
as the residual. Rows are tried from top to bottom, so longer chains stand before their beginnings. ``build`` makes the
call for chains of modules, ``build_functional`` for chains of functions (``F.conv2d(x, w, b)``); None: not fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from fastcnn.graph import calls, roles


class ModuleAt(NamedTuple):
    """Stands for the user's module in the arguments of a call."""

    path: str


class FusedCall(NamedTuple):
    """A call that takes a chain's place."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """A chain of nodes, one for each step of a pattern."""

    steps: tuple[str, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def input(self) -> Any:
        first = self.nodes[0]
        return first.args[0] if first.args else first.kwargs["input"]

    def node(self, step: str, which: int = 0) -> fx.Node | None:
        found = [n for s, n in zip(self.steps, self.nodes, strict=True) if s == step]
        return found[which] if len(found) > which else None

    def module(self, step: str, which: int = 0) -> ModuleAt:
        node = self.node(step, which)
        assert node is not None
        return ModuleAt(str(node.target))

    def settings(self, step: str) -> dict[str, Any]:
        """A functional node's arguments; ``input`` among them only where the chain begins with it."""
        node = self.node(step)
        assert node is not None
        given = roles.bound(node, step)
        if node is not self.nodes[0]:
            given.pop("input")
        return given

    @property
    def epilogue(self) -> dict[str, Any]:
        """``residual``, ``in_place`` and ``activation`` as the chain's end asks for them."""
        given: dict[str, Any] = {}
        add = self.node("add")
        if add is not None:
            before = self.nodes[self.nodes.index(add) - 1]
            given["residual"] = add.args[1] if add.args[0] is before else add.args[0]
            given["in_place"] = writes_in_place(add)
        if self.steps[-1] == "relu":
            given["activation"] = activation(self.nodes[-1])
        return given


def activation(node: fx.Node) -> Any:
    """A ReLU node as an argument: the user's module, so that its hooks run, or the function's name."""
    return ModuleAt(str(node.target)) if node.op == "call_module" else "relu"


def writes_in_place(add: fx.Node) -> bool:
    return add.target == "add_" or getattr(add.target, "__name__", "") == "iadd"


def _conv_bn(m: Match) -> FusedCall:
    return FusedCall(calls.conv_bn, (m.input, m.module("conv"), m.module("bn")), m.epilogue)


def _conv(m: Match) -> FusedCall:
    return FusedCall(calls.conv_act, (m.input, m.module("conv")), m.epilogue)


def _bn(m: Match) -> FusedCall:
    return FusedCall(calls.bn_act, (m.input, m.module("bn")), m.epilogue)


def _preactivation(m: Match) -> FusedCall:
    extra: dict[str, Any] = {}
    if m.steps[1] == "relu":
        extra["preactivation"] = activation(m.nodes[1])
    if m.node("bn", 1) is not None:
        extra["next_bn"] = m.module("bn", 1)
    return FusedCall(calls.bn_act_conv, (m.input, m.module("bn"), m.module("conv")), {**extra, **m.epilogue})


def _linear(m: Match) -> FusedCall:
    return FusedCall(calls.linear_act, (m.input, m.module("linear")), m.epilogue)


def _pool(m: Match) -> FusedCall:
    return FusedCall(calls.pool, (m.input, ModuleAt(str(m.nodes[0].target))), {})


def _add(m: Match) -> FusedCall:
    end = {"activation": activation(m.nodes[-1])} if m.steps[-1] == "relu" else {}
    return FusedCall(calls.add_act, tuple(m.nodes[0].args), end)


def _functional_conv_bn(m: Match) -> FusedCall:
    return FusedCall(calls.functional_conv_bn, (m.settings("conv"), m.settings("bn")), m.epilogue)


def _functional_conv(m: Match) -> FusedCall:
    return FusedCall(calls.functional_conv_act, (m.settings("conv"),), m.epilogue)


def _functional_bn(m: Match) -> FusedCall:
    return FusedCall(calls.functional_bn_act, (m.settings("bn"),), m.epilogue)


def _functional_linear(m: Match) -> FusedCall:
    return FusedCall(calls.functional_linear_act, (m.settings("linear"),), m.epilogue)


def _functional_pool(m: Match) -> FusedCall:
    from fastcnn import ops

    names = {
        "max_pool": "max_pool2d", "avg_pool": "avg_pool2d", "adaptive_pool": "adaptive_avg_pool2d",
        "lrn": "local_response_norm",
    }  # fmt: skip
    return FusedCall(getattr(ops, names[m.steps[0]]), m.nodes[0].args, dict(m.nodes[0].kwargs))


Builder = Callable[[Match], FusedCall]


class Pattern(NamedTuple):
    chain: str
    build: Builder | None
    build_functional: Builder | None

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(self.chain.split())


PATTERNS = (
    Pattern("conv bn add relu", _conv_bn, _functional_conv_bn),
    Pattern("conv bn add", _conv_bn, _functional_conv_bn),
    Pattern("conv bn relu", _conv_bn, _functional_conv_bn),
    Pattern("conv bn", _conv_bn, _functional_conv_bn),
    Pattern("conv add relu", _conv, _functional_conv),
    Pattern("conv add", _conv, _functional_conv),
    Pattern("conv relu", _conv, _functional_conv),
    Pattern("conv", _conv, _functional_conv),
    Pattern("bn relu conv bn add relu", _preactivation, None),
    Pattern("bn relu conv bn add", _preactivation, None),
    Pattern("bn relu conv bn relu", _preactivation, None),
    Pattern("bn relu conv bn", _preactivation, None),
    Pattern("bn relu conv add relu", _preactivation, None),
    Pattern("bn relu conv add", _preactivation, None),
    Pattern("bn relu conv relu", _preactivation, None),
    Pattern("bn relu conv", _preactivation, None),
    Pattern("bn add relu", _bn, _functional_bn),
    Pattern("bn add", _bn, _functional_bn),
    Pattern("bn relu", _bn, _functional_bn),
    Pattern("bn", _bn, _functional_bn),
    Pattern("linear relu", _linear, _functional_linear),
    Pattern("linear", _linear, _functional_linear),
    Pattern("add relu", _add, _add),
    Pattern("add", _add, _add),
    Pattern("max_pool", _pool, _functional_pool),
    Pattern("avg_pool", _pool, _functional_pool),
    Pattern("adaptive_pool", _pool, _functional_pool),
    Pattern("lrn", _pool, _functional_pool),
)
