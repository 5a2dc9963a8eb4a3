"""segmentation-models-pytorch with our networks as encoders, by the names that timm has for them."""

import pytest
import torch
from parameters import slow_except

import odconv

smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")
ours = pytest.importorskip("odconv.timm")

ENCODERS = ("od_resnet18", "od_mobilenetv2_050")
SIZES = {"DeepLabV3Plus": 64, "DeepLabV3": 64, "PAN": 128, "Unet": 64, "FPN": 64}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("architecture", SIZES)
def test_a_network_that_segments_learns_in_every_parameter(architecture, encoder):
    network = getattr(smp, architecture)(f"tu-{encoder}", encoder_weights=None, classes=3, kernel_num=2)
    size = SIZES[architecture]
    y = network(torch.randn(2, 3, size, size))
    assert y.shape == (2, 3, size, size)
    y.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("encoder", slow_except(ENCODERS, ENCODERS[0]))
def test_the_encoder_takes_a_published_file(encoder, tmp_path):
    published = odconv.create_model(encoder, kernel_num=2)
    file = str(tmp_path / "published.pth.tar")
    torch.save({"state_dict": {f"module.{key}": value for key, value in published.state_dict().items()}}, file)
    whole = timm.create_model(encoder, kernel_num=2, checkpoint_path=file).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = whole.forward_intermediates(x, intermediates_only=True)

    build = {"encoder_name": f"tu-{encoder}", "kernel_num": 2}
    at_once = smp.Unet(**build, encoder_weights=True, pretrained_cfg_overlay={"file": file})
    afterwards, by_timm = (smp.Unet(**build, encoder_weights=None) for _ in range(2))
    odconv.load_checkpoint(ours.published(afterwards.encoder.model), file, strict=False)
    timm.models.load_checkpoint(by_timm.encoder.model, file, strict=False)
    for network in (at_once, afterwards, by_timm):
        _, *maps = network.eval().encoder(x)
        for given, map_ in zip(maps, expected, strict=True):
            torch.testing.assert_close(given, map_)


@pytest.mark.filterwarnings("ignore:For 'tu-'")
def test_weights_of_imagenet_which_are_smps_default_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"od_resnet18 \(encoder_weights=None in segmentation_models_pytorch\)"):
        smp.Unet("tu-od_resnet18")
