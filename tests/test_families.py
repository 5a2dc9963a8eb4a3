"""Networks of torchvision, timm and MONAI, and one for sound: each converts, computes what it did, and trains."""

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

import odconv
from odconv.layers import DynamicConv

slow = pytest.mark.slow
QUICK = {
    "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "edgenext_xx_small", "lcnet_035",
    "nf_regnet_b0", "BasicUNet", "m5",
}  # fmt: skip
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
TIMM = {  # likewise
    "botnet26t_256": 256, "caformer_s18": 64, "coat_lite_tiny": 224, "coatnet_pico_rw_224": 224,
    "convmixer_768_32": 64, "convnext_atto": 64, "cs3darknet_s": 64, "csatv2": 64, "cspresnet50": 64,
    "darknet17": 64, "davit_tiny": 64, "dla46_c": 64, "dm_nfnet_f0": 64, "dpn48b": 64, "edgenext_xx_small": 64,
    "efficientformer_l1": 224, "efficientformerv2_s0": 224, "efficientnet_lite0": 64, "efficientvit_b0": 64,
    "efficientvit_m0": 224, "ese_vovnet19b_slim_dw": 64, "fasternet_t0": 64, "fastvit_t8": 64, "fbnetc_100": 64,
    "focalnet_tiny_srf": 64, "gcvit_xxtiny": 224, "gernet_s": 64, "ghostnet_050": 64, "halonet26t": 256,
    "hardcorenas_a": 64, "hgnetv2_b0": 64, "hiera_tiny_224": 224, "hrnet_w18_small": 64,
    "inception_next_atto": 64, "lambda_resnet26t": 64, "lcnet_035": 64, "legacy_seresnet18": 64,
    "legacy_xception": 64, "levit_128s": 224, "levit_conv_128s": 224, "lowformer_b0": 64, "mambaout_femto": 64,
    "maxvit_rmlp_pico_rw_256": 256, "mixnet_s": 64, "mnasnet_small": 64, "mobilenet_edgetpu_v2_xs": 64,
    "mobilenetv1_100": 64, "mobilenetv2_035": 64, "mobilenetv3_small_050": 64, "mobilenetv4_conv_small_035": 64,
    "mobileone_s0": 64, "mobilevit_xxs": 64, "mobilevitv2_050": 64, "nextvit_small": 64, "nf_regnet_b0": 64,
    "pit_ti_224": 224, "poolformer_s12": 64, "pvt_v2_b0": 64, "rdnet_tiny": 64, "regnety_002": 64,
    "repghostnet_050": 64, "repvgg_a0": 64, "repvit_m0_9": 64, "res2net50_14w_8s": 64, "resnest14d": 64,
    "resnet10t": 64, "resnetv2_18": 64, "resnetv2_50x1_bit": 64, "rexnet_100": 64, "selecsls42": 64,
    "sequencer2d_s": 224, "seresnext26d_32x4d": 64, "shvit_s1": 64, "skresnet18": 64, "spnasnet_100": 64,
    "starnet_s050": 64, "swiftformer_xs": 224, "tf_efficientnet_lite0": 64, "tinynet_e": 64, "tresnet_m": 64,
    "twins_pcpvt_small": 224, "visformer_tiny": 224, "vit_tiny_patch16_224": 224, "xcit_nano_12_p16_224": 224,
}  # fmt: skip
MONAI = {
    "BasicUNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (4, 4, 8, 8, 16, 4)},
    "SegResNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8},
}


def m5() -> nn.Module:
    """Raw sound to classes (Dai et al., Very deep convolutional neural networks for raw waveforms, 2017)."""
    widths, sizes = (1, 32, 32, 64, 64), (80, 3, 3, 3)
    stages = [
        nn.Sequential(
            nn.Conv1d(widths[i], widths[i + 1], size, stride=16 if i == 0 else 1),
            nn.BatchNorm1d(widths[i + 1]),
            nn.ReLU(),
            nn.MaxPool1d(4),
        )
        for i, size in enumerate(sizes)
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 35))


NETWORKS = [
    *(("torchvision", name, (3, side, side)) for name, side in (CLASSIFICATION | SEGMENTATION).items()),
    *(("torchvision", name, (3, *size)) for name, size in VIDEO.items()),
    *(("timm", name, (3, side, side)) for name, side in TIMM.items()),
    *(("monai", name, (1, 32, 32, 32)) for name in MONAI),
    ("own", "m5", (1, 8000)),
]
ONLY_A_STEM = ("swin_t", "swin_v2_t", "vit_b_16", "swin3d_t", "hiera_tiny_224", "vit_tiny_patch16_224")
OWN_FORWARD = {
    "dm_nfnet_f0": "ScaledStdConv2dSame",
    "nf_regnet_b0": "ScaledStdConv2d",
    "resnetv2_50x1_bit": "StdConv2d",
    "tf_efficientnet_lite0": "Conv2dSame",
}


def build(library: str, name: str) -> nn.Module:
    if library == "own":
        return m5()
    package = pytest.importorskip(library)
    if library == "monai":
        return getattr(pytest.importorskip("monai.networks.nets"), name)(**MONAI[name])
    if library == "timm":
        return package.create_model(name, num_classes=10)
    options = {"weights_backbone": None} if name in SEGMENTATION else {}
    return package.models.get_model(name, weights=None, **options)


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


@pytest.mark.parametrize(
    ("library", "name", "size"), [pytest.param(*row, marks=() if row[1] in QUICK else slow) for row in NETWORKS]
)
def test_a_family_converts_computes_the_same_and_trains(library, name, size):
    torch.manual_seed(0)
    model = build(library, name).double().eval()
    for parameter in model.parameters():
        if not parameter.any():  # biases, and heads that start at zero
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(2, *size, dtype=torch.float64)
    if name in ONLY_A_STEM:
        with pytest.raises(ValueError, match="the stem"):
            odconv.convert(model)
    choice = {"include": "*"} if name in ONLY_A_STEM else {}
    with torch.no_grad():
        expected = first(model(x))
    report = odconv.conversion_report(model, kernel_num=2, input_size=size, **choice)
    reasons = {row.reason for row in report.rows if not row.becomes} - {"the stem", "a shortcut"}
    assert reasons == ({f"{OWN_FORWARD[name]} has a forward of its own"} if name in OWN_FORWARD else set())
    converted = odconv.convert(copy.deepcopy(model), kernel_num=2, **choice)
    counts = odconv.profile(converted, size)
    assert (counts.parameters, counts.madds) == (report.parameters[1], report.madds[1])
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
    "name",
    [
        "resnet10t",
        *(
            pytest.param(name, marks=slow)
            for name in ("convnext_atto", "fastvit_t8", "ghostnet_050", "lcnet_035", "mobilevit_xxs", "regnety_002")
        ),
    ],
)
def test_a_converted_network_of_timm_compiles(name):
    torch.manual_seed(0)
    model = odconv.convert(build("timm", name).double(), kernel_num=2)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for network in (model, torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)  # for dropout
        y = network(x)
        y.square().mean().backward()
        results.append((y, next(network.parameters()).grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny.LISTED if not name.startswith(("od_", "dy_", "cond_"))])
@pytest.mark.parametrize("to", ["odconv", "condconv", "dyconv"])
def test_the_networks_of_the_zoo_compute_what_they_did(name, to):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=10).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        error = (odconv.convert(model, to, kernel_num=2)(x) - expected).norm() / expected.norm()
    assert error < 1e-12
