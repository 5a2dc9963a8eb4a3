"""The zoo in timm: its own networks with our layers, which load what is published and do all that timm's do."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
from parameters import slow_except
from stirring import stirred
from torch import nn

import odconv
from odconv.layers import DynamicConv
from odconv.models.build import shapes_alone

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
optim = pytest.importorskip("timm.optim")
ours = pytest.importorskip("odconv.timm")

SOME = {
    **{"od_resnet18": 1, "od_resnet50": 1, "od_mobilenetv2_050": 2},
    **{"dy_resnet18": 2, "cond_mobilenetv2_050": 2, "odl_mobilenetv2_050": 2},
}
"""Some of the names, and how many kernels they are tried with."""

TWO = ("od_resnet18", "od_mobilenetv2_050")


def images(batch=2, channels=3, size=64, dtype=torch.float32):
    return torch.randn(batch, channels, size, size, dtype=dtype)


def dynamic_layers(model):
    return [module for module in model.modules() if isinstance(module, DynamicConv)]


def test_the_dynamic_networks_are_registered_and_the_static_ones_are_timms_own():
    prefixes = ("od_", "odl_", "dy_", "cond_", "kw_")
    assert {*ours.NAMES} == {name for name in tiny.LISTED if name.startswith(prefixes)} - {"kw_convnext_tiny"}
    assert {*ours.NAMES} <= {*timm.list_models()}
    for static in ("resnet18", "resnet50", "mobilenetv2_050", "mobilenetv2_100"):
        assert timm.models.model_entrypoint(static).__module__.startswith("timm.models.")
    assert not dynamic_layers(timm.create_model("resnet18"))


# --- what is published


@pytest.mark.parametrize("name", slow_except([
    *("od_resnet18", "od_resnet50", "od_mobilenetv2_050", "od_mobilenetv2_075", "od_mobilenetv2_100"),
    *("dy_resnet18", "dy_mobilenetv2_075", "cond_resnet18", "cond_mobilenetv2_050", "odl_mobilenetv2_050"),
], "od_resnet18", "dy_mobilenetv2_075", "cond_mobilenetv2_050", "odl_mobilenetv2_050"))  # fmt: skip
def test_a_network_computes_what_the_zoos_does_with_its_weights(name):
    own = stirred(odconv.create_model(name, kernel_num=2, num_classes=7)).double().eval()
    model = timm.create_model(name, kernel_num=2, num_classes=7).double().eval()
    model.load_state_dict(own.state_dict())
    x = images(dtype=torch.float64)
    with torch.no_grad():
        expected = own(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12 * expected.norm().item())


@pytest.mark.parametrize(("name", "budget"), [
    ("kw_resnet18", 1), *(("kw_mobilenetv2_050", budget) for budget in (0.5, 4)),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in [("kw_resnet18", 0.25), ("kw_resnet50", 0.5)]),
])  # fmt: skip
def test_a_network_of_kernelwarehouse_computes_what_the_zoos_does(name, budget, tmp_path):
    options = {"budget": budget, "num_classes": 1000 if budget == 0.5 else 7}  # a classifier of cells of 1000 filters
    own = stirred(odconv.create_model(name, **options)).double().eval()
    model = timm.create_model(name, **options).double().eval()
    model.load_state_dict(own.state_dict())
    x = images(dtype=torch.float64)
    with torch.no_grad():
        expected = own(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12 * expected.norm().item())
    shown = {key: tensor.shape for key, tensor in ours.published(model).state_dict().items()}
    assert shown == {key: tensor.shape for key, tensor in own.state_dict().items()}


def test_features_of_kernelwarehouse():
    own = stirred(odconv.create_model("kw_resnet18")).eval()
    model = timm.create_model("kw_resnet18", features_only=True).eval()
    model.load_state_dict(own.state_dict(), strict=False)
    x = images()
    with torch.no_grad():
        last = model(x)[-1]
        torch.testing.assert_close(own.fc(last.mean((2, 3))), own(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="features_only must be False for kw_mobilenetv2_050"):
        timm.create_model("kw_mobilenetv2_050", features_only=True)
    with pytest.raises(ValueError, match="budget must be a whole number"):
        timm.create_model("kw_resnet18", budget=1.5)


@pytest.mark.slow
def test_the_deepest_network_has_the_weights_of_the_zoos():
    with shapes_alone():
        own, model = odconv.create_model("od_resnet152"), timm.create_model("od_resnet152")
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (own, model)]
    assert shapes[0] == shapes[1]


@pytest.fixture(params=slow_except(TWO, TWO[1]))
def published_file(request, tmp_path):
    """A network of the zoo, and a file of its weights as the authors publish them."""
    own = stirred(odconv.create_model(request.param, kernel_num=2)).eval()
    file = str(tmp_path / "published.pth.tar")
    torch.save({"state_dict": {f"module.{key}": value for key, value in own.state_dict().items()}, "epoch": 9}, file)
    return request.param, own, file


def test_a_published_file_is_loaded_by_timm_and_by_our_loader(published_file):
    name, own, file = published_file
    x = images()
    by_path = timm.create_model(name, kernel_num=2, checkpoint_path=file).eval()
    by_timm, by_us = (timm.create_model(name, kernel_num=2).eval() for _ in range(2))
    timm.models.load_checkpoint(by_timm, file, filter_fn=ours.checkpoint_filter_fn)
    assert not any(odconv.load_checkpoint(ours.published(by_us), file))
    for model in (by_path, by_timm, by_us):
        torch.testing.assert_close(model(x), own(x), rtol=0, atol=1e-5 * own(x).norm().item())


def test_a_published_file_is_adapted_to_other_images_classes_and_uses(published_file):
    name, own, file = published_file
    pretrained = {"kernel_num": 2, "pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    tuned = timm.create_model(name, **pretrained, num_classes=10, in_chans=1)
    stem, head = (tuned.pretrained_cfg[part] + ".weight" for part in ("first_conv", "classifier"))
    state, weights = ours.checkpoint_filter_fn(own.state_dict()), tuned.state_dict()
    changed = {key for key in state if not torch.equal(state[key], weights[key])}
    assert changed == {stem, head, head[:-6] + "bias"}
    torch.testing.assert_close(weights[stem], state[stem].sum(1, keepdim=True))
    features = timm.create_model(name, **pretrained, features_only=True).eval()
    x = images()
    whole = timm.create_model(name, **pretrained).eval().forward_intermediates(x, intermediates_only=True)
    for given, expected in zip(features(x), whole, strict=True):
        torch.testing.assert_close(given, expected)


def test_what_timm_trained_goes_back_to_the_zoo_under_the_published_names(published_file, tmp_path):
    name, own, _ = published_file
    model = stirred(timm.create_model(name, kernel_num=2)).eval()
    published = ours.published(model)
    assert {*published.state_dict()} == {*own.state_dict()}
    odconv.checkpoints.save_safetensors(published, tmp_path / "own.safetensors")
    again = odconv.create_model(name, kernel_num=2, weights=tmp_path / "own.safetensors").eval()
    torch.testing.assert_close(again(images(1)[:0]), model(images(1)[:0]))
    x = images()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5 * model(x).norm().item())


def test_features_of_a_mobilenetv2_load_a_published_file_without_its_head(tmp_path):
    own = stirred(odconv.create_model("od_mobilenetv2_050"))
    odconv.checkpoints.save_safetensors(own, tmp_path / "own.safetensors")
    features = timm.create_model("od_mobilenetv2_050", features_only=True)
    mismatch = odconv.load_checkpoint(ours.published(features), tmp_path / "own.safetensors", strict=False)
    assert not mismatch.missing
    assert {key.split(".")[0] + key.split(".")[1] for key in mismatch.unexpected} == {"features18", "classifier1"}
    torch.testing.assert_close(features.blocks[6][0].conv_pwl.weight, own.features[17].conv[2].weight)
    pruned = timm.create_model("od_mobilenetv2_050")
    pruned.prune_intermediate_layers(indices=[2])
    with pytest.raises(ValueError, match=r"all blocks under timm's names, got none at blocks\.3\.0"):
        ours.published(pruned)


def test_weights_that_timm_cannot_download_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"pretrained must be False for od_resnet18 .*'file': path"):
        timm.create_model("od_resnet18", pretrained=True)


@pytest.mark.parametrize("name", TWO)
def test_a_network_that_timm_saves_for_the_hub_comes_back(name, tmp_path):
    model = stirred(timm.create_model(name, kernel_num=2, norm="layer", num_classes=5)).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images()
    assert torch.equal(again(x), model(x))


# --- what timm's networks do


@pytest.mark.parametrize("name", slow_except(SOME, "od_mobilenetv2_050", "dy_resnet18"))
def test_it_learns_in_every_parameter_with_checkpointed_gradients_too(name):
    model = timm.create_model(name, num_classes=42, kernel_num=SOME[name])
    x = images(size=48)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        y = model(x)
        assert y.shape == (2, 42)
        assert y.isfinite().all()
        y.square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    plain, saved = gradients
    assert all(gradient is not None for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(saved[key], gradient, rtol=1e-4, atol=1e-5 * gradient.norm().item() + 1e-9)


@pytest.mark.parametrize("name", SOME)
def test_its_configuration_says_what_it_is(name):
    model = timm.create_model(name, kernel_num=SOME[name]).eval()
    config, state = model.pretrained_cfg, model.state_dict()
    assert config["architecture"] == name
    assert state[config["first_conv"] + ".weight"].shape[1] == config["input_size"][0]
    assert state[config["classifier"] + ".weight"].shape[0] == config["num_classes"]
    assert model.forward_features(images(1, size=config["input_size"][1])).shape[2:] == config["pool_size"]
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")


@pytest.mark.parametrize("name", TWO)
def test_the_classifier_can_be_replaced_and_left_out(name):
    model = timm.create_model(name, num_classes=0, in_chans=1).eval()
    x = images(channels=1)
    maps = model.forward_features(x)
    assert model(x).shape == (2, model.num_features)
    torch.testing.assert_close(model(x), model.forward_head(maps, pre_logits=True))
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, model.num_classes) == (2, 5)
    torch.testing.assert_close(model.forward_head(maps, pre_logits=True), maps.amax((2, 3)))
    torch.testing.assert_close(model.get_classifier()(maps.amax((2, 3))), model(x))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), maps)
    both = timm.create_model(name, num_classes=3, global_pool="catavgmax", in_chans=1)
    assert both.head_hidden_size == 2 * both.num_features
    assert both(x).shape == (2, 3)


@pytest.mark.parametrize(("name", "stride"), [*((name, 32) for name in SOME), (TWO[0], 8), (TWO[1], 16), (TWO[1], 8)])
def test_features_are_as_announced_for_every_output_stride(name, stride):
    options = {"kernel_num": SOME[name], "features_only": True, "in_chans": 4, "output_stride": stride}
    features = timm.create_model(name, **options).eval()
    x, info = images(1, 4), features.feature_info
    assert info.reduction() == [min(reduction, stride) for reduction in (2, 4, 8, 16, 32)]
    assert [y.shape for y in features(x)] == [
        (1, channels, 64 // reduction, 64 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]


@pytest.mark.parametrize("name", slow_except(TWO, "od_resnet18"))
@pytest.mark.parametrize("kind", [None, "hook", "fx"])
def test_chosen_features_are_the_same_maps_whatever_takes_them(name, kind):
    whole = stirred(timm.create_model(name)).eval()
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": whole.state_dict()}}
    features = timm.create_model(name, **weights, features_only=True, out_indices=(1, 3), feature_cls=kind).eval()
    x = images()
    expected = whole.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert features.feature_info.channels() == [y.shape[1] for y in expected]
    for given, map_ in zip(features(x), expected, strict=True):
        torch.testing.assert_close(given, map_)


@pytest.mark.parametrize("name", slow_except(SOME, "od_mobilenetv2_050", "dy_resnet18"))
def test_intermediate_maps_are_given_and_what_comes_after_them_can_be_pruned(name):
    model = stirred(timm.create_model(name, kernel_num=SOME[name], num_classes=10)).eval()
    x = images()
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
        assert [(y.shape[1], 64 // y.shape[2]) for y in maps] == [
            (info["num_chs"], info["reduction"]) for info in model.feature_info
        ]
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([2]) == [2]
        (third,) = pruned.forward_intermediates(x, indices=[2], intermediates_only=True)
        torch.testing.assert_close(third, maps[2])
        assert torch.equal(pruned(x), third)
    assert len(dynamic_layers(pruned)) < len(dynamic_layers(model))


@pytest.mark.parametrize("name", SOME)
def test_layers_decay_from_the_classifier_to_the_stem_with_their_attentions(name):
    model = timm.create_model(name, kernel_num=SOME[name])
    groups = optim.param_groups_layer_decay(model, layer_decay=0.5)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    stem, head = (model.get_submodule(model.pretrained_cfg[part]).weight for part in ("first_conv", "classifier"))
    assert scales[stem] == min(scales.values()) < scales[head] == 1
    for layer in dynamic_layers(model):
        assert len({scales[parameter] for parameter in layer.parameters()}) == 1


@pytest.mark.parametrize("name", TWO)
def test_device_and_dtype_are_taken(name):
    assert {tensor.device.type for tensor in timm.create_model(name, device="meta").state_dict().values()} == {"meta"}
    model = timm.create_model(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(images(dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("name", TWO)
def test_paths_are_dropped_in_training_alone(name):
    x = images(8, size=32)
    for rate in (0.0, 0.5):
        model = stirred(timm.create_model(name, drop_path_rate=rate))
        assert torch.equal(model(x), model(x)) == (rate == 0)
        model.eval()
        assert torch.equal(model(x), model(x))


def test_drop_rate_drops_in_training_alone():
    model = timm.create_model("od_mobilenetv2_050", drop_rate=0.5, num_classes=10).eval()
    maps = torch.rand(4, 1280, 2, 2) + 0.1
    kept = model.forward_head(maps, pre_logits=True)
    assert (kept > 0).all()
    dropped = model.train().forward_head(maps, pre_logits=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped > 0], 2 * kept[dropped > 0])


def test_a_copied_and_a_pickled_network_train_and_load_what_is_published():
    for name in TWO:
        model = timm.create_model(name, num_classes=10)
        published = odconv.create_model(name, num_classes=10).state_dict()
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            same(images(size=32)).square().mean().backward()
            assert same.get_submodule(same.pretrained_cfg["first_conv"]).weight.grad.isfinite().all()
            same.load_state_dict(published)
            torch.testing.assert_close(same.get_classifier().bias, published[[*published][-1]])


# --- our options


def test_the_options_of_the_layers_are_taken():
    options = {"reduction": 0.25, "norm": "layer", "kernel_gain": "sqrt", "temperature": 30.0, "init": "published"}
    for name in TWO:
        model = timm.create_model(name, kernel_num=2, **options)
        for layer in dynamic_layers(model):
            attention = layer.attention
            assert layer.kernel_num == 2
            assert attention.fc.out_channels == max(16, layer.in_channels // 4)
            assert isinstance(attention.bn, nn.GroupNorm)
            assert attention.temperature == 30
            assert attention.kernel_gain == math.sqrt(2)
            assert attention.init == "published"
        odconv.create_model(name, kernel_num=2, **options).load_state_dict(ours.published(model).state_dict())


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"stem": "small"}, TypeError, "stem"),
    ({"kernel_num": 0}, ValueError, "kernel_num must be an int of at least 1, got 0"),
    ({"norm": "instance"}, ValueError, "norm must be one of .*, got 'instance'"),
])  # fmt: skip
@pytest.mark.parametrize("name", TWO)
def test_what_it_does_not_know_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **options)


def test_an_option_of_another_method_is_refused():
    with pytest.raises(TypeError, match="reduction"):
        timm.create_model("cond_resnet18", reduction=0.25)


# --- scripts that do not import us


@pytest.mark.slow
def test_a_script_finds_our_networks(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'od_mobilenetv2_050'")
    script = tmp_path / "train.py"
    script.write_text(
        "import pickle, sys\n"
        "import beside, timm\n"
        "class Kept: pass\n"
        "assert __name__ == '__main__'\n"
        "pickle.loads(pickle.dumps((Kept(), timm.create_model(beside.name))))\n"
        "print(type(timm.create_model(sys.argv[2], kernel_num=2).layer1[0].conv1).__name__, sys.argv[1:], __file__)\n"
        "sys.exit(3)\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-m", "odconv.timm", str(script), "--model", "od_resnet18"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
    assert done.returncode == 3, done.stderr
    assert done.stdout.split("\n") == [f"ODConv2d ['--model', 'od_resnet18'] {script}", ""]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: SCRIPT"),
    (["nowhere.py", "--model", "od_resnet18"], "SCRIPT must be a file of Python code, got nowhere.py"),
    (["--model", "od_resnet18"], "required: SCRIPT"),
])  # fmt: skip
def test_a_script_that_is_none_is_said_to_be_so(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        ours.run_script()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "usage: python -m odconv.timm SCRIPT" in said


@pytest.mark.parametrize("name", ["mobilenetv2_050", "od_mobilenetv2_050", "od_resnet18"])
def test_norms_are_folded_with_their_activations_left(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        odconv.fuse(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    left = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "attention" not in name]
    assert not left
