"""What dynamic layers do: recorded, measured, drawn, and on a page."""

import csv
import re
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from math import isnan, sqrt

import pytest
import tiny
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from pages import CHROMIUM, Page, browse
from pages import measure as measure_page
from PIL import Image
from torch import nn

import odconv
from odconv.app.cli import main
from odconv.app.data import evaluation_transform, normalise, read_image
from odconv.app.pages import plot_attentions
from odconv.app.pages.curves import draw_history
from odconv.app.pages.reports import read_run
from odconv.app.pages.reports.pictures import draw_cells
from odconv.app.pages.visualize.gallery import explain_examples
from odconv.app.pages.visualize.gradcam import choose_layer, grad_cam
from odconv.app.pages.visualize.images import Pictures, choose, find, read
from odconv.app.pages.visualize.overview import draw_deviations
from odconv.app.pages.visualize.page import write_page
from odconv.app.pages.visualize.subject import Subject
from odconv.attentions import attention_statistics, record_attentions
from odconv.attentions.class_scatter import scatter
from odconv.attentions.kernels import kernel_similarity, scatter_of_kernels
from odconv.attentions.measurement import answer, measure
from odconv.attentions.verdicts import deviation


def network(dims=2):
    conv = (odconv.ODConv1d, odconv.ODConv2d, odconv.ODConv3d)[dims - 1]
    condconv = (odconv.CondConv1d, odconv.CondConv2d, odconv.CondConv3d)[dims - 1]
    return nn.Sequential(
        conv(3, 8, 3, kernel_num=4), conv(8, 8, 1, kernel_num=1), nn.Dropout(0.5), condconv(8, 6, 3)
    )  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_record_attentions(dims):
    model, x = network(dims), torch.randn(2, 3, *[7] * dims)
    model[0].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recorded = record_attentions(model, x)
    assert list(recorded) == ["0", "1", "3"]
    assert recorded["0"].spatial.shape == (2, *[3] * dims)
    assert recorded["0"].kernel.shape == (2, 4)
    assert recorded["1"].kernel is None
    assert recorded["1"].spatial is None
    assert recorded["3"].kernel.shape == (2, 8)
    assert not recorded["0"].filter.requires_grad
    with torch.no_grad():
        expected = model[0].attention(x)
    assert all(torch.equal(a, b) for a, b in zip(recorded["0"], expected, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_model_is_restored_after_an_error():
    model = network()
    with pytest.raises(ValueError, match="C = 3"):
        record_attentions(model, torch.randn(2, 4, 7, 7))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_static_network_has_no_attentions():
    with pytest.raises(ValueError, match="dynamic layers"):
        record_attentions(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_plot_attentions(dims, tmp_path):
    recorded = record_attentions(network(dims), torch.randn(3, 3, *[7] * dims))
    figure = plot_attentions(recorded)
    figure.savefig(tmp_path / "attentions.png", dpi=50)
    assert (tmp_path / "attentions.png").stat().st_size > 1000
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"0", "1", "3"} <= set(texts)
    assert sum(text.startswith("spatial") for text in texts) == 1
    assert sum(text.startswith("kernel") for text in texts) == 2


def test_plot_attentions_draws_shares_to_scale():
    x = torch.randn(2, 3, 7, 7)
    recorded = record_attentions(network(), x)
    figure = plot_attentions(recorded, x, ["cat", "dog"], layers=["0"])
    kernel = next(axes for axes in figure.axes if any(text.get_text().startswith("kernel") for text in axes.texts))
    widths = (
        torch.tensor([[bar.get_extents().width for bar in bars.get_paths()] for bars in kernel.collections]).float().t()
    )
    assert torch.allclose(widths / widths.sum(1, keepdim=True), recorded["0"].kernel, atol=1e-5)
    assert len(figure.axes[0].images) == 2


@pytest.mark.parametrize("title", ["7", "7, taken for 1", "a title of some thirty letters"])
def test_titles_end_before_the_panels(title):
    x = torch.randn(2, 3, 7, 7)
    figure = plot_attentions(record_attentions(network(), x), x, [title] * 2, layers=["0"])
    figure.canvas.draw()
    words = [text for text in figure.axes[0].texts if text.get_text() == title]
    assert len(words) == 2
    assert all(text.get_window_extent().x1 < figure.axes[1].get_window_extent().x0 for text in words)


def test_plot_attentions_picks_four_layers():
    model = nn.Sequential(*(odconv.ODConv2d(3, 3, 1, kernel_num=2) for _ in range(9)))
    figure = plot_attentions(record_attentions(model, torch.randn(1, 3, 4, 4)))
    names = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [name for name in names if name in set("02345678")] == ["0", "3", "5", "8"]


@pytest.mark.parametrize("wrong", [{"titles": ["one"]}, {"images": torch.zeros(3, 3, 7, 7)}, {"layers": ["2"]}])
def test_plot_attentions_says_what_is_wrong(wrong):
    recorded = record_attentions(network(), torch.randn(2, 3, 7, 7))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plot_attentions(recorded, **wrong)


@pytest.mark.parametrize("epochs", [1, 2])
def test_few_epochs_have_whole_ticks(epochs):
    row = {"train_loss": 1.0, "top1": 50.0, "temperature": 1.0}
    figure = draw_history({"run": [row | {"epoch": epoch} for epoch in range(1, epochs + 1)]})
    cells = Figure().subplots()
    draw_cells(cells, ["layer"], {("layer", float(epoch)): 0.5 for epoch in range(1, epochs + 1)}, Normalize(0, 1))
    for axes in (*figure.axes, cells):
        axes.figure.canvas.draw()
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [*range(1, epochs + 1)]


def test_draw_history(tmp_path):
    for name, offset in {"static": 0.0, "dynamic": 1.0}.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "train_loss", "val_loss", "top1", "temperature"])
            writer.writerows([[e, 2 / e + offset, 3 / e, 10.0 * e, 30 / e] for e in range(1, 6)])
    figure = draw_history({name: read_run(tmp_path / name).epochs for name in ("static", "dynamic")})
    figure.savefig(tmp_path / "curves.png", dpi=50)
    losses, accuracy, temperature = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 2]
    assert [*accuracy.lines[0].get_ydata()] == [10, 20, 30, 40, 50]
    assert losses.lines[2].get_ydata()[0] == 3
    assert temperature.lines[0].get_ydata()[-1] == 6


def test_what_draws_and_predicts_needs_neither_pyplot_nor_lightning():
    code = (
        "import sys, torch, odconv, odconv.app.pages as v, odconv.attentions as a, odconv.app.commands.visualize;"
        "assert not {'matplotlib', 'lightning'} & sys.modules.keys();"
        "m = odconv.ODConv2d(3, 3, 3); v.plot_attentions(a.record_attentions(m, torch.randn(2, 3, 5, 5)));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what differs between images and between classes


def test_scatter_by_its_definition():
    values, labels = torch.randn(9, 2, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 2, 2, 5, 5, 5, 5])
    found = scatter(values, labels)
    mean = values.mean(0)
    means = torch.stack([values[labels == label].mean(0) for label in labels])
    assert found[:3] == (9, 3, 6)
    assert found.norm == pytest.approx(mean.square().sum().item(), rel=1e-5)
    assert found.total == pytest.approx((values - mean).square().sum().item(), rel=1e-5)
    assert found.between == pytest.approx((means - mean).square().sum().item(), rel=1e-5)
    assert found.within_classes == pytest.approx((values - means).square().mean().sqrt().item(), rel=1e-5)
    assert found.between_classes == pytest.approx((means - mean).square().mean().sqrt().item(), rel=1e-5)
    parts = [scatter(values[:, :1], labels), scatter(values[:, 1:], labels)]
    assert sum(parts[1:], parts[0]) == pytest.approx(found)


def test_the_share_of_classes():
    labels = torch.arange(400) % 10
    of_classes, chance = torch.randn(10, 50)[labels], torch.randn(400, 50)
    assert scatter(of_classes, labels).class_share == pytest.approx(1)
    assert scatter(chance, labels).class_share < 0.03  # the plain share of the variance is 9 / 399, of 20 images 9 / 19
    assert scatter(chance[:20], labels[:20]).class_share < 0.2
    assert scatter(of_classes + chance, labels).class_share == pytest.approx(0.5, abs=0.1)
    assert scatter(torch.ones(8, 3), labels[:8] % 2).class_share == 0
    assert isnan(scatter(chance).class_share)
    assert isnan(scatter(chance).within_classes)
    assert isnan(scatter(chance[:10], labels[:10]).class_share)  # one image a class


@pytest.mark.parametrize(
    "layer",
    [
        odconv.ODConv2d(4, 6, 3, kernel_num=3),
        odconv.ODConv2d(4, 6, 1, kernel_num=1),
        odconv.ODConv2d(4, 4, 3, groups=4, kernel_num=2),
        odconv.ODConv1d(4, 6, 3, groups=2),
        odconv.CondConv2d(4, 6, 3, kernel_num=3),
        odconv.ODConvTranspose2d(4, 6, 3, groups=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}, {layer.groups}, {layer.kernel_num}",
)
@pytest.mark.parametrize("numbers", [1, 1 << 22])
def test_mixed_kernels_differ_as_the_static_ones_of_single_images_do(layer, numbers, monkeypatch):
    monkeypatch.setattr("odconv.attentions.kernels.NUMBERS", numbers)
    torch.manual_seed(0)
    layer.attention.init = "published"  # kernels that differ between images
    layer.reset_parameters()
    x, labels = torch.randn(5, 4, *[6] * layer.dims), torch.tensor([0, 1, 0, 1, 1])
    model = nn.Sequential(
        layer.eval(), nn.AdaptiveAvgPool1d(1) if layer.dims == 1 else nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    kernels = torch.stack([odconv.to_static(model, [image[None]]).model[0].weight.detach() for image in x])
    found = scatter_of_kernels(layer, record_attentions(model, x)["0"], labels)
    assert found == pytest.approx(scatter(kernels, labels), rel=1e-4)


def test_shares_of_equal_kernels_come_to_nothing():
    layer = odconv.ODConv2d(4, 4, 3, kernel_num=3, attentions=("kernel",), init="published").eval()
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
    model = nn.Sequential(layer)
    (found,) = measure(model, record_attentions(model, torch.randn(6, 4, 8, 8)), None)
    assert deviation(found.rows["kernel"]) > 0.05
    assert deviation(found.whole) < 1e-3
    assert found.static
    assert torch.allclose(found.similarity, torch.ones(3, 3))


def test_similarity_of_kernels():
    kernels = torch.tensor([[1.0, 0], [0, 2], [-3, 0]]).view(3, 1, 1, 2)
    assert torch.equal(kernel_similarity(kernels), torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]]))


# ---- images


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ({"a": 100, "b": 100}, 10, {"a": 5, "b": 5}),
        ({"a": 2, "b": 100}, 10, {"a": 2, "b": 8}),
        ({"a": 2, "b": 3}, 10, {"a": 2, "b": 3}),
        ({"a": 7, "b": 7, "c": 7}, 2, {"b": 1, "c": 1}),
    ],
)
def test_images_are_chosen_evenly(sizes, most, expected):
    classes = [name for name, size in sizes.items() for _ in range(size)]
    chosen = choose(classes, most)
    assert Counter(classes[index] for index in chosen) == expected
    assert chosen == sorted(set(chosen))


def test_images_of_a_class_are_spread_over_it():
    assert choose(["a"] * 100, 4) == [0, 25, 50, 75]


def write_images(root, names, side=12):
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 255, (4, 4, 3), generator=colour, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((side, side)).save(path)
    return root


def test_classes_of_images(tmp_path):
    names = [f"{name}/{index}.png" for name in ("dog", "cat") for index in range(2)]
    root = write_images(tmp_path / "val", names)
    by_name = [*["cat"] * 2, *["dog"] * 2]
    assert find([str(root)], [])[1] == by_name
    assert find([str(root)], ["dog", "cat"])[1] == by_name[::-1]  # in the order of the network's
    assert find([f"{root}/*/*.png"], ["dog", "cat"])[1] == by_name[::-1]
    assert find([f"{root}/dog", f"{root}/cat"], ["cat", "dog"])[1] == by_name
    assert find([str(tmp_path)], ["cat", "dog"])[1] == by_name  # whose subfolder is val
    assert find([f"{root}/*/*.png"], [])[1] is None
    assert find([f"{root}/dog", f"{root}/cat"], [])[1] is None
    assert find([str(root), *[str(write_images(tmp_path, ["other.png"]) / "other.png")]], [])[1] is None
    assert find([f"{root}/dog"], ["dog"])[1] is None  # one class alone


def test_folders_of_classes_that_the_weights_do_not_name(tmp_path):
    root = str(write_images(tmp_path, ["n2/0.png", "n1/0.png", "n1/1.png"]))
    options = {"most": 8, "image_size": 8, "resize_size": 8}
    assert read([root], [], ["tench", "shark"], **options).classes == ["tench", "tench", "shark"]
    assert read([root], [], ["tench", "shark", "ray"], **options).classes == ["n1", "n1", "n2"]
    assert read([root], ["n2", "n1", "n3"], ["tench", "shark", "ray"], **options).classes == ["tench", "shark", "shark"]


# ---- Grad-CAM


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.stage = nn.Sequential(odconv.ODConv2d(4, 6, 3, kernel_num=2), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def test_grad_cam_by_its_definition():
    model, x, targets = Small().eval(), torch.randn(3, 3, 17, 17), torch.tensor([0, 4, 2])
    maps = model.stage(model.stem(x)).detach().requires_grad_()
    answers = model.head(maps.mean((2, 3)))[range(3), targets].sum()
    (gradients,) = torch.autograd.grad(answers, maps)
    expected = (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12)
    assert torch.allclose(grad_cam(model, "stage", x, targets), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("resnet18", 96, "layer4"), ("resnet18", 64, "layer3"), ("mobilenetv2_050", 32, "features.6")],
)
def test_the_layer_of_grad_cam(name, side, expected):
    model, x = odconv.create_model(name, num_classes=3).eval(), torch.randn(2, 3, side, side)
    assert choose_layer(model, x) == expected
    assert choose_layer(model, x[..., :2, :2]) is None


# ---- the command


def save(path, arch, classes=(), **options):
    """A checkpoint as odconv train writes them."""
    torch.manual_seed(0)
    start = (
        {"init": "published"} if arch.startswith(("od_", "dy_", "cond_")) else {}
    )  # attentions that differ between images
    model = odconv.create_model(arch, num_classes=3, stem="small", **options, **start)
    config = {"arch": arch, "stem": "small", "image_size": 16, "resize_size": 16, **options}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    notes = {"classes": list(classes) or None, "temperature": 1.0}
    torch.save({"state_dict": state, "hyper_parameters": config, "odconv": notes}, path)
    return str(path)


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """What the command made of images of three classes, one of which is none, and what it printed."""
    folder = tmp_path_factory.mktemp("look")
    root = write_images(
        folder / "val", [f"{name}/{index}.png" for name in ("a<b>", "$c^2$", "d") for index in range(4)]
    )
    (root / "d" / "broken.png").write_bytes(b"none")
    weights = save(folder / "best.ckpt", tiny.DYNAMIC, ["d", "a<b>", "$c^2$"], kernel_num=3)
    words = ["visualize", str(root), "--weights", weights, "--out", str(folder / "out"), "--shown", "5"]
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        assert main(words) == 0
    return folder / "out", output.getvalue(), errors.getvalue()


def test_the_page(looked):
    out, output, errors = looked
    page = Page((out / "attentions.html").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((out / "attentions.csv").open()))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert len(layers) == 15
    assert page.shows("od_tiny, 3 kernels")
    assert page.shows("of 15 dynamic layers")
    assert all(page.shows(layer) for layer in layers)
    assert page.texts[page.texts.index("images") + 1] == "12"
    assert page.texts[page.texts.index("classes") + 1] == "3"
    assert page.tags.count("svg") == 4 + 15
    assert page.tags.count("img") == 2 * 5
    assert page.shows("a<b>")
    assert page.shows("$c^2$")
    assert page.shows("Grad-CAM on the map of features.3")
    assert "broken.png" in errors
    assert "Traceback" not in errors
    assert re.search(r"mixed kernel +± \d+\.\d % +\d+\.\d % +\d+ +\d+ +\d+\n", output)
    assert output.splitlines()[-1] == f"written: {out / 'attentions.html'}"


def test_the_numbers(looked):
    rows = {(row["layer"], row["attention"]): row for row in csv.DictReader((looked[0] / "attentions.csv").open())}
    model = odconv.create_model(tiny.DYNAMIC, num_classes=3, stem="small", kernel_num=3)
    odconv.load_checkpoint(model, looked[0].parent / "best.ckpt")
    paths, classes = find([str(looked[0].parent / "val")], ["d", "a<b>", "$c^2$"])
    paths = [path for path in paths if path.name != "broken.png"]
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    assert sorted({*classes}) == ["$c^2$", "a<b>", "d"]
    x = normalise(torch.stack([evaluation_transform(16, 16)(read_image(path)) for path in paths]))
    recorded = record_attentions(model, x)
    for expected in attention_statistics(model, x):
        row = rows[expected["layer"], expected["attention"]]
        assert float(row["between_images"]) == pytest.approx(expected["between_images"], rel=1e-3, abs=1e-6)
        values = getattr(recorded[expected["layer"]], expected["attention"])
        assert float(row["class_share"]) == pytest.approx(scatter(values, labels).class_share, rel=1e-2, abs=1e-3)
    found = scatter_of_kernels(model.features[3].conv[2], recorded["features.3.conv.2"], labels)
    row = rows["features.3.conv.2", "mixed kernel"]
    share = sqrt(found.total / 12 / found.norm)
    assert float(row["between_images"]) / float(row["mean"]) == pytest.approx(share, rel=1e-3)


def test_the_pictures(looked):
    out, *_ = looked
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert {"overview.png", "classes.png", "kernels.png", "shares.png", "images.png"} < names
    assert {"layers/01_features.1.conv.0.0.png", "layers/15_features.6.0.png"} < names
    assert len(names) == 5 + 15
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.width == 880
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 50
    assert not list(out.rglob("*.partial"))


def test_what_is_static_is_blank():
    torch.manual_seed(0)
    model = nn.Sequential(
        odconv.ODConv2d(3, 4, 3, kernel_num=2), odconv.ODConv2d(4, 4, 1, kernel_num=2, init="published")
    ).eval()
    for head in ("kernel", "spatial", "channel", "filter"):
        nn.init.zeros_(getattr(model[0].attention, f"{head}_fc").weight)
    x = torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(6, 3, 9, 9)
    layers = measure(model, record_attentions(model, x), None)
    assert [layer.static for layer in layers] == [True, False]
    svg = draw_deviations(layers).svg()
    cells = re.findall(r">(\d+\.\d|\d{2,}|-)</text>", svg)  # the layers are called 0 and 1
    assert cells[:5] == ["0.0"] * 5
    assert cells[7] == "-"  # a 1 x 1 kernel has no spatial attention
    assert all(float(cell) > 1 for cell in (*cells[5:7], *cells[8:10]))
    assert svg.count("opacity: ") == 4 + 2  # the cells of the second layer and the legend, in which one is full


@pytest.mark.parametrize(
    ("layer", "columns"),
    [
        (odconv.CondConv2d, ["kernel"]),
        (odconv.DyConv2d, ["kernel"]),
        (odconv.ODConv2d, ["kernel", "spatial", "filter", "channel"]),
        (partial(odconv.ODConv2d, kernel_num=1), ["spatial", "filter", "channel"]),
    ],
)
def test_pages_of_all_families_without_classes(layer, columns, tmp_path):
    model = nn.Sequential(layer(3, 4, 3), layer(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    pixels = torch.randint(0, 255, (5, 3, 8, 8), dtype=torch.uint8)
    device = torch.device("cpu")
    logits, recorded = answer(model, normalise(pixels).split(32))
    pictures = Pictures([tmp_path / f"{index}.png" for index in range(5)], pixels, None)
    layers = measure(model, recorded, None)
    subject = Subject("mine", "mine.ckpt", list("abcd"), None, pictures, logits.softmax(1), layers)
    path = write_page(tmp_path, subject, [0, 3], explain_examples(subject, model, device, [0, 3], None), None)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.shows("The classes of the images are not known")
    assert page.shows("Grad-CAM would say nothing and is left out")
    assert page.labels[: len(columns) + 2] == ["all", "together", *columns]
    assert not page.shows("How much of that is a matter of the class")
    assert page.shows("How alike the kernels of a layer are") == ("kernel" in columns)
    assert page.tags.count("img") == 2
    assert not (tmp_path / "classes.png").exists()


def test_mistakes(tmp_path, capsys):
    root = write_images(tmp_path / "images", ["1.png", "2.png"])
    static = save(tmp_path / "static.ckpt", "mobilenetv2_050")
    (tmp_path / "file").write_text("")
    (tmp_path / "no.png").write_text("no image")
    usual = ["--weights", save(tmp_path / "x.ckpt", "od_mobilenetv2_050", kernel_num=2), "--out", str(tmp_path / "out")]
    for said, *words in (  # the last of an option that is given twice counts
        ("mobilenetv2_050 is static", root, "--weights", static),
        ("arch must be od_mobilenetv2_050, .*, got od_resnet18", root, "--arch", "od_resnet18"),
        ("nowhere.ckpt do", root, "--weights", "nowhere.ckpt"),
        ("cannot be written", root, "--out", tmp_path / "file"),
        ("at least two that can be read, got 1", root / "1.png"),
        ("nowhere(.|\n)*no.png(.|\n)*at least two that can be read, got 0", tmp_path / "no.png", "nowhere"),
        ("max_images must be at least 2, got 1", root, "--max_images", "1"),
        ("shown must be at least 1, got 0", root, "--shown", "0"),
        ("cam_layer must be .* such as features.*, got fc", root, "--cam_layer", "fc"),
    ):
        assert main(["visualize", *usual, *map(str, words)]) == 1
        errors = capsys.readouterr().err
        assert re.search(said, errors), errors
        assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(looked, width, tmp_path):
    out, *_ = looked
    _, errors = browse(out / "attentions.html", tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}")
    assert errors == []
    page = measure_page(out / "attentions.html", tmp_path, width)
    assert page["width"] == page["scroll"] == width
    assert page["outside"] == []
    assert page["text"] > 1500
    assert page["label"] >= 7
