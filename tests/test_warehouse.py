"""KernelWarehouse: layers, warehouse, networks, held against what the published code computes."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import odconv
from odconv.layers.warehouse import Warehouse, shared_by_name
from odconv.layers.warehouse_attention import WarehouseAttention, set_blend
from odconv.layers.warehouse_conv import KWConv1d, KWConv2d, KWConv3d

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
}


@pytest.mark.parametrize("config", NETWORKS)
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
