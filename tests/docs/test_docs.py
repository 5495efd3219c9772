"""The documentation's pictures and tables are what their scripts write, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn import backends
from fastcnn import nn as fnn
from fastcnn.models import model_info
from fastcnn.models.densenet import DenseBlock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / script), "--check"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), DOCS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["draw_blocks.py", "write_architectures_tables.py"])
def test_what_is_generated_is_up_to_date(script: str, tmp_path: Path) -> None:
    result = run(script, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_changed_picture_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = load("draw_blocks.py")
    monkeypatch.setattr(drawing, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_blocks.py"])
    assert drawing.main() == 0
    monkeypatch.setattr(sys, "argv", ["draw_blocks.py", "--check"])
    assert drawing.main() == 0
    picture = tmp_path / "block-plain.svg"
    picture.write_text(picture.read_text("utf-8").replace("relu", "tanh"), "utf-8")
    assert drawing.main() == 1


def test_a_changed_number_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load("write_architectures_tables.py")
    monkeypatch.setattr(tables, "row", lambda name: f"| `{name}` |")
    page = (DOCS / "architectures.md").read_text("utf-8")
    assert tables.rewritten(page) != page
    assert tables.rewritten(tables.rewritten(page)) == tables.rewritten(page)


@pytest.mark.parametrize("name", ["lenet5_1998", "alexnet_2gpu", "googlenet", "resnext50_32x4d", "densenet121"])
def test_multiply_accumulates_are_those_of_the_summary(name: str) -> None:
    tables, size = load("write_architectures_tables.py"), model_info(name).input_size
    with torch.device("meta"):
        model = fastcnn.create_model(name).eval()
    assert tables.count_macs(model, size) == fastcnn.summary(fastcnn.create_model(name).eval(), size).macs


def inception(kind: type[nn.Module], *channels: int) -> nn.Module:
    return kind(16, *channels, fnn.ConvBNReLU)


BLOCKS = {
    "plain": lambda: fnn.PlainBlock(16, 16),
    "resnet-basic": lambda: fnn.BasicBlock(16, 16),
    "resnet-bottleneck": lambda: fnn.Bottleneck(16, 8, 2, fnn.make_shortcut("B", 16, 32, 2)),
    "preactivation": lambda: nn.Sequential(
        fnn.PreActBasicBlock(16, 16), fnn.PreActBasicBlock(16, 32, 2, preactivation="shared")
    ),
    "wide": lambda: fnn.PreActBasicBlock(16, 16, dropout=0.3),
    "resnext": lambda: fnn.Bottleneck(16, 4, groups=4, base_width=16),
    "stochastic-depth": lambda: with_survival(fnn.BasicBlock(16, 16)),
    "dense": lambda: DenseBlock(2, 16, 4, 4, 0.0),
    "inception": lambda: inception(fnn.Inception, 8, 4, 8, 4, 8, 8),
    "inception-naive": lambda: inception(fnn.InceptionNaive, 8, 8, 8),
}


def with_survival(block: nn.Module) -> nn.Module:
    fnn.set_stochastic_depth(block, 0.5)
    return block


@pytest.mark.parametrize("name", BLOCKS)
def test_a_picture_has_as_many_outlines_as_the_block_makes_calls(name: str) -> None:
    drawing, calls = load("draw_blocks.py"), []

    def count(call: backends.Call) -> None:
        calls.append(call.operator)
        call.run()

    with torch.no_grad(), backends.intercept(count):
        BLOCKS[name]().eval()(torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last))
    outlines = {box.kernel for box in drawing.parse_boxes(drawing.BLOCKS[name].boxes).values()} - {"-"}
    assert len(calls) == len(outlines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    relative = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    missing = [t for t in relative if not (page.parent / t.partition("#")[0]).exists()]
    assert not missing
