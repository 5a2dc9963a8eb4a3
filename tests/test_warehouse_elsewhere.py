"""KernelWarehouse's networks in the rest of the library and in the application."""

import argparse
import csv
from math import log

import pytest
import torch
from pages import Page
from PIL import Image
from torch import nn

import odconv
from odconv.app.classify.restore import restore
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
    model = Sharing(init="published").eval()
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_cells_in_eight_bits(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 128, 3, padding=1)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
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


@pytest.mark.parametrize("options", [{}, {"budget": 2, "norm": "layer", "reduction": 1 / 8}, {"budget": 0.5}])
def test_conversions_are_reported_before_they_are_done(options):
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18()
    report = odconv.conversion_report(network, "kernelwarehouse", input_size=(3, 64, 64), **options)
    odconv.convert(network, to="kernelwarehouse", warm_start=False, **options)
    done = odconv.profile(network, (3, 64, 64))
    assert (report.parameters[1], report.madds[1]) == (done.parameters, done.madds)
    assert report.rows[0][:3] == ("warehouse_manager", "", "Warehouse")
    assert [row.reason for row in report.rows if not row.becomes] == ["the stem"] + ["a shortcut"] * 3
    with pytest.raises(TypeError, match="'kernel_num' is no option of kernelwarehouse"):
        odconv.conversion_report(network, "kernelwarehouse", kernel_num=2)


def test_layers_that_share_cells_are_dynamic_already():
    network = odconv.create_model("kw_resnet18")
    reasons = {row.name: row.reason for row in odconv.conversion_report(network, "odconv").rows}
    assert reasons.pop("conv1") == "the stem"
    assert {*reasons.values()} == {"dynamic already"}
    with pytest.raises(ValueError, match="has a warehouse already"):
        odconv.conversion_report(network, "kernelwarehouse")


def test_parameter_groups_know_the_attentions():
    model = Sharing()
    attentions = sum(p.numel() for name, p in model.named_parameters() if "attention" in name)
    groups = odconv.parameter_groups(model, lr=1.0, weight_decay=0.1, attention_lr=0.5)
    assert sum(p.numel() for group in groups for p in group["params"] if group["lr"] == 0.5) == attentions
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert {*model.warehouse_manager.parameters()} < decayed


def test_layers_that_share_cells_are_not_pruned():
    from odconv.conversion.pruning import keep_channels, keep_filters

    layer = Sharing().layers[0]
    for keep in (keep_filters, keep_channels):
        with pytest.raises(TypeError, match="a KWConv2d, whose cells are other layers' too; prune the static network"):
            keep(layer, [0, 1])


def test_torch_fx_records_a_layer_as_one_node():
    model = Sharing().eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [f"layers.{i}" for i in range(5)]
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(traced(x), model(x))
    with pytest.raises(TypeError, match="KWConv2d cannot be scripted"):
        torch.jit.script(model)


def test_channels_last_networks():
    torch.manual_seed(0)
    model = odconv.create_model("kw_resnet18", budget=0.5, num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    wanted.sum().backward()
    found = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    cells = [*model.warehouse_manager.parameters()]
    assert all(own.is_contiguous() and own.grad.is_contiguous() for own in cells)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(own.dtype == torch.float64 for own in model.double().warehouse_manager.parameters())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_is_that_of_static_layers(dims, mode, padding):
    """At blend 1 a layer is the static one of its cells."""
    kind, like = getattr(odconv, f"KWConv{dims}d"), getattr(nn, f"Conv{dims}d")
    torch.manual_seed(0)
    static = nn.Sequential(like(4, 6, (3, 2, 3)[:dims], padding=padding, padding_mode=mode, bias=True)).double()
    model = odconv.convert(nn.Sequential(*static), to="kernelwarehouse", include="*")
    assert type(model[-1]) is kind
    assert model[-1].padding_mode == mode
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    torch.testing.assert_close(model(x), static(x), rtol=1e-12, atol=1e-12)


def test_geometry_is_checked_as_elsewhere():
    with pytest.raises(ValueError, match="padding 'same' needs stride 1"):
        odconv.KWConv2d(4, 6, 3, stride=2, padding="same")
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        odconv.KWConv2d(4, 6, 3, padding_mode="mirror")


def test_ultralytics_networks_are_refused():
    yolo = pytest.importorskip("odconv.yolo")
    with pytest.raises(ValueError, match="got 'kernelwarehouse', whose layers share their cells"):
        yolo.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "kernelwarehouse")


@pytest.mark.parametrize(
    ("arch", "budget"), [("kw_resnet18", 0.25), ("kw_mobilenetv2_050", 4), ("kw_mobilenetv2_050", 0.5)]
)
def test_files_that_do_not_say_their_budget(arch, budget, tmp_path):
    torch.manual_seed(0)
    model = odconv.create_model(arch, budget=budget).eval()
    keys = (key for key in model.state_dict() if not key.endswith((".blend", ".assignment")))
    published = {key: model.state_dict()[key] for key in keys}
    torch.save({"model": published, "args": argparse.Namespace(lr=0.1)}, tmp_path / "published.pth")
    restored = restore(str(tmp_path / "published.pth"), arch=arch)
    assert restored.num_classes == 1000
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(restored.model(x), model(x))


def test_the_demo_opens_such_a_network(tmp_path):
    pytest.importorskip("gradio")
    from odconv.app.demo.cards import describe
    from odconv.app.demo.networks import load

    (network,) = load(save_run(tmp_path / "best.ckpt", "kw_resnet18", layer_options={"budget": 2}), None, None)
    assert len(network.layers) == 19
    cells = sorted({len(weight) for weight in network.model.warehouse_manager.weights})
    number = " or ".join(map(str, cells))
    assert describe(network).startswith(f"19 dynamic layers of {number} cells<br>")
