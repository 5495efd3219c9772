"""The files of choices, and the look-up on the hot path."""

from __future__ import annotations

import json
import threading
import timeit

import pytest
import torch

from fastcnn import tuning
from fastcnn.tuning import store, tuned_backend
from fastcnn.tuning.key import describe, from_json, key_of, to_json

CPU = torch.device("cpu")


def conv_arguments(batch: int = 1) -> tuple[object, ...]:
    def nhwc(*shape):
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    return (nhwc(batch, 8, 6, 6), nhwc(batch, 4, 8, 8), torch.randn(8, 4, 3, 3), None, torch.randn(8), None, None, None,
            False, "relu", (1, 1), (0, 0), (1, 1), 1)  # fmt: skip


def entry(batch: int = 1, choice: str = "cpp") -> store.Entry:
    key = key_of("conv2d", CPU, torch.float32, conv_arguments(batch))
    return store.Entry(key, choice, {"cpp": 0.1, "reference": 0.2}, {"triton": "wrong"})


def look_up(batch: int = 1) -> str | None:
    return tuned_backend("conv2d", CPU, torch.float32, conv_arguments(batch))


def test_choices_come_back(cache_folder):
    path = store.save(CPU, [entry()])
    assert path.parent == cache_folder
    assert store.load(CPU) == [entry()]
    assert look_up() == "cpp"
    assert look_up(batch=2) is None
    assert [p.name for p in cache_folder.iterdir() if p.suffix not in (".json", ".lock")] == []


def test_later_choices_replace_earlier_ones_and_keep_the_rest():
    store.save(CPU, [entry(1), entry(2)])
    store.save(CPU, [entry(2, "reference"), entry(3)])
    assert {e.key[4][1]: e.choice for e in store.load(CPU)} == {1: "cpp", 2: "reference", 3: "cpp"}


def test_two_tuners_at_once_lose_nothing():
    threads = [threading.Thread(target=store.save, args=(CPU, [entry(i)])) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.load(CPU)) == 8


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 99, "environment": {}, "choices": []}',
        '{"format": 1, "environment": {"torch": "0"}, "choices": []}', "\x00\x01",
    ],
)  # fmt: skip
def test_a_corrupt_or_foreign_file_is_ignored_with_a_warning(text):
    path = store.save(CPU, [entry()])
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="ignoring the tuning file"):
        assert look_up() is None
    assert look_up() is None, "and only once"
    with pytest.warns(RuntimeWarning, match="ignoring"):
        store.save(CPU, [entry()])
    tuning.forget()
    assert look_up() == "cpp", "saving repairs it"


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(choice="nonsense"),
        lambda e: e.update(choice=3),
        lambda e: e.update(choice="triton:enormous"),
        lambda e: e.update(key="conv2d"),
        lambda e: e.update(key=[{"a": 1}]),
        lambda e: e.pop("milliseconds"),
        lambda e: e.update(milliseconds={"cpp": "fast"}),
        lambda e: e.update(rejected=[]),
    ],
)
def test_a_file_with_a_damaged_entry_is_not_trusted(change):
    path = store.save(CPU, [entry()])
    data = json.loads(path.read_text())
    change(data["choices"][0])
    path.write_text(json.dumps(data))
    with pytest.warns(RuntimeWarning, match="ignoring the tuning file"):
        assert look_up() is None


@pytest.mark.parametrize("part", ["fastcnn", "native", "torch", "triton", "device", "architecture"])
def test_choices_of_another_environment_do_not_count(monkeypatch, part):
    store.save(CPU, [entry()])
    other = {**store.environment(CPU), part: "another"}
    monkeypatch.setattr(store, "environment", lambda device: other)
    assert look_up() is None
    store.save(CPU, [entry(choice="reference")])
    assert len(store.files()) == 2
    tuning.forget()
    assert look_up() == "reference"


def test_clear_removes_the_choices_and_nothing_else(cache_folder):
    store.save(CPU, [entry()])
    (cache_folder / "other.json").write_text("{}")
    assert len(store.clear()) == 1
    assert [p.name for p in cache_folder.iterdir()] == ["other.json"]
    assert store.clear() == []


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTCNN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "fastcnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_folder() == tmp_path / "home" / ".cache" / "fastcnn"


def test_keys_tell_apart_what_matters_and_nothing_else():
    def key(*arguments, dtype=torch.float32):
        return key_of("conv2d", CPU, dtype, arguments)

    dense = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    assert key(dense) == key(dense.clone() + 1), "values"
    assert key(wide[:, 8:16]) == key(wide[:, 16:24]), "which aligned slice"
    different = [
        key(dense), key(dense.contiguous()), key(wide[:, 8:16]), key(wide[:, 3:11]), key(dense[:1]), key(dense, None),
        key(dense, (1, 1)), key(dense, (2, 1)), key(dense, "relu"), key(dense, dtype=torch.bfloat16),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_keys_survive_json():
    key = key_of("conv2d", CPU, torch.float32, conv_arguments())
    back = from_json(json.loads(json.dumps(to_json(key))))
    assert back == key
    assert hash(back) == hash(key)
    assert describe(back).startswith("conv2d float32 1x4x8x8, 8x4x3x3 -> 1x8x6x6")


def test_the_look_up_costs_nothing_when_nothing_was_tuned_and_little_when_it_was():
    arguments = conv_arguments()

    def cost() -> float:
        look = lambda: tuned_backend("conv2d", CPU, torch.float32, arguments)  # noqa: E731
        return min(timeit.repeat(look, number=2000, repeat=15)) / 2000

    assert look_up() is None
    assert cost() < 1e-6
    store.save(CPU, [entry()])
    tuning.forget()
    assert look_up() == "cpp"
    assert cost() < 20e-6
