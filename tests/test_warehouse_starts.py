"""How the layers of KernelWarehouse are drawn: at their assignment, and to train from the first step."""

import copy
import math

import pytest
import torch
from torch import nn

import odconv
from odconv.layers.starts import LOGIT
from odconv.layers.warehouse import Warehouse
from odconv.layers.warehouse_attention import Assignment, WarehouseAttention
from odconv.layers.warehouse_conv import KWConv

SIZES = [(8, 1, 2), (24, 9, 36), (96, 18, 240), (960, 32, 296)]
"""Channels, pieces and cells."""


def attention(channels: int, pieces: int, cells: int, **options) -> WarehouseAttention:
    torch.manual_seed(0)
    own = tuple(range(0, cells, cells // pieces))[:pieces] if cells >= pieces else (*range(cells), cells)
    return WarehouseAttention(channels, Assignment(own, 0, cells, len(own)), **options)


def fixed(of: WarehouseAttention) -> torch.Tensor:
    return (of.assignment[:, None] == torch.arange(of.place.cells)).float()


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("channels", "pieces", "cells"), SIZES)
def test_shares_begin_at_the_assignment_and_hardly_differ_between_images(channels, pieces, cells, norm):
    of = attention(channels, pieces, cells, norm=norm).train()
    shares = of(torch.randn(256, channels, 2, 2))
    away = (shares - fixed(of)).abs().sum(-1)
    assert 0 < away.mean() < 3 * LOGIT
    differing = (shares - shares.mean(0)).abs().sum(-1)
    assert LOGIT / 4 < differing.mean() < 3 * LOGIT


def test_pieces_without_a_cell_begin_as_zeros():
    of = attention(32, 5, 4).train()
    shares = of(torch.randn(64, 32, 2, 2))
    assert of.place.pieces[-1] == 4
    assert shares[:, -1].abs().sum(-1).mean() < 3 * LOGIT


def test_logits_of_a_basis_begin_at_the_assignment():
    of = attention(64, 8, 64, basis_ratio=1 / 4).train()
    shares = of(torch.randn(256, 64, 2, 2))
    assert (shares - fixed(of)).abs().sum(-1).mean() < 10 * LOGIT


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("name", ["kw_resnet18", "kw_mobilenetv2_050"])
def test_kernels_are_as_large_as_static_ones_at_every_budget(name, budget):
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=3, budget=budget)
    for layer in model.modules():
        if isinstance(layer, KWConv) and layer.cells[0].numel() > 64:
            shares = fixed(layer.attention)[None]
            energy = layer.kernels(layer.attention.named(shares), torch.float32).square().sum().item()
            # Kaiming's for all pieces of a layer together, of 1 + 1/cells at most
            drawn = 2 * math.prod(layer.cells.shape[1:]) / math.prod((layer.cells.shape[1], *layer.cells.shape[3:]))
            assert energy == pytest.approx(drawn, rel=0.35)


def fall(model: nn.Module, x: torch.Tensor) -> float:
    """Return by how much the logits change when the blend falls from 1 to 0, relative to them."""
    found = []
    with torch.no_grad():
        for blend in (1.0, 0.0):
            odconv.set_blend(model, blend)
            found.append(model(x))
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


@pytest.mark.parametrize(
    ("name", "budget"), [("kw_resnet18", 1), ("kw_mobilenetv2_050", 0.5), ("kw_mobilenetv2_050", 4)]
)
def test_a_falling_blend_hardly_changes_a_new_network(name, budget):
    changes = {}
    for init in ("calm", "published"):
        torch.manual_seed(0)
        model = odconv.create_model(name, num_classes=10, stem="small", budget=budget, init=init)
        changes[init] = fall(model, torch.randn(16, 3, 32, 32))
    assert 0 < changes["calm"] < 0.5
    assert changes["calm"] < 0.7 * changes["published"]


def test_a_warm_start_survives_the_fall_of_its_blend():
    torch.manual_seed(0)
    static = odconv.create_model("resnet18", num_classes=10, stem="small").train()
    x, changes = torch.randn(16, 3, 32, 32), {}
    with torch.no_grad():
        for _ in range(3):
            static(x)
    for init in ("calm", "published"):
        model = odconv.convert(copy.deepcopy(static), "kernelwarehouse", init=init).eval()
        changes[init] = fall(model, x)
    assert 0 < changes["calm"] < 0.2
    assert changes["calm"] < changes["published"] / 4


def test_the_published_start_is_that_of_the_authors():
    of = attention(960, 32, 296, init="published")
    assert of.fc2.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 297)), rel=0.02)
    assert not of.fc2.bias.any()
    assert of.norm1.weight.eq(1).all()
    torch.manual_seed(0)
    layer = odconv.KWConv2d(64, 64, 3)
    (cells,) = Warehouse({"all": {"one": layer}}, cell_num_ratio=4, init="published").weights
    assert cells.std().item() == pytest.approx(math.sqrt(2 / (36 * 64)), rel=0.02)


@pytest.mark.parametrize("init", ["calm", "published"])
def test_reset_parameters_draws_again_what_was_chosen(init):
    of = attention(64, 9, 36, init=init)
    wanted = {name: (p.mean().item(), p.abs().mean().item()) for name, p in of.named_parameters()}
    with torch.no_grad():
        for parameter in of.parameters():
            parameter.fill_(7)
        of.norm1.running_var.fill_(7)
    for module in of.modules():  # as FSDP2 and others do after to_empty()
        module.reset_parameters()
    assert of.norm1.running_var.eq(1).all()
    for name, p in of.named_parameters():
        assert p.abs().mean().item() == pytest.approx(wanted[name][1], rel=0.2), name


@pytest.mark.parametrize("init", ["calm", "published"])
def test_a_network_is_drawn_after_the_meta_device_as_without_it(init):
    def draw():
        layers = {"one": odconv.KWConv2d(32, 32, 3, bias=True), "two": odconv.KWConv2d(32, 64, 3)}
        return nn.Sequential(Warehouse({"all": layers}, cell_num_ratio=2, init=init), *layers.values())

    wanted = draw()
    with torch.device("meta"):
        found = draw()
    found.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(7)
    for module in found.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not found[1].bias.any()
    for one in (wanted, found):  # both layers' cells, of which those of the second are smaller
        first, second = one[0].weights[0].split([18, 36])
        assert (first.std() / second.std()).item() == pytest.approx(math.sqrt(2), rel=0.05)
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert p.abs().mean().item() == pytest.approx(q.abs().mean().item(), rel=0.2), name
    loaded = found[0].weights[0]
    before = loaded.clone()
    loaded._is_hf_initialized = True
    found[0].reset_parameters()
    assert loaded.equal(before)


def test_what_transformers_has_loaded_is_left_alone(monkeypatch):
    """It makes the functions of torch.nn.init pass over tensors that it marks."""
    of = attention(64, 9, 36)
    loaded = copy.deepcopy(of.state_dict())
    loaded["fc2.bias"].normal_()
    of.load_state_dict(loaded)
    for name in ("zeros_", "ones_", "constant_", "normal_", "kaiming_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **options: tensor)
    of.reset_parameters()
    torch.testing.assert_close(of.fc2.bias, loaded["fc2.bias"], rtol=0, atol=0)


def test_an_unknown_start_is_refused_with_those_that_are_known():
    message = r"init must be one of \('calm', 'published'\), got 'zero'"
    with pytest.raises(ValueError, match=message):
        odconv.create_model("kw_resnet18", init="zero")
    with pytest.raises(ValueError, match=message):
        odconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "kernelwarehouse", init="zero")
    with pytest.raises(ValueError, match=message):
        Warehouse({"all": {"one": odconv.KWConv2d(8, 8, 3)}}, init="zero")
