"""KernelWarehouse: layers, warehouse, networks, held against what the published code computes."""

import argparse
import copy
import fractions
import hashlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from parameters import slow_except
from torch import nn

import odconv
from odconv.checkpoints import save_safetensors
from odconv.conversion.fusion import fold_batch_norm
from odconv.layers.warehouse import Warehouse, shared_by_name
from odconv.layers.warehouse_attention import WarehouseAttention, set_blend
from odconv.layers.warehouse_conv import KWConv, KWConv1d, KWConv2d, KWConv3d, KWLinear
from odconv.models.build import make_dynamic, shapes_alone
from odconv.ops.cells import assemble

KINDS = {"conv1d": KWConv1d, "conv2d": KWConv2d, "conv3d": KWConv3d}
OURS = (".blend", ".assignment")  # what published files do not hold


def uniform(name, shape):
    """The draws of the golden values: a rule of a tensor's name and shape."""
    seed = int(hashlib.md5(name.encode()).hexdigest()[:16], 16)
    return 2 * np.random.Generator(np.random.PCG64(seed)).random(math.prod(shape)).reshape(shape) - 1


def golden_tensor(key, tensor):
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(tensor)
    s = uniform(key, tuple(tensor.shape))
    if key.endswith("running_var"):
        value = 1 + 0.3 * s
    elif key.endswith("running_mean"):
        value = 0.1 * s
    elif tensor.dim() == 1:
        value = 1 + 0.2 * s if key.endswith("weight") else 0.1 * s
    else:
        value = 1.7 * s * math.sqrt(2 / (tensor[0, 0] if tensor.dim() == 5 else tensor[0]).numel())
    return torch.from_numpy(value).to(tensor.dtype)


def published(model):
    return {key: tensor for key, tensor in model.state_dict().items() if not key.endswith(OURS)}


def keys_md5(model):
    lines = sorted(f"{key} {tuple(tensor.shape)}" for key, tensor in published(model).items())
    return hashlib.md5("\n".join(lines).encode()).hexdigest()


def filled(model):
    """The network with the golden weights, which are the same for the same keys and shapes."""
    model.load_state_dict({key: golden_tensor(key, tensor) for key, tensor in published(model).items()})
    return model.double()


def image(shape, name):
    return torch.from_numpy(math.sqrt(3) * uniform(name, shape))


class Chain(nn.Module):
    """Layers one after the other, and their warehouse."""

    def __init__(self, layers, sharing=(), **options):
        super().__init__()
        self.manager = Warehouse(shared_by_name(layers, sharing), **options)
        self.layers = nn.ModuleList(layers.values())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def chain_of(row):
    options = dict(row["manager"])
    options |= {"sharing": options.pop("sharing_range", ())}
    options |= {"basis_ratio": options.pop("nonlocal_basis_ratio", 1)}
    layers = {}
    for given in row["layers"]:
        config = {key: value for key, value in given.items() if key not in ("layer_type", "warehouse_name")}
        kind = KINDS[given.get("layer_type", "conv2d")]
        layers[given["warehouse_name"]] = kind(config.pop("in_planes"), config.pop("out_planes"), **config)
    return Chain(layers, **options)


@pytest.mark.parametrize("number", range(44))
def test_layers_compute_what_the_published_layers_compute(golden, number):
    rows = json.loads((golden / "kernelwarehouse.json").read_text())["layers"]
    assert len(rows) == 44
    row = rows[number]
    chain = chain_of(row)
    assert len(published(chain)) == row["keys"]
    assert keys_md5(chain) == row["keys_md5"]
    assert [[*weight.shape] for weight in chain.manager.weights] == row["warehouses"]
    for layer, flat in zip(chain.layers, row["assignments"], strict=True):
        pieces, n = layer.attention.assignment.tolist(), layer.cells.shape[0]
        assert [p * (n + 1) + cell for p, cell in enumerate(pieces)] == flat
    filled(chain).train(row["train"])
    set_blend(chain, row["temperature"])
    found = []
    hook = chain.layers[0].attention.register_forward_hook(lambda attention, inputs, shares: found.append(shares))
    x = image(tuple(row["input_shape"]), row["input_name"]).requires_grad_()
    y = chain(x)
    hook.remove()
    shares = found[0].detach().flatten(0, 1)
    if not row["train"]:  # where it was noted
        assert [*shares.shape] == row["attention_shape"]
        assert shares.flatten()[:8].tolist() == pytest.approx(row["attention_first"], abs=1e-9)
        assert shares.abs().sum().item() == pytest.approx(row["attention_abs_sum"], rel=1e-9)
    y.backward(image(tuple(y.shape), row["grad_name"]))
    assert [*y.shape] == row["shape"]
    assert y.norm().item() == pytest.approx(row["y_norm"], rel=1e-9)
    assert y.sum().item() == pytest.approx(row["y_sum"], abs=1e-9 * row["y_norm"])
    assert y.flatten()[:8].tolist() == pytest.approx(row["y_first"], abs=1e-9 * row["y_norm"])
    assert x.grad.norm().item() == pytest.approx(row["dx_norm"], rel=1e-9)
    assert x.grad.flatten()[:8].tolist() == pytest.approx(row["dx_first"], abs=1e-9 * row["dx_norm"])
    norms = {name: p.grad.norm().item() for name, p in chain.named_parameters()}
    assert norms == pytest.approx(row["grad_norms"], rel=1e-9)


NETWORKS = {
    "kw1x_resnet18": ("kw_resnet18", 1),
    "kw4x_resnet18": ("kw_resnet18", 4),
    "kw1d4x_resnet18": ("kw_resnet18", 0.25),
    "kw1d2x_resnet50": ("kw_resnet50", 0.5),
    "kw1x_mobilenetv2_050": ("kw_mobilenetv2_050", 1),
    "kw4x_mobilenetv2_100": ("kw_mobilenetv2_100", 4),
    "kw1d2x_mobilenetv2_050": ("kw_mobilenetv2_050", 0.5),
    "kw1x_convnext_tiny": ("kw_convnext_tiny", 1),
}


@pytest.mark.parametrize("config", slow_except(NETWORKS, "kw1d2x_mobilenetv2_050", "kw1x_mobilenetv2_050"))
def test_networks_compute_what_the_published_networks_compute(golden, config):
    pytest.importorskip("torchvision")
    rows = json.loads((golden / "kernelwarehouse.json").read_text())["models"]
    row = next(row for row in rows if row["config"] == config)
    name, budget = NETWORKS[config]
    model = odconv.create_model(name, budget=budget)
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    assert len(published(model)) == row["keys"]
    assert keys_md5(model) == row["keys_md5"]
    assert next(iter(model.state_dict())) == "warehouse_manager.weights.0"
    filled(model).train()
    for module in model.modules():
        if isinstance(module, WarehouseAttention | nn.Dropout):
            module.eval()
    x = image(tuple(row["input_shape"]), row["input_name"])
    for blend in (0.0, 0.5):
        expected = row[f"t{blend:g}"]
        set_blend(model, expected["temperature"])
        with torch.no_grad():
            logits = model(x)
        norm = expected["train_logits_norm"]
        assert logits.norm().item() == pytest.approx(norm, rel=1e-9)
        first = torch.tensor(expected["train_logits_first"], dtype=torch.float64)
        torch.testing.assert_close(logits[:, :6], first, rtol=0, atol=1e-9 * norm)
        assert logits.argmax(1).tolist() == expected["train_argmax"]


PARAMETERS = {  # of the authors' table, as their code gives them
    ("kw_resnet18", 0.25): 4_031_768,
    ("kw_resnet18", 0.5): 7_431_044,
    ("kw_resnet18", 1): 11_932_148,
    ("kw_resnet18", 2): 23_242_127,
    ("kw_resnet18", 4): 45_862_085,
    ("kw_resnet50", 0.5): 17_638_264,
    ("kw_resnet50", 1): 28_052_310,
    ("kw_resnet50", 4): 102_015_144,
    ("kw_mobilenetv2_100", 0.5): 2_654_396,
    ("kw_mobilenetv2_100", 1): 5_168_146,
    ("kw_mobilenetv2_100", 4): 11_379_382,
    ("kw_mobilenetv2_050", 0.5): 1_466_888,
    ("kw_mobilenetv2_050", 1): 2_854_522,
    ("kw_mobilenetv2_050", 4): 4_648_587,
    ("kw_convnext_tiny", 1): 39_370_674,
}


@pytest.mark.parametrize(("name", "budget"), PARAMETERS)
def test_parameters(name, budget):
    pytest.importorskip("torchvision")
    with shapes_alone():
        model = odconv.create_model(name, budget=budget)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, budget]


def test_convnext_tiny():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    static = odconv.create_model("convnext_tiny", num_classes=7, dropout=0.2)
    assert sum(p.numel() for p in static.parameters()) == 28_589_128 - 993 * 769
    static.eval()
    for block in static.stages.modules():
        if hasattr(block, "gamma"):
            nn.init.normal_(block.gamma)  # as after training: branches that count
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = static(x)
        theirs = torchvision_convnext(static)(x)
        torch.testing.assert_close(wanted, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        model = copy.deepcopy(static)
        make_dynamic(model, "kw_convnext_tiny", warm_start=True)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    with pytest.raises(ValueError, match="stem must be 'standard' for kw_convnext_tiny"):
        odconv.create_model("kw_convnext_tiny", stem="small")
    with pytest.raises(ValueError, match="unknown model 'od_convnext_tiny'"):
        odconv.create_model("od_convnext_tiny")


def torchvision_convnext(static):
    """torchvision's ConvNeXt-Tiny with the weights of ours, in the order in which both have them."""
    models = pytest.importorskip("torchvision.models")
    model = models.convnext_tiny(num_classes=7).eval()
    blocks = [module for module in model.modules() if type(module).__name__ == "CNBlock"]
    for theirs, ours in zip(blocks, (b for stage in static.stages for b in stage), strict=True):
        theirs.layer_scale.data = ours.gamma.data[0]
        parts = (ours.dwconv, ours.norm, ours.pwconv1, ours.pwconv2)
        for place, part in zip((0, 2, 3, 5), parts, strict=True):
            theirs.block[place].weight.data = part.weight.data.reshape(theirs.block[place].weight.shape)
            theirs.block[place].bias.data = part.bias.data
    for stage, narrow in enumerate(static.downsample_layers):
        for theirs, part in zip(model.features[2 * stage], narrow, strict=True):
            theirs.weight.data, theirs.bias.data = part.weight.data, part.bias.data
    for theirs, part in ((model.classifier[0], static.norm), (model.classifier[2], static.head)):
        theirs.weight.data, theirs.bias.data = part.weight.data, part.bias.data
    return model


class Small(nn.Module):
    """Two stages with a shortcut, grouped convolutions and biases; a stem before them."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        convs = {
            "conv1": nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            "conv2": nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            "conv3": nn.Conv2d(2 * width, 2 * width, 1),
            "downsample": nn.Conv2d(width, 2 * width, 1, stride=2),
        }
        self.block = nn.ModuleDict(convs)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.stage1(self.stem(x))
        y = self.block["conv3"](self.block["conv2"](self.block["conv1"](x)).relu())
        return self.fc((y + self.block["downsample"](x)).mean((2, 3)))


def small(**options):
    torch.manual_seed(0)
    return odconv.convert(Small().double(), "kernelwarehouse", **options)


X = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"budget": 2}, {"budget": 4, "include": "*"}, {"stages": ["*"]}])
def test_a_warm_start_computes_what_the_static_network_did(options):
    torch.manual_seed(0)
    static = Small().double().train()
    model = odconv.convert(copy.deepcopy(static), "kernelwarehouse", **options)
    torch.testing.assert_close(model(X), static(X), rtol=1e-12, atol=1e-12)
    assert any(isinstance(module, KWConv) for module in model.modules())
    odconv.set_blend(model, 0.5)
    assert not torch.allclose(model(X), static(X), rtol=1e-3)


def test_a_network_of_the_zoo_starts_from_its_static_one(tmp_path):
    pytest.importorskip("torchvision")
    static = odconv.create_model("mobilenetv2_050", num_classes=10)
    torch.save(static.state_dict(), tmp_path / "static.pth")
    options = {"num_classes": 10, "weights": tmp_path / "static.pth", "warm_start": True}
    model = odconv.create_model("kw_mobilenetv2_050", **options)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), static.eval()(x), rtol=1e-4, atol=1e-5)


def test_stages_are_found_by_resolution_and_kind():
    def found(width=128, **options):
        return [*odconv.convert(Small(width), "kernelwarehouse", **options).warehouse_manager.names.values()]

    assert found() == [["stage1.0"], ["block.conv1", "block.conv3"], ["block.conv2"]]
    assert found(stages="*") == [["stage1.0", "block.conv1", "block.conv3"], ["block.conv2"]]
    assert found(include="*", exclude="stem")[1] == ["block.conv1", "block.conv3", "block.downsample"]
    assert len(found(width=16)) == 4  # too narrow for attentions over shared cells


def test_gradients_are_those_of_the_formula():
    model = small(budget=2)
    odconv.set_blend(model, 0.3)
    layer = model.block["conv1"]
    x = torch.randn(3, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, layer.cells, *layer.parameters()]
    kernels = assemble(layer.cells, layer.attention(x), layer.kernel_shape)
    expected = torch.cat([nn.functional.conv2d(x[b : b + 1], kernels[b], layer.bias, 2, 1) for b in range(3)])
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(actual, parameters, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters, grad), rtol=1e-10, atol=1e-10)


def test_the_network_holds_its_cells_once():
    model = small()
    assert next(iter(model.named_parameters()))[0] == "warehouse_manager.weights.0"
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert names == [name for name, _ in model.named_parameters()]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(m.warehouse is copied.warehouse_manager for m in copied.modules() if isinstance(m, KWConv))
        with torch.no_grad():
            copied.warehouse_manager.weights[1].zero_()
        assert not copied.block["conv1"](copied.stage1(copied.stem(X))).std((0, 2, 3)).any()
        assert model.warehouse_manager.weights[1].any()


def test_batch_of_one_half_precision_and_autocast():
    model = small(warm_start=False).train()
    model(X[:1]).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.block["conv1"].attention.norm1.num_batches_tracked == 1
    model.float().eval()
    expected = model(X.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(X.float()) - expected).norm() < 0.05 * expected.norm()
    odconv.set_blend(model, 1 / 3)
    half = copy.deepcopy(model).bfloat16()
    assert half.block["conv1"].attention.blend.dtype == torch.float32
    assert (half(X.bfloat16()) - model(X.float())).norm() < 0.05 * expected.norm()


def test_a_linear_layer_takes_tokens():
    layer = KWLinear(8, 12).double()
    Warehouse({"all": {"linear": layer.conv}}, dtype=torch.float64)
    set_blend(layer, 1)
    tokens = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(tokens), tokens @ layer.conv.cells[0, :, :, 0].T)
    assert layer(tokens[:, 0, 0]).shape == (2, 12)


def test_one_schedule_serves_all_methods():
    model = nn.ModuleList([small(), odconv.ODConv2d(8, 8, 3)])
    attention = model[0].block["conv1"].attention
    for progress, blend, temperature in ((0, 1, 30), (0.25, 0.75, 22.75), (1, 0, 1)):
        odconv.set_progress(model, progress)
        assert (attention.blend, model[1].attention.temperature) == (blend, temperature)
    odconv.set_temperature(model, 5)
    assert attention.blend == 0
    for call in (odconv.set_blend, odconv.set_progress):
        with pytest.warns(UserWarning, match="none was set"):
            call(Small(), 0.5)
        with pytest.raises(ValueError, match="must be from 0"):
            call(model, 1.5)


def test_a_compiled_network_follows_the_blend():
    model = small().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for blend in (1, 0.25):
        odconv.set_blend(model, blend)
        torch.testing.assert_close(compiled(X), model(X))
    torch.compiler.reset()


def test_files(tmp_path):
    pytest.importorskip("safetensors")
    model, other = small(), small(warm_start=False)
    odconv.set_blend(model, 0.25)
    save_safetensors(model, tmp_path / "ours.safetensors")
    odconv.load_checkpoint(other, tmp_path / "ours.safetensors")
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(tensor.equal(other.state_dict()[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"published must be False unless each blend is 0, got 0\.25"):
        save_safetensors(model, tmp_path / "x.safetensors", published=True)
    odconv.set_blend(other, 0)
    file = {"model": published(model), "epoch": 3, "args": argparse.Namespace(lr=0.1, model="kw", resume=None)}
    torch.save(file, tmp_path / "published.pth")
    odconv.load_checkpoint(other, tmp_path / "published.pth")
    assert other.block["conv1"].attention.blend == 0  # not noted there
    torch.save(file | {"args": argparse.Namespace(lr=fractions.Fraction(1, 2))}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"holds an object that is no tensor \(fractions\.Fraction\)"):
        odconv.load_checkpoint(other, tmp_path / "objects.pth")


def test_weights_of_another_order_are_refused(tmp_path):
    model, other = nn.Module(), nn.Module()
    for network, order in ((model, (0, 1)), (other, (1, 0))):
        layers = [KWConv2d(8, 8, 3, padding=1) for _ in range(2)]
        network.manager = Warehouse({"all": dict(zip("ab", layers, strict=True))}, [layers[i] for i in order])
        network.layers = nn.ModuleList(layers)
    assert keys_md5(model) == keys_md5(other)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"layers\.0\.attention takes its kernel from other cells there"):
        odconv.load_checkpoint(other, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="piece 0 of this layer's kernel is cell 0 there, and cell 9"):
        other.load_state_dict(model.state_dict())
    odconv.load_checkpoint(model, tmp_path / "other.pth")


def test_bad_input(tmp_path):
    model = small()
    with pytest.raises(ValueError, match=r"the Small has a warehouse already \(warehouse_manager\)"):
        odconv.convert(model, "kernelwarehouse")
    with pytest.raises(ValueError, match="whose cells are in a warehouse that is no part of the ModuleDict"):
        save_safetensors(model.block, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"KWConv2d has no kernel: it takes one from an odconv\.Warehouse"):
        KWConv2d(3, 8, 3)(X)
    with pytest.raises(ValueError, match="layers must be in no warehouse yet, got conv1"):
        Warehouse({"all": {"conv1": model.block["conv1"]}})
    with pytest.raises(TypeError, match="no filters of its own"):
        fold_batch_norm(model.block["conv1"], nn.BatchNorm2d(32))
    for options, error, message in (
        ({"budget": 0.3}, ValueError, "budget must be a whole number such as 1, 2 or 4, or 1 by one"),
        ({"budget": 1.5}, ValueError, "budget must be a whole number"),
        ({"budget": "2x"}, ValueError, "budget must be a whole number such as 1, 2 or 4, or 1 by one .* got '2x'"),
        ({"budget": 0.5}, ValueError, r"warm_start must be False with a budget of 0\.5"),
        ({"budget": 1 / 3, "warm_start": False}, ValueError, r"got block\.conv3 \(4 pieces\); 1/2, 1/4, every"),
        ({"stages": ["block.*"]}, ValueError, r"stages: stage1\.0 is in none of"),
        ({"stages": ["blok.*"]}, ValueError, "stages: no convolution has a name that matches"),
        ({"kernel_num": 4}, TypeError, "'kernel_num' is no option of kernelwarehouse; it has budget, stages"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            small(**options)
    with pytest.raises(ValueError, match="cells of 2 filters, which do not divide the 5"):
        Warehouse({"all": {"odd": KWConv2d(4, 5, 3)}}, cell_outplane_ratio=0.5)
    with pytest.raises(ValueError, match="cell_num_ratio must be a positive number, or one for each of 1 parameters"):
        Warehouse({"all": {"one": KWConv2d(4, 4, 3)}}, cell_num_ratio=(1, 2))
    layer = KWConv2d(4, 4, 3)
    for wrong in ([layer], {"a": layer}, {"a": {"b": nn.Conv2d(8, 8, 3)}}):
        with pytest.raises(TypeError, match="layers must map the name of each parameter to KWConv layers by name"):
            odconv.Warehouse(wrong)
    with pytest.raises(ValueError, match=r"layers must hold each layer once, got a \(all\), b \(all\)"):
        Warehouse({"all": {"a": layer, "b": layer}})
    torch.save(odconv.create_model("mobilenetv2_050").state_dict(), tmp_path / "static.pth")
    with pytest.raises(ValueError, match=r"warm_start must be False with a budget of 0\.5"):
        odconv.create_model("kw_mobilenetv2_050", budget=0.5, weights=tmp_path / "static.pth", warm_start=True)
    with pytest.raises(ValueError, match="kernel_num must be None for kw_resnet18"):
        odconv.create_model("kw_resnet18", kernel_num=4)
    with pytest.raises(TypeError, match="'gain' is no option of kw_resnet18; it has budget, reduction"):
        odconv.create_model("kw_resnet18", gain=2)


def test_profile_counts_mixing():
    model = small()
    rows = {row.name: row for row in odconv.profile(model, (3, 12, 12)).rows}
    place = model.block["conv1"].attention.place
    assert (len(place.pieces), place.cells) == (9, 9)
    mixing = len(place.pieces) * model.block["conv1"].cells.numel()
    attention = 16 * 16 + 16 * len(place.pieces) * (place.cells + 1)
    assert rows["block.conv1"].madds == 32 * 16 * 9 * 36 + mixing + attention
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_frozen_and_fused_networks():
    model = small().eval()
    frozen = odconv.to_static(model, [X]).model
    assert not any(isinstance(module, KWConv | Warehouse) for module in frozen.modules())
    torch.testing.assert_close(frozen(X), model(X), rtol=1e-12, atol=1e-12)  # at blend 1 nothing depends on the image
    odconv.set_blend(model, 0)
    expected = model(X)
    assert isinstance(odconv.fuse(model).stage1[1], nn.BatchNorm2d)
    torch.testing.assert_close(model(X), expected)


def test_export_serves_every_batch(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = Chain({"one": KWConv2d(3, 8, 3, padding=1, bias=True)}, cell_num_ratio=2).eval()
    odconv.export_onnx(model, tmp_path / "small.onnx", (3, 12, 12))
    session = ort.InferenceSession(tmp_path / "small.onnx")
    program = torch.export.export(model, (X.float(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        expected = model(x)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_in_parts_is_computed_as_a_whole(monkeypatch):
    model = small(warm_start=False).eval()
    expected = model(X).detach()
    monkeypatch.setattr("odconv.ops.mixing.PART", 1)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
