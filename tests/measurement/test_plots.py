"""Pictures of measurements."""

from __future__ import annotations

import pytest
import torch
from support.networks import small_input, small_network

from fastcnn.cli import main
from fastcnn.measurement import compare, plots
from fastcnn.measurement.layers import layer_times

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def measured():
    model, input = small_network(), small_input()
    return compare(model, input, rounds=1, name="small"), layer_times(model, input, rounds=1)


def test_a_picture_names_its_candidates_and_conditions(measured, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    comparison, layers = measured
    path = tmp_path / "times.svg"
    plots.plot_bench(path, [comparison], [layers], 1e12)
    picture = path.read_text()
    for text in ("fastcnn", "channels_last", "small, batch", "share of 1000 GFLOP/s", f"torch {torch.__version__}"):
        assert text in picture
    plots.plot_bench(tmp_path / "times.png", [comparison])
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_layers_need_a_peak(measured, tmp_path):
    comparison, layers = measured
    with pytest.raises(ValueError, match="peak"):
        plots.plot_bench(tmp_path / "x.png", [comparison], [layers])


def test_the_command_saves_a_picture_or_says_at_once_why_not(tmp_path, capsys, monkeypatch):
    path = tmp_path / "lenet.svg"
    assert main(["bench", "lenet5", "--no-verify", "--layers", "--rounds", "1", "--plot", str(path)]) == 0
    assert path.read_text().count("<svg") == 1
    for bad, words in ((tmp_path / "x.bmp", ".png"), (tmp_path / "none" / "x.png", "no folder")):
        assert main(["bench", "lenet5", "--plot", str(bad)]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert plots.missing() is not None
