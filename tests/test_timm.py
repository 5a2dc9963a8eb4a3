"""The zoo in timm: registered, and built as timm's own networks are."""

import copy
import pickle

import pytest
import torch

import odconv

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")
ours = pytest.importorskip("odconv.timm")


def test_the_dynamic_networks_are_registered_and_the_static_ones_are_timms_own():
    assert {*ours.NAMES} == {name for name in odconv.list_models() if name.startswith(("od_", "odl_", "dy_", "cond_"))}
    assert {*ours.NAMES} <= {*timm.list_models()}
    for static in ("resnet18", "resnet50", "mobilenetv2_050", "mobilenetv2_100"):
        assert timm.models.model_entrypoint(static).__module__.startswith("timm.models.")


@pytest.mark.parametrize("name", ["od_resnet18", "dy_resnet18", "od_resnet50", "od_mobilenetv2_050", "cond_resnet18"])
def test_a_network_computes_what_the_zoos_does_under_the_same_keys(name):
    own = odconv.create_model(name, kernel_num=2, num_classes=7).double().eval()
    model = timm.create_model(name, kernel_num=2, num_classes=7).double().eval()
    assert list(model.state_dict()) == list(own.state_dict())
    model.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = own(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12 * expected.norm().item())
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["od_resnet18", "dy_resnet18", "od_resnet50", "od_mobilenetv2_075"])
def test_features_only_gives_the_maps_that_it_announces(name):
    torch.manual_seed(0)
    features = timm.create_model(name, kernel_num=2, features_only=True, in_chans=4).eval()
    x = torch.randn(1, 4, 64, 64)
    maps = features(x)
    info = features.feature_info
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert [y.shape for y in maps] == [
        (1, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(info.channels(), info.reduction(), strict=True)
    ]
    if "resnet" in name:
        torch.manual_seed(0)
        whole = timm.create_model(name, kernel_num=2, in_chans=4).eval()
        torch.testing.assert_close(maps[-1], whole.forward_features(x), rtol=0, atol=0)
    some = timm.create_model(name, features_only=True, out_indices=(1, 3)).feature_info
    assert some.channels() == [info.channels()[1], info.channels()[3]]


@pytest.mark.parametrize("name", ["od_resnet18", "od_mobilenetv2_050"])
def test_the_classifier_can_be_replaced_and_left_out(name):
    model = timm.create_model(name, num_classes=0, in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, model.num_features)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(5, "max")
    assert model(x).shape == (2, 5)
    assert model.num_classes == model.get_classifier().out_features == 5
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((2, 3))
    )
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="num_classes must be 0 without global_pool, got 5"):
        model.reset_classifier(5)
    assert timm.create_model(name, num_classes=3, global_pool="catavgmax", in_chans=1)(x).shape == (2, 3)


def test_drop_rate_drops_in_training_alone():
    model = timm.create_model("od_mobilenetv2_050", drop_rate=0.5, num_classes=10).eval()
    maps = torch.rand(4, 1280, 2, 2) + 0.1
    kept = model.forward_head(maps, pre_logits=True)
    assert (kept > 0).all()
    dropped = model.train().forward_head(maps, pre_logits=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped > 0], 2 * kept[dropped > 0])


def test_timm_knows_how_to_prepare_images():
    model = timm.create_model("od_mobilenetv2_050")
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")


@pytest.mark.parametrize("name", ["od_resnet18", "od_mobilenetv2_050"])
def test_a_published_file_is_loaded_whole_or_for_other_images_and_classes(name, tmp_path):
    own = odconv.create_model(name, kernel_num=2)
    state, file = own.state_dict(), str(tmp_path / "published.pth.tar")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 100}, file)
    whole = timm.create_model(name, kernel_num=2, checkpoint_path=file).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.items())
    published = {"kernel_num": 2, "pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    tuned = timm.create_model(name, **published, num_classes=10, in_chans=1)
    stem, head = (tuned.pretrained_cfg[part] + ".weight" for part in ("first_conv", "classifier"))
    weights = tuned.state_dict()
    assert {key for key in state if not torch.equal(state[key], weights[key])} == {stem, head, head[:-6] + "bias"}
    torch.testing.assert_close(weights[stem], state[stem].sum(1, keepdim=True))
    maps = timm.create_model(name, **published, features_only=True)(torch.randn(2, 3, 64, 64))
    assert maps[-1].shape[-1] == 2
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


def test_a_network_trains_copies_and_refuses_what_it_does_not_know():
    model = timm.create_model("od_resnet18", kernel_num=2, num_classes=10)
    odconv.set_temperature(model, 30.0)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(torch.randn(2, 3, 32, 32)).square().mean().backward()
        assert same.conv1.weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="stem"):
        timm.create_model("od_resnet18", stem="small")
    with pytest.raises(ValueError, match="kernel_num must be an int of at least 1, got 0"):
        timm.create_model("od_resnet18", kernel_num=0)
