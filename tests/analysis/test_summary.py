"""fastcnn.summary on torchvision's networks and on modules written in every style; what it must leave alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn
from fastcnn import ops
from fastcnn.measurement import count_flops

TORCHVISION = {
    "resnet50": (25_557_032, 4_089_184_256),
    "densenet121": (7_978_856, 2_834_161_664),
    "googlenet": (6_624_904, 1_498_376_192),
    "mobilenet_v2": (3_504_872, 300_774_272),
}


def torchvision_network(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return models.get_model(name, weights=None, **options)


def sizes(found: fastcnn.analysis.Summary) -> dict[str, tuple[int, ...] | None]:
    return {la.name: None if la.receptive_field is None else la.receptive_field.size for la in found.layers}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks(name):
    found = fastcnn.summary(torchvision_network(name), (3, 224, 224))
    assert (found.parameters, found.macs) == TORCHVISION[name]
    assert found.parameters == found.trainable_parameters == sum(layer.parameters for layer in found.layers)
    assert found.unused_parameters == 0


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_our_networks_have_torchvisions_layers(name):
    def convolutions(model):
        found = fastcnn.summary(model, (3, 224, 224))
        return {la.name: (la.output_shape, la.parameters, la.macs, la.activation_bytes, la.receptive_field)
                for la in found.layers if la.type == "Conv2d"}  # fmt: skip

    with torch.device("meta"):
        mine = fastcnn.create_model(name)
    assert convolutions(mine) == convolutions(torchvision_network(name))


def test_resnet50s_receptive_field():
    found = fastcnn.summary(torchvision_network("resnet50"), (3, 224, 224))
    assert found["layer4.2.conv3"].receptive_field.size == (427, 427)
    assert found["layer4.2.conv3"].receptive_field.stride == (32, 32)
    with torch.device("meta"):
        v1 = fastcnn.summary(fastcnn.create_model("resnet50", stride_in_1x1=True), (3, 224, 224))
    assert v1["layer4.2.conv3"].receptive_field.size == (483, 483)  # as published for it
    assert found["avgpool"].receptive_field is None
    assert found["avgpool"].sees_whole_input
    assert found["layer1.0"].parameters == 75_008  # a block
    assert found["layer1"].macs == sum(la.macs for la in found.layers if la.name.startswith("layer1."))


# ---- receptive fields are what gradients say ----------------------------------------------------------------------


class Branches(nn.Module):
    """Residual, concatenation, slices, views, functions, in-place operations, several sizes of filters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, 2)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.filter = nn.Parameter(torch.rand(4, 8, 1, 3))
        self.norm = nn.LayerNorm(12)
        self.mix = nn.Linear(12, 6)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        y = x.clone()
        y += self.wide(x)
        z = F.conv2d(x, self.filter, padding=(0, 1))
        joined = x.new_empty(x.shape[0], 12, *x.shape[2:])
        joined[:, :8] = y
        joined[:, 8:].copy_(z)
        joined = self.mix(joined.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        joined = F.pad(joined, (1, 0, 0, 0))[:, :, 1:, ::2]
        return F.avg_pool2d(joined, (3, 1), stride=(2, 1))


def test_fields_are_those_of_gradients():
    torch.manual_seed(0)
    model = Branches().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    output = model(image)
    field = fastcnn.summary(model, (3, 64, 64)).layers[-1].receptive_field
    row, column = 4, 5
    seen = torch.autograd.grad(output[0, :, row, column].sum(), image)[0].abs().sum((0, 1)).nonzero()
    low, high = seen.min(0).values.tolist(), seen.max(0).values.tolist()
    for axis, index in enumerate((row, column)):
        middle = field.offset[axis] + index * field.stride[axis]
        assert low[axis] == middle - (field.size[axis] - 1) / 2
        assert high[axis] == middle + (field.size[axis] - 1) / 2


def test_functional_calls_have_rows_and_owners():
    found = fastcnn.summary(Branches(), (2, 3, 64, 64))
    rows = {layer.name: layer for layer in found.layers}
    assert rows["filter"].type == "convolution"
    assert rows["filter"].parameters == 96
    assert rows["filter"].macs == 2 * 4 * 32 * 32 * 24
    assert rows["avg_pool2d"].output_shape[0] == 2
    assert found.unused_parameters == 24  # the norm, which never runs
    assert found.macs == count_flops(Branches(), torch.randn(2, 3, 64, 64)) // 2


def test_functions_over_other_modules_weights():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x):
            x = ops.conv_bn_relu(x, self.conv.weight, self.bn.running_mean, self.bn.running_var)
            x = ops.conv2d(x, torch.eye(8)[:, :, None, None].to(x), residual=x, activation="relu")
            x = ops.max_pool2d(x, 3, 2)
            return ops.linear(ops.global_avg_pool2d(x).flatten(1), self.fc.weight, self.fc.bias)

    found = fastcnn.summary(Functional(), (3, 17, 17))
    assert sizes(found) == {
        "conv": (3, 3), "conv2d": (3, 3), "max_pool2d": (5, 5), "adaptive_avg_pool2d": None, "fc": None
    }  # fmt: skip
    assert found.layers[0].type == "Conv2d"
    assert found["conv"].parameters == 224
    assert found.macs == 15 * 15 * (8 * 27 + 64) + 40
    assert found.unused_parameters == 16


def test_slices_of_one_output():
    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2)

        def forward(self, x):
            out = torch.empty(x.shape[0], 8, *x.shape[2:]).to(memory_format=torch.channels_last)
            fastcnn.nn.conv_act(x, self.a, out=out[:, :4])
            ops.conv2d(x, self.b.weight, self.b.bias, padding=2, out=out[:, 4:])
            return F.max_pool2d(out, 2)

    found = fastcnn.summary(Buffer(), (4, 12, 12))
    assert sizes(found) == {"a": (1, 1), "b": (5, 5), "max_pool2d": (6, 6)}
    assert found["b"].output_shape == (1, 4, 12, 12)


def test_what_has_no_window():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2, 2), nn.Upsample(scale_factor=2), nn.Flatten())
    found = fastcnn.summary(model, (3, 10, 10))
    assert [la.receptive_field is None for la in found.layers] == [False, True, True, True]
    assert not any(la.sees_whole_input for la in found.layers)
    assert found["1"].macs == 4 * 8 * 8 * 2 * 4
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.conv = gate, nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x * self.gate(x))

    assert fastcnn.summary(Gated(), (3, 9, 9))["conv"].sees_whole_input


# ---- forms of models -----------------------------------------------------------------------------------------------


def test_shared_modules_and_several_outputs():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.tied = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.tied.weight = self.conv.weight
            self.parts = nn.ModuleDict({"split": Split()})

        def forward(self, x):
            y, z = self.parts["split"](self.tied(self.conv(self.conv(x))))
            return {"y": y, "z": [z, None]}

    class Split(nn.Module):
        def forward(self, x):
            return x[:, :1], x * 2

    found = fastcnn.summary(Shared(), (3, 8, 8))
    assert sizes(found) == {"conv": (3, 3), "conv#2": (5, 5), "tied": (7, 7), "parts.split": (7, 7)}
    assert [layer.parameters for layer in found.layers] == [84, 0, 0, 0]
    assert found.parameters == 84
    assert found["parts.split"].output_shapes == ((1, 1, 8, 8), (1, 3, 8, 8))
    assert found["parts.split"].activation_bytes == 4 * 3 * 64  # the first is a view


def test_several_inputs_and_other_dimensions():
    class Two(nn.Module):
        def forward(self, a, b):
            return F.conv1d(a, torch.ones(2, 4, 3)) + b.mean()

    found = fastcnn.summary(Two(), [(2, 4, 10), (7,)])
    assert found.input_shapes == ((2, 4, 10), (7,))
    assert found["Two"].macs == 2 * 2 * 8 * 12
    assert found["Two"].sees_whole_input
    assert fastcnn.summary(nn.Conv1d(4, 2, 3), [(2, 4, 10)]).layers[0].receptive_field.size == (3,)
    line = fastcnn.summary(nn.Sequential(nn.Linear(10, 20), nn.ReLU(inplace=True), nn.Linear(20, 3)), (8, 10))
    assert [(la.macs, la.activation_bytes) for la in line.layers] == [(1600, 640), (0, 0), (480, 96)]
    cube = fastcnn.summary(nn.Conv3d(1, 2, 3, stride=(1, 2, 1)), (1, 1, 8, 8, 8))
    assert cube.layers[0].receptive_field.stride == (1, 2, 1)


def test_dtype_sets_the_memory():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    half, full = (fastcnn.summary(model, (3, 8, 8), dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert 2 * half.activation_bytes == full.activation_bytes == 2 * 4 * 4 * 64
    assert 2 * half.parameter_bytes == full.parameter_bytes
    assert half.dtype == "bfloat16"
    tokens = fastcnn.summary(nn.Embedding(10, 4), (2, 5), dtype=torch.long)
    assert tokens.layers[0].output_shape == (2, 5, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["scripted", "parametrized", "old weight norm", "data-dependent"])
def test_unusual_models(form):
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum().item() >= 0 else x

    inner = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = Asks(*inner) if form == "data-dependent" else nn.Sequential(*inner)
    count = 216 + 8 + 16
    if form == "scripted":
        model = torch.jit.script(model)
    elif form == "parametrized":
        nn.utils.parametrizations.weight_norm(model[0])
        count += 8
    elif form == "old weight norm":
        nn.utils.weight_norm(model[0])
        count += 8
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = fastcnn.summary(model, (3, 10, 10))
    assert found.parameters == count
    assert found.macs == 216 * 64
    assert found["0"].output_shape == (1, 8, 8, 8)
    assert found["0"].receptive_field.size == (3, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model(torch.rand(1, 3, 10, 10)).sum().item() > 0  # still works, on values


# ---- the model is left as it was -----------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Sets attributes, replaces a buffer and counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=True)
        self.register_buffer("average", torch.ones(()))
        self.last = None

    def forward(self, x):
        self.average = self.average * 0.9
        self.last = x
        self.new_attribute = x
        self.bn.num_batches_tracked.add_(1)
        return self.bn(self.conv(x))


def test_nothing_is_changed():
    model = Remembers().train()
    model.bn.eval()
    calls = []
    model.conv.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    del model.new_attribute
    last, hooks = model.last, dict(model.conv._forward_hooks)
    state = copy.deepcopy(model.state_dict())
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    grads = [p.grad for p in model.parameters()]
    random = torch.get_rng_state()
    fastcnn.summary(model, (5, 3, 8, 8))
    assert calls == [(2, 4, 6, 6), (5, 4, 6, 6)]  # the hook is part of the model: it ran
    assert model.training
    assert model.conv.training
    assert not model.bn.training
    assert model.last is last
    assert not hasattr(model, "new_attribute")
    assert dict(model.conv._forward_hooks) == hooks
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    global_hooks = torch.nn.modules.module
    assert not global_hooks._global_forward_hooks
    assert not global_hooks._global_forward_pre_hooks


def test_nothing_is_changed_by_a_failure():
    model = Remembers().train()
    with pytest.raises(RuntimeError, match="channels"):
        fastcnn.summary(model, (4, 8, 8))
    assert model.training
    assert model.last is None
    assert model.average == 1
    assert not torch.nn.modules.module._global_forward_hooks
    assert type(model.conv.weight) is nn.Parameter


def test_nothing_is_computed():
    model = nn.Sequential(nn.Linear(100_000, 100_000, device="meta"))  # 40 GB
    assert fastcnn.summary(model, (1, 100_000)).macs == 10**10


@pytest.mark.parametrize(
    ("size", "error"), [("224", TypeError), (224, TypeError), ((), ValueError), ((3, 0, 8), ValueError)]
)
def test_sizes_that_are_none(size, error):
    with pytest.raises(error, match="input_size"):
        fastcnn.summary(nn.ReLU(), size)


def test_what_cannot_be_summed_up():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fastcnn.summary(lambda x: x, (3, 8, 8))
    with pytest.raises(ValueError, match="lazy"):
        fastcnn.summary(nn.LazyConv2d(4, 3), (3, 8, 8))


# ---- what it prints ------------------------------------------------------------------------------------------------


def test_the_table_and_the_document():
    conv = nn.Conv2d(3, 64, (7, 3), stride=2)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64 * 45, 10))
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    found = fastcnn.summary(model, (3, 16, 20), name="small")
    text = str(found).splitlines()
    assert text[0] == "small, input 1x3x16x20 float32"
    assert text[3].split() == ["0", "Conv2d", "1x64x5x9", "4,096", "181,440", "11.5", "kB", "7x3", "2", "3x1"]
    assert text[6].split()[-1] == "all"
    assert any("trainable" in line for line in text)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["layers"][0]["receptive_field"] == {"size": [7, 3], "stride": [2, 2], "offset": [3.0, 1.0]}
    assert document["macs"] == found.macs
    with pytest.raises(KeyError, match="nothing"):
        found["nothing"]
