"""1x1 convolution by Strassen's algorithm against float64, and the rule that says when it serves."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import relative_error
from support.instruction_sets import check_kernels_under
from support.layout import GuardedSlice, sliced
from torch import Tensor, nn

import fastcnn
from fastcnn import _native, ops
from fastcnn.backends import cpp

# What the accuracy rule grants fast algorithms, and what this one keeps to with room for small sums.
STATED, USUAL = 1e-5, 2e-6


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.h, self.w


CASES = [
    Case(1, 2, 1, 1, 1),
    Case(1, 2, 1, 2, 3),
    Case(3, 6, 1, 1, 70),
    Case(1, 16, 3, 3, 16),
    Case(1, 64, 7, 7, 64),  # pixels that do not divide evenly into halves
    Case(2, 66, 5, 5, 65),  # halves of 33 channels, a column over two blocks
    Case(1, 130, 9, 7, 33),
    Case(3, 32, 13, 11, 96),  # an odd number of column blocks
    Case(2, 48, 4, 14, 110),
    Case(1, 1024, 5, 6, 64),  # pixels 4 KiB apart
    Case(1, 254, 15, 14, 128),
    Case(2, 258, 8, 9, 100),  # two chunks, the second one shorter
    Case(1, 700, 14, 3, 160),
    Case(1, 514, 29, 31, 40),
]


class Arguments(NamedTuple):
    """The tensors of one call, and what an exact convolution makes of them."""

    x: Tensor
    w: Tensor
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    relu: bool

    def reference(self) -> Tensor:
        x, w = self.x.double().contiguous(), self.w.double()
        if self.input_scale is not None and self.input_shift is not None:
            x = F.relu(x * self.input_scale.double().view(-1, 1, 1) + self.input_shift.double().view(-1, 1, 1))
        y = F.conv2d(x, w)
        if self.scale is not None:
            y = y * self.scale.double().view(-1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.double().view(-1, 1, 1)
        if self.residual is not None:
            y = y + self.residual.double()
        return F.relu(y) if self.relu else y

    def run(self, out: Tensor, threads: int) -> None:
        _native.cpu_conv2d_strassen(
            out, self.x, _native.PackedConv2dWeight(self.w, 1), self.scale, self.bias, self.residual,
            self.input_scale, self.input_shift, self.input_scale is not None, self.relu, threads,
        )  # fmt: skip


def arguments(case: Case, kind: str) -> Arguments:
    generator = torch.Generator().manual_seed(sum(case))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    lay = sliced if kind != "plain" else lambda t: t.contiguous(memory_format=torch.channels_last)
    x, w = lay(draw(case.n, case.c, case.h, case.w)), draw(case.k, case.c, 1, 1)
    if kind == "plain":
        return Arguments(x, w, None, None, None, None, None, False)
    epilogue = draw(case.k), draw(case.k), lay(draw(*case.out_shape))
    if kind == "epilogue":  # the input is read in place
        return Arguments(x, w, *epilogue, None, None, True)
    return Arguments(x, w, *epilogue, draw(case.c), draw(case.c), True)


KINDS = ("plain", "epilogue", "everything")


def check(case: Case, kind: str, threads: int) -> None:
    """One call into a poisoned slice: right everywhere, nothing written beside it."""
    given = arguments(case, kind)
    out = GuardedSlice(case.out_shape, torch.float32)
    given.run(out.view, threads)
    out.assert_guards_intact()
    assert relative_error(out.view, given.reference()) <= USUAL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, kind: str):
    check(case, kind, threads=2)


def check_kernels() -> None:
    for case in CASES:
        for kind in KINDS:
            check(case, kind, threads=1 if kind == "plain" else 3)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)


@pytest.mark.parametrize(
    "case", [Case(1, 96, 61, 53, 64), Case(1, 300, 14, 14, 310), Case(3, 40, 30, 7, 150), Case(1, 8, 4, 4, 16)], ids=str
)
def test_the_same_bits_on_any_number_of_threads(case: Case):
    """Fewer threads cut the work differently, into tasks of other pixels or output channels."""
    given = arguments(case, "everything")
    results = []
    for threads in (1, 2, 3, 4, 7):
        out = torch.full(case.out_shape, float("nan")).contiguous(memory_format=torch.channels_last)
        given.run(out, threads)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_an_image_does_not_depend_on_its_batch():
    case = Case(5, 24, 13, 9, 40)
    given = arguments(case, "plain")
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(out, 2)
    alone = torch.empty_like(out[3:4]).contiguous(memory_format=torch.channels_last)
    given._replace(x=given.x[3:4]).run(alone, 2)
    assert torch.equal(out[3:4], alone)


@pytest.mark.parametrize("relu", [False, True], ids=["normal", "non-negative"])
@pytest.mark.parametrize("channels", [64, 256, 1024, 2048])
def test_error_keeps_far_below_the_stated_one(channels: int, relu: bool):
    case = Case(1, channels, 14, 14, 128)
    given = arguments(case, "plain")
    if relu:
        given = given._replace(x=given.x.relu())
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(out, 2)
    assert relative_error(out, given.reference()) <= USUAL < STATED


def test_a_nan_stays_in_its_image_and_pixel_block():
    case = Case(2, 32, 16, 16, 64)
    given = arguments(case, "plain")
    clean = given.reference()
    given.x[0, 3, 1, 2] = float("nan")
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(out, 2)
    assert out[0, :, 1, 2].isnan().all()
    assert out.isnan().any(dim=1).sum() <= 2  # its own pixel and the one it is paired with
    assert relative_error(out[1], clean[1]) <= USUAL


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    def run(x: Tensor, out: Tensor, w: Tensor, groups: int = 1, threads: int = 1, bias: Tensor | None = None) -> None:
        packed = _native.PackedConv2dWeight(w, groups)
        _native.cpu_conv2d_strassen(out, x, packed, None, bias, None, None, None, False, False, threads)

    def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, out, w = last(1, 16, 6, 6), last(1, 8, 6, 6), torch.zeros(8, 16, 1, 1)
    run(x, out, w)
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, 1, 1\)"):
        run(x, out, torch.zeros(8, 16, 3, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, 1, 1\) and one group"):
        run(x, out, torch.zeros(8, 8, 1, 1), groups=2)
    with pytest.raises(ValueError, match="even number of input channels"):
        run(last(1, 15, 6, 6), out, torch.zeros(8, 15, 1, 1))
    with pytest.raises(ValueError, match="must be float32"):
        run(x.bfloat16(), out.bfloat16(), w)
    with pytest.raises(ValueError, match="input must have shape"):
        run(last(1, 16, 6, 5), out, w)
    with pytest.raises(ValueError, match="out must have shape"):
        run(x, last(1, 9, 6, 6), w)
    with pytest.raises(ValueError, match="threads must be positive"):
        run(x, out, w, threads=0)
    with pytest.raises(ValueError, match="bias must be contiguous with 8 values"):
        run(x, out, w, bias=torch.zeros(7))
    with pytest.raises(ValueError, match="out_shape must be positive"):
        _native.cpu_conv2d_strassen_cycles((1, 0, 4, 4), 16)
    with pytest.raises(ValueError, match="in_channels must be at least 2"):
        _native.cpu_conv2d_strassen_cycles((1, 4, 4, 4), 1)


def test_a_plans_step_names_wrong_arguments():
    constants = torch.empty(0, dtype=torch.uint8)
    x = (2, 0, "float32", (1, 16, 6, 6), (576, 1, 96, 16))
    y = (3, 0, "float32", (1, 8, 6, 6), (288, 1, 48, 8))
    small = (3, 0, "float32", (1, 8, 5, 6), (240, 1, 48, 8))

    def step(out: tuple[object, ...], shape: tuple[int, ...]) -> None:
        plan = _native.Plan(0, constants, [4 * 576], [4 * 288])
        packed = _native.PackedConv2dWeight(torch.zeros(shape), 1)
        plan.conv2d_strassen(out, x, packed, None, None, None, None, None, False, False)

    step(y, (8, 16, 1, 1))
    with pytest.raises(ValueError, match="out must have shape"):
        step(small, (8, 16, 1, 1))
    with pytest.raises(ValueError, match="weight must have shape"):
        step(y, (8, 16, 3, 3))
    with pytest.raises(ValueError, match="input must have shape"):
        step(y, (8, 18, 1, 1))


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """The algorithm of each convolution that the C++ backend runs."""
    seen: list[str] = []
    plain = cpp.conv2d_by

    def watching(algorithm: str, *args: object) -> None:
        seen.append(algorithm)
        plain(algorithm, *args)

    monkeypatch.setattr(cpp, "conv2d_by", watching)
    return seen


@pytest.fixture
def chosen_wherever_it_can(monkeypatch) -> None:
    """The rule prefers Strassen's algorithm for every large layer, whatever the instruction set."""
    monkeypatch.setattr(cpp, "_WORTHWHILE", 0.5)
    monkeypatch.setattr(cpp, "_cheapest", cpp._cheapest.__wrapped__)


# With AVX2 it is no faster than the plain sum anywhere.
PAYS = "direct" if _native.cpu_instruction_set() == "avx2" else "strassen"


class Layer(nn.Module):
    def __init__(self, weight: Tensor, options: dict[str, int]) -> None:
        super().__init__()
        self.weight, self.options = nn.Parameter(weight), options

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, **self.options)


@pytest.mark.parametrize(
    ("algorithm", "shape", "k", "options"),
    [
        (PAYS, (1, 128, 28, 28), 512, {}),
        (PAYS, (1, 256, 14, 14), 1024, {}),
        (PAYS, (8, 512, 7, 7), 512, {}),
        ("direct", (1, 128, 28, 28), 512, {"padding": 1}),
        ("direct", (1, 128, 28, 28), 512, {"stride": 2}),
        ("direct", (1, 128, 28, 28), 512, {"groups": 2}),
        ("direct", (1, 129, 28, 28), 512, {}),  # an odd number of channels
        ("direct", (1, 64, 56, 56), 64, {}),  # too few columns for the sums of the input
        ("direct", (1, 16, 28, 28), 512, {}),  # products too short
        ("direct", (1, 512, 1, 1), 512, {}),
        ("direct", (64, 512, 1, 1), 512, {}),  # no pixel of its image to be paired with
    ],
)
@torch.no_grad()
def test_which_algorithm_serves(served, algorithm: str, shape: tuple[int, ...], k: int, options: dict[str, int]):
    x, w = torch.randn(shape), torch.randn(k, shape[1] // options.get("groups", 1), 1, 1)
    y = ops.conv2d(x, w, **options)
    assert served == [algorithm]
    assert relative_error(y, F.conv2d(x.double(), w.double(), **options)) <= USUAL
    verified = fastcnn.verify(Layer(w, options), x)
    assert verified.passed, str(verified)
    expected = None if algorithm == "direct" else "strassen"
    assert [layer.algorithm for layer in verified.layers] == [expected]


@torch.no_grad()
def test_float16_by_strassen_and_bfloat16_by_the_plain_sum(served, chosen_wherever_it_can):
    x, w = torch.randn(1, 128, 28, 28), torch.randn(512, 128, 1, 1)
    exact = F.conv2d(x.half().double(), w.half().double())
    assert relative_error(ops.conv2d(x.half(), w.half()), exact) <= 5e-4
    ops.conv2d(x.bfloat16(), w.bfloat16())
    assert served == ["strassen", "direct"]


@torch.no_grad()
def test_exact_keeps_to_the_plain_sum(served, chosen_wherever_it_can):
    x, layer = torch.randn(1, 128, 28, 28), Layer(torch.randn(512, 128, 1, 1), {})
    with fastcnn.exact():
        layer(x)
    layer(x)
    assert served == ["direct", "strassen"]
    served.clear()
    verified = fastcnn.verify(layer, x, exact=True)
    assert verified.passed
    assert verified.layers[0].algorithm is None
    assert set(served) == {"direct"}


def test_recorded_calls_keep_to_the_plain_sum(served, chosen_wherever_it_can):
    x, w = torch.randn(1, 128, 28, 28), torch.randn(512, 128, 1, 1, requires_grad=True)
    ops.conv2d(x, w).sum().backward()
    with torch.no_grad():
        ops.conv2d(x, w)
    assert served == ["direct", "strassen"]


def test_variants_are_offered_where_they_can_run():
    def args(c: int = 16, *, p: int = 8, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
        x, w, out = torch.empty(1, c, 8, 8), torch.empty(16, c, 1, 1), torch.empty(1, 16, p, p)
        return (out.to(dtype), x.to(dtype), w.to(dtype), None, None, None, None, None, False, "none")

    one: tuple[object, ...] = ((1, 1), (0, 0), (1, 1), 1)
    assert cpp.variants("conv2d", *args(), *one) == ("direct", "strassen")
    assert cpp.variants("conv2d", *args(15), *one) == ()
    assert cpp.variants("conv2d", *args(dtype=torch.bfloat16), *one) == ()
    assert cpp.variants("conv2d", *args(p=10), (1, 1), (1, 1), (1, 1), 1) == ()
    assert cpp.variants("conv2d", *args(p=4), (2, 2), (0, 0), (1, 1), 1) == ()
    assert cpp.variant("strassen").fast_algorithm("conv2d") == "strassen"
    with pytest.raises(ValueError, match="strassen serves 1x1 filters with one group, an even number"):
        cpp.variant("strassen").conv2d(*args(15), *one)
    with pytest.raises(ValueError, match="strassen serves 1x1 filters"):
        cpp.variant("strassen").conv2d(*args(p=10), (1, 1), (1, 1), (1, 1), 1)


# ---- frozen ---------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A prologue, a residual, and two branches that write into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(256), nn.Conv2d(256, 128, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 256, 1, bias=False)
        self.left, self.right = nn.Conv2d(256, 160, 1), nn.Conv2d(256, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y))) + x
        return torch.cat([F.relu(self.left(y)), self.right(y)], 1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Bottleneck()
    for bn in (model.bn1, model.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    return model.eval()


@torch.no_grad()
def test_a_frozen_model_has_the_bits_of_the_unfrozen_one(model, tmp_path, chosen_wherever_it_can):
    x = torch.randn(2, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    frozen = fastcnn.freeze(model, x)
    steps = [step.operator for step in frozen._recipe.steps]
    assert steps.count("conv2d_strassen") >= 3
    exact = model.double()(x.double())
    model.float()
    y = frozen(x)
    assert relative_error(y, exact) <= USUAL
    assert torch.equal(fastcnn.optimize(model, x)(x), y)
    frozen.save(tmp_path / "model.fcnn")
    assert torch.equal(fastcnn.load_frozen(tmp_path / "model.fcnn")(x), y)
    with fastcnn.exact():
        plain = fastcnn.freeze(model, x)
    assert "conv2d_strassen" not in [step.operator for step in plain._recipe.steps]
    assert plain.memory().weights == frozen.memory().weights


@torch.no_grad()
def test_tuning_measures_it(monkeypatch):
    from fastcnn.graph.freezing import choosing

    taken = {"direct": 2.0, "strassen": 1.0}
    monkeypatch.setattr(choosing._Layer, "seconds", lambda layer: taken[layer.algorithm])
    monkeypatch.setattr(choosing, "is_faster", lambda candidate, usual: True)
    conv, x = nn.Conv2d(64, 32, 1).eval(), torch.randn(1, 64, 12, 12)

    def chosen() -> set[str]:
        frozen = fastcnn.freeze(conv, x, tune=True)
        assert relative_error(frozen(x), F.conv2d(x.double(), conv.weight.double(), conv.bias.double())) <= USUAL
        return {algorithm for _, _, algorithm, *_ in frozen._recipe.weights}

    assert chosen() == {"strassen"}
    taken["strassen"] = 3.0
    assert chosen() == {"direct"}
