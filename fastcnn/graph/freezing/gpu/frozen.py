"""`freeze` for a GPU: a model with static shapes as one CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastcnn.backends.derived import Kept, keeping
from fastcnn.graph.classes import STATE
from fastcnn.graph.freezing.gpu import cuda_graph
from fastcnn.graph.freezing.gpu.comparing import equal, near
from fastcnn.graph.freezing.gpu.cuda_graph import Capturer, CudaCapturer, Graph
from fastcnn.graph.freezing.gpu.fusing import Fusion, Rule, fused
from fastcnn.graph.freezing.gpu.fusions import RULES
from fastcnn.graph.freezing.gpu.hidden import hidden_code
from fastcnn.graph.freezing.gpu.interpreting import Interpreted, run_substituted
from fastcnn.graph.freezing.gpu.saving import content_of, program_of
from fastcnn.graph.freezing.gpu.schedule import Schedule
from fastcnn.graph.freezing.gpu.settings import Settings
from fastcnn.graph.freezing.gpu.storage import from_bytes, with_parameters
from fastcnn.graph.freezing.gpu.watching import CannotBeCaptured, OneLane, Watching
from fastcnn.graph.optimizing import is_fastcnn, optimize

MOST_LANES = 4  # of an inception module's four branches each has a stream of its own

logger = logging.getLogger("fastcnn")


class MemoryOnGpu(NamedTuple):
    """Bytes of GPU memory that a frozen model holds."""

    inputs: int
    weights: int  # its own copies of parameters and buffers, and what was made of them: packed, folded, merged
    graph: int  # the graph's private pool: activations and results

    def __str__(self) -> str:
        mib = [f"{value / 2**20:.2f} MiB" for value in self]
        return f"inputs {mib[0]}; weights {mib[1]}; activations and results {mib[2]}"


class FrozenOnGpu(nn.Module):
    """What :func:`fastcnn.freeze` returns for inputs on a GPU: call it with tensors as the example's.

    A call copies its inputs into :attr:`inputs`, replays the graph, and returns copies of the results, all on the
    caller's current stream. A tensor of :attr:`inputs` itself may be passed after it was filled in place: it is not
    copied. :meth:`replay` copies nothing at all.

    Calls from several threads and on several streams are safe; they run one after the other, since there is one set of
    activations. It has no parameters; ``train``, ``to`` and changes of the original's weights do not reach it. No
    gradient is recorded.

    A file (:meth:`save`), a pickle or a deep copy holds the operators that the graph was captured from, with their
    constants, and is captured again where it is loaded.
    """

    def __init__(
        self, capturer: Capturer, graph: Graph, inputs: Sequence[Tensor], result: Any, held: _Held, notes: _Notes
    ) -> None:
        super().__init__()
        self._set(capturer, graph, inputs, result, held, notes)
        self.train(False)

    def _set(
        self, capturer: Capturer, graph: Graph, inputs: Sequence[Tensor], result: Any, held: _Held, notes: _Notes
    ) -> None:
        self._capturer, self._graph, self._held = capturer, graph, held
        self.branches, self.fusions = notes
        self._inputs = tuple(inputs)
        self._checks = tuple((i, t, t.shape, t.dtype, t.device) for i, t in enumerate(self._inputs))
        leaves, self._structure = tree_flatten(result)
        self._outputs: tuple[Tensor, ...] = tuple(leaves)
        self._result = result
        self._lock = threading.Lock()
        self._turn = capturer.turn

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the graph reads, to be filled in place: in the stream of the call that follows."""
        return self._inputs

    #: What was found of the network's branches: whether they run side by side, and the times that decided it.
    branches: str

    #: What was found of operators that one kernel could do together: whether it does, and the times that decided it.
    fusions: tuple[str, ...]

    @property
    def recomputed(self) -> int:
        """Packed or folded weights that each replay computes again, since the model computes them in each call."""
        return self._held.derived.made

    @property
    def lanes(self) -> int:
        """Streams that the network's branches run on inside the graph."""
        return self._graph.lanes

    @property
    def early_starts(self) -> bool:
        """Whether kernels begin while those ahead of them still run, where they can: freezing measured it faster."""
        return self._graph.early

    def forward(self, *inputs: Tensor) -> Any:
        """The model's result for inputs of the example's shapes and dtypes, in memory of its own.

        Raises:
            TypeError: an input is no tensor.
            ValueError: a wrong number of inputs, or one of a wrong shape, dtype or device.
            RuntimeError: the current stream is being captured.
        """
        if len(inputs) != len(self._checks):
            raise ValueError(f"the frozen model takes {len(self._checks)} inputs, was given {len(inputs)}")
        to_copy = []
        for (index, static, shape, dtype, device), given in zip(self._checks, inputs, strict=True):
            if given is static:
                continue
            if not isinstance(given, Tensor):
                raise TypeError(f"input {index} must be a tensor, is a {type(given).__name__}")
            if given.shape != shape or given.dtype != dtype or given.device != device:
                raise ValueError(
                    f"input {index} must have shape {tuple(shape)} and dtype {dtype} on {device}, as the example it "
                    f"was frozen with; it has shape {tuple(given.shape)} and dtype {given.dtype} on {given.device}"
                )
            to_copy.append((static, given.detach() if given.requires_grad else given))
        with self._lock, self._turn:
            for static, given in to_copy:
                static.copy_(given)
            self._graph.replay()
            results = [output.clone() for output in self._outputs]
        return results[0] if self._structure.is_leaf() else tree_unflatten(results, self._structure)

    def replay(self) -> Any:
        """The result for what :attr:`inputs` hold, in the graph's own memory: the next call writes over it.

        For a caller that is alone: it must have read the result, in the same stream, before the next call.
        """
        with self._lock, self._turn:
            self._graph.replay()
        return self._result

    def memory(self) -> MemoryOnGpu:
        """Bytes of GPU memory that the frozen model holds."""
        return MemoryOnGpu(_bytes_of(self._inputs), _bytes_of(self._held.tensors()), self._graph.bytes())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frozen model to a file for :func:`fastcnn.load_frozen`; the format needs no pickle.

        It is traced for that, and what was traced is run once and compared with the graph.

        Raises:
            ValueError: the model cannot be in a file: it holds operators that no file may hold (all are named), or
                its forward cannot be traced, or gives another result when it is.
        """
        content = self._content()
        with open(path, "wb") as file:
            file.write(content)

    def _content(self) -> bytes:
        with self._lock, self._turn:  # nobody fills the inputs meanwhile
            return content_of(self._held.model, self._inputs, self._held.settings, self._results)

    def _results(self) -> list[Tensor]:
        """For what the inputs hold, with the graph's own memory left as it was: somebody may be about to read it."""
        before = [output.clone() for output in self._outputs]
        self._graph.replay()
        results = [output.clone() for output in self._outputs]
        for output, value in zip(self._outputs, before, strict=True):
            output.copy_(value)
        return results

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: what any module has, and the bytes of :meth:`save`'s file. Raises ValueError as that does."""
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_A_FROZEN_MODEL}
        return {**state, "_file": self._content()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On the current GPU. Raises ValueError as :func:`fastcnn.load_frozen` does."""
        self._restore(state, "the pickled model", cuda_graph.capturer_on())

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenOnGpu:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = copy.deepcopy(self.__getstate__(), memo)
        other._restore(state, "the copied model", cuda_graph.capturer_on(self._capturer.device))
        return other

    def _restore(self, state: dict[str, Any], name: str, capturer: Capturer | None) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_file"})
        self._set(*_loaded(state["_file"], name, capturer))

    def __del__(self) -> None:
        # Memory goes back to the allocator, which knows of the streams it came from, not of those of the calls.
        capturer = self.__dict__.get("_capturer")
        if capturer is not None:
            with contextlib.suppress(Exception):  # when the interpreter ends, CUDA may be gone already
                capturer.wait()

    def extra_repr(self) -> str:
        inputs = ", ".join(str(tuple(tensor.shape)) for tensor in self._inputs)
        return "; ".join([f"inputs {inputs}", self.branches, *self.fusions, str(self.memory())])


# Attributes that the file's bytes stand for.
_OF_A_FROZEN_MODEL = frozenset(
    {
        "_capturer", "_graph", "_held", "branches", "fusions", "_inputs", "_checks", "_structure", "_outputs",
        "_result", "_lock", "_turn",
    }
)  # fmt: skip


class _Held(NamedTuple):
    """What the graph reads: it must live as long, and nobody else may write or free it. And what made the graph."""

    model: nn.Module
    derived: Kept
    settings: Settings

    def tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for value in self.derived.values:
            yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _bytes_of(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def freeze_on_gpu(
    model: nn.Module,
    examples: Sequence[Tensor],
    dtype: torch.dtype | None,
    *,
    capturer: Capturer | None = None,
    most_lanes: int = MOST_LANES,
) -> FrozenOnGpu:
    """:func:`fastcnn.freeze` for examples on a GPU.

    Args:
        capturer: makes the graph; tests without a GPU pass one that only runs the model again.
        most_lanes: streams for branches, at most. More than one are used where that is faster here.
    """
    capturer = capturer or CudaCapturer(examples[0].device)
    with torch.inference_mode(False), torch.no_grad():
        inputs = [torch.empty_strided(e.shape, e.stride(), dtype=dtype or e.dtype, device=e.device) for e in examples]
        for static, example in zip(inputs, examples, strict=True):
            static.copy_(example.detach())
        own = _own(model, inputs, dtype)
        return FrozenOnGpu(*_Freezing(capturer, own, inputs).parts(most_lanes))


def load_on_gpu(content: bytes, name: str) -> FrozenOnGpu:
    """:func:`fastcnn.load_frozen` for the content of a file that :meth:`FrozenOnGpu.save` wrote."""
    return FrozenOnGpu(*_loaded(content, name, cuda_graph.capturer_on()))


def _loaded(content: bytes, name: str, capturer: Capturer | None) -> _Parts:
    with torch.inference_mode(False), torch.no_grad():
        model, settings = from_bytes(content, name, None if capturer is None else capturer.device)
        assert capturer is not None
        generator = torch.Generator().manual_seed(0)
        inputs = []
        try:
            for spec in model.program.inputs:
                static = torch.empty_strided(spec.shape, spec.strides, dtype=spec.torch_dtype, device=capturer.device)
                inputs.append(static.copy_(torch.randn(spec.shape, generator=generator)))
            with settings.applied(capturer.device):
                return _Freezing(capturer, model, inputs).parts(MOST_LANES)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} cannot run here: {error}") from error


def _own(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> nn.Module:
    """A copy in eval mode that nobody else can change, made of fastcnn's operators."""
    own = copy.deepcopy(model).requires_grad_(False).eval()
    if dtype is not None:
        own = own.to(dtype)
    misplaced = {t.device for t in (*own.parameters(), *own.buffers()) if t.device != inputs[0].device}
    if misplaced:
        raise ValueError(
            f"model must be on {inputs[0].device} like example_inputs[0]; it has tensors on "
            + ", ".join(sorted(map(str, misplaced)))
        )
    if is_fastcnn(own) or any(STATE in module.__dict__ for module in own.modules()):
        return own
    return optimize(own, list(inputs), inplace=True)


class _Notes(NamedTuple):
    branches: str
    fusions: tuple[str, ...]


# What a frozen model is made of.
_Parts = tuple[Capturer, Graph, Sequence[Tensor], Any, _Held, _Notes]


class _Freezing:
    """One model on its way into a graph."""

    def __init__(self, capturer: Capturer, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self._capturer, self._model, self._inputs = capturer, model, inputs
        self._kept, self._settings = Kept(), Settings.now(capturer.device)
        self._early = False  # whether the kernels of the next graph may begin early

    def _run(self) -> Any:
        with self._settings_of_model():
            result = self._model(*self._inputs)
        for leaf in tree_flatten(result)[0]:
            if not isinstance(leaf, Tensor):
                raise ValueError(f"model must return tensors, returned a {type(leaf).__name__}")
        return result

    def _settings_of_model(self) -> contextlib.AbstractContextManager[Any]:
        """A program's operators are those that autocast called: it must not see them again."""
        if self._settings.autocast is None or not isinstance(self._model, Interpreted):
            return contextlib.nullcontext()
        return self._settings._replace(autocast=None).applied(self._capturer.device)

    def parts(self, most_lanes: int) -> _Parts:
        try:
            expected, lanes = self._warm_up(most_lanes)
            graph, result = self._capture(1)
        except CannotBeCaptured as error:
            raise ValueError(f"model cannot be frozen: {error}") from error
        first = self._results_of(graph, result)
        if not all(map(near, first, expected)):
            raise ValueError(
                "model cannot be frozen: a replay of its CUDA graph gives another result than the model, which may be "
                "because it depends on what changes from call to call"
            )
        note = "no branches"
        hidden = hidden_code(self._model)
        fusions: list[str] = []
        for rule in RULES if hidden is None else ():
            graph, result, first, found = self._with_fusions(graph, result, first, rule)
            fusions += found
        if self._capturer.early_starts and not self._kept.made:
            graph, result = self._with_early_starts(graph, result, first)
        if lanes > 1 and hidden is not None:
            note = f"branches run one after the other: {hidden}"
        elif lanes > 1:
            graph, result, note = self._with_branches(graph, result, first, most_lanes)
        self._kept.values = list({id(value): value for value in self._kept.values}.values())
        held = _Held(self._model, self._kept, self._settings)
        return self._capturer, graph, self._inputs, result, held, _Notes(note, tuple(fusions))

    def _warm_up(self, most_lanes: int) -> tuple[list[Tensor], int]:
        """Kernels are compiled, weights are packed, and what a graph would do wrong is found.

        Returns the results, and how many lanes the model's branches would have.
        """
        device, schedule = self._capturer.device, Schedule(most_lanes)
        watching = Watching(device, schedule, OneLane())

        def first() -> None:
            with Watching(device):
                self._run()

        def second() -> list[Tensor]:
            with watching:
                result = self._run()
            return [leaf.clone() for leaf in tree_flatten(result)[0]]

        with keeping() as kept:
            self._capturer.warm_up(first)
            before, generator = self._state(), _generator_state(device)
            results = self._capturer.warm_up(second)
        self._kept.values += kept.values
        if watching.may_draw and not torch.equal(_generator_state(device), generator):
            raise ValueError("model cannot be frozen: it draws random numbers")
        after = self._state()
        for what in ("a parameter or buffer", "an input"):
            if before[what] != after[what]:
                raise ValueError(f"model cannot be frozen: it writes to {what}")
        return results, schedule.lanes

    def _capture(self, most_lanes: int) -> tuple[Graph, Any]:
        with keeping() as kept:
            captured = self._capturer.capture(self._run, most_lanes, self._early)
        self._kept.values += kept.values
        self._kept.made = kept.made  # of the last capture: what every replay computes again
        return captured

    def _state(self) -> dict[str, list[tuple[int, int]]]:
        """Which tensors the model has, and how often they were written."""
        own = [*self._model.parameters(), *self._model.buffers()]
        return {
            "a parameter or buffer": [(id(tensor), tensor._version) for tensor in own],
            "an input": [(id(tensor), tensor._version) for tensor in self._inputs],
        }

    def _results_of(self, graph: Graph, result: Any) -> list[Tensor]:
        def run() -> list[Tensor]:
            graph.replay()
            return [leaf.clone() for leaf in tree_flatten(result)[0]]

        return self._capturer.warm_up(run)

    def _with_early_starts(self, graph: Graph, result: Any, results: Sequence[Tensor]) -> tuple[Graph, Any]:
        """The graph whose kernels begin early, where that is faster. No weight of the model is computed in a replay."""
        self._early = True
        try:
            other, other_result = self._capture(1)
        except CannotBeCaptured as error:
            logger.warning("freeze: kernels do not begin early: %s", error)
            self._early = False
            return graph, result
        if not all(map(equal, self._results_of(other, other_result), results)):
            logger.warning("freeze: where kernels begin early the result is another; they do not")
        elif self._capturer.milliseconds(other) < self._capturer.milliseconds(graph):
            return other, other_result
        self._early = False
        return graph, result

    def _with_fusions(
        self, graph: Graph, result: Any, results: list[Tensor], rule: Rule
    ) -> tuple[Graph, Any, list[Tensor], list[str]]:
        """The graph with groups of operators in one kernel each, where a rule finds any and that is faster; its
        results, and what was found. The model is then the program that the graph was captured from.
        """
        device = self._capturer.device
        if not rule.possible(device):
            return graph, result, results, []
        before = self._model, self._kept
        try:
            program, parts = program_of(self._model, self._inputs)
            found = fused(program, device, rule)
            if found is None:
                return graph, result, results, []
            together_program, groups = found
            self._model, self._kept = with_parameters(together_program, parts, device), Kept()
            self._warm_up(1)
            other, other_result = self._capture(1)
            other_results = self._results_of(other, other_result)
            expected, same = self._substituted(with_parameters(program, parts, device), groups)
            same = same and all(map(near, other_results, expected))
        except Exception as error:  # tracing runs the model's own code, which may raise anything; or no memory is left
            self._model, self._kept = before
            reason = str(error) or type(error).__name__
            logger.info("freeze: %s stay apart: %s", rule.name, reason)
            return graph, result, results, [f"{rule.name} apart: {reason}"]
        together, apart = self._capturer.milliseconds(other), self._capturer.milliseconds(graph)
        times = f"in one kernel {together:.4f} ms, apart {apart:.4f} ms"
        if same and together < apart:
            return other, other_result, other_results, [f"{rule.name} in one kernel, {len(groups)} times: {times}"]
        self._model, self._kept = before
        if not same:
            logger.warning("freeze: %s in one kernel give another result; they stay apart", rule.name)
            times = "in one kernel they gave another result"
        return graph, result, results, [f"{rule.name} apart: {times}"]

    def _substituted(self, apart: Interpreted, groups: Sequence[Fusion]) -> tuple[list[Tensor], bool]:
        """A program's results with groups in one kernel each, and whether each gave what its group's steps do."""

        def run() -> tuple[list[Tensor], bool]:
            with self._settings_of_model():
                given = (*self._inputs, *apart.constants)
                return run_substituted(apart.program, given, self._capturer.device, groups, near)

        return self._capturer.warm_up(run)

    def _with_branches(
        self, graph: Graph, result: Any, results: Sequence[Tensor], most_lanes: int
    ) -> tuple[Graph, Any, str]:
        """The graph with branches on streams of their own, where the model has any and that is faster; and what was
        found.
        """
        try:
            other, other_result = self._capture(most_lanes)
        except CannotBeCaptured:
            if not self._early:
                raise
            self._early = False
            other, other_result = self._capture(most_lanes)
        if not all(map(equal, self._results_of(other, other_result), results)):
            logger.warning("freeze: with branches side by side the result is another; they run one after the other")
            return graph, result, "branches run one after the other: side by side they gave another result"
        apart, side_by_side = self._capturer.milliseconds(graph), self._capturer.milliseconds(other)
        times = f"side by side {side_by_side:.4f} ms, one after the other {apart:.4f} ms"
        if side_by_side < 0.98 * apart:
            return other, other_result, f"branches run on {other.lanes} streams: {times}"
        return graph, result, f"branches run one after the other: {times}"


def _generator_state(device: torch.device) -> Tensor:
    """Of the generator that a model on this device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
