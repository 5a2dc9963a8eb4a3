import csv
import subprocess
import sys

import pytest
import torch
from torch import nn

import odconv
from odconv.visualize import plot_attentions, plot_history, record_attentions

pytest.importorskip("matplotlib")


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
    widths = torch.tensor([bar.get_width() for bar in kernel.patches]).view(4, 2).t()
    assert torch.allclose(widths / widths.sum(1, keepdim=True), recorded["0"].kernel, atol=1e-5)
    assert len(figure.axes[0].images) == 2


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


def test_plot_history(tmp_path):
    for name, offset in {"static": 0.0, "dynamic": 1.0}.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "train_loss", "val_loss", "top1", "temperature"])
            writer.writerows([[e, 2 / e + offset, 3 / e, 10.0 * e, 30 / e] for e in range(1, 6)])
    figure = plot_history({name: tmp_path / name for name in ("static", "dynamic")})
    figure.savefig(tmp_path / "curves.png", dpi=50)
    losses, accuracy, temperature = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 2]
    assert [*accuracy.lines[0].get_ydata()] == [10, 20, 30, 40, 50]
    assert losses.lines[2].get_ydata()[0] == 3
    assert temperature.lines[0].get_ydata()[-1] == 6
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv"):
        plot_history({"none": tmp_path / "missing"})
    with pytest.raises(ValueError, match="runs"):
        plot_history({})


def test_pyplot_is_not_needed():
    code = (
        "import sys, torch, odconv, odconv.visualize as v; assert 'matplotlib' not in sys.modules;"
        "m = odconv.ODConv2d(3, 3, 3); v.plot_attentions(v.record_attentions(m, torch.randn(2, 3, 5, 5)));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
