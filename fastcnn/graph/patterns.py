"""The pattern table: which chains of layers become one call. To teach the rewriter another, add a row.

A chain is a path through the graph on which each value has one reader: the next step. ``add`` takes its other operand
as the residual. Rows are tried from top to bottom, so longer chains stand before their beginnings. ``build`` makes the
call; it takes layers as modules or as functions (``F.conv2d(x, w, b)``), in any mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from fastcnn import ops
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
        return roles.first_argument(self.nodes[0])

    def node(self, step: str, which: int = 0) -> fx.Node | None:
        found = [n for s, n in zip(self.steps, self.nodes, strict=True) if s == step]
        return found[which] if len(found) > which else None

    def layer(self, step: str, which: int = 0) -> ModuleAt | dict[str, Any]:
        """The user's module, or a function's arguments without the input."""
        node = self.node(step, which)
        assert node is not None
        if node.op == "call_module":
            return ModuleAt(str(node.target))
        given = roles.bound(node, step)
        given.pop("input")
        return given

    @property
    def epilogue(self) -> dict[str, Any]:
        """What the calls of :mod:`fastcnn.graph.calls` take for the chain's addition and activation."""
        given: dict[str, Any] = {}
        add = self.node("add")
        if add is not None:
            before = self.nodes[self.nodes.index(add) - 1]
            first = add.args[0] is before
            given["residual"] = add.args[1] if first else add.args[0]
            if not first:
                given["residual_first"] = True
            if writes_in_place(add):
                given["writes"] = "result" if first else "residual"
        return {**given, **self.activation}

    @property
    def activation(self) -> dict[str, Any]:
        if self.steps[-1] != "relu":
            return {}
        of = activation(self.nodes[-1])
        return {"activation": of, "in_place": True} if is_in_place(self.nodes[-1]) else {"activation": of}


def activation(node: fx.Node) -> Any:
    """A ReLU node as an argument: the user's module, so that its hooks run, or the function's name."""
    return ModuleAt(str(node.target)) if node.op == "call_module" else "relu"


def is_in_place(relu: fx.Node) -> bool:
    """Of a function or method; a module is asked in each call."""
    if relu.op == "call_module":
        return False
    return roles.label(relu) == "relu_" or roles.bound(relu, "relu").get("inplace", False) is True


def writes_in_place(add: fx.Node) -> bool:
    return add.target == "add_" or getattr(add.target, "__name__", "") == "iadd"


def _conv_bn(m: Match) -> FusedCall:
    return FusedCall(calls.conv_bn, (m.input, m.layer("conv"), m.layer("bn")), m.epilogue)


def _conv(m: Match) -> FusedCall:
    return FusedCall(calls.conv_act, (m.input, m.layer("conv")), m.epilogue)


def _bn(m: Match) -> FusedCall:
    return FusedCall(calls.bn_act, (m.input, m.layer("bn")), m.epilogue)


def _preactivation(m: Match) -> FusedCall:
    extra: dict[str, Any] = {}
    if m.steps[1] == "relu":
        extra["preactivation"] = activation(m.nodes[1])
        if is_in_place(m.nodes[1]):
            extra["preactivation_in_place"] = True
    if m.node("bn", 1) is not None:
        extra["next_bn"] = m.layer("bn", 1)
    return FusedCall(calls.bn_act_conv, (m.input, m.layer("bn"), m.layer("conv")), {**extra, **m.epilogue})


def _linear(m: Match) -> FusedCall:
    return FusedCall(calls.linear_act, (m.input, m.layer("linear")), m.epilogue)


def _add(m: Match) -> FusedCall:
    end = m.activation
    if writes_in_place(m.nodes[0]):
        end["writes"] = "result"
    return FusedCall(calls.add_act, tuple(m.nodes[0].args), end)


def _pool(m: Match) -> FusedCall:
    node = m.nodes[0]
    if node.op == "call_module":
        return FusedCall(calls.pool, (m.input, ModuleAt(str(node.target))), {})
    return FusedCall(_POOL_FUNCTIONS[m.steps[0]], node.args, dict(node.kwargs))


_POOL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max_pool": ops.max_pool2d,
    "avg_pool": ops.avg_pool2d,
    "adaptive_pool": ops.adaptive_avg_pool2d,
    "lrn": ops.local_response_norm,
}


class Pattern(NamedTuple):
    chain: str
    build: Callable[[Match], FusedCall]

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(self.chain.split())


PATTERNS = (
    Pattern("conv bn add relu", _conv_bn),
    Pattern("conv bn add", _conv_bn),
    Pattern("conv bn relu", _conv_bn),
    Pattern("conv bn", _conv_bn),
    Pattern("conv add relu", _conv),
    Pattern("conv add", _conv),
    Pattern("conv relu", _conv),
    Pattern("conv", _conv),
    Pattern("bn relu conv bn add relu", _preactivation),
    Pattern("bn relu conv bn add", _preactivation),
    Pattern("bn relu conv bn relu", _preactivation),
    Pattern("bn relu conv bn", _preactivation),
    Pattern("bn relu conv add relu", _preactivation),
    Pattern("bn relu conv add", _preactivation),
    Pattern("bn relu conv relu", _preactivation),
    Pattern("bn relu conv", _preactivation),
    Pattern("bn add relu", _bn),
    Pattern("bn add", _bn),
    Pattern("bn relu", _bn),
    Pattern("bn", _bn),
    Pattern("linear relu", _linear),
    Pattern("linear", _linear),
    Pattern("add relu", _add),
    Pattern("add", _add),
    Pattern("max_pool", _pool),
    Pattern("avg_pool", _pool),
    Pattern("adaptive_pool", _pool),
    Pattern("lrn", _pool),
)

# Chains whose calls become one where their convolutions are 1x1 and read the same value.
MERGED = ("conv relu", "conv", "conv bn relu", "conv bn")
