"""What other programs count of dynamic layers, beside :func:`odconv.profile`."""

import contextlib
import io

import pytest
import torch
from torch import nn

import odconv
from odconv.profiling import counters

SHAPE = (3, 24, 24)


class Own(odconv.ODConv2d):
    """A layer that a user derived from one of ours."""


def network(kernel_num=4):
    """Layers of every method, static ones among them, one that runs twice, and no norms: they differ about these."""
    torch.manual_seed(0)
    twice = odconv.ODConv2d(16, 16, 3, padding=1, kernel_num=kernel_num, norm="none")
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Sequential(twice, nn.ReLU(), twice),
        odconv.DyConv2d(16, 24, 3, 2, 1, kernel_num=kernel_num, bias=True),
        odconv.CondConv2d(24, 24, 3, padding=1, groups=24, kernel_num=kernel_num),
        Own(24, 32, 1, kernel_num=kernel_num, norm="none"),
        odconv.ODConvTranspose2d(32, 8, 2, 2, kernel_num=kernel_num, norm="none"),
        nn.Flatten(),
        nn.Linear(8 * 24 * 24, 5),
    ).eval()


def expected(model):
    report = odconv.profile(model, SHAPE)
    return pytest.approx(report.madds, rel=0.01), report.parameters


@pytest.fixture(params=[1, 4])
def model(request):
    return network(request.param)


@pytest.fixture
def thop(monkeypatch):
    package = pytest.importorskip("thop")
    monkeypatch.setattr(package, "profile", package.profile)  # restored afterwards
    return package


def test_thop(model, thop):
    x = torch.rand(1, *SHAPE)
    assert thop.profile(model, (x,), custom_ops=counters.thop_ops(), verbose=False) == expected(model)
    assert thop.profile(model, (x,), verbose=False)[0] < 0.8 * odconv.profile(model, SHAPE).madds


class ByKeyword(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for part in self.model:
            x = part(x=x) if isinstance(part, odconv.DynamicConv) else part(x)
        return x


def test_inputs_by_keyword(model, thop, capsys):
    x = torch.rand(1, *SHAPE)
    torch.testing.assert_close(ByKeyword(model)(x), model(x), rtol=0, atol=0)
    assert thop.profile(ByKeyword(model), (x,), custom_ops=counters.thop_ops(), verbose=False) == expected(model)
    pytest.importorskip("torchsummary").summary(ByKeyword(model), SHAPE, device="cpu")


def test_thop_unasked(model, thop):
    plain = thop.profile
    counters.register_thop()
    once = thop.profile
    counters.register_thop()
    assert thop.profile is once is not plain
    assert thop.profile(model, (torch.rand(1, *SHAPE),), verbose=False) == expected(model)

    def billion(layer, x, y):
        layer.total_ops += 10**9

    ops = {odconv.DyConv2d: billion}  # those of the caller go before ours
    assert thop.profile(model, (torch.rand(1, *SHAPE),), custom_ops=ops, verbose=False)[0] > 10**9


@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(model, backend):
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
    hooks = counters.ptflops_hooks()
    assert ptflops.get_model_complexity_info(model, SHAPE, custom_modules_hooks=hooks, **options) == expected(model)


def test_calflops(model, monkeypatch):
    calflops = pytest.importorskip("calflops")
    monkeypatch.setattr(calflops.pytorch_ops, "MODULE_HOOK_MAPPING", calflops.pytorch_ops.MODULE_HOOK_MAPPING.copy())
    pipeline = pytest.importorskip("calflops.calculate_pipline")
    monkeypatch.setattr(pipeline, "MODULE_HOOK_MAPPING", pipeline.MODULE_HOOK_MAPPING | counters.calflops_hooks())
    options = {"print_results": False, "output_as_string": False}
    flops, madds, parameters = calflops.calculate_flops(model, (1, *SHAPE), **options)
    assert (madds, parameters) == expected(model)
    assert flops == pytest.approx(2 * madds, rel=0.03)  # with biases and activations


def test_torchinfo(model):
    torchinfo = pytest.importorskip("torchinfo")
    statistics = torchinfo.summary(model, (2, *SHAPE), verbose=0)
    madds, parameters = expected(model)
    right = counters.torchinfo_statistics(statistics)
    assert (right.total_mult_adds / 2, right.total_params) == (madds, parameters)
    assert right.trainable_params == parameters
    assert right.total_param_bytes == 4 * parameters
    assert f"{right.total_params:,}" in str(right)
    assert "Attention" not in str(right)
    assert statistics.total_param_bytes < 4 * parameters
    again = counters.torchinfo_statistics(right)
    assert (again.total_mult_adds, again.total_params) == (right.total_mult_adds, right.total_params)
    with pytest.raises(ValueError, match="give summary an input_size"):
        counters.torchinfo_statistics(torchinfo.summary(model, verbose=0))


@pytest.mark.parametrize(
    "layer", [odconv.ODConv3d(4, 6, 3), odconv.ODConv2d(4, 4, 1, groups=4, attentions=["filter"], kernel_num=1)]
)
def test_torchsummary_lists_any_layer(layer, capsys):
    torchsummary = pytest.importorskip("torchsummary")
    torchsummary.summary(nn.Sequential(layer), (4, *(6,) * layer.dims), device="cpu")
    assert f"Total params: {sum(p.numel() for p in layer.parameters()):,}" in capsys.readouterr().out


def test_torchsummary(model, capsys):
    torchsummary = pytest.importorskip("torchsummary")
    model[1][2] = nn.Identity()  # it counts a layer at each of its calls
    model[2].kernel_bias.requires_grad_(False)
    torchsummary.summary(model, SHAPE, device="cpu")
    told = capsys.readouterr().out
    parameters = (
        odconv.profile(model, SHAPE).parameters - model[2].kernel_bias.numel()
    )  # it knows weight and bias alone
    assert f"Total params: {parameters:,}" in told


def test_counting_leaves_nothing_behind(model):
    ptflops = pytest.importorskip("ptflops")
    torchinfo = pytest.importorskip("torchinfo")
    keys, x = set(model.state_dict()), torch.rand(1, *SHAPE)
    before = model(x)
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()):
            ptflops.get_model_complexity_info(model, SHAPE, custom_modules_hooks=counters.ptflops_hooks())
            counters.torchinfo_statistics(torchinfo.summary(model, (1, *SHAPE)))
    assert set(model.state_dict()) == keys
    assert not any(hasattr(module, "__flops__") for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_lightning_summary(model):
    lightning = pytest.importorskip("lightning.pytorch")
    summaries = pytest.importorskip("lightning.pytorch.utilities.model_summary")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.example_input_array = model, torch.rand(1, *SHAPE)

        def forward(self, x):
            return self.network(x)

    summary = summaries.ModelSummary(Module())
    assert (summary.total_flops / 2, summary.total_parameters) == expected(model)


def test_fvcore_counts_the_traced_form(model):
    """It traces, and counts no products with gates."""
    fvcore = pytest.importorskip("fvcore.nn")
    found = fvcore.FlopCountAnalysis(model, torch.rand(1, *SHAPE)).unsupported_ops_warnings(False).total()
    assert found > 0.8 * odconv.profile(model, SHAPE).madds


class Sharing(nn.Module):
    """Layers of KernelWarehouse, whose warehouse nobody calls."""

    def __init__(self):
        super().__init__()
        first, second = odconv.KWConv2d(3, 16, 3, padding=1, bias=True), odconv.KWConv2d(16, 32, 3, padding=1)
        self.warehouse = odconv.Warehouse({"one": {"first": first}, "two": {"second": second}}, cell_num_ratio=4)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(32 * 24 * 24, 5))

    def forward(self, x):
        return self.layers(x)


def test_layers_that_share_cells(thop, monkeypatch):
    model = Sharing().eval()
    madds, parameters = expected(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    cells = sum(p.numel() for p in model.warehouse.parameters())
    found = thop.profile(model, (torch.rand(1, *SHAPE),), custom_ops=counters.thop_ops(), verbose=False)
    assert found in [(madds, parameters - cells), (madds, parameters)]  # ultralytics' thop sees the cells too
    ptflops = pytest.importorskip("ptflops")
    for backend in ("pytorch", "aten"):
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        hooks = counters.ptflops_hooks()
        assert ptflops.get_model_complexity_info(model, SHAPE, custom_modules_hooks=hooks, **options)[0] == madds
    calflops = pytest.importorskip("calflops")
    pipeline = pytest.importorskip("calflops.calculate_pipline")
    monkeypatch.setattr(pipeline, "MODULE_HOOK_MAPPING", pipeline.MODULE_HOOK_MAPPING | counters.calflops_hooks())
    options = {"print_results": False, "output_as_string": False}
    assert calflops.calculate_flops(model, (1, *SHAPE), **options)[1:] == (madds, parameters)
    torchinfo = pytest.importorskip("torchinfo")
    right = counters.torchinfo_statistics(torchinfo.summary(model, (2, *SHAPE), verbose=0))
    assert (right.total_mult_adds / 2, right.total_params) == (madds, parameters)
    assert right.total_param_bytes == 4 * parameters
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(torch.rand(1, *SHAPE))
    assert counter.get_total_flops() / 2 == madds
