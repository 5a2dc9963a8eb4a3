"""KernelWarehouse's networks in the rest of the library and in the application."""

import csv
from math import log

import pytest
import torch
from pages import Page
from PIL import Image
from torch import nn

import odconv
from odconv.app.cli import main
from odconv.app.pages import plot_attentions
from odconv.attentions import attention_statistics, record_attentions
from odconv.attentions.class_scatter import scatter
from odconv.attentions.kernels import scatter_of_kernels, usage
from odconv.attentions.measurement import describe_layer, measure


class Sharing(nn.Module):
    """Three layers, of which two share cells, and one has few."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        first, second = odconv.KWConv2d(3, 8, 3, padding=1), odconv.KWConv2d(8, 8, 3, groups=2)
        third = odconv.KWConv2d(8, 4, 1)
        self.warehouse_manager = odconv.Warehouse(
            {"one": {"first": first, "third": third}, "two": {"second": second}}, **options
        )
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def save_run(path, arch, **options):
    """A checkpoint as odconv train writes them."""
    torch.manual_seed(0)
    layer_options = options.pop("layer_options", {})
    model = odconv.create_model(arch, num_classes=3, stem="small", **options, **layer_options)
    config = {"arch": arch, "stem": "small", "image_size": 32, "resize_size": 32, "layer_options": layer_options}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    notes = {"classes": ["a", "b", "c"], "temperature": 1.0}
    torch.save({"state_dict": state, "hyper_parameters": config | options, "odconv": notes}, path)
    return str(path)


def write_images(root):
    generator = torch.Generator().manual_seed(0)
    for index in range(9):
        pixels = torch.randint(0, 255, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
        path = root / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40, 40)).save(path)
    return root


@pytest.mark.parametrize("numbers", [1, 1 << 22])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_mixed_kernels_differ_as_the_static_ones_of_single_images_do(numbers, index, monkeypatch):
    monkeypatch.setattr("odconv.attentions.kernels.NUMBERS", numbers)
    model = Sharing().eval()
    x, labels = torch.randn(5, 3, 9, 9), torch.tensor([0, 1, 0, 1, 1])
    kernels = torch.stack([odconv.to_static(model, [image[None]]).model.layers[index].weight.detach() for image in x])
    found = scatter_of_kernels(model.layers[index], record_attentions(model, x)[f"layers.{index}"], labels)
    assert found == pytest.approx(scatter(kernels, labels), rel=1e-4)


def test_statistics_of_shares_with_signs():
    model = Sharing(cell_num_ratio=2)
    x = torch.randn(6, 3, 9, 9)
    recorded = record_attentions(model, x)
    rows = {row["layer"]: row for row in attention_statistics(model, x)}
    assert list(rows) == ["layers.0", "layers.2", "layers.4"]
    shares = recorded["layers.0"].kernel
    assert shares.shape == (6, 54, 124)
    assert (shares < 0).any()
    row = rows["layers.0"]
    assert row["attention"] == "kernel"
    assert row["mean"] == pytest.approx(shares.abs().mean().item(), rel=1e-4)
    sizes = shares.abs() / shares.abs().sum(2, keepdim=True)
    assert row["entropy"] == pytest.approx(-(sizes * sizes.log()).sum(2).mean().item() / log(124), rel=1e-4)
    assert 0 <= row["kernel_distance"] <= 1.2
    odconv.set_blend(model, 1.0)
    (row, *_) = attention_statistics(model, x)
    assert row["saturated"] == pytest.approx(1 / 124, rel=1e-4)  # one cell has all of a piece
    assert row["entropy"] == row["between_images"] == 0
    assert attention_statistics(Sharing(cell_num_ratio=1, norm="layer").train(), x)


def test_layers_that_share_cells_have_one_similarity():
    model = Sharing().eval()
    layers = measure(model, record_attentions(model, torch.randn(4, 3, 9, 9)), None)
    first, second, third = layers
    assert first.similarity is third.similarity is not second.similarity
    assert first.similarity.shape == (62, 62)
    assert describe_layer(model.layers[0]) == first.shape == "3 to 8 channels, 3 x 3, 62 cells"


def test_figures_of_many_cells_and_of_few():
    model = Sharing().eval()
    x = torch.randn(3, 3, 9, 9)
    recorded = record_attentions(model, x)
    figure = plot_attentions(recorded, x)
    assert len(figure.axes) == 6
    assert usage(recorded["layers.2"].kernel).shape == (3, 9)
    many, few = figure.axes[1], figure.axes[3]
    assert len(many.images) == 3
    assert not few.images


def test_visualize(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    weights = save_run(tmp_path / "best.ckpt", "kw_mobilenetv2_050", layer_options={"budget": 4})
    assert main(["visualize", str(images), "--weights", weights, "--out", str(tmp_path / "out"), "--shown", "3"]) == 0
    page = Page((tmp_path / "out" / "attentions.html").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((tmp_path / "out" / "attentions.csv").open()))
    assert len({row["layer"] for row in rows}) == 52
    assert {row["attention"] for row in rows} == {"kernel", "mixed kernel"}
    assert page.shows("kw_mobilenetv2_050, ")
    assert page.shows("cells")
    assert page.texts[page.texts.index("blend") + 1] == "0"
    assert page.shows("How alike the cells of a layer are")


def test_cells_in_eight_bits(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    odconv.convert(model, to="kernelwarehouse", budget=2, warm_start=False, stages=["*"]).eval()
    files = {}
    for precision in ("float32", "int8"):
        files[precision] = odconv.export_onnx(model, tmp_path / f"{precision}.onnx", (3, 32, 32), precision=precision)
    assert files["int8"].megabytes < 0.35 * files["float32"].megabytes
    assert 0 < files["int8"].error < 0.05
    images = torch.randn(5, 3, 32, 32)
    (logits,) = runtime.InferenceSession(files["int8"].path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = model(images)
    assert (torch.from_numpy(logits) - wanted).abs().max() < 0.06 * wanted.abs().max()
