import io
import math
import re

import pytest
import torch
from torch import nn

import odconv
from odconv.app.commands.profile import profile_networks
from odconv.profiling import PUBLISHED, latencies, profile


class Everything(nn.Module):
    """One layer of every kind that is counted, one used twice, one never, and a parameter outside of layers."""

    def __init__(self, dims):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        dynamic = (odconv.ODConv1d, odconv.ODConv2d, odconv.ODConv3d)[dims - 1]
        self.conv = conv(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm = norm(8)
        self.twice = conv(8, 8, 1)
        self.dynamic = dynamic(8, 6, 3, padding=1, kernel_num=2)
        self.dropout = nn.Dropout(0.5)
        self.transposed = transposed(6, 4, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(5))
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(4, 10)
        self.dims = dims

    def forward(self, x):
        x = self.twice(self.twice(self.norm(self.conv(x))))
        x = self.transposed(self.dropout(self.dynamic(x)))
        return self.fc(x.flatten(2).mean(2)) * self.scale.sum()


def by_name(result):
    return {row.name: row for row in result.rows}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_counts_by_hand(dims):
    model = Everything(dims)
    result = profile(model, (4, *[8] * dims))
    rows = by_name(result)
    full, half = 8**dims, 4**dims
    taps = 3**dims
    assert rows["conv"].madds == 8 * half * 2 * taps
    assert rows["conv"].output_shape == (8, *[4] * dims)
    assert rows["twice"].madds == 2 * 8 * 8 * half
    attention = 16 * 8 + 16 * (8 + 6 + taps + 2)
    weights = 2 * 6 * 8 * taps
    assert rows["dynamic"].madds == 6 * 8 * taps * half + attention + (8 + 6) * half + 2 * weights
    assert rows["transposed"].madds == half * 6 * 4 * 2**dims
    assert rows["transposed"].output_shape == (4, *[8] * dims)
    assert full == math.prod(rows["transposed"].output_shape[1:])
    assert rows["fc"].madds == 4 * 10
    assert rows["unused"].madds == 0
    assert rows["unused"].output_shape is None
    assert rows["norm"].madds == 0
    assert rows[""].parameters == 5
    assert result.madds == sum(row.madds for row in result.rows)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "extra"),
    [
        (odconv.ODConv2d(8, 8, 3, groups=8, kernel_num=1), 16 * 8 + 16 * (8 + 9) + 8 * 36 + 8 * 9),  # no filter head
        (odconv.ODConv2d(8, 4, 1, kernel_num=4), 16 * 8 + 16 * (8 + 4 + 4) + (8 + 4) * 36 + 4 * 32),  # no spatial head
        (odconv.ODConv2d(8, 4, 1, kernel_num=1, attentions=["filter"]), 16 * 8 + 16 * 4 + 4 * 36),
        (odconv.DyConv2d(8, 4, 1, kernel_num=4), 4 * 8 + 4 * 4 + 4 * 32),
        (odconv.CondConv2d(8, 4, 1, kernel_num=8), 8 * 8 + 8 * 32),
    ],
    ids=["depthwise", "pointwise", "filter only", "dyconv", "condconv"],
)
def test_what_a_dynamic_layer_counts(layer, extra):
    size = 6 + layer.kernel_size[0] - 1  # a map of 6 x 6 comes out
    kernel = layer.weight[0].numel()
    channel = 8 * (size * size - 36) if "channel" in layer.attention.heads else 0  # it scales the map that goes in
    assert profile(layer, (8, size, size)).madds == 36 * kernel + extra + channel


@pytest.mark.parametrize("size", [(4, 8, 8), (1, 4, 8, 8), (5, 4, 8, 8)])
def test_counts_are_for_one_sample(size):
    model = Everything(2)
    assert profile(model, size) == profile(model, (4, 8, 8))


def test_linear_network_and_shared_weights():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert profile(model, (6,)).parameters == 42
    assert profile(model, (6,)).madds == profile(model, (3, 6)).madds == 72


def test_the_model_is_left_as_it_was():
    model = Everything(2)
    model.dropout.eval()  # a mode of its own
    x = torch.randn(3, 4, 8, 8)
    model.fc.register_forward_hook(lambda *_: torch.rand(1))  # draws a random number, whatever the mode
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    profile(model, (4, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError):
        profile(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model(x).requires_grad


def test_buffers_that_change_in_evaluation_are_restored():
    norm = nn.BatchNorm2d(4)
    norm.eval = norm.train  # some networks keep their norms in training mode
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    profile(model, (2, 4, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dtype_of_the_model_is_used():
    assert profile(nn.Conv2d(3, 8, 3).double(), (3, 8, 8)) == profile(nn.Conv2d(3, 8, 3), (3, 8, 8))


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, 8.0, 8), 224, "3x8"])
def test_input_size_is_checked(size):
    with pytest.raises(ValueError, match="input_size"):
        profile(nn.Conv2d(3, 8, 3), size)


def test_tables():
    console = pytest.importorskip("rich.console").Console(width=200, file=io.StringIO())
    result = profile(Everything(2), (4, 8, 8))
    text = str(result)
    assert "ODConv2d" in text
    assert f"{result.madds:,}" in text
    console.print(result)
    drawn = console.file.getvalue()
    assert f"{result.madds:,}" in drawn
    assert "dynamic" in drawn


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.name} {row.kernel_num or row.budget or ''}",
            marks=() if row.budget in (None, 1) else pytest.mark.slow,
        )
        for row in PUBLISHED
    ],
)
def test_published_rows(row):
    pytest.importorskip("torchvision")
    from benchmarks.common import RESULTS, read_rows

    from odconv.profiling.published import count_published

    counts, madds = count_published(row)
    assert f"{counts.parameters / 1e6:.2f}" == f"{row.parameters:.2f}"
    if row.madds is not None:
        assert madds == pytest.approx(row.madds * 1e6, rel=0.02)
    if row.kernel_num is None and row.madds is not None:
        assert madds == pytest.approx(row.madds * 1e6, rel=6e-4)  # as printed
    (written,) = (
        found
        for found in read_rows(RESULTS / "costs.csv")
        if found["model"] == row.name
        and found["kernel_num"] == str(row.kernel_num or "")
        and found["budget"] == str(row.budget or "")
    )
    assert [counts.parameters, counts.madds, madds] == [
        int(written[column]) for column in ("parameters", "madds", "madds_as_published")
    ]


def test_latencies():
    small, large = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 256, 7, padding=3)
    quick, slow = latencies([small, large], torch.rand(2, 8, 32, 32), runs=5)
    assert 0 < quick < slow


def test_command(capsys):
    pytest.importorskip("torchvision")
    profile_networks(["od_mobilenetv2_050", "resnet18"], num_classes=10, image_size=32, batch_size=2, runs=1)
    out = capsys.readouterr().out
    assert "od_mobilenetv2_050: 1.16M parameters" in out
    assert re.search(r"median of 1 runs, batch 2, 32 x 32, \d+ CPU threads?", out)
    assert re.search(r"[\d.]+ times that of mobilenetv2_050", out)
    assert "times that of resnet18" not in out
    profile_networks(["resnet18"], image_size=32, latency=False)
    assert "latency" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--table"),
        ({"names": ["od_resnet19"]}, "did you mean"),
        ({"names": ["resnet18"], "kernel_num": 4}, "static"),
        ({"names": ["resnet18"], "runs": 0}, "runs must be at least 1"),
        ({"names": ["resnet18"], "image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_command_says_what_is_wrong(options, message):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=message):
        profile_networks(**options)
