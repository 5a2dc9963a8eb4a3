"""The layers in mmcv and mmengine: built by name from configs, drawn, trained, counted, and fused."""

import copy
import math
import pickle

import pytest
import torch
from stirring import stirred
from torch import nn

import odconv
from odconv.conversion.fusion import fold_batch_norm
from odconv.layers import Attention, DynamicConv

mmcv = pytest.importorskip("mmcv.cnn")
mmengine = pytest.importorskip("mmengine.model")
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DATASETS, MODELS  # noqa: E402

import odconv.mmcv  # noqa: E402

NAMES = [
    f"{method}{form}{dims}d"
    for method in ("ODConv", "DyConv", "CondConv")
    for form in ("", "Transpose")
    for dims in (1, 2, 3)
]
STATIC = [name for name in NAMES if "Transpose" not in name]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conv_module(**options):
    return mmcv.ConvModule(16, 16, 3, padding=1, conv_cfg={"type": "ODConv2d", "kernel_num": 4}, **options)


def heads(model):
    return torch.cat([p.flatten() for m in model.modules() if isinstance(m, Attention) for p in m.parameters()])


# --- by name


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_registered(name):
    original, dims = getattr(odconv, name), int(name[-2])
    layer = mmcv.build_conv_layer({"type": name, "kernel_num": 3}, 8, 4, 3, padding=1, bias=True)
    assert isinstance(layer, original)
    assert type(layer) is getattr(odconv.mmcv, name)
    assert layer.kernel_num == 3
    assert layer.output_padding == (0,) * dims
    plain = original(8, 4, 3, padding=1, bias=True, kernel_num=3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, *(6,) * dims)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=0, atol=0)
    assert isinstance(pickle.loads(pickle.dumps(layer)), original)
    assert repr(copy.deepcopy(layer)) == repr(plain)


@pytest.mark.parametrize("name", [name for name in NAMES if "Transpose" in name])
def test_transposed_layers_make_maps_larger(name):
    dims = int(name[-2])
    config = {"type": name, "in_channels": 8, "out_channels": 4, "kernel_size": 3, "stride": 2, "output_padding": 1}
    layer = mmcv.build_upsample_layer(config | {"padding": 1})
    assert layer.output_padding == (1,) * dims
    assert layer(torch.randn(2, 8, *(5,) * dims)).shape == (2, 4, *(10,) * dims)


@pytest.mark.parametrize("name", STATIC)
def test_a_block_of_mmcv(name):
    dims = int(name[-2])
    options = {"norm_cfg": {"type": f"BN{dims}d"}, "act_cfg": {"type": "LeakyReLU"}}
    block = mmcv.ConvModule(8, 16, 3, 2, 1, conv_cfg={"type": name, "kernel_num": 2}, **options)
    assert (block.output_padding, block.transposed, block.conv.bias) == ((0,) * dims, False, None)
    x = torch.randn(2, 8, *(6,) * dims)
    torch.testing.assert_close(block.eval()(x), nn.functional.leaky_relu(block.norm(block.conv(x)), 0.01))
    block.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_options_of_the_block():
    x = torch.randn(2, 16, 6, 6)
    reflected = conv_module(padding_mode="reflect", act_cfg=None).eval()
    torch.testing.assert_close(reflected(x), reflected.conv(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")))
    config = {"type": "ODConv2d", "padding_mode": "circular", "attentions": ("channel", "kernel")}
    around = mmcv.ConvModule(16, 16, 3, padding=1, conv_cfg=config, act_cfg=None).eval()
    assert (around.conv.padding_mode, [*around.conv.attention.heads]) == ("circular", ["channel", "kernel"])
    first = conv_module(order=("act", "norm", "conv"), norm_cfg={"type": "BN"}, inplace=False).eval()
    torch.testing.assert_close(first(x), first.conv(first.norm(x.relu())))
    with pytest.raises(TypeError, match="experts"):
        mmcv.build_conv_layer({"type": "ODConv2d", "experts": 2}, 8, 8, 3)


def test_spectral_norm_holds_the_kernels_of_a_layer_in_one_bound():
    block = conv_module(with_spectral_norm=True, act_cfg=None)
    x = torch.randn(2, 16, 6, 6)
    for _ in range(30):
        block(x)
    assert torch.linalg.matrix_norm(block.conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)
    assert torch.linalg.matrix_norm(block.conv.weight.flatten(2), 2).max() < 1  # of each kernel by itself
    block(x).sum().backward()
    assert block.conv.weight_orig.grad.abs().sum() > 0


def test_other_blocks_of_mmcv():
    config = {"type": "ODConv2d", "kernel_num": 2}
    x = torch.randn(2, 16, 6, 6)
    separable = mmcv.DepthwiseSeparableConvModule(16, 24, 3, padding=1, conv_cfg=config, norm_cfg={"type": "BN"})
    assert [m.groups for m in separable.modules() if isinstance(m, DynamicConv)] == [16, 1]
    assert separable(x).shape == (2, 24, 6, 6)
    around = mmcv.NonLocal2d(16, conv_cfg=config)
    assert {type(block.conv) for block in (around.g, around.theta, around.phi, around.conv_out)} == {
        odconv.mmcv.ODConv2d
    }
    torch.testing.assert_close(around(x), x)  # its last kernels are drawn as zeros
    assert around.g.conv.weight.std().item() == pytest.approx(0.01, rel=0.1)


# --- how they are drawn


@pytest.mark.parametrize("n", [1, 4])
def test_mmcv_leaves_the_layers_as_they_are_drawn(n):
    config = {"type": "ODConv2d", "kernel_num": n}
    torch.manual_seed(1)
    block = mmcv.ConvModule(64, 16, 3, conv_cfg=config, norm_cfg={"type": "BN"})
    torch.manual_seed(1)
    layer = odconv.ODConv2d(64, 16, 3, kernel_num=n)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in block.conv.state_dict().items())
    assert block.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.03)  # whatever n


class Backbone(mmengine.BaseModule):
    """A layer of its own, and two that mmengine does not see: in a container, and in a block of mmcv."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.own = mmcv.build_conv_layer({"type": "ODConv2d", "kernel_num": 2}, 16, 16, 3, padding=1)
        self.inner = nn.Sequential(mmcv.build_conv_layer({"type": "ODConv2d", "kernel_num": 2}, 16, 16, 3, padding=1))
        self.block = conv_module(norm_cfg={"type": "BN"})

    def forward(self, x):
        return self.block(self.inner(self.own(self.stem(x))))


@pytest.mark.parametrize("kind", ["Kaiming", "Xavier", "Normal", "Uniform", "TruncNormal", "Caffe2Xavier"])
def test_an_init_cfg_for_convolutions_is_not_for_attentions(kind):
    options = {"Normal": {"std": 2.0}, "Uniform": {"a": -2, "b": 2}, "TruncNormal": {"std": 2.0}}.get(kind, {})
    model = Backbone({"type": kind, "layer": "Conv2d", **options})
    before, stem = copy.deepcopy(model.state_dict()), model.stem.weight.clone()
    own = before["own.weight"].std().item()
    model.init_weights()
    assert not torch.equal(model.stem.weight, stem)
    for key in (
        "inner.0.weight",
        "block.conv.weight",
        "inner.0.attention.kernel_fc.weight",
        "block.conv.attention.fc.weight",
    ):
        assert torch.equal(model.state_dict()[key], before[key])
    assert not torch.equal(model.own.weight, before["own.weight"])  # drawn again, by its own init_weights
    assert model.own.weight.std().item() == pytest.approx(own, rel=0.05)
    assert model.own.attention.kernel_fc.weight.std() < 0.2


def test_an_init_cfg_by_the_name_of_a_layer_draws_each_kernel():
    model = Backbone()
    before = heads(model)
    mmengine.initialize(model, {"type": "Kaiming", "layer": "ODConv2d"})
    assert torch.equal(heads(model), before)
    for layer in (model.own, model.inner[0], model.block.conv):
        assert layer.weight.std((1, 2, 3, 4)).tolist() == pytest.approx(
            [math.sqrt(2 / (16 * 9))] * len(layer.weight), rel=0.1
        )
        assert not torch.equal(layer.weight[0], layer.weight[1])
    mmengine.initialize(model, {"type": "Constant", "val": 3.0, "override": {"name": "inner"}, "layer": "Linear"})
    assert model.inner[0].weight.unique().tolist() == [3]
    assert torch.equal(heads(model), before)
    mixed = mmcv.build_conv_layer({"type": "CondConv2d"}, 8, 8, 3, bias=True)
    mmengine.initialize(mixed, {"type": "Normal", "std": 1.0, "bias": 2.0, "layer": "CondConv2d"})
    assert mixed.weight.std().item() == pytest.approx(1, rel=0.05)
    assert mixed.kernel_bias.unique().tolist() == [2]


def test_initialising_after_converting_leaves_what_was_converted():
    class Static(mmengine.BaseModule):
        def __init__(self):
            super().__init__({"type": "Kaiming", "layer": "Conv2d"})
            self.stem = mmcv.ConvModule(3, 16, 3, padding=1, norm_cfg={"type": "BN"})
            self.block = mmcv.ConvModule(16, 16, 3, padding=1, norm_cfg={"type": "BN"})

    model = odconv.convert(Static(), odconv.mmcv.ODConv2d)
    before = copy.deepcopy(model.block.conv.state_dict())
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.block.conv.state_dict().items())


def test_a_function_of_the_user_reaches_all_parts():
    seen = []
    layer = mmcv.build_conv_layer({"type": "ODConv2d"}, 16, 16, 3)
    assert layer.apply(seen.append) is layer
    assert set(seen) == set(layer.modules())


# --- the programs around them


@MODELS.register_module()
class TinyNet(mmengine.BaseModel):
    def __init__(self, conv_cfg):
        super().__init__()
        self.body = nn.Sequential(
            mmcv.ConvModule(3, 16, 3, 2, 1, norm_cfg={"type": "BN"}),
            mmcv.ConvModule(16, 16, 3, 1, 1, conv_cfg=conv_cfg, norm_cfg={"type": "BN"}),
        )
        self.head = nn.Linear(16, 2)

    def forward(self, images, labels=None, mode="tensor"):
        logits = self.head(self.body(images).mean((2, 3)))
        return logits if mode != "loss" else {"loss": nn.functional.cross_entropy(logits, labels)}


@DATASETS.register_module()
class TinyData(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"images": torch.randn(3, 12, 12, generator=generator) + index % 2, "labels": index % 2}


CONFIG = """
custom_imports = dict(imports=["odconv.mmcv"])
default_scope = "mmengine"
model = dict(type="TinyNet", conv_cfg=dict(type="ODConv2d", kernel_num=2))
train_dataloader = dict(
    batch_size=8,
    dataset=dict(type="TinyData"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))
custom_hooks = [dict(type="EMAHook")]
randomness = dict(seed=0)
"""


def test_a_runner_trains_from_a_config_and_resumes(tmp_path, monkeypatch):
    from mmengine.runner import Runner, load_checkpoint

    monkeypatch.setenv(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"
    )  # mmengine 0.10.7 reads no checkpoint of its own without
    (tmp_path / "config.py").write_text(CONFIG + f"work_dir = {str(tmp_path)!r}")
    config = Config.fromfile(tmp_path / "config.py")
    runner = Runner.from_cfg(config)
    before = copy.deepcopy(runner.model.state_dict())
    runner.train()
    learnt = runner.model.state_dict()
    for key in ("body.1.conv.weight", "body.1.conv.attention.filter_fc.weight"):
        assert (learnt[key] - before[key]).abs().max() > 1e-6
    network = MODELS.build(config.model)
    load_checkpoint(network, str(tmp_path / "epoch_2.pth"), strict=True)
    assert set(network.state_dict()) == set(before)
    config.resume, config.experiment_name, config.train_cfg.max_epochs = True, "again", 3
    again = Runner.from_cfg(config)
    again.train()
    assert again.epoch == 3


def test_complexity():
    from mmengine.analysis import get_model_complexity_info

    config = {"type": "ODConv2d", "kernel_num": 4}
    model = nn.Sequential(*(mmcv.ConvModule(64, 64, 3, padding=1, conv_cfg=config) for _ in range(2))).eval()
    info = get_model_complexity_info(model, (64, 32, 32), show_table=False, show_arch=False)
    report = odconv.profile(model, (64, 32, 32))
    assert info["params"] == report.parameters
    assert 0.95 < info["flops"] / report.madds < 1.2  # it traces, which takes another form than running does


def test_synchronised_norms_are_turned_back():
    model = stirred(Backbone()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(synchronised.own.attention.bn, nn.SyncBatchNorm)
    turned = mmengine.revert_sync_batchnorm(synchronised).eval()
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in turned.modules())
    torch.testing.assert_close(turned(x), expected)


def test_fusing_by_mmcv_changes_nothing():
    """It looks for nn.Conv2d, and finds the one before the norm of an attention."""
    model = stirred(Backbone()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fused = mmcv.fuse_conv_bn(copy.deepcopy(model))
    assert isinstance(fused.block.conv.attention.bn, nn.Identity)
    assert isinstance(fused.block.bn, nn.BatchNorm2d)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    fold_batch_norm(model.block.conv, model.block.norm)
    model.block.add_module(model.block.norm_name, nn.Identity())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_form_for_static_kernels_fails_aloud(n):
    config = {"type": "ODConv2d", "kernel_num": n}
    block = mmcv.ConvModule(16, 16, 3, conv_cfg=config, norm_cfg={"type": "BN"}, efficient_conv_bn_eval=True).eval()
    with pytest.raises((AttributeError, RuntimeError)):
        block(torch.randn(2, 16, 6, 6))
