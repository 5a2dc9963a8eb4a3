"""Dynamic layers in other people's programs: averages, adapters, masks, counters, sharding, loaders.

Each test runs the real program and is skipped where that is not installed; docs/interop.md lists what works.
"""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import odconv

PARTS = ("attention.fc", "attention.bn", "attention.channel_fc", "attention.filter_fc", "attention.kernel_fc")


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        odconv.ODConv2d(8, 8, 3, padding=1, **options),
        nn.ReLU(),
        odconv.DyConv2d(8, 8, 3, padding=1, groups=8, bias=True),
        odconv.CondConv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def images(batch=3, dtype=torch.float32):
    return torch.randn(batch, 3, 12, 12, dtype=dtype)


def temperatures(model):
    return [m.attention.temperature.item() for m in model.modules() if isinstance(m, odconv.ODConv2d)]


def train(model, steps=3, lr=0.1, batch=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(batch).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x)


class Averages:
    """Averaged copies of others, with how each is made and moved on, and what it averages."""

    @staticmethod
    def torch(model):
        averaged = AveragedModel(model)
        return averaged, lambda: averaged.update_parameters(model), averaged.module

    @staticmethod
    def timm_v2(model):
        averaged = pytest.importorskip("timm.utils").ModelEmaV2(model, decay=0.5)
        return averaged, lambda: averaged.update(model), averaged.module

    @staticmethod
    def timm_v3(model):
        averaged = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)
        return averaged, lambda: averaged.update(model), averaged.module


@pytest.mark.parametrize("kind", ["torch", "timm_v2", "timm_v3"])
def test_an_averaged_copy_follows_the_temperature_and_keeps_it(kind):
    model = network(temperature=30.0)
    averaged, update, copied = getattr(Averages, kind)(model)
    for temperature in (20.0, 10.0, *(1.0,) * 40):
        odconv.set_temperature(model, temperature)
        update()
    assert temperatures(copied) == pytest.approx([1.0], abs=1e-3)
    state = copy.deepcopy(averaged.state_dict())
    for moved in (averaged.cpu(), averaged.float(), averaged.double(), averaged.to(torch.float32)):
        moved.load_state_dict(state)
        assert temperatures(copied) == pytest.approx([1.0], abs=1e-3)


def test_a_whole_model_comes_back_with_its_temperature(tmp_path):
    model = network(temperature=30.0)
    odconv.set_temperature(model, 5.0)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert temperatures(again) == temperatures(copy.deepcopy(model).half().float()) == [5.0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_masks_of_pruning_hold_in_training_and_evaluation(part, dtype, batch):
    model = network().to(dtype)
    module = model[1].get_submodule(part)
    with torch.no_grad():
        module.weight.copy_(torch.randn_like(module.weight))
    prune.l1_unstructured(module, "weight", amount=0.5)
    mask = module.weight_mask.bool()
    train(model, batch=batch)
    assert module.weight_orig.grad[~mask].abs().max() == 0
    x = images(dtype=dtype)
    found = logits(model, x)
    prune.remove(module, "weight")
    assert (module.weight == 0).sum() == mask.numel() // 2
    torch.testing.assert_close(found, logits(model, x), rtol=1e-4, atol=1e-5)


def test_the_kernels_can_be_masked_too():
    model = network()
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    train(model)
    found = logits(model, x := images())
    prune.remove(model[1], "weight")
    torch.testing.assert_close(found, logits(model, x))


@pytest.mark.parametrize("part", [part for part in PARTS if part != "attention.bn"])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore")  # the older weight norm is on its way out
def test_weights_that_are_computed_are_computed_at_every_step(part, norm):
    model, plain = network(), network()
    norm(model[1].get_submodule(part))
    before = logits(model, x := images())
    if norm is not parametrizations.spectral_norm:
        torch.testing.assert_close(before, logits(plain, x), rtol=1e-4, atol=1e-5)
    train(model.train())
    assert all(p.grad is not None for p in model[1].attention.parameters())
    weight = model[1].get_submodule(part).weight
    found = logits(model, x)
    set_weight(plain, model, part, weight)
    torch.testing.assert_close(found, logits(plain, x), rtol=1e-4, atol=1e-5)


def set_weight(plain, model, part, weight):
    """Give a network without computed weights those of another."""
    state = {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state, strict=False)
    other = plain[1].get_submodule(part)
    other.weight.data.copy_(weight.detach())
    bias = model[1].get_submodule(part).bias
    if bias is not None:
        other.bias.data.copy_(bias.detach())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_every_part_of_the_attention_are_called(part, batch):
    model = network()
    module = model[1].get_submodule(part)
    seen = []
    plain = logits(model, x := images())
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)),
        module.register_forward_hook(lambda _, args, y: y + 10),
        module.register_full_backward_hook(lambda *_: seen.append("back")),
    ]
    model.train()(images(batch)).sum().backward()
    assert seen == [seen[0], "back"]
    assert seen[0][0] == batch
    changed = logits(model, x)
    assert not torch.allclose(plain, changed)
    for handle in handles:
        handle.remove()
    model.load_state_dict(network().state_dict())
    torch.testing.assert_close(logits(model, x), plain)


@pytest.mark.parametrize("train", [False, True])
def test_hooks_on_an_attention_meet_flat_tensors_and_can_name_them(train):
    layer, x = odconv.ODConv2d(8, 6, 3, gain=2.0), torch.randn(3, 8, 7, 7)
    seen = []
    layer.attention.register_forward_hook(lambda attention, _, found: seen.append((found, attention.named(found))))
    with torch.set_grad_enabled(train):
        given = layer.train(train).attention(x)
    found, named = seen[0]
    assert [tuple(gates.shape) for gates in found] == [(3, 8), (3, 6), (3, 9), (3, 4)]
    assert given.spatial.shape == (3, 3, 3)
    for one, other in zip(named, given, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", ["subclass", "forward of its own"])
def test_other_classes_in_the_attention_are_called(other, dtype):
    class Louder(nn.Conv2d):
        def forward(self, x):
            return 3 * super().forward(x)

    model, x = network().to(dtype), images(dtype=dtype)
    plain, head = logits(model, x), model[1].attention.channel_fc
    nn.init.normal_(head.bias)
    wanted = copy.deepcopy(model)
    for parameter in wanted[1].attention.channel_fc.parameters():
        parameter.data *= 3
    if other == "subclass":
        head.__class__ = Louder
    else:
        head.forward = lambda z: 3 * nn.Conv2d.forward(head, z)
    assert not torch.allclose(logits(model, x), plain)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(logits(model, x), logits(wanted, x), **tolerance)


def test_adapters_learn():
    peft = pytest.importorskip("peft")
    model = network()
    targets = [f"{index}.attention.{name}" for index in (1, 3) for name in ("fc", "kernel_fc")]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[*targets, "4.attention.kernel_fc"]))
    before = logits(adapted, x := images())
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 10
    first = {name: p.detach().clone() for name, p in adapters.items()}
    train(adapted.train(), steps=4, lr=1.0)
    assert not [name for name, p in adapters.items() if torch.equal(p, first[name])]
    after = logits(adapted, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["od_resnet18", "dy_mobilenetv2_050", "cond_resnet18"])
def test_pytorch_counts_the_multiply_adds(name):
    torch.manual_seed(0)
    model = odconv.create_model(name, num_classes=10).eval()
    wanted = odconv.profile(model, (3, 64, 64)).madds
    for batch in (1, 4):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(batch, 3, 64, 64))
        assert counter.get_total_flops() / 2 / batch == pytest.approx(wanted, rel=0.01)
    if "mobilenet" in name:  # PyTorch counts a grouped convolution's backward pass as a dense one's
        return
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64)).sum().backward()
    # x's gradient is not wanted in the stem; mixing is done again, and its gradient goes to kernels and shares
    assert 2.5 < counter.get_total_flops() / 2 / 4 / wanted < 3.6


COUNTED = """
import sys, torch, odconv
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as first, torch.no_grad():  # before anything of ours was called or made
    if sys.argv[1] == "operator":
        odconv.functional.dynamic_conv(torch.randn(2, 8, 9, 9), torch.randn(1, 8, 8, 3, 3), padding=1)
    else:
        torch.load(sys.argv[1], weights_only=False)(torch.randn(2, 8, 9, 9))
print(first.get_total_flops())
"""


@pytest.mark.slow
def test_counting_needs_no_order(tmp_path):
    layer = odconv.ODConv2d(8, 8, 3, padding=1).eval()
    torch.save(layer, tmp_path / "layer.pt")
    wanted = {"operator": 9 * 9 * 8 * 8 * 9, str(tmp_path / "layer.pt"): odconv.profile(layer, (8, 9, 9)).madds}
    for source, madds in wanted.items():
        run = subprocess.run([sys.executable, "-c", COUNTED, source], capture_output=True, text=True, check=True)
        assert int(run.stdout) == 4 * madds


def test_lightning_counts_the_multiply_adds():
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = odconv.create_model("od_resnet18", num_classes=10)
            self.example_input_array = torch.randn(1, 3, 64, 64)

        def forward(self, x):
            return self.model(x)

    module = Module()
    summary = ModelSummary(module, max_depth=1)
    wanted = odconv.profile(module.model, (3, 64, 64)).madds
    assert summary.total_flops / 2 == pytest.approx(wanted, rel=0.01)
    assert summary.total_parameters == sum(p.numel() for p in module.parameters())


@pytest.fixture
def hugging_face():
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "dynamic"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.model = network(temperature=30.0, norm="layer", gain=2.0, kernel_gain="sqrt")
            self.post_init()

        def forward(self, x):
            return self.model(x)

    model = Model(Config()).eval()
    odconv.set_temperature(model, 5.0)
    return model, Model


def drop(path, kinds):
    """Take the keys that end in one of `kinds` out of a file, as in a published one, and return what is left."""
    state = load_file(path)
    left = {key: tensor for key, tensor in state.items() if not key.endswith(kinds)}
    save_file(left, path, {"format": "pt"})
    return left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_brings_a_model_back(hugging_face, dtype, tmp_path):
    model, kind = hugging_face
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, dtype=dtype)
    assert temperatures(again) == [5.0]
    x = images()
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(logits(again, x.to(dtype)).float(), logits(model, x), **tolerance)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("kinds", [("temperature",), ("temperature", "factors"), ("1.weight", "fc.weight", "fc.bias")])
def test_transformers_fills_in_what_a_file_lacks(hugging_face, kinds, options, tmp_path):
    model, kind = hugging_face
    model.save_pretrained(tmp_path)
    held = drop(tmp_path / "model.safetensors", kinds)
    memory = [torch.full((size,), 2e8) for size in (1, 2, 8, 64, 128, 576, 2304)]  # which others then get as it was
    del memory
    again = kind.from_pretrained(tmp_path, **options)
    assert temperatures(again) == [30.0 if "temperature" in kinds else 5.0]
    assert again.model[1].attention.factors.tolist() == [2, 2]
    state = again.state_dict()
    for key, tensor in held.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
    layer, drawn = again.model[1], kind(model.config).model[1]
    for name in ("weight", "attention.kernel_fc.weight", "attention.fc.weight"):
        assert 0.5 < layer.get_parameter(name).std() / drawn.get_parameter(name).std() < 2, name


def test_transformers_leaves_new_layers_as_they_are_drawn(hugging_face):
    model, kind = hugging_face
    assert temperatures(kind(model.config)) == [30.0]
    assert (model.model[1].attention.bn.weight == 0.5).all()
    assert 0 < model.model[1].attention.kernel_fc.weight.std() < 0.2
    assert model.model[0].weight.std() < 0.03  # its own draw of other convolutions


@pytest.mark.parametrize("kinds", [("temperature",), ("temperature", "factors")])
@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_fills_in_the_temperature(hugging_face, kinds, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, kind = hugging_face
    model.save_pretrained(tmp_path)
    drop(path := tmp_path / "model.safetensors", kinds)
    with accelerate.init_empty_weights(include_buffers=buffers):
        empty = kind(model.config)
    again = accelerate.load_checkpoint_and_dispatch(empty, str(path), device_map={"": "cpu"})
    assert temperatures(again) == [30.0]
    odconv.set_temperature(again, 5.0)
    torch.testing.assert_close(logits(again, x := images()), logits(model, x), rtol=0, atol=0)
    assert not any(tensor.is_meta for tensor in again.state_dict().values())


def test_accelerate_offloads_buffers_and_their_temperature_is_not_set_in_vain():
    accelerate = pytest.importorskip("accelerate")
    model, x = network(temperature=30.0), images()
    wanted = logits(copy.deepcopy(model), x)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    torch.testing.assert_close(logits(offloaded, x), wanted)
    with pytest.raises(ValueError, match=r"cannot be set on the meta device: set it before offloading"):
        odconv.set_temperature(offloaded, 5.0)
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    odconv.set_temperature(offloaded, 5.0)
    assert temperatures(offloaded) == [5.0]


def test_a_temperature_set_on_the_meta_device_comes_with_the_numbers():
    with torch.device("meta"):
        model = network()
        odconv.set_temperature(model, 5.0)
    assert temperatures(model.to_empty(device="cpu")) == [5.0]


def test_a_network_made_under_inference_mode_infers_as_static_ones_do():
    with torch.inference_mode():
        model = network()
    plain = network()
    torch.testing.assert_close(logits(model, x := images()), logits(plain, x), rtol=0, atol=0)
    with torch.inference_mode():
        odconv.set_temperature(model, 5.0)
    odconv.set_temperature(plain, 5.0)
    torch.testing.assert_close(logits(copy.deepcopy(model), x), logits(plain, x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        model.train()(x)


@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_brings_a_model_to_its_device(hugging_face, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, kind = hugging_face
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=buffers):
        empty = kind(model.config)
    assert empty.model[1].weight.is_meta
    again = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert temperatures(again) == [5.0]
    torch.testing.assert_close(logits(again, x := images()), logits(model, x), rtol=0, atol=0)


def test_timm_saves_for_the_hub_with_the_temperature(tmp_path):
    timm = pytest.importorskip("timm")
    import odconv.timm  # registers the names

    model = timm.create_model("od_resnet18", kernel_num=2, num_classes=4)
    odconv.set_temperature(model, 5.0)
    timm.models.save_for_hf(model, tmp_path, model_args={"kernel_num": 2}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(logits(again, x := torch.randn(2, 3, 64, 64)), logits(model, x), rtol=0, atol=0)
    assert set(temperatures(again)) == {5.0}


def test_monai_traces_a_dynamic_network():
    monai = pytest.importorskip("monai.networks")
    torch.manual_seed(0)
    model = nn.Sequential(odconv.ODConv3d(1, 4, 3, padding=1), odconv.DyConvTranspose3d(4, 2, 2, stride=2)).eval()
    x = torch.randn(2, 1, 6, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = monai.convert_to_torchscript(model, inputs=(x,), use_trace=True, verify=True, atol=1e-6)
        with pytest.raises(TypeError, match="cannot be scripted"):
            monai.convert_to_torchscript(model)
    torch.testing.assert_close(traced(x[:1]), logits(model, x[:1]), rtol=1e-4, atol=1e-5)


def test_the_temperature_may_be_set_before_the_backward_pass():
    model = network(temperature=30.0)
    y = model(images())
    odconv.set_temperature(model, 10.0)
    y.sum().backward()


def test_global_hooks_see_the_parts_of_an_attention():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        logits(model := network(), images())
    finally:
        handle.remove()
    assert {model[1].attention.fc, model[1].attention.bn, model[1].attention.kernel_fc} <= {*seen}


def test_synchronised_batch_norm_is_drawn_as_batch_norm_is():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    bn = model[1].attention.bn
    bn.num_batches_tracked += 5
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert isinstance(bn, nn.SyncBatchNorm)
    assert (bn.weight == 0.2).all()
    assert bn.num_batches_tracked == 0


SHARDED = """
import copy, sys, torch, odconv, torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            odconv.ODConv2d(8, 8, 3, kernel_num=3, temperature=4.0),
            odconv.ODConv2d(8, 64, 3, kernel_num=1, norm="layer", gain=2),
            odconv.DyConvTranspose2d(64, 8, 2, bias=True),
            odconv.CondConv2d(8, 4, 3),
        )
    for layer in model[1:]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    weight = model[2].weight.full_tensor()
    assert weight.shape == (1, 64, 8, 3, 3) and abs(weight.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.1
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.manual_seed(rank)
    for batch in (4, 4, 1):
        loss = model(torch.randn(batch, 3, 14, 14)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    statistics = model[1].attention.bn
    assert statistics.running_var.dtype == torch.float32 and statistics.num_batches_tracked == 3
    odconv.set_temperature(model, 2.0)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        assert state["1.attention.temperature"] == 2
        whole = nn.Sequential(*[nn.Identity()] + [copy.deepcopy(layer) for layer in [
            odconv.ODConv2d(8, 8, 3, kernel_num=3), odconv.ODConv2d(8, 64, 3, kernel_num=1, norm="layer", gain=2),
            odconv.DyConvTranspose2d(64, 8, 2, bias=True), odconv.CondConv2d(8, 4, 3)]])
        whole.load_state_dict({key: value for key, value in state.items() if not key.startswith("0.")})
with torch.device("meta"):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    odconv.convert(model, "kernelwarehouse", warm_start=False)
fully_shard(model, mesh=mesh)
model.to_empty(device="cpu")
for module in model.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
bias = model[2].attention.fc2.bias.full_tensor().view(9, -1)
assert bias[:, :-1].ne(0).equal(torch.eye(9).bool()) and not bias[:, -1].any()
cells = model[0].weights[0].full_tensor()
assert abs(cells.std() / (2 / (8 * 9)) ** 0.5 - 1) < 0.2
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_fsdp2_shards_draws_and_trains_from_meta(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-W", "ignore", str(script)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.strip() == "done"
