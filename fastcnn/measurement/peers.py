"""What else a user could run a network on: torch.compile with frozen weights, ONNX Runtime, OpenVINO.

Each function takes a network taken apart into PyTorch's own operators and returns a function without arguments that
runs one batch and returns the output. All use as many threads as PyTorch, and are otherwise as their makers set them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastcnn.measurement.plain import plain_program

Runner = Callable[[], Tensor]


@dataclass(frozen=True)
class Network:
    """What a peer is given."""

    program: ExportedProgram  # in the dtype to be measured
    input: Tensor
    wide: ExportedProgram  # the same in fp32, with the same values: `program` itself where that is fp32

    @classmethod
    def of(cls, model: nn.Module, input: Tensor) -> Network:
        """A network of fastcnn's modules, without changing it."""
        input = input.contiguous()
        program = plain_program(model, input)
        if input.dtype == torch.float32:
            return cls(program, input, program)
        return cls(program, input, plain_program(copy.deepcopy(model).float(), input.float()))


COMPILED_FROZEN, ONNXRUNTIME, OPENVINO = "compile_frozen", "onnxruntime", "openvino"


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters report their steps as warnings and log lines, none of which concerns the user of a benchmark."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def compiled_frozen(network: Network) -> Runner:
    """torch.compile (inductor) with weights frozen into the program, channels-last."""
    import torch._inductor.config as inductor

    module = network.program.module().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nhwc = network.input.contiguous(memory_format=torch.channels_last)
    with inductor.patch(freezing=True), torch.no_grad(), _quietly():
        faster = torch.compile(module)
        faster(nhwc)

    def run() -> Tensor:
        with torch.no_grad():
            return faster(nhwc)

    return run


def onnxruntime(network: Network) -> Runner:
    """ONNX Runtime's CPU provider with all graph optimisations; fp32 only."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, _quietly():
        path = os.path.join(folder, "network.onnx")
        torch.onnx.export(network.program, (network.input,), path, dynamo=True, external_data=False, verbose=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: network.input.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(network: Network) -> Runner:
    """OpenVINO's CPU plugin, set for latency. bf16 is asked for as its manual says: a hint to an fp32 model."""
    import openvino as ov

    with _quietly():
        model = ov.convert_model(network.wide, example_input=network.input.float())
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[network.input.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.compile_model(model, "CPU", settings).create_infer_request()
    values = network.input.float().numpy()
    return lambda: torch.from_numpy(request.infer([values], share_inputs=True)[0])


PEERS: dict[str, tuple[tuple[str, ...], tuple[torch.dtype, ...], Callable[[Network], Runner]]] = {
    # Packages it needs, dtypes it runs, and what makes its runner.
    COMPILED_FROZEN: ((), (torch.float32, torch.bfloat16), compiled_frozen),
    ONNXRUNTIME: (("onnxruntime", "onnx", "onnxscript"), (torch.float32,), onnxruntime),
    OPENVINO: (("openvino",), (torch.float32, torch.bfloat16), openvino),
}


def engine_versions() -> dict[str, str]:
    """Versions of the engines' packages that are installed."""
    found = {}
    for package in dict.fromkeys(package for packages, _, _ in PEERS.values() for package in packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def distance(output: Tensor, expected: Tensor) -> float:
    """Of a result from the float64 one, relative; NaN where the result holds one."""
    return float((output.detach().double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Expected:
    """What every candidate has to compute, so that nothing that computes something else is timed."""

    result: Tensor  # of the network in float64 on PyTorch's operators
    tolerance: float  # relative distance from it

    @classmethod
    def of(cls, result: Tensor, in_dtype: Tensor) -> Expected:
        """The accuracy rule: up to twice as far off as PyTorch itself (``in_dtype``) in the dtype that is measured."""
        return cls(result, max(1e-4, 2 * distance(in_dtype, result)))

    def fault(self, output: Tensor) -> str | None:
        """What is wrong with a candidate's result, or None."""
        off = distance(output, self.result)
        return None if off <= self.tolerance else f"its result is off by {off:.1e}"


def cpu_peers(
    network: Network,
    expected: Expected | None,
    tell: Callable[[str], None] = lambda text: None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Runner], list[str]]:
    """Every peer that this machine can run; where ``expected`` is given, none whose result is wrong.

    Returns:
        The runners by name, and a line for each peer left out that says why.
    """
    runners: dict[str, Runner] = {}
    left_out: list[str] = []
    dtype = network.input.dtype
    for name, (packages, dtypes, make) in PEERS.items():
        if only is not None and name not in only:
            continue
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            left_out.append(f"{name}: {' and '.join(missing)} not installed (pip install 'fastcnn[bench]')")
            continue
        if dtype not in dtypes:
            left_out.append(f"{name}: not timed in {dtype}")
            continue
        tell(f"preparing {name}")
        try:
            runner = make(network)
            output = runner()
            fault = None if expected is None else expected.fault(output)
        except Exception as error:  # whatever a foreign compiler raises, the others can still be timed
            first_line = next(iter(str(error).splitlines()), "")
            left_out.append(f"{name}: failed ({type(error).__name__}: {first_line})")
            continue
        if fault is not None:
            left_out.append(f"{name}: {fault}")
            continue
        runners[name] = runner
    return runners, left_out
