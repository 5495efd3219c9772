"""What else a user could run a network on: torch.compile with frozen weights, ONNX Runtime, OpenVINO.

Each function takes a program of PyTorch's own operators (:func:`fastcnn.measurement.plain.plain_program`) and returns a
function without arguments that runs one batch and returns the output. All use as many threads as PyTorch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.export import ExportedProgram

Runner = Callable[[], Tensor]

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


def compiled_frozen(program: ExportedProgram, input: Tensor) -> Runner:
    """torch.compile (inductor) with weights frozen into the program, channels-last."""
    import torch._inductor.config as inductor

    module = program.module().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nhwc = input.contiguous(memory_format=torch.channels_last)
    with inductor.patch(freezing=True), torch.no_grad(), _quietly():
        faster = torch.compile(module)
        faster(nhwc)

    def run() -> Tensor:
        with torch.no_grad():
            return faster(nhwc)

    return run


def onnxruntime(program: ExportedProgram, input: Tensor) -> Runner:
    """ONNX Runtime's CPU provider with all graph optimisations; fp32 only."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, _quietly():
        path = os.path.join(folder, "network.onnx")
        torch.onnx.export(program, (input,), path, dynamo=True, external_data=False, verbose=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: input.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(program: ExportedProgram, input: Tensor) -> Runner:
    """OpenVINO's CPU plugin, set for latency; arithmetic in the input's dtype."""
    import openvino as ov

    with _quietly():
        model = ov.convert_model(program, example_input=input)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[input.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.compile_model(model, "CPU", settings).create_infer_request()
    values = input.contiguous().float().numpy()
    return lambda: torch.from_numpy(request.infer([values], share_inputs=True)[0])


_PEERS: dict[str, tuple[tuple[str, ...], tuple[torch.dtype, ...], Callable[[ExportedProgram, Tensor], Runner]]] = {
    # Packages it needs, dtypes it runs, and what makes its runner.
    COMPILED_FROZEN: ((), (torch.float32, torch.bfloat16), compiled_frozen),
    ONNXRUNTIME: (("onnxruntime", "onnx", "onnxscript"), (torch.float32,), onnxruntime),
    OPENVINO: (("openvino",), (torch.float32,), openvino),
}


def cpu_peers(
    program: ExportedProgram, input: Tensor, tell: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Runner], list[str]]:
    """Every peer that this machine can run, each checked against the program itself before anybody times it.

    Returns:
        The runners by name, and a line for each peer left out that says why.
    """
    runners: dict[str, Runner] = {}
    left_out: list[str] = []
    with torch.no_grad():
        expected = program.module()(input).float()
    tolerance = 1e-3 if input.dtype == torch.float32 else 0.1
    for name, (packages, dtypes, make) in _PEERS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            left_out.append(f"{name}: {' and '.join(missing)} not installed (pip install 'fastcnn[bench]')")
            continue
        if input.dtype not in dtypes:
            left_out.append(f"{name}: not timed in {input.dtype}")
            continue
        tell(f"preparing {name}")
        try:
            runner = make(program, input)
            difference = float((runner().detach().float() - expected).norm() / expected.norm())
        except Exception as error:  # whatever a foreign compiler raises, the others can still be timed
            first_line = next(iter(str(error).splitlines()), "")
            left_out.append(f"{name}: failed ({type(error).__name__}: {first_line})")
            continue
        if not difference <= tolerance:
            left_out.append(f"{name}: its result is off by {difference:.1e}")
            continue
        runners[name] = runner
    return runners, left_out
