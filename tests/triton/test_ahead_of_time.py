"""Every kernel compiled for sm_80 and sm_90 with the shipped configurations, without a GPU: no spilled registers, and
tensor-core instructions where they belong. `python -m fastcnn.triton_kernels.report` prints the same as a table."""

import dataclasses
import os
import re

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels cannot be compiled while TRITON_INTERPRET is set", allow_module_level=True)

from fastcnn.triton_kernels import configs, conv2d, report

CAPABILITIES = (80, 90)


@pytest.fixture(autouse=True)
def _default_precision():
    """TF32 for fp32 convolutions, PyTorch's default, whatever ran before."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def labelled_cases():
    for capability in CAPABILITIES:
        for case in report.cases(capability):
            label = f"sm{capability}-{case.name}-{case.dtype}-{report.describe(case.launch)}"
            yield pytest.param(capability, case, id=label.replace("torch.", "").replace(" ", "_"))


@pytest.mark.parametrize(("capability", "case"), list(labelled_cases()))
def test_compiles_without_spills(capability: int, case: report.Case) -> None:
    row = report.compile_case(case, capability)
    assert row.spill == 0, row
    assert 0 < row.registers <= 255, row
    assert row.shared <= configs.generation(capability).shared_memory, row
    assert row.programs >= 1, row
    if not case.uses_tensor_cores:
        assert row.wgmma == row.mma == 0, row
    elif capability >= 90 and case.launch.arguments["BLOCK_M"] >= 64:
        assert row.wgmma > 0, row
        assert row.mma == 0, row
    else:
        assert row.mma > 0, row


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tile", configs.tiles(80, torch.float32, "ieee"), ids=str)
def test_full_precision_fp32_uses_no_tensor_cores(capability: int, tile: configs.Tile) -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    case = report.conv_case("ieee", torch.float32, capability, tile)
    row = report.compile_case(case, capability)
    assert (row.spill, row.wgmma, row.mma) == (0, 0, 0), row
    # A block's products are summed from zero: the compiler has not made one long chain of all blocks.
    dots = re.findall(r"tt\.dot [^,]+, [^,]+, (%\w+)", report.compile_launch(case.launch, capability).asm["ttgir"])
    assert dots, "no product"
    assert all(accumulator.startswith("%cst") for accumulator in dots), dots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operands_arrive_in_16_byte_copies(capability: int, dtype: torch.dtype) -> None:
    """cp.async straight to shared memory, also for channel counts (24) that are no multiple of 16."""
    case = report.conv_case("narrow", dtype, capability, channels=24, filters=24)
    ptx = report.compile_launch(case.launch, capability).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx
    assert "st.global.v4" in ptx


def test_a_spilling_kernel_is_noticed() -> None:
    """The check above can fail: 256 x 256 accumulators do not fit in the registers of four warps."""
    tile = configs.Tile(256, 256, 32, 4, 2)
    row = report.compile_case(report.conv_case("too large", torch.bfloat16, 80, tile), 80)
    assert row.spill > 0


@pytest.mark.parametrize("dtype", report.DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_shipped_tiles_fit_in_shared_memory(capability: int, dtype: torch.dtype) -> None:
    limit = configs.generation(capability).shared_memory
    for tile in configs.tiles(capability, dtype, "tf32"):
        operands = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * tile.num_stages
        # A prologue keeps its scale and shift vectors there as well, and its tile once more.
        prologue = tile.block_m * tile.block_k * dtype.itemsize + 2 * tile.block_k * 4 * tile.num_stages
        assert operands + prologue <= limit, tile


def test_weights_are_rounded_to_tf32() -> None:
    """To nearest, half away from zero, non-finite values untouched, once: exactly for full-precision settings."""
    ulp = 2.0**-10
    values = torch.tensor([1.0, 1 + 0.49 * ulp, 1 + 0.5 * ulp, -1 - 0.51 * ulp, 3e-39, float("inf"), float("nan")])
    rounded = conv2d.round_to_tf32(values)
    expected = torch.tensor([1.0, 1.0, 1 + ulp, -1 - ulp, 3e-39, float("inf"), float("nan")])
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-41, equal_nan=True)
    weight = torch.randn(8, 16, 1, 1)
    assert torch.equal(conv2d.prepare_weight(weight), conv2d.round_to_tf32(weight.permute(0, 2, 3, 1)))
    assert not conv2d.is_prepared(weight)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert conv2d.is_prepared(weight)
    assert conv2d.prepare_weight(weight).data_ptr() == weight.data_ptr()


def test_choice_of_tile_is_deterministic_and_listed() -> None:
    for m, n, depth in [(49, 512, 512), (200704, 64, 64), (3136, 256, 1024), (1, 1000, 2048), (802816, 96, 24)]:
        problem = configs.Problem(m, n, 9, depth)
        picks = {configs.pick_tile.__wrapped__(problem, 90, 132, torch.bfloat16, "ieee") for _ in range(3)}
        assert len(picks) == 1
        assert picks <= set(configs.candidates(problem, 90, torch.bfloat16, "ieee"))


def test_rows_serve_as_records() -> None:
    case = report.conv_case("record", torch.bfloat16, 90)
    row = report.compile_case(case, 90)
    assert row.to_dict() == dataclasses.asdict(row)
    assert "| 90 | record | bfloat16 |" in report.as_table([row])
