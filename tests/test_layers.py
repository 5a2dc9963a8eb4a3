"""The layers: published values, every option, precision, and life as a module among others."""

import copy
import hashlib
import itertools
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from parameters import slow_except
from torch import nn
from torch.export import Dim, export
from torch.optim.swa_utils import update_bn

import odconv
from odconv.export import export_torch
from odconv.layers import Attention, DynamicConv

LAYERS = {name: getattr(odconv, name) for name in odconv.__all__ if re.fullmatch(r"(OD|Dy|Cond)Conv.*d", name)}
LAYERS = {name: layer for name, layer in LAYERS.items() if not layer.transposed}
CHANNELS = {"in_channels": 8, "out_channels": 12}


def map_of(layer_class, batch=3, channels=8, extent=6, **options):
    return torch.randn(batch, channels, *(extent,) * layer_class.dims, **options)


def uniform(name, shape):
    """The draws of the golden values: a rule of a tensor's name and shape."""
    seed = int(hashlib.md5(name.encode()).hexdigest()[:16], 16)
    return 2 * np.random.Generator(np.random.PCG64(seed)).random(math.prod(shape)).reshape(shape) - 1


def golden_state(key, tensor):
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(tensor)
    s = uniform(key, tuple(tensor.shape))
    if key.endswith("running_var"):
        value = 1 + 0.3 * s
    elif key.endswith("running_mean"):
        value = 0.1 * s
    elif tensor.dim() == 1:
        value = 1 + 0.2 * s if key.endswith("weight") else 0.1 * s
    else:
        fan_in = (tensor[0, 0] if tensor.dim() == 5 else tensor[0]).numel()
        value = 1.7 * s * math.sqrt(2 / fan_in)
    return torch.from_numpy(value).to(tensor.dtype)


def golden_model(model):
    published = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("temperature")}
    model.load_state_dict({key: golden_state(key, tensor) for key, tensor in published.items()})
    return model.double()


def golden_image(shape, name):
    return torch.from_numpy(math.sqrt(3) * uniform(name, shape))


def test_layers_compute_what_the_published_layer_computes(golden):
    rows = json.loads((golden / "layers.json").read_text())
    assert len(rows) == 32
    for row in rows:
        config = {k: v for k, v in row["config"].items() if k not in ("in_planes", "out_planes")}
        layer = odconv.ODConv2d(row["config"]["in_planes"], row["config"]["out_planes"], **config)
        layer = golden_model(layer).train(row["train"])
        odconv.set_temperature(layer, row["temperature"])
        x = golden_image((3, layer.in_channels, 11, 13), row["input_name"]).requires_grad_()
        y = layer(x)
        y.backward(golden_image(tuple(y.shape), row["grad_name"]))
        assert list(y.shape) == row["shape"]
        assert y.norm().item() == pytest.approx(row["y_norm"], rel=1e-9)
        assert y.sum().item() == pytest.approx(row["y_sum"], abs=1e-9 * row["y_norm"])
        assert y.flatten()[:8].tolist() == pytest.approx(row["y_first"], abs=1e-9 * row["y_norm"])
        assert x.grad.norm().item() == pytest.approx(row["dx_norm"], rel=1e-9)
        assert x.grad.flatten()[:8].tolist() == pytest.approx(row["dx_first"], abs=1e-9 * row["dx_norm"])
        norms = {name: p.grad.norm().item() for name, p in layer.named_parameters()}
        assert norms == pytest.approx(row["grad_norms"], rel=1e-9)


@pytest.mark.parametrize("model_row", range(7))
def test_networks_compute_what_the_published_networks_compute(golden, model_row):
    pytest.importorskip("torchvision")
    row = json.loads((golden / "models.json").read_text())[model_row]
    model = odconv.create_model(row["arch"], kernel_num=row["kernel_num"], dropout=0.2)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    lines = sorted(f"{key} {tuple(t.shape)}" for key, t in state.items() if not key.endswith("temperature"))
    assert hashlib.md5("\n".join(lines).encode()).hexdigest() == row["keys_md5"]
    golden_model(model).train()
    for module in model.modules():
        if isinstance(module, Attention | nn.Dropout):
            module.eval()
    with torch.no_grad():
        logits = model(golden_image(tuple(row["input_shape"]), row["input_name"]))
    norm = row["train_logits_norm"]
    assert logits.norm().item() == pytest.approx(norm, rel=1e-9)
    first = torch.tensor(row["train_logits_first"], dtype=torch.float64)
    torch.testing.assert_close(logits[:, :6], first, rtol=0, atol=1e-9 * norm)
    assert logits.argmax(1).tolist() == row["train_argmax"]


def by_the_formula(layer, x):
    """What a layer should compute, from its attentions and the operator's definition."""
    attentions = layer.attention(x)._asdict()
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    bias = layer.bias if layer.kernel_bias is None else layer.kernel_bias
    return odconv.functional.dynamic_conv(x, layer.weight, **attentions, bias=bias, **geometry, backend="reference")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_layer_is_its_formula_and_reaches_every_parameter(name, bias):
    torch.manual_seed(0)
    layer = LAYERS[name](**CHANNELS, kernel_size=3, stride=2, padding=1, groups=2, bias=bias, dtype=torch.float64)
    x = map_of(layer, dtype=torch.float64).requires_grad_()
    layer.eval()
    torch.testing.assert_close(layer(x), by_the_formula(layer, x))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert x.grad.abs().max() > 0


def test_the_attentions_are_what_their_methods_say():
    x = torch.randn(5, 8, 6, 6)
    od = odconv.ODConv2d(**CHANNELS, kernel_size=(3, 1)).attention(x)
    assert [tuple(a.shape) for a in od] == [(5, 4), (5, 3, 1), (5, 8), (5, 12)]
    torch.testing.assert_close(od.kernel.sum(1), torch.ones(5))
    assert all(((a > 0) & (a < 1)).all() for a in od)
    dy = odconv.DyConv2d(**CHANNELS, kernel_size=3).attention(x)
    torch.testing.assert_close(dy.kernel.sum(1), torch.ones(5))
    cond_layer = odconv.CondConv2d(**CHANNELS, kernel_size=3)
    cond = cond_layer.attention(x)
    assert tuple(cond.kernel.shape) == (5, 8)
    head = cond_layer.attention.kernel_fc
    by_hand = torch.sigmoid(x.mean((2, 3)) @ head.weight.flatten(1).T + head.bias)
    torch.testing.assert_close(cond.kernel, by_hand)
    assert dy[1:] == cond[1:] == (None, None, None)


def test_defaults_and_keys_are_the_published_ones():
    layer = odconv.ODConv2d(64, 64, 3)
    assert layer.kernel_num == 4
    assert layer.bias is None
    assert layer.attention.fc.weight.shape == (16, 64, 1, 1)
    assert odconv.ODConv2d(512, 64, 3).attention.fc.weight.shape[0] == 32
    assert set(layer.state_dict()) == {
        "weight", "attention.temperature", "attention.fc.weight",
        *(f"attention.bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"attention.{h}_fc.{k}" for h in ("channel", "filter", "spatial", "kernel") for k in ("weight", "bias")),
    }  # fmt: skip
    assert set(odconv.CondConv1d(8, 8, 3, bias=True).state_dict()) == {
        "weight", "kernel_bias", "attention.kernel_fc.weight", "attention.kernel_fc.bias"
    }  # fmt: skip
    assert "attention.fc.weight" in odconv.DyConv3d(8, 8, 3).state_dict()
    assert odconv.ODConv1d(8, 8, 3).attention.fc.weight.dim() == 3
    absent = set(odconv.ODConv2d(8, 8, 1, groups=8, kernel_num=1).state_dict())
    parts = {key.split(".")[1] for key in absent if key.startswith("attention")}
    assert parts == {"temperature", "fc", "bn", "channel_fc"}


def test_initialisation_is_kaiming_for_each_kernel_alone():
    torch.manual_seed(0)
    layer = odconv.ODConv2d(256, 128, 3, groups=2, init="published")
    expected = math.sqrt(2 / (128 * 9))  # fan-out of one kernel
    for kernel in layer.weight:
        assert kernel.std().item() == pytest.approx(expected, rel=0.02)
    assert layer.attention.filter_fc.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert layer.attention.channel_fc.bias.abs().max() == 0


@pytest.mark.parametrize(
    "subset", [s for r in range(1, 5) for s in itertools.combinations(("channel", "filter", "spatial", "kernel"), r)]
)
def test_any_subset_of_the_attentions(subset):
    n = 3 if "kernel" in subset else 1
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, padding=1, kernel_num=n, attentions=subset).double()
    x = map_of(layer).double()
    given = layer.attention(x)
    assert {name for name, a in given._asdict().items() if a is not None} == set(subset)
    layer.eval()
    torch.testing.assert_close(layer(x), by_the_formula(layer, x))


def test_a_pointwise_layer_with_only_the_spatial_attention_is_a_plain_convolution():
    layer = odconv.ODConv2d(8, 12, 1, kernel_num=1, attentions=("spatial",))
    assert set(layer.state_dict()) == {"weight"}
    x = map_of(layer)
    torch.testing.assert_close(layer(x), torch.conv2d(x, layer.weight[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("ODConv")])  # padding knows no method
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_padding_modes_are_those_of_torch(name, mode, padding):
    """With all attentions equal, a layer is nn.ConvNd with its padding, an even kernel included."""
    dynamic = LAYERS[name](8, 12, 4, padding=padding, padding_mode=mode, kernel_num=1, dilation=1)
    plain = getattr(nn, f"Conv{dynamic.dims}d")(8, 12, 4, padding=padding, padding_mode=mode, bias=False)
    for parameter in dynamic.attention.parameters():
        nn.init.zeros_(parameter)  # sigmoids of 0.5, a softmax of 1
    plain.load_state_dict({"weight": dynamic.weight[0]})
    x = map_of(dynamic)
    torch.testing.assert_close(dynamic(x), plain(x) / 8, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_training_on_small_batches_with_every_norm(norm, batch):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, norm=norm)
    layer(map_of(layer, batch)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_batch_of_one_takes_the_running_statistics_and_moves_them(momentum):
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, dtype=torch.float64)
    bn = layer.attention.bn
    bn.momentum = momentum
    layer(map_of(layer, 4, dtype=torch.float64))  # statistics that are not the initial ones
    before, x = copy.deepcopy(layer).eval(), map_of(layer, 1, dtype=torch.float64).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, before(x))
    y.sum().backward()  # through statistics that have moved since
    read = []
    layer.attention.bn.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(1)[0]))
    layer.eval()(x)
    share = 0.1 if momentum else 0.5
    torch.testing.assert_close(bn.running_mean, before.attention.bn.running_mean.lerp(read[0], share))
    squares = (read[0] - before.attention.bn.running_mean).square()
    torch.testing.assert_close(bn.running_var, (1 - share) * (before.attention.bn.running_var + share * squares))
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_can_be_estimated_anew_in_any_dtype_by_any_batch(dtype, batch):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, padding=1)
    images = 2 + torch.randn(320, 8, 4, 4) * torch.rand(320, 1, 1, 1)
    exact = (images.mean((2, 3)).double() @ layer.attention.fc.weight.double().flatten(1).T).detach()
    layer.to(dtype)
    update_bn(images.to(dtype).split(batch), nn.Sequential(layer))
    bn = layer.attention.bn
    assert (bn.num_batches_tracked, bn.momentum) == (320 // batch, 0.1)
    tolerance = 0.02 if dtype == torch.float32 else 0.2  # a sum in bfloat16 loses what is small
    torch.testing.assert_close(bn.running_mean.double(), exact.mean(0), rtol=tolerance, atol=0.02)
    torch.testing.assert_close(bn.running_var.double(), exact.var(0), rtol=tolerance + 0.05, atol=0.01)


def test_statistics_may_be_wider_than_the_parameters():
    # FSDP2 and trainers that cast parameters alone
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, padding=1)
    exact = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    for parameter, wide in zip(layer.parameters(), exact.parameters(), strict=True):
        wide.data = parameter.data.float()
    x = map_of(layer).bfloat16()
    for batch in (3, 1):
        layer(x[:batch]).sum().backward()
        exact(x[:batch].float())
    for name, buffer in exact.attention.bn.named_buffers():
        own = layer.attention.bn.get_buffer(name)
        assert own.dtype == buffer.dtype
        torch.testing.assert_close(own, buffer, rtol=1e-4, atol=1e-5)


def test_temperature_divides_every_logit():
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, temperature=7.5, dtype=torch.float64).eval()
    x = map_of(layer, dtype=torch.float64)
    at_temperature = layer.attention(x)
    odconv.set_temperature(nn.Sequential(layer), 1.0)
    for hot, cold in zip(at_temperature[1:], layer.attention(x)[1:], strict=True):
        torch.testing.assert_close(torch.logit(hot) * 7.5, torch.logit(cold))
    odconv.set_temperature(layer, 1e6)
    torch.testing.assert_close(
        layer.attention(x).kernel, torch.full((3, 4), 0.25, dtype=torch.float64), rtol=1e-4, atol=0
    )
    with pytest.warns(UserWarning, match="no layer of the CondConv2d has a temperature"):
        odconv.set_temperature(odconv.CondConv2d(8, 8, 3), 2.0)
    for value in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            odconv.set_temperature(layer, value)


def test_the_temperature_survives_half_to_empty_loading_and_copies():
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, temperature=30.0)
    odconv.set_temperature(layer, 12.3)  # nothing may bring the first one back
    state = layer.state_dict()
    meta = odconv.ODConv2d(**CHANNELS, kernel_size=3, temperature=12.3, device="meta")
    emptied = copy.deepcopy(meta).to_empty(device="cpu")
    assigned, published = copy.deepcopy(meta), copy.deepcopy(meta)
    assigned.load_state_dict(state, assign=True)
    published.load_state_dict({k: v for k, v in state.items() if "temperature" not in k}, assign=True)
    half = copy.deepcopy(layer).half().state_dict() | {"attention.temperature": torch.tensor(12.3).half()}
    loaded = odconv.ODConv2d(**CHANNELS, kernel_size=3).half()
    loaded.load_state_dict(half)
    assert loaded.attention.temperature.item() == pytest.approx(12.3, rel=1e-3)
    again = copy.deepcopy(layer)
    again.load_state_dict({k: v for k, v in state.items() if "temperature" not in k})
    for same in (
        published,
        again,
        copy.deepcopy(layer).to_empty(device="cpu"),
        layer,
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).bfloat16(),
        emptied,
        assigned,
        copy.deepcopy(layer),
    ):
        temperature = same.attention.temperature
        assert temperature.dtype == torch.float32
        assert temperature.device.type == "cpu"
        assert temperature.item() == pytest.approx(12.3)
    layer.reset_parameters()
    assert layer.attention.temperature == 30
    layer.load_state_dict(state)
    assigned.load_state_dict(state)
    x = map_of(layer)
    torch.testing.assert_close(assigned.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_can_be_had_on_the_meta_device(name):
    layer = LAYERS[name](**CHANNELS, kernel_size=3, stride=2, device="meta")
    assert layer(map_of(layer, extent=9, device="meta")).shape == (3, 12, *(4,) * layer.dims)


@pytest.mark.parametrize("name", LAYERS)
def test_deepcopy_and_pickle_keep_the_layer(name):
    layer = LAYERS[name](**CHANNELS, kernel_size=3, padding="same", bias=True).eval()
    x = map_of(layer)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(same(x), layer(x))
        assert repr(same) == repr(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("train", [False, True])
def test_half_precision_models_keep_their_attention_exact(dtype, norm, train):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, padding=1, norm=norm).to(dtype).train(train)
    exact = copy.deepcopy(layer).double()
    x = map_of(layer).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    for a, b in zip(layer.attention(x), exact.attention(x.double()), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    reference = exact(x.double())
    assert (y.double() - reference).norm() / reference.norm() < 8 * torch.finfo(dtype).eps
    if train and norm == "batch":
        torch.testing.assert_close(
            layer.attention.bn.running_mean.double(), exact.attention.bn.running_mean, rtol=1e-2, atol=1e-2
        )


def test_large_float16_activations_do_not_overflow_the_attention():
    layer = odconv.ODConv2d(512, 8, 1, init="published").half().eval()
    with torch.no_grad():
        layer.attention.fc.weight.fill_(60)
        layer.weight.mul_(0.1)  # nor the convolution
    assert torch.isfinite(layer(torch.full((2, 512, 2, 2), 3000.0).half())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    torch.manual_seed(0)
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, padding=1)
    x = map_of(layer)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        attentions = layer.attention(x.to(dtype))
    assert y.dtype == dtype
    assert all(a.dtype == torch.float32 for a in attentions)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("name", slow_except(LAYERS, "ODConv2d", "CondConv1d"))
def test_compile_takes_the_whole_layer_and_no_recompilation_for_a_temperature(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = LAYERS[name](**CHANNELS, kernel_size=3, padding=1)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = map_of(layer)
    for temperature in (30.0, 12.5, 1.0):
        if not name.startswith("CondConv"):
            odconv.set_temperature(layer, temperature)
        state = copy.deepcopy(layer.state_dict())
        y = compiled(x)
        layer.load_state_dict(state)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    for batch in (4, 5, 7, 1, 9, 1):
        compiled(map_of(layer, batch)).sum().backward()
    assert counter.frame_count <= 3  # a dynamic batch, and a batch of one


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("groups", [1, 8])
def test_export_with_a_dynamic_batch(name, groups):
    layer = LAYERS[name](8, 8, 3, padding=1, groups=groups).eval()
    program = export(layer, (map_of(layer),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 2, 7, 33):
        x = map_of(layer, batch)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ODConv2d", "CondConv1d", "DyConv3d"])
def test_inductor(name):
    layer = LAYERS[name](**CHANNELS, kernel_size=3, padding=1)
    x = map_of(layer)
    state = copy.deepcopy(layer.state_dict())
    y = torch.compile(layer, fullgraph=True)(x)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.load_state_dict(state)
    layer(x).square().sum().backward()
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)


def test_functional_call_and_per_sample_gradients():
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3, norm="none")
    x = map_of(layer, 3)
    parameters = dict(layer.named_parameters())

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(
        per_sample["weight"].sum(0),
        torch.func.grad(lambda p: layer_loss(layer, p, x))(parameters)["weight"],
        rtol=1e-3,
        atol=1e-4,
    )


def layer_loss(layer, parameters, x):
    return torch.func.functional_call(layer, parameters, (x,)).square().sum()


def test_a_static_bias_beside_a_mixed_one_is_added_too():
    layer = odconv.DyConv2d(**CHANNELS, kernel_size=3, bias=True).eval()
    x = map_of(layer)
    before = layer(x)
    layer.bias = nn.Parameter(torch.arange(12.0))
    torch.testing.assert_close(layer(x), before + torch.arange(12.0).view(12, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_num": 0}, "kernel_num must be an int of at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be an int of at least 1, got 0"),
        ({"out_channels": 2.5}, "out_channels must be an int of at least 1, got 2.5"),
        ({"groups": 3}, "groups must divide in_channels 8 and out_channels 12, got 3"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be an int or 2 ints, each at least 1, got \(3, 3, 3\)"),
        ({"stride": 0}, "stride must be an int or 2 ints"),
        ({"padding": -1}, "padding must be an int or 2 ints, each at least 0, got -1"),
        ({"padding": "half"}, "padding must be ints, 'same' or 'valid', got 'half'"),
        ({"padding": "same", "stride": 2}, "padding 'same' needs stride 1"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of .* got 'mirror'"),
        ({"reduction": 0}, "reduction must be above 0, got 0"),
        ({"reduction": math.inf}, "reduction must be above 0, got inf"),
        ({"reduction": 16}, "reduction must be a share of the channels, at most 1, got 16; 1/16 for a sixteenth"),
        ({"min_channels": 0}, "min_channels must be an int of at least 1, got 0"),
        ({"min_channels": 16.0}, "min_channels must be an int of at least 1, got 16.0"),
        ({"kernel_size": 3.0}, "kernel_size must be an int or 2 ints, each at least 1, got 3.0"),
        ({"stride": None}, "stride must be an int or 2 ints, each at least 1, got None"),
        ({"norm": "instance"}, "norm must be one of .* got 'instance'"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"attentions": "kernel"}, "attentions must be some of"),
        ({"attentions": ()}, "attentions must be some of"),
        ({"attentions": 3}, "attentions must be some of .* got 3"),
        ({"attentions": ("kernels",)}, r"attentions must be some of .* got \('kernels',\)"),
        ({"attentions": ("channel",)}, "kernel_num must be 1 without the kernel attention, got 4"),
    ],
)
def test_what_a_layer_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        odconv.ODConv2d(**(CHANNELS | {"kernel_size": 3} | change))


def test_numpy_sizes_and_any_iterable_of_attentions_are_taken():
    layer = odconv.ODConv2d(
        np.int64(8), np.int32(12), np.int64(3), kernel_num=np.int8(2), attentions=iter(("kernel", "filter"))
    )
    assert set(layer.attention.heads) == {"kernel", "filter"}
    assert layer(map_of(layer)).shape == (3, 12, 4, 4)


def test_sync_batch_norm_in_half_precision_evaluates():
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3)
    half = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)).half().eval()
    x = map_of(layer)
    torch.testing.assert_close(half(x.half()).float(), layer.eval()(x), rtol=1e-2, atol=1e-2)


def test_an_input_of_another_shape_is_named():
    layer = odconv.ODConv2d(**CHANNELS, kernel_size=3)
    for shape in ((3, 9, 6, 6), (8, 6, 6), (3, 8, 6, 6, 6)):
        with pytest.raises(ValueError, match=r"x must have shape \(B, C, H, W\) with C = 8, got"):
            layer(torch.zeros(shape))


def test_every_layer_is_a_dynamic_conv():
    assert all(issubclass(layer, DynamicConv) for layer in LAYERS.values())
    assert len(LAYERS) == 9


@pytest.mark.parametrize(
    "function",
    [
        odconv.accelerate,
        odconv.convert,
        odconv.fuse,
        lambda model: odconv.parameter_groups(model, attention_lr=0.1, lr=0.1),
        odconv.restore_forward,
        lambda model: export_torch(model, "network.pt2", (3, 8, 8)),
        lambda model: odconv.export_onnx(model, "network.onnx", (3, 8, 8)),
        lambda model: odconv.load_checkpoint(model, "network.pth"),
        lambda model: odconv.profile(model, (3, 8, 8)),
        lambda model: odconv.layers.pool_inside(model, torch.ones(1, 2)).__enter__(),
        lambda model: odconv.set_blend(model, 0.5),
        lambda model: odconv.set_progress(model, 0.5),
        lambda model: odconv.set_temperature(model, 2.0),
        lambda model: odconv.to_static(model, []),
    ],
)
def test_functions_of_networks_want_networks(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor$"):
        function(torch.ones(3))
    with pytest.raises(TypeError, match=r"got str; odconv\.create_model\('od_resnet18'\) makes a network of the zoo"):
        function("od_resnet18")


@pytest.mark.parametrize("size", [(7,), (5, 4), (2, 3, 4)], ids=str)
def test_an_attention_has_derivatives_forward_and_again(size):
    layers = {1: odconv.ODConv1d, 2: odconv.ODConv2d, 3: odconv.ODConv3d}
    attention = layers[len(size)](6, 8, 3, padding=1, kernel_num=2, norm="layer").double().attention
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)

    def gates(x):
        return tuple(gate for gate in attention(x) if gate is not None)

    assert torch.autograd.gradcheck(gates, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(gates, x)
