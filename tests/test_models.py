"""The zoo: names, options, what is replaced, loading weights, and whole networks under compile and export."""

import pytest
import tiny
import torch
from parameters import ZOO
from torch import nn
from torch.export import Dim, export

import odconv
from odconv.checkpoints import save_safetensors
from odconv.layers import DynamicConv
from odconv.models.build import shapes_alone

pytest.importorskip("torchvision")


def dynamic(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}


def test_names():
    assert len(tiny.LISTED) == 50
    assert odconv.list_models()[:50] == tiny.LISTED
    assert odconv.list_models("od_mobile*") == ["od_mobilenetv2_050", "od_mobilenetv2_075", "od_mobilenetv2_100"]
    assert odconv.list_models("nothing") == []


@pytest.mark.parametrize("name", ["od_mobilenetv2_050", "kw_resnet18", "convnext_tiny"])
def test_shapes_alone_are_those_of_the_network(name):
    with shapes_alone():
        empty = odconv.create_model(name, num_classes=10)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    shapes = [
        {key: tensor.shape for key, tensor in model.state_dict().items()}
        for model in (empty, odconv.create_model(name, num_classes=10))
    ]
    assert shapes[0] == shapes[1]
    assert torch.nn.Linear(3, 3).weight.any()  # drawn, outside of the block


@pytest.mark.parametrize("name", ZOO)
def test_every_network_is_built_with_its_defaults(name):
    with shapes_alone():
        model = odconv.create_model(name, num_classes=10)
    layers = dynamic(model)
    prefix = name.partition("_")[0]
    methods = {"dy": (odconv.DyConv2d, 4), "cond": (odconv.CondConv2d, 8)}
    expected = (methods | dict.fromkeys(("od", "odl"), (odconv.ODConv2d, 1))).get(prefix)
    if expected is None:
        assert not layers
        return
    assert {(type(layer), layer.kernel_num) for layer in layers.values()} == {expected}
    convolutions = [m for m in model.modules() if type(m) is nn.Conv2d]
    attention = [m for layer in layers.values() for m in layer.attention.modules() if type(m) is nn.Conv2d]
    shortcuts = sum("downsample" in key and key.endswith("0.weight") for key in model.state_dict())
    static = 1 + (0 if prefix == "dy" else shortcuts)
    assert len(convolutions) - len(attention) == static


def test_networks_from_nothing_differ_from_the_published_ones_in_their_keys():
    published, settled = (odconv.create_model(f"{prefix}_resnet18", kernel_num=4) for prefix in ("od", "odl"))
    keys, others = set(published.state_dict()), set(settled.state_dict())
    assert {key.rpartition(".")[2] for key in keys - others} == {"running_mean", "running_var", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in others - keys} == {"factors"}
    with pytest.raises(RuntimeError, match=r"attention\.factors"):
        settled.load_state_dict(published.state_dict())
    attention = settled.layer1[0].conv1.attention
    assert (attention.norm, attention.gain, attention.kernel_gain) == ("layer", 2, 2)


def test_options_reach_the_layers():
    model = odconv.create_model("od_resnet18", kernel_num=2, reduction=0.25, num_classes=7, dropout=0.3)
    layer = model.layer4[1].conv1
    assert (layer.kernel_num, layer.attention.fc.weight.shape[0]) == (2, 128)
    assert model.fc.weight.shape == (7, 512)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3]
    assert set(model.state_dict()) == set(odconv.create_model("od_resnet18", kernel_num=2).state_dict())
    mobile = odconv.create_model("od_mobilenetv2_050", dropout=0.3)
    assert [m.p for m in mobile.modules() if isinstance(m, nn.Dropout)] == [0.3]


@pytest.mark.parametrize("name", ["resnet18", "od_resnet50", "mobilenetv2_050", "od_mobilenetv2_050"])
def test_the_small_stem_keeps_small_images(name):
    model = odconv.create_model(name, stem="small", num_classes=10).eval()
    first = model.layer1 if "resnet" in name else model.features[1]
    seen = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(32, 32)]


@pytest.mark.parametrize("name", ["od_resnet18", "dy_resnet18", "cond_mobilenetv2_050", "od_mobilenetv2_050"])
def test_a_training_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=5)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.slow
def test_whole_networks_compile_without_a_break_and_export_with_a_dynamic_batch():
    torch._dynamo.reset()
    model = odconv.create_model("od_mobilenetv2_050", kernel_num=4).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(program(x[:1]), expected[:1], rtol=1e-4, atol=1e-4)


def test_weights_are_loaded_and_what_does_not_fit_is_explained(tmp_path):
    trained = odconv.create_model("od_resnet18", kernel_num=2, num_classes=10)
    published = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}
    torch.save(published, tmp_path / "published.pth.tar")
    model = odconv.create_model("od_resnet18", kernel_num=2, num_classes=10, weights=tmp_path / "published.pth.tar")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    for options, cause in (
        ({"kernel_num": 1, "num_classes": 10}, "kernel_num is 2 in the file, 1 in the model"),
        ({"kernel_num": 2, "num_classes": 20}, "num_classes is 10 in the file, 20 in the model"),
        ({"kernel_num": 2, "num_classes": 10, "reduction": 0.25}, "reduction"),
    ):
        with pytest.raises(ValueError, match=cause):
            odconv.create_model("od_resnet18", **options, weights=tmp_path / "published.pth.tar")


def test_the_temperature_of_a_checkpoint_comes_with_it(tmp_path):
    def small(temperature, **options):
        torch.manual_seed(0)
        model = odconv.create_model("od_mobilenetv2_050", num_classes=10, stem="small", **options)
        if temperature is not None:
            odconv.set_temperature(model, temperature)
        return model

    trained, x = small(12.5), torch.randn(4, 3, 32, 32)
    state = {f"model.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "odconv": {"classes": [], "temperature": 12.5}}, tmp_path / "best.ckpt")
    save_safetensors(trained, tmp_path / "best.safetensors")
    published = {key: value for key, value in state.items() if not key.endswith("temperature")}
    torch.save({"state_dict": published}, tmp_path / "published.pth")
    with torch.no_grad():
        expected = trained(x)
        for file in ("best.ckpt", "best.safetensors"):
            torch.testing.assert_close(small(None, weights=tmp_path / file)(x), expected, rtol=0, atol=0)
        assert not torch.allclose(small(None, weights=tmp_path / "published.pth")(x), expected)
        own = small(12.5)
        odconv.load_checkpoint(own, tmp_path / "published.pth")
        torch.testing.assert_close(own(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("file", "model"), [("od", "dy"), ("dy", "od"), ("od", "cond"), ("cond", "dy")])
def test_a_file_of_another_method_is_told(file, model, tmp_path):
    names = {"od": "ODConv", "dy": "DyConv", "cond": "CondConv"}
    state = odconv.create_model(f"{file}_mobilenetv2_050", kernel_num=2).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"another method: {names[file]}, the model is {names[model]}"):
        odconv.create_model(f"{model}_mobilenetv2_050", kernel_num=2, weights=tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("od_resnet19", {}, "unknown model 'od_resnet19'; did you mean od_resnet1"),
        ("vgg", {}, r"unknown model 'vgg'; see odconv.list_models\(\)"),
        ("od_resnet18", {"kernel_num": 0}, "kernel_num must be an int of at least 1, got 0"),
        ("od_resnet18", {"stem": "tiny"}, "stem must be 'standard' or 'small', got 'tiny'"),
        (
            "resnet18",
            {"kernel_num": 4},
            "resnet18 is static: kernel_num and .* must be None, got 4 and None; od_resnet18 is dynamic",
        ),
        ("cond_resnet18", {"reduction": 0.5}, "reduction must be None for cond_resnet18"),
        ("od_resnet18", {"reduction": -1}, "reduction must be above 0, got -1"),
        ("resnet18", {"num_classes": 0}, "num_classes must be an int of at least 1, got 0"),
        ("od_mobilenetv2_050", {"num_classes": 2.5}, "num_classes must be an int of at least 1, got 2.5"),
        ("od_resnet18", {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ("mobilenetv2_050", {"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ],
)
def test_what_the_zoo_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        odconv.create_model(name, **options)


def test_a_warm_start_computes_what_the_static_network_does(tmp_path):
    static = odconv.create_model("mobilenetv2_050", num_classes=3).eval()
    torch.save(static.state_dict(), tmp_path / "static.pth")
    options = {"kernel_num": 4, "num_classes": 3, "weights": tmp_path / "static.pth"}
    warm = odconv.create_model("od_mobilenetv2_050", warm_start=True, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(warm(x), static(x), rtol=1e-4, atol=1e-5)
    torch.save(warm.state_dict(), tmp_path / "warm.pth")
    again = odconv.create_model("od_mobilenetv2_050", kernel_num=4, num_classes=3, weights=tmp_path / "warm.pth").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), warm(x))
    with pytest.raises(ValueError, match="does not fit"):
        odconv.create_model("od_mobilenetv2_050", **options)
    routed = odconv.create_model("cond_mobilenetv2_050", warm_start=True, **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(routed(x), static(x), rtol=1e-4, atol=1e-5)
    torch.save(routed.state_dict(), tmp_path / "routed.pth")
    options["weights"] = tmp_path / "routed.pth"
    again = odconv.create_model("cond_mobilenetv2_050", norm="layer", **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), routed(x))
    with pytest.raises(ValueError, match=r'no norm in the model \(norm: .* a warm start of cond_ is "layer"'):
        odconv.create_model("cond_mobilenetv2_050", **options)
    options["weights"] = tmp_path / "static.pth"
    with pytest.raises(ValueError, match="warm_start needs the weights of the static network"):
        odconv.create_model("od_mobilenetv2_050", warm_start=True)
    with pytest.raises(ValueError, match="mobilenetv2_050 is static: warm_start is for dynamic networks"):
        odconv.create_model("mobilenetv2_050", **options | {"kernel_num": None}, warm_start=True)


@pytest.mark.parametrize("backbone", ["mobilenetv2_050", "resnet18"])
def test_a_new_classifier_leaves_the_last_layer_of_a_file_out(backbone, tmp_path):
    torch.save(odconv.create_model(backbone, num_classes=7).state_dict(), tmp_path / "seven.pth")
    weights = {"weights": tmp_path / "seven.pth", "new_classifier": True}
    for options in ({}, {"warm_start": True, "kernel_num": 2}):
        name = f"od_{backbone}" if options else backbone
        model = odconv.create_model(name, num_classes=3, **weights, **options).eval()
        seven = odconv.create_model(name, num_classes=7, weights=tmp_path / "seven.pth", **options).eval()
        x = torch.randn(2, 3, 64, 64)
        assert model(x).shape == (2, 3)
        classifier = next(key for key, module in model.named_modules() if isinstance(module, nn.Linear))
        model.set_submodule(classifier, seven.get_submodule(classifier))
        torch.testing.assert_close(model(x), seven(x), rtol=1e-3, atol=1e-4)  # a warm start draws its kernels
    with pytest.raises(ValueError, match="does not fit"):
        odconv.create_model(f"od_{backbone}", num_classes=3, **weights)
    with pytest.raises(ValueError, match="new_classifier needs weights, those of a network for other classes"):
        odconv.create_model(backbone, new_classifier=True)
