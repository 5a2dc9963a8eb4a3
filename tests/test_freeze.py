"""Dynamic layers at their mean attentions: exact where the attentions do not vary, measured where they do."""

import pytest
import tiny
import torch
from torch import nn

import odconv
from odconv.layers import DynamicConv


def constant(layer: DynamicConv) -> DynamicConv:
    """A layer whose attentions are the same for every input, but no two of their entries alike."""
    layer = layer.double().eval()
    for name in layer.attention.heads:
        head = getattr(layer.attention, f"{name}_fc")
        nn.init.zeros_(head.weight)
        nn.init.normal_(head.bias)
    if layer.kernel_bias is not None:
        nn.init.normal_(layer.kernel_bias)
    return layer


class Network(nn.Module):
    """A layer, used under two names, and what makes logits of its maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = self.alias = layer

    def forward(self, x):
        return self.layer(x).flatten(2).mean(2)


@pytest.mark.parametrize("method", ["ODConv", "DyConv", "CondConv"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_constant_attentions_are_frozen_exactly(method, n, dims, transposed, bias):
    torch.manual_seed(0)
    kind = getattr(odconv, f"{method}{'Transpose' if transposed else ''}{dims}d")
    extra = {"output_padding": 1} if transposed else {"padding_mode": "circular"}
    layer = constant(kind(4, 6, 3, stride=2, padding=1, groups=2, bias=bias, kernel_num=n, **extra))
    batches = [torch.randn(3, 4, *(7,) * dims, dtype=torch.float64) for _ in range(2)]
    network = Network(layer)
    frozen = odconv.to_static(network, batches)
    assert frozen.model.layer is frozen.model.alias
    assert type(frozen.model.layer).__name__ == f"Conv{'Transpose' if transposed else ''}{dims}d"
    assert network.layer is layer, "the network itself stays"
    assert (frozen.inputs, frozen.before, frozen.after) == (6, (100.0, None), (100.0, None))
    with torch.no_grad():
        torch.testing.assert_close(frozen.model.layer(batches[0]), layer(batches[0]), rtol=1e-12, atol=1e-12)


def test_folded_batch_norm_beside_a_mixed_bias():
    torch.manual_seed(0)
    network = nn.Sequential(constant(odconv.CondConv2d(4, 6, 3, bias=True)), nn.BatchNorm2d(6).double()).eval()
    network[1].running_mean.normal_()
    odconv.fuse(network)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    frozen = odconv.to_static(nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten()), [x])
    with torch.no_grad():
        torch.testing.assert_close(frozen.model[0](x), network(x), rtol=1e-12, atol=1e-12)


def test_what_is_lost_is_measured():
    torch.manual_seed(0)
    model = odconv.create_model(tiny.DYNAMIC, kernel_num=2, num_classes=4)
    for part in model.modules():  # attentions that depend on the input
        if isinstance(part, DynamicConv):
            for name in part.attention.heads:
                nn.init.normal_(getattr(part.attention, f"{name}_fc").weight, std=1.0)
    model(torch.randn(16, 3, 64, 64))  # gives the batch norm statistics
    batches = [(torch.randn(8, 3, 64, 64), torch.arange(8) % 4) for _ in range(4)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode = model.training
    frozen = odconv.to_static(model, batches, by_layer=True)
    assert model.training is mode
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    names = [name for name, part in model.named_modules() if isinstance(part, DynamicConv)]
    assert list(frozen.layers) == names
    assert not any(isinstance(part, DynamicConv) for part in frozen.model.modules())
    with torch.no_grad():
        dynamic, static = (torch.cat([net(x).argmax(1) for x, _ in batches]) for net in (model.eval(), frozen.model))
    labels = torch.cat([y for _, y in batches])
    assert frozen.before == (100.0, 100 * (dynamic == labels).double().mean().item())
    assert frozen.after.agreement == 100 * (dynamic == static).double().mean().item()
    assert frozen.after.accuracy == 100 * (static == labels).double().mean().item()
    text = str(frozen)
    assert "on 32 inputs" in text
    assert f"only {names[0]} static" in text
    assert f"{frozen.after.agreement:.2f}" in text


def test_the_mean_is_over_inputs_not_batches():
    torch.manual_seed(0)
    network = Network(odconv.ODConv2d(4, 6, 3, kernel_num=2).double().eval())
    nn.init.normal_(network.layer.attention.channel_fc.weight)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    whole, parts = odconv.to_static(network, [x]), odconv.to_static(network, [x[:4], x[4:]])
    torch.testing.assert_close(whole.model.layer.weight, parts.model.layer.weight, rtol=1e-12, atol=1e-12)


def test_what_is_refused():
    x = torch.randn(1, 4, 6, 6)
    layer = odconv.ODConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="model must have dynamic layers, got a Conv2d without"):
        odconv.to_static(nn.Conv2d(4, 6, 3), [x])
    with pytest.raises(ValueError, match="loader must have at least one batch, each time it is gone through, got none"):
        odconv.to_static(Network(layer), [])
    with pytest.raises(TypeError, match=r"loader must give batches, .* got one tensor"):
        odconv.to_static(Network(layer), x)
    with pytest.raises(TypeError, match=r"model must return logits \(B, classes\), got a tensor \(1, 6, 4, 4\)"):
        odconv.to_static(layer, [x])
    with pytest.raises(ValueError, match="layer takes a context, which an ordinary convolution cannot"):
        odconv.to_static(Network(odconv.ODConv2d(4, 6, 3, context_channels=3)), [x])
    with pytest.raises(ValueError, match="each time it is gone through, got none"):
        odconv.to_static(Network(layer), iter([x]))
    sizes = iter([2, 1])

    class Shrinking:
        def __iter__(self):
            return iter([torch.randn(next(sizes), 4, 6, 6)])

    with pytest.raises(ValueError, match="loader must give the same inputs every time, got 2, then 1"):
        odconv.to_static(Network(layer), Shrinking())
    silent = Network(layer)
    silent.unused = odconv.ODConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="unused took part in no answer"):
        odconv.to_static(silent, [x])
