"""Structured pruning, by hand and by torch-pruning."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import odconv
from odconv.conversion.pruning import keep_channels, keep_filters, pruners

LAYERS = {
    "ODConv2d": lambda: odconv.ODConv2d(8, 12, 3, padding=1, bias=True),
    "ODConv3d 1x": lambda: odconv.ODConv3d(8, 12, 3, kernel_num=1, attentions=("filter", "spatial"), norm="none"),
    "DyConv1d": lambda: odconv.DyConv1d(8, 12, 3, bias=True),
    "CondConv2d": lambda: odconv.CondConv2d(8, 12, 3, bias=True),
    "ODConvTranspose2d": lambda: odconv.ODConvTranspose2d(8, 12, 3, stride=2, bias=True, norm="layer"),
    "CondConvTranspose1d": lambda: odconv.CondConvTranspose1d(8, 12, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_kept_computes_what_it_did(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    x = torch.randn(3, 8, *(7,) * layer.dims, dtype=torch.float64)
    kept, filters = [1, 2, 6, 7], [11, 0, 5]
    off = [i for i in range(8) if i not in kept]
    x[:, off] = 0
    y = layer(x)
    small = copy.deepcopy(layer)
    assert keep_channels(keep_filters(small, filters), kept) is small
    torch.testing.assert_close(small(x[:, kept]), y[:, filters])
    assert (small.in_channels, small.out_channels) == (4, 3)
    small.train()(x[:, kept]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    rebuilt = copy.deepcopy(small)
    rebuilt.reset_parameters()
    rebuilt.load_state_dict(small.state_dict())


def test_a_norm_of_the_pooled_input_keeps_the_same_channels():
    layer = odconv.CondConv2d(8, 12, 3, norm="layer")
    nn.init.normal_(layer.attention.bn.weight)
    wanted = layer.attention.bn.weight[[1, 2, 6]].clone()
    keep_channels(layer, [1, 2, 6])
    assert torch.equal(layer.attention.bn.weight, wanted)
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    assert layer.attention.bn.bias.grad.shape == (3,)


def test_a_context_of_its_own_is_left_alone():
    layer = odconv.ODConv2d(8, 12, 3, context_channels=5)
    keep_channels(layer, [0, 3])
    assert layer(torch.randn(2, 2, 5, 5), context=torch.randn(2, 5)).shape == (2, 12, 3, 3)


def test_what_cannot_be_kept_is_named():
    layer = odconv.ODConv2d(8, 12, 3)
    for kept in ([], [1, 1], [12], [-1]):
        with pytest.raises(ValueError, match="kept must be different channels of 0 to 11"):
            keep_filters(layer, kept)
    with pytest.raises(ValueError, match="a layer with groups 4 cannot be pruned"):
        keep_channels(odconv.ODConv2d(8, 12, 3, groups=4), [0])
    with pytest.raises(ValueError, match=r"a layer of a fused network cannot be pruned; prune before odconv\.fuse"):
        keep_filters(odconv.fuse(nn.Sequential(odconv.ODConv2d(8, 12, 3)).eval())[0], [0])


def test_computed_weights_are_refused_before_anything_is_cut():
    for part in ("", "attention.filter_fc", "attention.fc"):
        layer = odconv.ODConv2d(8, 12, 3)
        prune.l1_unstructured(layer.get_submodule(part), "weight", amount=0.5)
        shapes = {key: value.shape for key, value in layer.state_dict().items()}
        for cut in (keep_filters, keep_channels):
            with pytest.raises(ValueError, match=f"the weight of {part or 'the layer'} is computed"):
                cut(layer, [0, 1])
        assert {key: value.shape for key, value in layer.state_dict().items()} == shapes
    with pytest.raises(ValueError, match="kept must be different channels"):
        keep_filters(odconv.ODConv2d(8, 12, 3), [True, False])


def test_layers_of_your_own_are_pruned_too():
    pytest.importorskip("torch_pruning")
    mine = type("Mine", (odconv.ODConv2d,), {})
    assert {mine, odconv.ODConv2d, odconv.CondConvTranspose3d} <= pruners().keys()


@pytest.mark.parametrize("name", ["od_resnet18", "dy_resnet18", "cond_resnet18"])
def test_torch_pruning_prunes_a_whole_network(name):
    pruning = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=10)
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "attention" not in name]
    inner = [block.bn1 for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    for norm in norms:
        off = torch.arange(norm.num_features) < norm.num_features // 2
        norm.weight.data[off] = norm.bias.data[off] = 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model.eval()(x)
    pruner = pruning.pruner.BNScalePruner(
        model, x, importance=pruning.importance.BNScaleImportance(), pruning_ratio=0.5, ignored_layers=[model.fc],
        customized_pruners=pruners(), root_module_types=[nn.Conv2d, nn.Linear, odconv.DynamicConv],
    )  # fmt: skip
    widths = [norm.num_features for norm in inner]
    pruner.step()
    assert [norm.num_features for norm in inner] == [width // 2 for width in widths]
    assert {m.out_channels for m in model.layer4.modules() if isinstance(m, odconv.DynamicConv)} == {256}
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.train()(x).sum().backward()
