"""Batch norm folded into dynamic layers: nothing changes but the rounding."""

import copy

import pytest
import torch
from torch import nn

import odconv
from odconv.fuse import fold_batch_norm

BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def stirred(module):
    """The module in float64 with every parameter and statistic at random, so that no scale is 1 and no shift 0."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.3, 3)
    return module


@pytest.mark.parametrize("method", ["ODConv", "DyConv", "CondConv"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_layer_computes_what_both_did(method, n, dims, transposed, bias):
    torch.manual_seed(0)
    kind = getattr(odconv, f"{method}{'Transpose' if transposed else ''}{dims}d")
    layer = stirred(kind(4, 6, 3, stride=2, groups=2, bias=bias, kernel_num=n))
    bn = stirred(BATCH_NORM[dims](6))
    x = torch.randn(3, 4, *(7,) * dims, dtype=torch.float64)
    expected = bn(layer(x))
    assert fold_batch_norm(layer, bn) is layer
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.bias.shape == (6,)
    assert (layer.kernel_bias is not None) == (bias and method != "ODConv")


def test_depthwise_layers_half_precision_and_batch_norm_without_weights():
    torch.manual_seed(0)
    layer, bn = stirred(odconv.ODConv2d(4, 4, 3, groups=4)), stirred(nn.BatchNorm2d(4, affine=False))
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = bn(layer(x))
    half = fold_batch_norm(copy.deepcopy(layer).half(), bn)
    torch.testing.assert_close(fold_batch_norm(layer, bn)(x), expected, rtol=1e-12, atol=1e-12)
    assert half.weight.dtype == half.bias.dtype == torch.float16
    torch.testing.assert_close(half(x.half()), expected.half(), rtol=0.02, atol=0.02)


def test_a_second_batch_norm_folds_too_and_frozen_layers_stay_frozen():
    torch.manual_seed(0)
    layer = stirred(odconv.DyConv2d(4, 6, 3, bias=True)).requires_grad_(False)
    first, second = stirred(nn.BatchNorm2d(6)), stirred(nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = second(first(layer(x)))
    folded = fold_batch_norm(fold_batch_norm(layer, first), second)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_what_cannot_be_folded_is_named_and_left():
    layer = odconv.ODConv2d(4, 6, 3)
    before = layer.weight.clone()
    with pytest.raises(TypeError, match="layer must be a dynamic layer, got Conv2d"):
        fold_batch_norm(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match="bn must be a batch norm, got GroupNorm"):
        fold_batch_norm(layer, nn.GroupNorm(2, 6))
    with pytest.raises(ValueError, match="bn must have the layer's 6 output channels, got 4"):
        fold_batch_norm(layer, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="bn must have running statistics"):
        fold_batch_norm(layer, nn.BatchNorm2d(6, track_running_stats=False))
    assert torch.equal(layer.weight, before)
    assert layer.bias is None


def test_a_fusing_made_for_static_convolutions_is_found_out():
    layer, bn = odconv.ODConv2d(4, 6, 3, kernel_num=1), nn.BatchNorm2d(6)
    layer.weight, layer.bias = nn.utils.fuse_conv_bn_weights(
        layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )  # takes the kernels for the filters
    with pytest.raises(ValueError, match=r"weight must have 1 kernels .* got shape \(6, 6, 4, 3, 3\).*fold_batch_norm"):
        layer(torch.randn(1, 4, 5, 5))
