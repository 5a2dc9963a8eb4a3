"""Exported files that are told which part of each image is not padding."""

from pathlib import Path

import pytest
import torch
from parameters import slow_except
from torch import nn

import odconv
from odconv.app.cli import main
from odconv.app.predict import load_classifier
from odconv.export import export_torch, verify
from odconv.export.opened import open_exported

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def small(to: str = "odconv") -> nn.Module:
    """Two layers whose attentions differ between images."""
    torch.manual_seed(0)
    static = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    options = {"budget": 1.0} if to == "kernelwarehouse" else {"init": "published", "warm_start": False}
    model = odconv.convert(static, to, include="*", **options).eval()
    for name, parameter in model.named_parameters():
        if ".attention." in name or ".attn" in name:
            nn.init.normal_(parameter)
    return model


def pad(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = torch.tensor([image.shape[1:] for image in images])
    batch = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


@pytest.mark.parametrize(
    "name", slow_except(["loop.onnx", "product.onnx", "program.pt2", "aoti.pt2"], "loop.onnx", "program.pt2")
)
def test_padding_is_not_seen(name: str, tmp_path: Path) -> None:
    model, file = small(), tmp_path / name
    options = {"dynamic_size": True, "sizes": True}
    if name.endswith("onnx"):
        odconv.export_onnx(model, file, (3, 9, 12), form=name.split(".", maxsplit=1)[0], **options)
    else:
        export_torch(model, file, (3, 9, 12), compiled=name.startswith("aoti"), **options)
    images = [torch.randn(3, 9, 7), torch.randn(3, 5, 12), torch.randn(3, 9, 12)]
    batch, sizes = pad(images)
    opened = open_exported(file, trust=True)
    assert opened.takes_sizes
    (maps,) = opened.compute(batch, sizes)
    with torch.no_grad():
        for found, image in zip(maps, images, strict=True):
            torch.testing.assert_close(found[:, : image.shape[1], : image.shape[2]], model(image[None])[0])
        assert (maps - model(batch)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "precision"),
    [("dyconv", "int8"), ("condconv", "float16"), ("kernelwarehouse", "float32"), ("kernelwarehouse", "float16")],
)
def test_methods_and_precisions(to: str, precision: str, tmp_path: Path) -> None:
    options = {"dynamic_size": True, "sizes": True, "precision": precision}
    assert odconv.export_onnx(small(to), tmp_path / "net.onnx", (3, 33, 47), **options).error < 0.05


def test_a_file_that_does_something_else_with_its_sizes_is_noticed(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "net.onnx"
    odconv.export_onnx(model, file, (3, 9, 12), sizes=True)
    assert verify(file, model, [(4, 3, 9, 12)]) < 1e-4
    odconv.set_temperature(model, 5.0)
    with pytest.raises(ValueError, match="does not compute what the network does"):
        verify(file, model, [(4, 3, 9, 12)])


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sizes are for networks with dynamic layers"):
        odconv.export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "net.onnx", (3, 9, 12), sizes=True)
    odconv.export_onnx(small(), tmp_path / "net.onnx", (3, 9, 9), sizes=True)
    with pytest.raises(ValueError, match="must take images alone, but it takes their sizes too"):
        load_classifier(str(tmp_path / "net.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "inputs"), [([], 2), (["--sizes=false"], 1)])
def test_a_detector_with_a_masked_pool(options: list[str], inputs: int, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    detector = odconv.create_detector("faster_rcnn", "od_tiny", num_classes=3, masked_pool=True)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    out = str(tmp_path / "pyramid.onnx")
    words = [
        "--weights",
        str(tmp_path / "detector.pth"),
        "--out",
        out,
        "--detector",
        "faster_rcnn",
        "--arch",
        "od_tiny",
    ]
    words += ["--masked_pool", "true", "--height", "64", "--width", "96", "--dynamic_size=false"]
    assert main(["detect", "export", *words, *options]) == 0
    assert ("sizes (batch, 2) -> output_0" in capsys.readouterr().out) == (inputs == 2)
    images, sizes = torch.rand(2, 3, 64, 96), torch.tensor([[64, 50], [33, 96]])
    found = open_exported(Path(out)).compute(images, *[sizes][: inputs - 1])
    extent = sizes / torch.tensor([64, 96])
    with torch.no_grad(), odconv.layers.pool_inside(detector.eval(), extent if inputs == 2 else torch.ones(2, 2)):
        for one, other in zip(found, detector.backbone(images).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
