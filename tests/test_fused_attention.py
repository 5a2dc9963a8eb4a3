"""Fused attentions compute what attentions do in evaluation mode, with fewer parts."""

import copy

import pytest
import torch
from stirring import stirred

import odconv
from odconv.layers.attention import Attention, fused_attention
from odconv.layers.fused_attention import FusedAttention, can_be_fused, fuse_attentions
from odconv.ops import cpu

LAYERS = {
    "batch": lambda: odconv.ODConv2d(32, 24, 3, kernel_num=4),
    "group": lambda: odconv.ODConv2d(
        64, 24, 3, kernel_num=4, norm="group", gain=2.0, kernel_gain="sqrt", reduction=1 / 2
    ),
    "layer": lambda: odconv.ODConv1d(32, 24, 3, kernel_num=2, norm="layer", gain=2.0),
    "none": lambda: odconv.ODConv3d(32, 24, 3, kernel_num=4, norm="none"),
    "one kernel": lambda: odconv.ODConv2d(32, 32, 3, groups=32, kernel_num=1),
    "DyConv": lambda: odconv.DyConv2d(32, 24, 3, kernel_gain="sqrt"),
    "CondConv": lambda: odconv.CondConv2d(32, 24, 3),
    "layer, CondConv": lambda: odconv.CondConv2d(32, 24, 3, norm="layer"),
    "transposed": lambda: odconv.ODConvTranspose2d(32, 24, 3),
}


def drawn(name: str, dtype: torch.dtype = torch.float64) -> tuple[odconv.DynamicConv, torch.Tensor]:
    """Return a layer whose parameters and statistics are none of those that layers begin with, and an input."""
    torch.manual_seed(0)
    layer = stirred(LAYERS[name]()).to(dtype).eval()
    if layer.attention.temperature is not None:
        odconv.set_temperature(layer, 0.7)
    return layer, torch.randn(3, layer.in_channels, *(6, 5, 4)[: layer.dims], dtype=dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_fused_attention_computes_the_same(name: str, differentiated: bool) -> None:
    layer, x = drawn(name)
    with torch.set_grad_enabled(differentiated):
        wanted = layer(x)
        fuse_attentions(layer)
        assert type(layer.attention) is FusedAttention
        torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert not list(layer.attention.children())
    names = {name.partition("_")[0] for name, _ in layer.attention.named_parameters()}
    assert names == {"heads", *["hidden"] * ("CondConv" not in name), *["norm"] * name.startswith(("group", "layer"))}


@pytest.mark.skipif(not cpu.available(), reason="the compiled kernel is not here")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_the_compiled_attention_is_the_plain_one(name: str, dtype: torch.dtype, fused: bool) -> None:
    layer, x = drawn(name, dtype)
    if fused:
        fuse_attentions(layer)
    with torch.no_grad():
        found = fused_attention(layer.attention, x)
    assert found is not None
    wanted = layer.attention.forward(x)  # with gradients it is made of PyTorch's operations
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert {gate.dtype for gate in found} == {torch.promote_types(dtype, torch.float32)}


def test_what_somebody_looks_into_stays() -> None:
    for hooked in (lambda a: a, lambda a: a.fc, lambda a: a.bn, lambda a: a.kernel_fc):
        layer, _ = drawn("batch")
        hooked(layer.attention).register_forward_hook(lambda *_: None)
        fuse_attentions(layer)
        assert type(layer.attention) is Attention
    layer, _ = drawn("batch")
    layer.attention.forward = layer.attention.forward  # as programs wrap it
    assert not can_be_fused(layer.attention)
    layer, _ = drawn("batch")
    assert not can_be_fused(layer.train().attention)
    assert not can_be_fused(None)


def test_a_fused_attention_is_kept_copied_and_set() -> None:
    layer, x = drawn("batch")
    fuse_attentions(layer)
    other, _ = drawn("batch")
    fuse_attentions(other)
    state = {name: tensor + 0.1 for name, tensor in layer.state_dict().items()}
    other.load_state_dict(state)
    layer.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("temperature")})
    odconv.set_temperature(layer, 0.8)  # which the state has, and this layer kept its own
    torch.testing.assert_close(layer(x), other(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(other)(x), other(x), rtol=0, atol=0)
    before = other(x)
    odconv.set_temperature(other, 5.0)
    assert not torch.allclose(other(x), before)
    other(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in other.attention.parameters())


def test_a_frozen_attention_stays_frozen_and_is_not_drawn_anew() -> None:
    layer, _ = drawn("batch")
    fuse_attentions(layer.requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(ValueError, match=r"cannot be drawn anew; draw the network, then call odconv\.fuse"):
        layer.reset_parameters()
