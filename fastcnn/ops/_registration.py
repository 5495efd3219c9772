"""Registers an operator with torch.library: functional and `_into` forms, fake kernel, autograd, autocast.

An operator is described once (:class:`Operator`); real and fake kernels share its ``allocate``, so that shapes, strides
and error messages cannot differ between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcnn import _native, backends
from fastcnn.ops._arguments import require_tensor
from fastcnn.ops._layout import overlaps_itself, pixel_stride, same_memory

LIBRARY = torch.library.Library("fastcnn", "DEF")

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


class Unread(NamedTuple):
    """What the backward of an operator gets for a tensor whose values it does not need."""

    dtype: torch.dtype


class _Form(NamedTuple):
    """What comes of arguments of one form: shapes, strides, dtypes and devices of tensors, and all other values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_empty: bool
    is_finished: bool  # the filled output has the layout to be returned


_MOST_FORMS = 4096  # that an operator remembers; then it begins anew


def _ends_in_relu(*args: Any) -> bool:
    return any(isinstance(a, str) and a == "relu" for a in args)


class Operator:
    """One operator, registered as ``fastcnn::name(args) -> Tensor`` and ``fastcnn::name_into(out, args)``.

    Args:
        name: the operator's name.
        signature: its arguments in torch.library's schema language.
        allocate: ``allocate(*args) -> Tensor`` checks the arguments (raising ValueError or TypeError) and returns an
            empty channels-last output. Runs on real and on fake tensors; must not read values.
        finish: ``finish(out, *args) -> Tensor`` puts the filled output into the layout that PyTorch would return.
        fill: ``fill(out, *args)`` computes into a non-empty ``out`` that kernels can write.
        fill_fresh: the same for an ``out`` that ``allocate`` just made: what fills it may give it other memory.
        backward: ``backward(grad, out, needs, *args) -> sequence`` gives one gradient (or None) an argument, in
            differentiable ATen operations; ``needs[i]`` says whether argument i's is wanted. ``out`` is None unless
            ``needs_output``, and a tensor in ``unread`` comes as :class:`Unread`: what was not saved may be
            overwritten, as users of PyTorch's operators do (``nn.ReLU(inplace=True)`` after a convolution).
        needs_output: ``needs_output(*args)`` says whether ``backward`` reads ``out``: by default, where a ReLU ends it.
        unread: indices of the tensor arguments of which ``backward`` reads no value.
        autocast: indices of the tensor arguments that autocast converts to its dtype.
        autocast_dtype: the dtype they are converted to, where that is not autocast's own.
        writable: whether ``fill`` can write a given ``out`` as it lies; if not, a temporary is filled and copied.
        in_place: ``fill`` works value by value, so that ``out`` may be exactly one of the inputs.
    """

    def __init__(
        self,
        name: str,
        signature: str,
        *,
        allocate: Callable[..., Tensor],
        finish: Callable[..., Tensor],
        fill: Callable[..., None],
        fill_fresh: Callable[..., None] | None = None,
        backward: Callable[..., Sequence[Tensor | None]] | None,
        needs_output: Callable[..., bool] | None = None,
        unread: Sequence[int] = (),
        autocast: Sequence[int] = (),
        autocast_dtype: torch.dtype | None = None,
        writable: Callable[[Tensor], bool] = lambda out: pixel_stride(out) is not None,
        in_place: bool = False,
    ) -> None:
        self.name = name
        self._allocate, self._finish, self._fill, self._backward = allocate, finish, fill, backward
        self.allocate, self.finish, self.fill = allocate, finish, fill  # for operators made of this one
        self._fill_fresh = fill_fresh or fill
        self._needs_output, self._unread = needs_output or _ends_in_relu, frozenset(unread)
        self._autocast, self._autocast_dtype = tuple(autocast), autocast_dtype
        self._writable, self._in_place = writable, in_place
        # Arguments that were checked before, by their signature: those of calls, and those of calls with `out`.
        self._forms: dict[bytes | None, _Form] = {}
        self._good_outputs: set[bytes] = set()
        LIBRARY.define(f"{name}({signature}) -> Tensor")
        LIBRARY.define(f"{name}_into(Tensor(a!) out, {signature}) -> ()")
        namespace = torch.ops.fastcnn
        self.functional = getattr(namespace, name).default
        self.into = getattr(namespace, f"{name}_into").default
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self._run, key)
            LIBRARY.impl(f"{name}_into", self._run_into, key)
        torch.library.register_fake(f"fastcnn::{name}", self._fake, lib=LIBRARY)
        torch.library.register_fake(f"fastcnn::{name}_into", self._fake_into, lib=LIBRARY)
        self._function = self._make_function()
        LIBRARY.impl(name, self._run_autograd, "Autograd")
        LIBRARY.impl(f"{name}_into", self._run_into_autograd, "Autograd")
        if self._autocast:
            for key in ("AutocastCPU", "AutocastCUDA"):
                LIBRARY.impl(name, self._autocast_kernel(key), key)

    def __call__(self, *args: Any, out: Tensor | None = None) -> Tensor:
        if out is None:
            if _needs_no_dispatcher(args) and not (self._autocast and autocasts(args[0].device.type)):
                return self._run_known(args)
            if torch._C._are_functorch_transforms_active():
                return self._run_transformed(args)
            return self.functional(*args)
        require_tensor(out, "out")
        if _needs_no_dispatcher((out, *args)):
            self._run_into(out, *args)
            return out
        if not torch.compiler.is_compiling() and (out.is_neg() or out.is_conj()):
            raise ValueError(f"{self.name}: out must not be a lazily negated or conjugated view; see out.resolve_neg()")
        self.into(out, *args)
        return out

    # ---- kernels -----------------------------------------------------------------------------------------------

    def _run_known(self, args: tuple[Any, ...]) -> Tensor:
        """:meth:`_run`, checking arguments of each form once only."""
        signature = _native.signature(args)
        form = self._forms.get(signature)
        if form is None:
            return self._run(*args) if signature is None else self._run_new(signature, args)
        out = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
        if not form.is_empty:
            self._fill_fresh(out, *args)
        return out if form.is_finished else self._finish(out, *args)

    def known_form(self, args: tuple[Any, ...]) -> _Form | None:
        """What is remembered of calls with arguments like these."""
        return self._forms.get(_native.signature(args))

    def _run_new(self, signature: bytes, args: tuple[Any, ...]) -> Tensor:
        out = self._allocate(*args)
        shape, strides, is_empty = out.shape, out.stride(), out.numel() == 0
        if not is_empty:
            self._fill_fresh(out, *args)
        finished = self._finish(out, *args)
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        self._forms[signature] = _Form(shape, strides, out.dtype, out.device, is_empty, finished is out)
        return finished

    def _run(self, *args: Any) -> Tensor:
        out = self._allocate(*args)
        if out.numel() > 0:
            self._fill_fresh(out, *args)
        return self._finish(out, *args)

    def _fake(self, *args: Any) -> Tensor:
        return self._finish(self._allocate(*args), *args)

    def _run_into(self, out: Tensor, *args: Any) -> None:
        signature = _native.signature((out, *args))
        if signature is None or signature not in self._good_outputs:
            self._check_out(out, *args)
            if not out.is_contiguous() and pixel_stride(out) is None and overlaps_itself(out):
                raise ValueError(
                    f"{self.name}: out must not overlap itself, has shape {tuple(out.shape)} and strides {out.stride()}"
                )
            if signature is not None:
                if len(self._good_outputs) >= _MOST_FORMS:
                    self._good_outputs.clear()
                self._good_outputs.add(signature)
        if out.numel() > 0:
            inputs = tuple(a for a in args if isinstance(a, Tensor) and not (self._in_place and same_memory(out, a)))
            if not self._writable(out) or _native.may_overlap(out, inputs):
                expected = self._allocate(*args)
                self._fill_fresh(expected, *args)
                out.copy_(expected)
            else:
                self._fill(out, *args)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)

    def _fake_into(self, out: Tensor, *args: Any) -> None:
        self._check_out(out, *args)

    def _check_out(self, out: Tensor, *args: Any) -> None:
        expected = self._allocate(*args)
        if out.shape != expected.shape:
            raise ValueError(f"{self.name}: out must have shape {tuple(expected.shape)}, has {tuple(out.shape)}")
        if out.dtype != expected.dtype or out.device != expected.device:
            raise ValueError(
                f"{self.name}: out must be {expected.dtype} on {expected.device}, is {out.dtype} on {out.device}"
            )

    # ---- autograd ------------------------------------------------------------------------------------------------

    def _run_autograd(self, *args: Any) -> Tensor:
        # The forward-mode case goes through the Function too, which refuses it loudly.
        if records_gradient(args) or forward_ad._current_level >= 0:
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"torch.func cannot transform torch.ops.fastcnn.{self.name}: use fastcnn.ops")
            return self._function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.functional(*args)

    def _run_transformed(self, args: tuple[Any, ...]) -> Tensor:
        """Under torch.func's transforms, which must meet the Function before the dispatcher does."""
        device_type = args[0].device.type
        if self._autocast and autocasts(device_type):
            args = self._cast(args, device_type)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return self._function.apply(*args)

    def _run_into_autograd(self, out: Tensor, *args: Any) -> None:
        if records_gradient((out, *args)):
            raise RuntimeError(
                f"{self.name}: out= does not support automatic differentiation, but an argument requires grad"
            )
        if forward_ad._current_level >= 0 and any(
            isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in (out, *args)
        ):
            raise RuntimeError(f"{self.name}: out= does not support forward-mode differentiation")
        with torch._C._AutoDispatchBelowAutograd():
            self.into(out, *args)

    def _make_function(self) -> type[torch.autograd.Function]:
        operator = self

        class Function(torch.autograd.Function):
            generate_vmap_rule = True  # torch.func: the operator itself runs once for each item of a batch

            @staticmethod
            def forward(*args: Any) -> Tensor:
                with backends.recording(), torch._C._AutoDispatchBelowAutograd():
                    return operator.functional(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
                ctx.plain, ctx.positions, tensors = list(inputs), [], []
                for i, argument in enumerate(inputs):
                    if isinstance(argument, Tensor):
                        if i in operator._unread:
                            ctx.plain[i] = Unread(argument.dtype)
                        else:
                            ctx.plain[i] = None
                            ctx.positions.append(i)
                            tensors.append(argument)
                ctx.save_for_backward(output if operator._needs_output(*inputs) else None, *tensors)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if operator._backward is None:
                    raise RuntimeError(f"fastcnn::{operator.name} has no gradient")
                out, *tensors = ctx.saved_tensors
                args = list(ctx.plain)
                for position, tensor in zip(ctx.positions, tensors, strict=True):
                    args[position] = tensor
                return tuple(operator._backward(grads[0], out, ctx.needs_input_grad, *args))

        Function.__name__ = Function.__qualname__ = f"fastcnn_{self.name}"
        return Function

    # ---- autocast ------------------------------------------------------------------------------------------------

    def _autocast_kernel(self, key: str) -> Callable[..., Tensor]:
        device_type = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}[key]

        def kernel(*args: Any) -> Tensor:
            cast = self._cast(args, device_type)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return self.functional(*cast)

        return kernel

    def _cast(self, args: tuple[Any, ...], device_type: str) -> tuple[Any, ...]:
        dtype = self._autocast_dtype or torch.get_autocast_dtype(device_type)
        cast = list(args)
        for i in self._autocast:
            tensor = cast[i]
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                cast[i] = tensor.to(dtype)
        return tuple(cast)


def autocasts(device_type: str) -> bool:
    """Whether autocast chooses dtypes on a device. PyTorch refuses to answer for devices without autocast, as meta."""
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


_TENSOR_TYPES = frozenset((Tensor, torch.nn.Parameter))
_OTHER_TYPES = frozenset((type(None), int, tuple, str, bool, float))


@functools.cache
def _ordinary_keys(device_type: str) -> frozenset[int]:
    """What the dispatcher sees in a tensor of values in a device's memory, and in one of inference mode."""
    with torch.inference_mode(False):
        ordinary = torch.empty(0, device=device_type)
    with torch.inference_mode():
        of_inference = torch.empty(0, device=device_type)
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (ordinary, of_inference))


def _needs_no_dispatcher(args: Sequence[Any]) -> bool:
    """Whether PyTorch's dispatcher would find nothing to do but to call the kernel.

    So it is for ordinary tensors on one kind of device where no gradient is recorded and nobody watches or replaces
    operations: no mode, transform, tracer or profiler. Going through it takes longer than many a kernel.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    device_type = args[0].device.type
    if device_type not in ("cpu", "cuda"):
        return False
    keys, recording, keys_of = _ordinary_keys(device_type), torch.is_grad_enabled(), torch._C._dispatch_keys
    for argument in args:
        kind = type(argument)
        if kind in _TENSOR_TYPES:
            if (recording and argument.requires_grad) or keys_of(argument).raw_repr() not in keys:
                return False
        elif kind not in _OTHER_TYPES and isinstance(argument, Tensor):
            return False
    return True


def records_gradient(args: Sequence[Any]) -> bool:
    """Whether autograd would record an operation on these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
