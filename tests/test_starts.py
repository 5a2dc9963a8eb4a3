"""How new layers are drawn, how new networks train, and parameters in groups."""

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from benchmarks import starts as digits
from benchmarks import warm
from benchmarks.gradients import amplification
from hypothesis import given, settings
from hypothesis import strategies as st
from parameters import slow_except
from torch import nn

import odconv
from odconv import convert
from odconv.layers import Attention, DynamicConv, PerSampleConv
from odconv.layers.starts import LOGIT, OPEN, ROUTED

LAYERS = {name: getattr(odconv, name) for name in odconv.__all__ if re.fullmatch(r"(OD|Dy|Cond)Conv.*d", name)}
NORMS = {"OD": ["batch", "group", "layer", "none"], "Dy": ["none", "layer", "batch"], "Co": ["none", "layer"]}
"""Norms of the attention that the layers of a method have."""
WIDE = {"norm": "layer", "gain": 2.0, "kernel_gain": "sqrt"}
"""The options with which a mixture of new kernels is as large as one of them."""


def draw(name: str, channels: int, n: int, **options) -> DynamicConv:
    torch.manual_seed(0)
    return LAYERS[name](channels, channels, 3, kernel_num=n, **options)


def logits(attention: Attention, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the gates are computed of but for the biases, (B, outputs) each, from pooled features (B, C)."""
    z = attention._normalise(
        features if attention.fc is None else nn.functional.linear(features, attention.fc.weight.flatten(1))
    )
    if attention.fc is not None:
        z = z.relu()
    heads = {name: getattr(attention, f"{name}_fc").weight.flatten(1) for name in attention.heads}
    return {name: nn.functional.linear(z, weight) for name, weight in heads.items()}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    channels=st.sampled_from([8, 24, 96, 320, 960, 2048]),
    n=st.sampled_from([1, 2, 4, 8, 16]),
    data=st.data(),
)
def test_new_logits_are_small_whatever_the_widths(name: str, channels: int, n: int, data: st.DataObject) -> None:
    dims = LAYERS[name].dims
    norm = data.draw(st.sampled_from(NORMS[name[:2]]))
    options = {} if norm is None else {"norm": norm}
    torch.manual_seed(0)
    groups = channels if channels > 96 else 1  # a dense layer of 2048 channels in 3-d would have half a gigabyte
    layer = LAYERS[name](channels, channels, 1 if dims == 3 else 3, groups=groups, kernel_num=n, **options)
    features = torch.randn(256, channels)
    for kind, values in logits(layer.attention.train(), features).items():
        if values.shape[1] < 4:  # too few to measure a spread
            continue
        spread = values.square().mean().sqrt().item()
        assert LOGIT / 2.5 < spread < 2.5 * LOGIT, kind


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["ODConv2d", "DyConv2d", "CondConv2d", "ODConvTranspose1d"])
@pytest.mark.parametrize("options", [{}, WIDE], ids=["default", "wide"])
def test_the_size_of_a_new_mixture_is_the_documented_one(name: str, n: int, options: dict) -> None:
    if options and not name.startswith("ODConv"):
        options = {"kernel_gain": "sqrt"} if name.startswith("Dy") else {}
    layer = draw(name, 64, n, **options)
    attentions = layer.attention(torch.randn(4, 64, *(8,) * layer.dims))
    size = 1.0 if attentions.kernel is None else attentions.kernel.square().sum(1).sqrt().mean().item()
    for gate in (attentions.channel, attentions.filter, attentions.spatial):
        size *= 1.0 if gate is None else gate.mean().item()
    gates = 3 if name.startswith("ODConv") else 0
    expected = OPEN**gates / math.sqrt(n)
    if options:
        expected = 1.0
    if name.startswith("Cond"):
        expected = math.sqrt(n) / 2
    assert size == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["ODConv2d", "DyConv2d", "CondConv2d"])
@pytest.mark.parametrize("n", [1, 4])
def test_depth_wise_mixtures_are_as_large_as_a_static_kernel(name: str, n: int) -> None:
    torch.manual_seed(0)
    static = nn.Conv2d(256, 256, 3, groups=256, bias=False)
    nn.init.kaiming_normal_(static.weight, mode="fan_out")
    layer = LAYERS[name](256, 256, 3, groups=256, kernel_num=n)
    x = torch.randn(16, 256, 8, 8)
    assert layer(x).std().item() == pytest.approx(static(x).std().item(), rel=0.1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("init", ["calm", "published"])
def test_a_start_is_initialisation_alone(name: str, init: str) -> None:
    layer, other = draw(name, 8, 3, init=init), draw(name, 8, 3)
    assert [*layer.state_dict()] == [*other.state_dict()]
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 8, *(6,) * layer.dims)
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)


def test_published_starts_are_those_of_the_authors() -> None:
    published = draw("ODConv2d", 256, 4, init="published").attention
    assert published.kernel_fc.weight.std().item() == pytest.approx(math.sqrt(2 / 4), rel=0.2)
    assert (published.bn.weight == 1).all()
    assert not any(getattr(published, f"{name}_fc").bias.any() for name in published.heads)
    router = draw("CondConv2d", 256, 8, init="published").attention.kernel_fc  # Glorot uniform
    assert router.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (256 + 8)), rel=0.02)
    assert not router.bias.any()


def test_the_routing_of_condconv_moves_as_slowly_for_all_widths() -> None:
    x = torch.randn(8, 960, 4, 4).relu()  # with which a router without norm has inputs of squared length 150
    for channels in (8, 96, 960):
        layer = odconv.CondConv2d(channels, 16, 1, norm="layer")
        z = layer.attention._normalise(x[:, :channels].mean((2, 3)))
        assert z.square().sum(1).mean().item() == pytest.approx(ROUTED, rel=0.05)
    with pytest.raises(ValueError, match="norm must be 'none' or 'layer', got 'batch'"):
        odconv.CondConvTranspose1d(8, 8, 3, norm="batch")


@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"attentions": ("channel",), "kernel_num": 1}])
def test_reset_parameters_draws_again_what_was_chosen(options: dict) -> None:
    for init in ("calm", "published"):
        layer = odconv.ODConv2d(16, 16, 3, init=init, **options)
        with torch.device("meta"):
            empty = odconv.ODConv2d(16, 16, 3, init=init, **options)
        empty.to_empty(device="cpu")
        for part in (layer, empty):
            torch.manual_seed(1)
            part.reset_parameters()
        for (key, one), other in zip(layer.named_parameters(), empty.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("to", ["odconv", "condconv", "dyconv"])
def test_an_unknown_start_is_refused_with_those_that_are_known(to: str) -> None:
    with pytest.raises(ValueError, match=r"init must be one of \('calm', 'published'\), got 'warm'"):
        convert(nn.Conv2d(4, 4, 3), to, init="warm")
    with pytest.raises(ValueError, match="init must be one of"):
        odconv.create_model("od_resnet18", init="warm")


def test_a_static_network_has_no_start() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(TypeError, match="resnet18 is static and has no options of dynamic layers: init"):
        odconv.create_model("resnet18", init="calm")
    with pytest.raises(TypeError, match="'gain' is no option of CondConv2d"):
        odconv.create_model("cond_resnet18", gain=2.0)


@pytest.mark.parametrize("value", ["root", 0, -1.0, float("nan")])
def test_factors_are_positive_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="kernel_gain must be a positive number"):
        odconv.DyConv2d(4, 4, 3, kernel_gain=value)


@pytest.mark.parametrize("prefix", slow_except(["od_", "dy_", "cond_"], "od_"))
@pytest.mark.parametrize("n", slow_except([1, 4], 4))
def test_a_new_network_of_fifty_layers_amplifies_as_a_static_one(prefix: str, n: int) -> None:
    pytest.importorskip("torchvision")
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def measured(name: str, **options) -> float:
        torch.manual_seed(0)
        return amplification(odconv.create_model(name, num_classes=10, **options), x)

    static = measured("mobilenetv2_050")
    assert measured(f"{prefix}mobilenetv2_050", kernel_num=n) < 2 * static


@pytest.mark.slow
@pytest.mark.parametrize("method", ["condconv_8x", "dyconv_4x", "odconv_1x", "odconv_4x"])
@pytest.mark.parametrize(("lr", "steps"), [(0.02, 300), (0.1, 60), (0.2, 60)])
def test_a_new_network_learns_as_the_static_one(method: str, lr: float, steps: int) -> None:
    static, _ = digits.accuracies("static", "calm", lr, 3, steps)
    settled, _ = digits.accuracies(method, "settled", lr, 3, steps)
    calm, _ = digits.accuracies(method, "calm", lr, 3, steps)
    assert mean(settled) > mean(static) - 1.5
    assert mean(calm) > 93


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kernelwarehouse_1x", "kernelwarehouse_4x"])
@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_a_new_network_of_kernelwarehouse_learns(method: str, lr: float) -> None:
    calm, _ = digits.accuracies(method, "calm", lr, 3)
    published, _ = digits.accuracies(method, "published", lr, 3)
    assert mean(calm) > 93
    assert mean(published) < 50


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in digits.METHODS if name != "static"])
@pytest.mark.parametrize(("lr", "steps"), [(0.004, 60), (0.001, 240)])
def test_a_new_network_learns_with_adamw_as_the_static_one(method: str, lr: float, steps: int) -> None:
    # with recomputed statistics: in sixty steps AdamW moves weights faster than batch norm's running averages follow
    _, static = digits.accuracies("static", "calm", lr, 3, steps, "adamw")
    for start in ("settled", "calm"):
        _, found = digits.accuracies(method, start, lr, 3, steps, "adamw")
        assert mean(found) > mean(static) - 1.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["condconv_8x", "dyconv_4x", "odconv_1x", "odconv_4x"])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.01), ("adamw", 0.0001), ("adamw", 0.001), ("adamw", 0.004)])
def test_a_warm_start_learns_as_the_static_network(method: str, optimizer: str, lr: float, shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"

    def learned(name: str) -> float:
        return mean(warm.accuracies(name, "warm", weights, lr, 3, optimizer=optimizer))

    assert learned(method) > learned("static") - 1.5


@contextmanager
def rearranged(layer: PerSampleConv, rearrange: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let a layer compute with other attentions than those of its samples."""

    def others(_: nn.Module, inputs: tuple, found: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(found, torch.Tensor):
            return rearrange(found).contiguous()
        return tuple(rearrange(attention).contiguous() for attention in found)

    hook = layer.attention.register_forward_hook(others)
    yield
    hook.remove()


def two_sides(n: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of two sides, told apart by a channel's mean, and what a teacher of its own makes of each side.

    One kernel can follow teachers that look at other channels, n kernels any.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 8, 8, 3, 3, generator=random) / 8
    if n == 1:
        weight = weight[:1] * (torch.arange(8) % 2 == torch.arange(2)[:, None])[:, None, :, None, None]
    side = torch.randint(0, 2, (count,))
    x = torch.randn(count, 8, 6, 6)
    x[:, 0] += (2.0 * side - 1)[:, None, None]
    targets = torch.stack([nn.functional.conv2d(x, kernel, padding=1) for kernel in weight])
    return x, targets[side, torch.arange(count)]


@pytest.mark.parametrize(
    ("to", "n"),
    [("odconv", 4), ("odconv", 1), (odconv.ODConv2d, 4), ("dyconv", 4), ("condconv", 8), ("kernelwarehouse", 4)],
)
@pytest.mark.parametrize(
    ("optimizer", "warm_start"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), False),
        pytest.param(partial(torch.optim.AdamW, lr=0.004), True, marks=pytest.mark.slow),
        pytest.param(partial(torch.optim.SGD, lr=0.1, momentum=0.9), True, marks=pytest.mark.slow),
        pytest.param(partial(torch.optim.AdamW, lr=0.004), False, marks=pytest.mark.slow),
    ],
)
def test_a_calm_layer_becomes_dynamic(to: str, n: int, optimizer: Callable, warm_start: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))  # which can hold a warehouse
    number = {"budget" if to == "kernelwarehouse" else "kernel_num": n}
    layer = convert(network, to, include="0", warm_start=warm_start, **number)[-1]
    if to == "kernelwarehouse":
        odconv.set_blend(network, 0.0)
    steps = optimizer(network.parameters())
    for _ in range(600):
        x, target = two_sides(n, 32)
        loss = (layer(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
    x, target = two_sides(n, 512)
    layer.eval()

    def error() -> float:
        with torch.no_grad():
            return (layer(x) - target).square().mean().item()

    own = error()
    with rearranged(layer, lambda a: a.mean(0, keepdim=True).expand_as(a)):
        assert error() > 1.5 * own
    with rearranged(layer, lambda a: a.roll(1, 0)):
        assert error() > 2 * own


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_parameter_groups_hold_every_parameter_once_at_its_rate(decay: str) -> None:
    pytest.importorskip("torchvision")
    model = odconv.create_model("dy_mobilenetv2_050", num_classes=3)
    model.classifier[1].bias.requires_grad_(False)
    groups = odconv.parameter_groups(model, lr=0.1, weight_decay=0.05, attention_lr=0.5, decay=decay)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, (lr, weight_decay) in found.items():
        assert lr == (0.05 if ".attention." in name else 0.1), name
        plain = model.get_parameter(name).ndim == 1
        assert weight_decay == (0 if plain and decay == "weights" else 0.05), name
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        optimizer(groups, lr=1.0)


def test_biases_that_are_mixed_do_not_decay() -> None:
    layer = odconv.CondConv2d(4, 4, 3, bias=True)
    groups = odconv.parameter_groups(layer, lr=0.1, weight_decay=0.05)
    assert [len(group["params"]) for group in groups if group["weight_decay"] == 0] == [2]


def test_parameter_groups_of_a_static_network_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="the Sequential has no dynamic layers: attention_lr has no effect"):
        groups = odconv.parameter_groups(model, lr=0.1, weight_decay=0.01, attention_lr=0.1)
    assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"lr": 0.1, "attention_lr": -1}, "attention_lr must be a non-negative number, got -1"),
        ({"lr": 0.1, "weight_decay": float("inf")}, "weight_decay must be a non-negative number, got inf"),
        ({"lr": 0.1, "decay": "none"}, "decay must be 'weights' or 'all', got 'none'"),
    ],
)
def test_bad_numbers_of_groups_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odconv.parameter_groups(odconv.ODConv2d(4, 4, 3), **options)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "attention_lr"])
def test_words_are_no_numbers(name: str) -> None:
    layer = odconv.ODConv2d(4, 4, 3)
    with pytest.raises(TypeError, match=f"{name} must be a number, got '0.1'"):
        odconv.parameter_groups(layer, **{"lr": 0.1, name: "0.1"})
    with pytest.raises(TypeError, match="temperature must be a number, got '5'"):
        odconv.set_temperature(layer, "5")
    with pytest.raises(TypeError, match="x must be a tensor, got a list"):
        layer([1, 2])


def test_a_loop_over_reset_parameters_draws_a_layer_as_its_attention_does():
    # what FSDP2, ultralytics and others do after to_empty()
    for init in ("calm", "published"):
        for norm in ("batch", "layer", "none"):
            torch.manual_seed(0)
            layer = odconv.ODConv2d(16, 16, 3, norm=norm, init=init)
            for module in (layer, layer.attention):
                torch.manual_seed(1)
                module.reset_parameters()
            wanted = copy.deepcopy(layer.state_dict())
            for parameter in layer.parameters():
                nn.init.constant_(parameter, math.nan)
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    torch.manual_seed(1)
                    module.reset_parameters()
            state = pickle.loads(pickle.dumps(copy.deepcopy(layer))).state_dict()
            assert all(torch.equal(state[key], value) for key, value in wanted.items())
