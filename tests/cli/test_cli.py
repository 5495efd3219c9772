"""env, list, verify, bench, tune: what they print, their JSON, their exit codes."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

import fastcnn
from fastcnn.backends import cpp
from fastcnn.commands import verify as verify_command
from fastcnn.tuning import shipping

SMALL = ("resnet20_cifar", "--batch", "2")


def assert_refused(result, *words: str) -> None:
    """Exit code 2, nothing on standard output, one line of explanation."""
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("fastcnn")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], result.err


# ---- as a user runs it -------------------------------------------------------------------------------------------


def test_env_in_a_process_of_its_own(command):
    result = command("env", "--json", FASTCNN_CPU_ISA="portable")
    assert result.code == 0, result.err
    report = result.json
    assert report["versions"]["fastcnn"] == fastcnn.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["native"]["loaded"] is True
    assert report["native"]["instruction_set"] == "portable"
    assert "portable" in report["native"]["instruction_sets"]
    assert isinstance(report["native"]["cuda"], bool)
    assert report["native"]["cuda_reason"]
    assert report["backends"]["cpp"] == "available"
    assert report["variables"]["FASTCNN_CPU_ISA"] == "portable"


def test_an_instruction_set_that_is_not_there_is_said_to_be_not_there(command):
    result = command("env", FASTCNN_CPU_ISA="sse1")
    assert result.code == 0, result.err
    assert "sse1" in result.out


def test_the_installed_command(tmp_path):
    program = shutil.which("fastcnn")
    if program is None:
        pytest.skip("the command fastcnn is not on PATH")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.strip() == f"fastcnn {fastcnn.__version__}"


def test_an_unknown_network_in_a_process_of_its_own(command):
    assert_refused(command("verify", "resnet21_cifar"), "resnet21_cifar", "did you mean")


def test_verify_in_a_process_of_its_own(command):
    result = command("verify", *SMALL, "--json")
    assert result.code == 0, result.err
    assert result.json["passed"] is True
    assert "verifying resnet20_cifar" in result.err


# ---- env, list ---------------------------------------------------------------------------------------------------


def test_env_as_text(cli, cache_folder):
    result = cli("env")
    assert result.code == 0
    for word in ("torch", "CUDA kernels", "CPU kernels", "threads", "backend triton", str(cache_folder)):
        assert word in result.out, word


def test_list(cli):
    result = cli("list", "--json")
    assert result.code == 0
    found = {m["name"]: m for m in result.json}
    assert list(found) == fastcnn.list_models()
    assert found["resnet50"]["parameters"] == 25_557_032
    assert found["resnet20_cifar"]["input_size"] == [3, 32, 32]


def test_list_filters(cli):
    assert [m["name"] for m in cli("list", "resnet20_", "--json").json] == ["resnet20_cifar"]
    assert "25,557,032" in cli("list", "resnet5*").out
    assert_refused(cli("list", "unheard"), "unheard")


# ---- verify ------------------------------------------------------------------------------------------------------


def test_verify_one(cli):
    result = cli("verify", *SMALL)
    assert result.code == 0, result
    assert "PASSED" in result.out
    assert "operator calls checked" in result.out


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_verify_other_dtypes(cli, dtype):
    result = cli("verify", *SMALL, "--dtype", dtype, "--json")
    assert result.code == 0, result.out
    assert result.json["results"][0]["dtype"] in ("bfloat16", "float16")


@pytest.mark.parametrize(("option", "allowed"), [("--tf32", True), ("--no-tf32", False), (None, None)])
def test_verify_sets_tf32_and_leaves_it_as_it_was(cli, monkeypatch, option, allowed):
    def settings():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before, seen = settings(), []
    usual = verify_command.verify_network
    monkeypatch.setattr(verify_command, "verify_network", lambda *args: (seen.append(settings()), usual(*args))[1])
    assert cli("verify", *SMALL, *([option] if option else [])).code == 0
    assert seen == [before if allowed is None else (allowed, allowed)]
    assert settings() == before


def test_verify_several(cli):
    result = cli("verify", "resnet2*_cifar", "plain20_cifar", "--batch", 1, "--layers")
    assert result.code == 0, result
    assert "2 of 2 networks passed" in result.out
    assert "layer3.2.conv2" in result.out


def test_verify_fails_on_a_wrong_kernel(cli, monkeypatch):
    right = cpp.conv2d

    def wrong(out, input, weight, *rest):
        right(out, input, weight, *rest)
        if weight.shape[0] == 32:
            out[0, 0, 0, 0] += 1

    monkeypatch.setattr(cpp, "conv2d", wrong)
    result = cli("verify", *SMALL)
    assert result.code == 1
    assert "FAILED, first at layer2.0.conv1" in result.out
    document = cli("verify", *SMALL, "--json")
    assert document.code == 1
    assert document.json["passed"] is False
    assert document.json["results"][0]["first_off"] == "layer2.0.conv1"


def test_a_kernel_that_fails_is_a_failed_check(cli, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("the kernel broke")

    monkeypatch.setattr(cpp, "conv2d", broken)
    result = cli("verify", *SMALL)
    assert result.code == 1
    assert "the kernel broke" in result.out
    assert cli("verify", *SMALL, "--backend", "reference").code == 0


def test_strict_verification_fails_on_fallbacks(cli, monkeypatch):
    monkeypatch.setattr(cpp, "unsupported", lambda *args, **facts: "not today")
    assert cli("verify", *SMALL).code == 0
    result = cli("verify", *SMALL, "--strict")
    assert result.code == 1
    assert "not today" in result.out


# ---- bench -------------------------------------------------------------------------------------------------------


def test_bench_verifies_and_times_in_one_table(cli):
    result = cli("bench", *SMALL, "--rounds", 3)
    assert result.code == 0, result
    heading = result.out.splitlines()[0]
    for column in ("verified", "error", "fastcnn ms", "eager ms", "channels_last ms", "speedup"):
        assert column in heading
    assert "yes, " in result.out
    assert "medians of 3 interleaved runs" in result.out
    assert f"torch {torch.__version__}" in result.out


def test_bench_json(cli):
    result = cli("bench", *SMALL, "--rounds", 3, "--json")
    document = result.json["results"][0]
    assert document["verification"]["passed"] is True
    assert document["conditions"]["batch"] == 2
    assert document["flops"] == pytest.approx(2 * 2 * 40.55e6, rel=1e-3)
    timings = document["timings"]
    assert set(timings) == {"fastcnn", "eager", "channels_last"}
    assert document["speedup"] == pytest.approx(
        min(timings[p]["median_ms"] for p in ("eager", "channels_last")) / timings["fastcnn"]["median_ms"]
    )


def test_bench_fails_where_verification_does(cli, monkeypatch):
    monkeypatch.setattr(cpp, "conv2d", lambda out, *rest: out.zero_())
    assert cli("bench", *SMALL, "--rounds", 1).code == 1
    assert cli("bench", *SMALL, "--rounds", 1, "--no-verify").code == 0


def test_compile_without_a_torchvision_network_is_said_to_be_left_out(cli):
    result = cli("bench", *SMALL, "--rounds", 1, "--no-verify", "--compile")
    assert result.code == 0
    assert "not timed with torch.compile" in result.out


# ---- tune --------------------------------------------------------------------------------------------------------


def test_tune_show_clear(cli, cache_folder):
    assert "nothing was tuned yet" in cli("tune", "--show").out
    result = cli("tune", *SMALL)
    assert result.code == 0, result
    assert "stored in" in result.out
    assert "conv2d float32" in result.out
    again = cli("tune", *SMALL, "--json").json["resnet20_cifar"]
    assert again["calls"] == []
    assert again["kept"] > 0
    assert "conv2d float32" in cli("tune", "--show").out
    shown = cli("tune", "--show", "--json").json
    assert shown["folder"] == str(cache_folder)
    assert len(shown["files"][0]["choices"]) == again["kept"]
    assert "1 tuning file" in cli("env").out
    assert cli("tune", "--clear").out.startswith("removed 1 files")
    assert cli("tune", "--show", "--json").json["files"] == []


def test_tune_several_batches_and_export(cli, tmp_path):
    tuned = cli("tune", "lenet5", "--batch", "1,3,1", "--effort", "quick", "--export", tmp_path / "out" / "it.json")
    assert tuned.code == 0, tuned
    assert "lenet5 batch 1\n" in tuned.out
    assert "lenet5 batch 3\n" in tuned.out
    path = tmp_path / "out" / "it.json"
    header, entries = shipping.read(path.read_text(), path)
    assert header is not None
    batches = {e.key[4][1] for e in entries}
    assert batches == {1, 3}
    assert {name.partition(":")[0] for e in entries for name in e.milliseconds} <= {"reference", "cpp"}
    assert f"{len(entries)} choices exported" in tuned.err
    alone = cli("tune", "--export", tmp_path / "again.json")
    assert alone.code == 0
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_export_without_choices(cli, tmp_path):
    assert_refused(cli("tune", "--export", tmp_path / "it.json"), "nothing to export")


def test_shipped_choices_are_shown(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "FOLDER", tmp_path / "shipped")
    assert "shipped choices    none" in cli("env").out
    cli("tune", "lenet5", "--effort", "quick", "--export", tmp_path / "shipped" / "some-device.json")
    cli("tune", "--clear")
    shown = cli("tune", "--show").out
    assert "some-device.json, with the package" in shown
    assert "conv2d float32" in shown
    document = cli("tune", "--show", "--json").json
    assert document["files"] == []
    assert document["shipped"][0]["choices"]
    assert "some-device.json" in cli("env").out


def test_a_cache_folder_that_cannot_be_written(cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "file"))
    assert_refused(cli("tune", *SMALL), "cache folder")


# ---- what cannot be done -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify",), ("at least one network",)),
        (("verify", "nothing*"), ("nothing*",)),
        (("bench", "resnet20_cifar", "--device", "tpu"), ("--device", "tpu")),
        (("bench", "resnet20_cifar", "--device", "cuda:99"), ("cuda:99",)),
        (("verify", "resnet20_cifar", "--weights", "no/such/file.pt"), ("no/such/file.pt",)),
        (("verify", "resnet20_cifar", "--data", "no/such/file.npz"), ("no/such/file.npz",)),
        (("tune", "resnet20_cifar", "--show"), ("--show",)),
        (("tune", "resnet20_cifar", "--batch", "1,0"), ("--batch",)),
        (("tune", "resnet20_cifar", "--batch", "1,"), ("--batch",)),
        (("tune", "resnet20_cifar", "--effort", "some"), ("--effort",)),
    ],
)
def test_refusals(cli, arguments, words):
    assert_refused(cli(*arguments), *words)


@pytest.mark.parametrize(
    "option", [("--backend", "quick"), ("--batch", "0"), ("--batch", "many"), ("--dtype", "int8"), ("--rounds", "-1")]
)
def test_bad_options_are_argparses(cli, option):
    result = cli("bench", "resnet20_cifar", *option)
    assert result.code == 2
    assert option[0] in result.err


def test_a_backend_that_cannot_run_here(cli, monkeypatch):
    from fastcnn.backends import triton

    monkeypatch.setattr(triton, "unavailable", lambda: "no GPU")
    assert_refused(cli("verify", *SMALL, "--backend", "triton"), "triton", "no GPU")


def test_weights_of_another_network(cli, tmp_path):
    torch.save(fastcnn.create_model("resnet32_cifar").state_dict(), tmp_path / "w.pt")
    assert_refused(cli("verify", *SMALL, "--weights", tmp_path / "w.pt"), "does not fit resnet20_cifar")
