"""create_model, list_models and the loading of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.data import data_file
from torch import Tensor, nn

import fastcnn
from fastcnn.models import ModelInfo, model_info


def small(**kwargs: object) -> nn.Module:
    return fastcnn.create_model("resnet20_cifar", **kwargs)


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], value) for key, value in state.items())


def test_names_are_unique_functions_of_the_package() -> None:
    names = fastcnn.list_models()
    assert len(names) == len(set(names))
    assert {"resnet18", "resnet50", "plain18", "resnet20_cifar", "resnext50_32x4d"} <= set(names)
    for name in names:
        info = model_info(name)
        assert isinstance(info, ModelInfo)
        assert info.name == name
        assert len(info.input_size) == 3
        assert info.paper.startswith("http")
    assert isinstance(fastcnn.models.resnet20_cifar(num_classes=7), fastcnn.models.CifarResNet)


def test_new_list_each_time() -> None:
    fastcnn.list_models().clear()
    assert fastcnn.list_models()


@pytest.mark.parametrize(
    ("name", "close"), [("resnet51", "resnet50"), ("ResNet50", "resnet50"), ("resnet20", "resnet20_cifar")]
)
def test_unknown_name_suggests_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=rf"no model is named '{name}'; did you mean .*{close}"):
        fastcnn.create_model(name)
    with pytest.raises(ValueError, match="list_models"):
        fastcnn.create_model("zzzz")


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="classes"):
        fastcnn.create_model("resnet18", classes=3)
    with pytest.raises(ValueError, match="shortcut must be"):
        fastcnn.create_model("resnet18", shortcut="D")
    with pytest.raises(ValueError, match="stride_in_1x1 is for Bottleneck"):
        fastcnn.create_model("resnet18", stride_in_1x1=True)
    with pytest.raises(ValueError, match="6n"):
        fastcnn.models.CifarResNet(21)


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best_prec1": 91.5},
    "model": lambda state: {"model": state, "optimizer": {}},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: {f"module.{k}": v for k, v in state.items()},
    "both prefixes": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "fc": lambda state: {k.replace("linear.", "fc."): v for k, v in state.items()},
    "shortcut": lambda state: {k.replace("downsample", "shortcut"): v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_and_renamed_state_dicts(wrapping: str, tmp_path: Path) -> None:
    state = small(shortcut="B").state_dict()
    wrapped = WRAPPINGS[wrapping](state)
    assert_same_state(small(shortcut="B", weights=wrapped), state)
    torch.save(wrapped, tmp_path / "weights.pth")
    for path in (tmp_path / "weights.pth", str(tmp_path / "weights.pth")):
        assert_same_state(small(shortcut="B", weights=path), state)


def test_state_dict_without_batch_counters() -> None:
    state = {k: v for k, v in small().state_dict().items() if "num_batches" not in k}
    assert small(weights=state).bn1.num_batches_tracked == 0


def message_of(weights: object, name: str = "resnet20_cifar", **kwargs: object) -> str:
    with pytest.raises(ValueError, match="does not fit") as caught:
        fastcnn.create_model(name, weights=weights, **kwargs)
    return str(caught.value)


def test_weights_that_do_not_fit_say_what_would() -> None:
    assert "create_model('resnet20_cifar', num_classes=100, weights" in message_of(small(num_classes=100).state_dict())
    assert "create_model('resnet20_cifar', in_channels=1, weights" in message_of(small(in_channels=1).state_dict())
    assert "create_model('resnet20_cifar', shortcut='B', weights" in message_of(small(shortcut="B").state_dict())
    assert "create_model('resnet20_cifar', weights" in message_of(small().state_dict(), "resnet32_cifar")


def test_weights_that_do_not_fit_list_the_keys() -> None:
    state = small().state_dict()
    state["layer9.weight"] = state.pop("layer3.2.conv2.weight")
    state["linear.bias"] = torch.zeros(11)
    message = message_of(state)
    assert "1 missing: layer3.2.conv2.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "1 of another shape: linear.bias (11,), the model's is (10,)" in message
    assert "54 more" in message_of(small().state_dict(), "resnet32_cifar")


def test_nothing_is_loaded_when_something_does_not_fit() -> None:
    from fastcnn.models._weights import load_weights

    model, other = small(), small().state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other["linear.bias"] = torch.zeros(11)
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(model, other, "resnet20_cifar", {})
    assert_same_state(model, before)


def test_files_that_are_no_state_dicts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no weights file"):
        small(weights=tmp_path / "absent.pth")
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        small(weights=garbage)
    garbage.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        small(weights=garbage)
    torch.save(small(), garbage)
    with pytest.raises(ValueError, match="whole pickled model"):
        small(weights=garbage)
    torch.save(torch.zeros(3), garbage)
    with pytest.raises(ValueError, match="holds no state dict, but Tensor"):
        small(weights=garbage)
    with pytest.raises(ValueError, match="epoch not tensors"):
        small(weights={"epoch": 3, "lr": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no state dict"):
        small(weights={})


def test_safetensors_needs_its_package(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="pip install safetensors"):
            small(weights=path)
        return
    state = small().state_dict()
    save_file(state, path)
    assert_same_state(small(weights=path), state)


def test_real_checkpoint_loads_by_path() -> None:
    path = data_file("resnet20-12fca82f.th")
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = small(weights=path)
    for key, value in saved.items():
        assert torch.equal(model.state_dict()[key.removeprefix("module.")], value)
