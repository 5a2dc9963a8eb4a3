"""Batch norm folded into convolutions: nothing changes but the rounding."""

import copy

import pytest
import torch
from torch import nn

import odconv
from odconv.conversion.fusion import fold_batch_norm

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


def batch_norms(model):
    """Names of batch norms outside of attentions."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and "attention" not in name]


@pytest.mark.parametrize(
    "name", ["od_resnet18", "dy_resnet18", "cond_mobilenetv2_050", "od_mobilenetv2_050", "resnet50"]
)
def test_whole_networks(name):
    torch.manual_seed(0)
    options = {} if name.startswith("resnet") else {"kernel_num": 2}
    model = odconv.create_model(name, num_classes=5, **options).double().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert odconv.fuse(model) is model
        assert batch_norms(model) == []
        assert (model(x) - expected).norm() <= 1e-12 * expected.norm()
        odconv.fuse(model)  # once more: nothing is left to do
        assert (model(x) - expected).norm() <= 1e-12 * expected.norm()


def test_the_backbone_of_a_detector():
    detector = odconv.create_detector("faster_rcnn", "od_resnet18", num_classes=3, min_size=64, max_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = detector.backbone(x)
        odconv.fuse(detector.backbone)
        assert batch_norms(detector) == []
        for name, level in detector.backbone(x).items():
            torch.testing.assert_close(level, expected[name], rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """One convolution whose output is used twice, one that is called twice, and a pair that can be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = odconv.ODConv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again, self.again_norm = odconv.ODConv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.first(x)
        y = y + self.first_norm(y)
        y = self.again_norm(self.again(self.again(y)))
        return self.last_norm(self.last(y))


def test_what_cannot_be_folded_stays():
    model = stirred(Shared())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        odconv.fuse(model)
        assert batch_norms(model) == ["first_norm", "again_norm"]
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = odconv.ODConv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def test_what_fuse_refuses():
    model = Branching()
    with pytest.raises(ValueError, match="model must be in evaluation mode, got batch norm in training mode: conv"):
        odconv.fuse(model)
    with pytest.raises(
        ValueError, match=r"the Branching cannot be traced \(.*\); odconv\.conversion\.fusion\.fold_batch_norm"
    ):
        odconv.fuse(model.eval())
    assert batch_norms(model) == ["bn"]
