"""`freeze`: a model with static shapes as one native call."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils._pytree import TreeSpec, tree_unflatten

from fastcnn._native import call_plan
from fastcnn.backends import cpp
from fastcnn.graph.classes import STATE
from fastcnn.graph.freezing import choosing
from fastcnn.graph.freezing.aten import aten_rules
from fastcnn.graph.freezing.capture import Captured, capture
from fastcnn.graph.freezing.choosing import ByMeasurement, Choose, by_rule
from fastcnn.graph.freezing.gpu import FrozenOnGpu, freeze_on_gpu
from fastcnn.graph.freezing.gpu.frozen import load_on_gpu
from fastcnn.graph.freezing.gpu.storage import DTYPES as GPU_DTYPES
from fastcnn.graph.freezing.gpu.storage import MAGIC as GPU_MAGIC
from fastcnn.graph.freezing.lowering import DTYPES, Lowering, fastcnn_rules
from fastcnn.graph.freezing.recipe import Recipe, TensorSpec, build_plan, dtype_of, make_recipe, packed
from fastcnn.graph.freezing.storage import as_bytes, from_bytes
from fastcnn.graph.freezing.structures import filled, structure_as_data
from fastcnn.graph.optimizing import is_fastcnn, optimize


class Memory(NamedTuple):
    """Bytes that a frozen model holds, and what its activations would take side by side.

    The workspace is what linear layers with more than 8 rows repack their input into: as large as the largest needs.
    """

    arena: int
    weights: int
    activations: int
    workspace: int

    def __str__(self) -> str:
        mib = [f"{value / 2**20:.2f} MiB" for value in self]
        workspace = f"; workspace {mib[3]}" if self.workspace else ""
        return f"arena {mib[0]} for activations of {mib[2]} in all{workspace}; weights {mib[1]}"


class FrozenModel(nn.Module):
    """What :func:`freeze` returns: call it with tensors as the example's.

    It has no parameters; ``train``, ``to`` and changes of the original's weights do not reach it. Calls from several
    threads are safe; they run one after the other, since there is one arena. No gradient is recorded.
    """

    def __init__(
        self,
        recipe: Recipe,
        constants: Tensor,
        weights: Sequence[cpp.PackedWeight],
        structure: TreeSpec | None = None,
    ) -> None:
        super().__init__()
        self._set(recipe, constants, weights, structure)
        self.train(False)

    def _set(
        self,
        recipe: Recipe,
        constants: Tensor,
        weights: Sequence[cpp.PackedWeight],
        structure: TreeSpec | None = None,  # of the result, where it does not come from a file
    ) -> None:
        self._recipe, self._constants, self._weights = recipe, constants, tuple(weights)
        self._plan = build_plan(recipe, constants, self._weights)
        self._structure = structure
        if structure is None:
            filled(recipe.structure, [None] * len(recipe.outputs))  # raises where a file's does not fit
        self._input_checks = [(spec.shape, spec.strides, dtype_of(spec.dtype)) for spec in recipe.inputs]
        self._output_memory = [(length, dtype_of(dtype)) for length, dtype in recipe.output_memory]
        for spec in recipe.outputs:
            _require_within(spec, self._output_memory)
        whole = _whole_results(recipe.outputs, self._output_memory)
        self._is_leaf = recipe.structure == 0
        self._call = None  # what call_plan() runs
        if whole is not None:
            self._call = self._plan.caller(self._input_checks, whole, self._is_leaf, _GLOBAL_HOOKS, torch)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and deep copies: what any module has, and the bytes of :meth:`save`'s file.

        Raises ValueError as :meth:`save` does.
        """
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_A_FROZEN_MODEL}
        return {**state, "_file": b"".join(self._as_bytes())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises ValueError as :func:`load_frozen` does, on a processor of another instruction set for example."""
        super().__setstate__({name: value for name, value in state.items() if name != "_file"})
        from_bytes(state["_file"], "the pickled model", lambda stored: self._set(*stored))

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """What ``nn.Module`` does, at once where there are no hooks and inputs lie as the example's."""
        found = call_plan(self, inputs, kwargs)
        if found is None:
            return super().__call__(*inputs, **kwargs)
        return self._structured(found) if type(found) is list else found

    def forward(self, *inputs: Tensor) -> Any:
        """The model's result for inputs of the example's shapes and dtypes.

        Inputs in another memory layout are first copied to the example's; results have the strides that the model
        gives for the example.

        Raises:
            TypeError: an input is no tensor.
            ValueError: a wrong number of inputs, or one of a wrong shape, dtype or device.
        """
        if len(inputs) != len(self._input_checks):
            raise ValueError(f"the frozen model takes {len(self._input_checks)} inputs, was given {len(inputs)}")
        given = [self._checked(i, tensor) for i, tensor in enumerate(inputs)]
        memory = [torch.empty(length, dtype=dtype) for length, dtype in self._output_memory]
        self._plan.run(given, memory, torch.get_num_threads())
        results = [
            memory[spec.memory].as_strided(spec.shape, spec.strides, spec.offset) for spec in self._recipe.outputs
        ]
        return results[0] if self._is_leaf else self._structured(results)

    def _structured(self, results: list[Tensor]) -> Any:
        if self._structure is None:
            return filled(self._recipe.structure, results)
        return tree_unflatten(results, self._structure)

    def _checked(self, index: int, tensor: Tensor) -> Tensor:
        shape, strides, dtype = self._input_checks[index]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"input {index} must be a tensor, is a {type(tensor).__name__}")
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
            raise ValueError(
                f"input {index} must have shape {shape} and dtype {dtype} on the CPU, as the example it was frozen "
                f"with; it has shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device}"
            )
        tensor = tensor.detach()
        if tensor.stride() == strides and not tensor.is_neg():
            return tensor
        return torch.empty_strided(shape, strides, dtype=dtype).copy_(tensor)

    def memory(self) -> Memory:
        """Bytes of the arena, of the packed weights and constants, and of the linear layers' workspace.

        Not counted: the kernels' scratch memory, which belongs to the threads and serves every model that they run.
        """
        weights = self._constants.numel() + sum(weight.bytes for weight in self._weights)
        recipe = self._recipe
        return Memory(recipe.arena_bytes, weights, recipe.activation_bytes, self._plan.workspace_bytes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frozen model to a file for :func:`load_frozen`; the format needs no pickle.

        Raises:
            ValueError: the result is no tensor, and made of other than tuples, lists and dictionaries with strings as
                keys.
        """
        parts = self._as_bytes()
        with open(path, "wb") as file:
            for part in parts:
                file.write(part)

    def _as_bytes(self) -> list[bytes]:
        if self._structure is not None:
            structure_as_data(self._structure)
        return as_bytes(self._recipe, self._constants, self._weights)

    def extra_repr(self) -> str:
        inputs = ", ".join(str(spec.shape) for spec in self._recipe.inputs)
        return f"inputs {inputs}; {len(self._recipe.steps)} steps; {self.memory()}"


# Hooks of all modules: torch changes these dictionaries in place.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)

# Attributes that the file's bytes stand for.
_OF_A_FROZEN_MODEL = frozenset(
    {
        "_recipe", "_constants", "_weights", "_plan", "_structure", "_input_checks", "_output_memory", "_call",
        "_is_leaf",
    }
)


def load_frozen(path: str | os.PathLike[str]) -> FrozenModel | FrozenOnGpu:
    """A frozen model from a file that its ``save`` wrote: a :class:`FrozenModel` or, if it was frozen on a GPU, a
    :class:`FrozenOnGpu` on the current one.

    Nothing in the file is executed: steps and operators are looked up in fixed lists, and every address is checked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, is damaged, or was written for another format, version, instruction set or
            GPU architecture; or it needs a GPU, and there is none.
    """
    with open(path, "rb") as file:
        content = file.read()
    if content[: len(GPU_MAGIC)] == GPU_MAGIC:
        return load_on_gpu(content, os.fspath(path))
    return from_bytes(content, os.fspath(path), lambda stored: FrozenModel(*stored))


def _last(spec: TensorSpec) -> int:
    """Where a tensor's last element lies, counted from its first."""
    return sum((size - 1) * stride for size, stride in zip(spec.shape, spec.strides, strict=True))


def _require_within(spec: TensorSpec, memory: list[tuple[int, torch.dtype]]) -> None:
    """Nothing that a file says may make a result reach beyond its memory."""
    if not 0 <= spec.memory < len(memory) or memory[spec.memory][1] != dtype_of(spec.dtype):
        raise ValueError("an output lies in no known memory")
    if spec.offset < 0 or any(v < 0 for v in spec.strides) or spec.offset + _last(spec) >= memory[spec.memory][0]:
        raise ValueError("an output reaches beyond its memory")


def _whole_results(
    outputs: Sequence[TensorSpec], memory: Sequence[tuple[int, torch.dtype]]
) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] | None:
    """Shape, strides and dtype of each result, where each fills a memory of its own from start to end; else None.

    Such results are made in their shapes, which saves a small network a tenth of its time.
    """
    if [spec.memory for spec in outputs] != list(range(len(memory))):
        return None
    if any(spec.offset or _last(spec) + 1 != length for spec, (length, _) in zip(outputs, memory, strict=True)):
        return None
    return [(spec.shape, spec.strides, dtype_of(spec.dtype)) for spec in outputs]


def _prepared(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> nn.Module:
    """The model itself where it is made of fastcnn's operators already, else a copy that is optimized.

    The copy has the model's own parameters and buffers, unless they must be converted.
    """
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    if is_fastcnn(model) or any(STATE in module.__dict__ for module in model.modules()):
        return model
    if dtype is None:
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return optimize(model, list(inputs), inplace=True)


def freeze(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    tune: bool = False,
) -> FrozenModel | FrozenOnGpu:
    """A model in eval mode, for inputs of one shape, as one native call on the CPU or one CUDA graph on a GPU.

    On a GPU: see :class:`~fastcnn.graph.freezing.FrozenOnGpu`. The kernels that ``use_backend``, the tuner's table,
    ``exact`` and PyTorch's TF32 settings say when it is frozen are launched by the graph, with nothing computed anew
    that depends on weights alone; branches run side by side on streams of their own where that is faster here. What
    ``save`` writes there is captured again by :func:`load_frozen`, on a GPU of the same architecture.

    On the CPU: batch norm is folded, weights are packed for this processor, and activations share one arena whose
    memory is planned and touched here. The results are the optimized model's own, since the same kernels run; what is
    not fastcnn's (activations but ReLU, layer norm, sums) is computed by steps of the plan, within the accuracy rule.

    Args:
        model: any convolutional network. Unless it is made of fastcnn's modules or was optimized, a copy of it goes
            through :func:`fastcnn.optimize` first. It is not changed, and later changes of its parameters do not reach
            the frozen model.
        example_inputs: a tensor, or a sequence of them, as ``model(*example_inputs)`` takes; only shapes, strides and
            dtypes matter.
        dtype: ``torch.float32``, ``torch.bfloat16`` or, on a GPU, ``torch.float16``: freeze a converted copy, for
            inputs of this dtype.
        tune: on the CPU, measure which algorithm (direct, Winograd in 6x6, 4x4 or 2x2 tiles, Strassen) is fastest here
            for each 1x1, 3x3, 5x5 or strided convolution, for the number of threads now set, instead of going by the
            backend's estimate, and whether the model is then faster as a whole; if not, it stays as estimated. Takes
            some seconds. Results may then differ from the unfrozen model's within what fast algorithms may be off.

    Raises:
        ValueError: an example is empty, of another dtype, or on another device than the rest; on the CPU, the model
            holds operators without a native step (all are listed); on a GPU, it waits for the GPU or copies between
            devices, writes to its input, parameters or buffers, or draws random numbers.
        TypeError: ``model`` is no module or an example no tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, is a {type(model).__name__}")
    examples = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    on_gpu = any(isinstance(example, Tensor) and example.is_cuda for example in examples)
    place, dtypes = ("one GPU", GPU_DTYPES) if on_gpu else ("the CPU", tuple(DTYPES))
    named = " or ".join(map(str, dtypes))
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"dtype must be {named}, is {dtype}")
    for index, example in enumerate(examples):
        if not isinstance(example, Tensor):
            raise TypeError(f"example_inputs[{index}] must be a tensor, is a {type(example).__name__}")
        elsewhere = example.device != examples[0].device if on_gpu else not example.is_cpu
        if example.numel() == 0 or elsewhere or (dtype or example.dtype) not in dtypes:
            raise ValueError(
                f"example_inputs[{index}] must be a {named.replace('torch.', '')} tensor on {place} and not empty; "
                f"it has shape {tuple(example.shape)} and dtype {example.dtype} on {example.device}"
            )
    if on_gpu:
        if tune:
            raise ValueError("tune is for the CPU; on a GPU, `fastcnn tune` or fastcnn.tuning.tune before freezing")
        return freeze_on_gpu(model, examples, dtype)
    # Memory of their own each, with the same strides: values do not matter, and no two inputs may share a storage.
    blank = [torch.empty_strided(e.shape, e.stride(), dtype=dtype or e.dtype) for e in examples]
    captured = capture(_prepared(model, blank, dtype), blank)
    usual = _lowered(captured, by_rule)
    if not tune:
        return usual
    tuned = _lowered(captured, ByMeasurement())
    if tuned._recipe == usual._recipe:
        return usual
    inputs = [b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(0))) for b in blank]
    return tuned if choosing.is_faster(lambda: tuned(*inputs), lambda: usual(*inputs)) else usual


def _lowered(captured: Captured, choose: Choose) -> FrozenModel:
    """The captured model with an algorithm for each convolution."""
    with torch.inference_mode(False), torch.no_grad():
        program = Lowering(captured, {**fastcnn_rules(), **aten_rules()}, choose).run()
        recipe, constants = make_recipe(program, captured.spec)
    return FrozenModel(recipe, constants, packed(program.weights), captured.spec)
