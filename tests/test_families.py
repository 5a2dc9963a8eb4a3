"""torchvision's families: each converts, computes what it did, and trains."""

import copy

import pytest
import torch
from torch import Tensor

import odconv
from odconv.layers import DynamicConv

torchvision = pytest.importorskip("torchvision")

slow = pytest.mark.slow
QUICK = (
    "alexnet",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
CLASSIFICATION = {  # one of each family, and the side of its image
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11_bn": 64, "vit_b_16": 224, "wide_resnet50_2": 64,
}  # fmt: skip
SEGMENTATION = {"deeplabv3_resnet50": 64, "fcn_resnet50": 64, "lraspp_mobilenet_v3_large": 64}
VIDEO = {
    "mc3_18": (8, 32, 32),
    "mvit_v1_b": (16, 224, 224),
    "r2plus1d_18": (8, 32, 32),
    "r3d_18": (8, 32, 32),
    "s3d": (14, 224, 224),
    "swin3d_t": (8, 32, 32),
}
WITHOUT_WEIGHTS = {"weights_backbone": None}
NETWORKS = [
    *(
        pytest.param(name, (3, side, side), {}, marks=() if name in QUICK else slow)
        for name, side in CLASSIFICATION.items()
    ),
    *(pytest.param(name, (3, side, side), WITHOUT_WEIGHTS, marks=slow) for name, side in SEGMENTATION.items()),
    *(pytest.param(name, (3, *size), {}, marks=slow) for name, size in VIDEO.items()),
]
ONLY_A_STEM = ("swin_t", "swin_v2_t", "vit_b_16", "swin3d_t")


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


@pytest.mark.parametrize(("name", "size", "options"), NETWORKS)
def test_a_family_converts_computes_the_same_and_trains(name, size, options):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options).double().eval()
    for parameter in model.parameters():
        if not parameter.any():  # biases, and heads that start at zero
            torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(2, *size, dtype=torch.float64)
    if name in ONLY_A_STEM:
        with pytest.raises(ValueError, match="the stem"):
            odconv.convert(model)
    choice = {"include": "*"} if name in ONLY_A_STEM else {}
    with torch.no_grad():
        expected = first(model(x))
    converted = odconv.convert(copy.deepcopy(model), kernel_num=2, **choice)
    with torch.no_grad():
        error = (first(converted(x)) - expected).norm() / expected.norm()
    assert error < 1e-12
    first(converted.train()(x)).square().mean().backward()
    layers = [module for module in converted.modules() if isinstance(module, DynamicConv)]
    assert layers
    trained = [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in trained)
    assert sum(layer.weight.grad is not None for layer in layers) >= 0.8 * len(layers)  # some heads serve only training


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in odconv.list_models() if not name.startswith(("od_", "dy_", "cond_"))]
)
@pytest.mark.parametrize("to", ["odconv", "condconv", "dyconv"])
def test_the_networks_of_the_zoo_compute_what_they_did(name, to):
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=10).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        error = (odconv.convert(model, to, kernel_num=2)(x) - expected).norm() / expected.norm()
    assert error < 1e-12
