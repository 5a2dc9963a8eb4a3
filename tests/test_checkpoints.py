"""Checkpoints of every origin are read, what does not fit is explained, and nothing in a file is run."""

import copy
import fractions
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from odconv import ODConv2d
from odconv.app.classify.restore import restore
from odconv.app.cli import main
from odconv.checkpoints import load_checkpoint, read_state_dict, resolve, save_safetensors

pytest.importorskip("faster_coco_eval")
from odconv.app.detect.restore import restore as restore_detector

safetensors_torch = pytest.importorskip("safetensors.torch")


class Dynamic(nn.Module):
    """The parameters of a dynamic layer, as the published checkpoints name them."""

    def __init__(self, channels: int, filters: int, kernel_num: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kernel_num, filters, channels, 3, 3))
        self.attention = nn.Module()
        self.attention.fc = nn.Conv2d(channels, hidden, 1, bias=False)
        self.attention.bn = nn.BatchNorm2d(hidden)
        self.attention.channel_fc = nn.Conv2d(hidden, channels, 1)
        self.attention.filter_fc = nn.Conv2d(hidden, filters, 1)
        self.attention.spatial_fc = nn.Conv2d(hidden, 9, 1)
        if kernel_num > 1:
            self.attention.kernel_fc = nn.Conv2d(hidden, kernel_num, 1)


def network(*, width: int = 8, kernel_num: int = 4, hidden: int = 4, classes: int = 10, stem: int = 3) -> nn.Module:
    """A dynamic network; kernel_num 0 for its static sister."""
    conv = Dynamic(width, width, kernel_num, hidden) if kernel_num else nn.Conv2d(width, width, 3, bias=False)
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, width, stem, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(width))
    net.add_module("conv", conv)
    net.add_module("bn2", nn.BatchNorm2d(width))
    net.add_module("fc", nn.Linear(width, classes))
    return net


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=0, atol=0)


def published(state: dict[str, Tensor]) -> dict:
    return {
        "epoch": 100,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "acc": torch.tensor(74.1),
        "best_acc": torch.tensor(74.2),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


FORMS = {
    "plain": lambda state: state,
    "published": published,
    "lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(10)},
        "hyper_parameters": {"lr": 0.1},
    },
    "compiled": lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
    "torchvision": lambda state: {"model": state, "epoch": 3},
    "parameters": lambda state: {key: nn.Parameter(value, value.is_floating_point()) for key, value in state.items()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_reads_the_files_that_people_have(form: str, zipped: bool, tmp_path: Path) -> None:
    state = network().state_dict()
    path = tmp_path / "weights.pth.tar"
    torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=zipped)
    read = read_state_dict(path)
    read.pop("loss.weight", None)
    assert_same(read, state)
    assert not any(tensor.requires_grad for tensor in read.values())


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(100_000)}, path)
    read = read_state_dict(path)
    path.write_bytes(b"")
    assert read["a"].sum() == 100_000


def test_a_prefix_of_a_few_keys_is_a_name(tmp_path: Path) -> None:
    state = {"model.weight": torch.ones(1), "head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pth")
    assert_same(read_state_dict(tmp_path / "weights.pth"), state)


def test_no_key_is_lost_to_a_prefix(tmp_path: Path) -> None:
    state = {f"model.weight{i}": torch.full((1,), float(i)) for i in range(20)} | {"weight0": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pth")
    assert_same(read_state_dict(tmp_path / "weights.pth"), state)


def test_published_mobilenet(shared_data: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.mobilenet_v2()
    path = shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"
    load_checkpoint(model, path)
    for key, tensor in torch.load(path, weights_only=True).items():
        torch.testing.assert_close(model.state_dict()[key], tensor, check_dtype=False, rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("wrap", [Wrapped, nn.DataParallel, torch.compile], ids=["model", "parallel", "compiled"])
def test_wrappers_do_not_matter_on_either_side(wrap: type, tmp_path: Path) -> None:
    bare, wrapped = network(), wrap(network())
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    load_checkpoint(wrapped, tmp_path / "bare.pth")
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "wrapped.pth")
    again = network()
    load_checkpoint(again, tmp_path / "wrapped.pth")
    assert_same(again.state_dict(), bare.state_dict())


def test_files_of_old_pytorch_have_no_batch_counters(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    assert not any(load_checkpoint(network(), tmp_path / "old.pth"))


@pytest.mark.parametrize("prefix", ["", "layer."], ids=["alone", "inside"])
def test_a_lone_layer_is_explained_too(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + k: v for k, v in Dynamic(8, 8, 4, 4).state_dict().items()}, tmp_path / "weights.pth")
    layer: nn.Module = Dynamic(8, 8, 2, 4)
    model = nn.Sequential()
    model.add_module("layer", layer)
    with pytest.raises(ValueError, match="kernel_num is 4 in the file, 2 in the model"):
        load_checkpoint(model if prefix else layer, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("file", "model", "cause"),
    [
        ({"kernel_num": 1}, {}, "kernel_num is 1 in the file, 4 in the model"),
        ({"kernel_num": 4}, {"kernel_num": 8}, "kernel_num is 4 in the file, 8 in the model"),
        ({"hidden": 8}, {}, "another reduction: conv.attention.fc.weight is (8, 8, 1, 1) in the file, (4, 8, 1, 1)"),
        ({"width": 16}, {}, "another width: stem.weight is (16, 3, 3, 3) in the file, (8, 3, 3, 3) in the model"),
        ({"classes": 1000}, {}, "num_classes is 1000 in the file, 10 in the model (fc)"),
        ({"stem": 7}, {}, "another kernel size (stem?): stem.weight"),
        ({"kernel_num": 0}, {}, "the model is dynamic; what begins with such a file is a warm start"),
        ({}, {"kernel_num": 0}, "the file is of a dynamic network, the model is static"),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) or "default" if isinstance(value, dict) else "",
)
def test_mismatches_are_explained(file: dict, model: dict, cause: str, tmp_path: Path) -> None:
    torch.save(published(network(**file).state_dict()), tmp_path / "weights.pth")
    net = network(**model)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights\.pth does not fit the Sequential") as caught:
        load_checkpoint(net, tmp_path / "weights.pth")
    causes = [line for line in str(caught.value).splitlines() if "probable cause" in line]
    assert len(causes) == 1
    assert cause in causes[0]
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(("theirs", "ours"), [("batch", "layer"), ("layer", "batch"), ("none", "group")])
def test_another_norm_of_the_attentions_is_named(theirs: str, ours: str, tmp_path: Path) -> None:
    names = {"batch": "batch norm", "layer": "layer or group norm", "group": "layer or group norm", "none": "no norm"}
    torch.save(ODConv2d(8, 8, 3, norm=theirs).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"have {names[theirs]} in the file, {names[ours]} in the model"):
        load_checkpoint(ODConv2d(8, 8, 3, norm=ours), tmp_path / "weights.pth")


def test_the_lists_are_short_and_counted(tmp_path: Path) -> None:
    names = [f"part{i:02d}" for i in range(20)]
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})
    torch.save({f"{name}.other": torch.ones(1) for name in names}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="another architecture: of the model's 20 keys, 0 are") as caught:
        load_checkpoint(model, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "20 keys missing in the file: part00.weight" in message
    assert "20 keys unknown to the model: part00.other" in message
    assert message.count("and 12 more") == 2
    assert "part07.weight" in message
    assert "part08" not in message


def test_without_strict_what_fits_is_loaded(tmp_path: Path) -> None:
    source, target = network(kernel_num=1, classes=1000), network(classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    fc = target.fc.weight.clone()
    report = load_checkpoint(target, tmp_path / "weights.pth", strict=False)
    assert report.missing == ["conv.attention.kernel_fc.weight", "conv.attention.kernel_fc.bias"]
    assert report.unexpected == []
    assert report.mismatched == [
        ("conv.weight", (1, 8, 8, 3, 3), (4, 8, 8, 3, 3)),
        ("fc.weight", (1000, 8), (10, 8)),
        ("fc.bias", (1000,), (10,)),
    ]
    torch.testing.assert_close(target.stem.weight, source.stem.weight, rtol=0, atol=0)
    torch.testing.assert_close(target.fc.weight, fc, rtol=0, atol=0)


class Hostile:
    """Unpickling one of these makes a file, if anybody lets it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_files_are_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "hostile.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Hostile(witness)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"hostile\.pth holds an object that is no tensor \(\w+\.mkdir\)"):
        read_state_dict(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # so the file was dangerous indeed


def compress(path: Path) -> None:
    """Write a zip file anew, with all of its members compressed."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_compressed_members_are_read_as_they_were(tmp_path: Path) -> None:
    net, other = network(), network()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    compress(tmp_path / "weights.pth")
    load_checkpoint(other, tmp_path / "weights.pth")
    assert_same(other.state_dict(), net.state_dict())


class Larger:
    """A tensor that claims more numbers than its storage has."""

    def __reduce__(self) -> tuple:
        storage = torch.zeros(4).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (10**12,), (1,), False, OrderedDict())


@pytest.mark.parametrize("case", ["expanded", "shared", "claimed", "compressed"])
def test_no_more_memory_is_asked_for_than_the_file_can_hold(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if case == "expanded":
        torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    elif case == "shared":
        whole = torch.zeros(10**6)
        torch.save({f"a{i}": whole for i in range(1000)}, path)
    elif case == "claimed":
        torch.save({"a": Larger()}, path)
    else:
        torch.save({"a": torch.zeros(10**7)}, path)
        compress(path)
    with pytest.raises(ValueError, match=r"weights\.pth .*(are allowed for a file of its size|damaged or cut short)"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.to_sparse(), "holds a tensor that is sparse coo, and cannot be loaded: fc.weight"),
        (lambda t: t.to_sparse_csr(), "holds a tensor that is sparse csr, and cannot be loaded: fc.weight"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "that is quantised, and cannot be loaded"),
        (lambda t: t.to("meta"), "that is without content, and cannot be loaded"),
        (lambda t: t + 1j, "holds complex numbers, and the model real ones: fc.weight"),
    ],
    ids=["sparse", "csr", "quantised", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_copied_leave_the_model_untouched(change: Callable, reason: str, tmp_path: Path) -> None:
    state, other = network().state_dict(), network()
    torch.save(state | {"fc.weight": change(state["fc.weight"])}, tmp_path / "weights.pth")
    before = copy.deepcopy(other.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"weights\.pth .*{reason}"):
            load_checkpoint(other, tmp_path / "weights.pth", strict=strict)
        assert_same(other.state_dict(), before)


def test_control_characters_of_a_file_are_not_printed(tmp_path: Path, capsys) -> None:
    torch.save({"a\x1b]0;title\x07": torch.ones(1, 1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="keys unknown to the model") as caught:
        load_checkpoint(network(), tmp_path / "weights.pth")
    assert r"a\x1b]0;title\x07" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    run = {"state_dict": {"a": torch.ones(1, 1)}, "odconv": {}, "hyper_parameters": {"detector": "\x1b[31m"}}
    torch.save(run, tmp_path / "weights.ckpt")
    assert main(["evaluate", "--weights", str(tmp_path / "weights.ckpt"), "--data", "digits"]) == 1
    assert r"is a detector, \x1b[31m: see" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("notes", "options"),
    [
        ({}, None),
        ([], {}),
        ({}, "resnet18"),
        ({}, {"arch": ["resnet18"]}),
        ({}, {"arch": 18}),
        ({}, {"image_size": "large"}),
        ({}, {"image_size": 10**7}),
        ({}, {"resize_size": 10**400}),
        ({}, {"kernel_num": 10**9}),
        ({}, {"kernel_num": 10**18}),
        ({}, {"kernel_num": 10**400}),
        ({}, {"layer_options": [1]}),
        ({}, {"stem": None}),
        ({"temperature": 10**400}, {}),
    ],
)
def test_malformed_notes_are_a_value_error(notes: object, options: object, tmp_path: Path) -> None:
    described = {"arch": "od_resnet18", "image_size": 32, "resize_size": 36}
    torch.save(
        {
            "state_dict": {"fc.weight": torch.ones(2, 2), "roi_heads.box_predictor.cls_score.bias": torch.ones(2)},
            "odconv": notes,
            "hyper_parameters": described | options if isinstance(options, dict) else options,
        },
        tmp_path / "weights.ckpt",
    )
    for load in (restore, restore_detector):
        with pytest.raises(ValueError, match=r"weights\.ckpt|must be"):
            load(str(tmp_path / "weights.ckpt"))


def test_objects_can_be_allowed_by_who_trusts_them(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "rate": fractions.Fraction(1, 10)}, path)
    with pytest.raises(ValueError, match=r"fractions\.Fraction"):
        read_state_dict(path)
    with torch.serialization.safe_globals([fractions.Fraction]):
        assert list(read_state_dict(path)) == ["a"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 20, b"<!DOCTYPE html><html>", bytes(1000), b"PK\x03\x04"])
def test_garbage_is_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"weights{suffix} is no .*, or damaged or cut short"):
        read_state_dict(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), form=st.sampled_from(["zip", "legacy", "safetensors"]))
def test_any_truncated_file_is_a_value_error(share: float, form: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    state = {"a": torch.ones(300), "b": torch.zeros(7)}
    if form == "safetensors":
        save_safetensors(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    # a legacy file that ends amid the name of an object holds, as far as anybody can tell, an unknown object
    with pytest.raises(ValueError, match=r"cut short|could run code"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "holds no state dict, only the entries epoch, optimizer"),
        ({"state_dict": {}}, "holds a state dict without tensors"),
        ({}, "holds a state dict without tensors"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
    ],
)
def test_files_without_weights(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "weights.pth")


def test_missing_files_suggest_similar_ones(tmp_path: Path) -> None:
    (tmp_path / "od_resnet18_4x.pth").touch()
    with pytest.raises(
        FileNotFoundError, match=r"od_resnet18\.pth does not exist; did you mean .*od_resnet18_4x\.pth\?"
    ):
        read_state_dict(tmp_path / "od_resnet18.pth")
    with pytest.raises(FileNotFoundError, match="nor does its folder"):
        read_state_dict(tmp_path / "nowhere" / "weights.pth")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_exported_networks_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is an exported network, .*; give its checkpoint"):
        read_state_dict(tmp_path / name)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "new folder" / "model.safetensors"
    save_safetensors(model, path, {"arch": "od_test"})
    assert_same(dict(sorted(read_state_dict(path).items())), dict(sorted(model.state_dict().items())))
    with safetensors_torch.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "arch": "od_test"}
    again = network()
    load_checkpoint(again, path)
    assert_same(again.state_dict(), model.state_dict())
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as readable for others as any new file


def test_safetensors_of_shared_and_strided_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last))
    model[1].weight = model[0].weight
    save_safetensors(model, tmp_path / "model.safetensors")
    read = read_state_dict(tmp_path / "model.safetensors")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(read[key], tensor, rtol=0, atol=0)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.ones(1)}, path)
    with pytest.raises(TypeError):
        save_safetensors({"a": torch.zeros(1)}, path, {"epoch": 3})  # type: ignore[dict-item]
    assert read_state_dict(path)["a"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder.safetensors", tmp_path / "file" / "model.safetensors"):
        with pytest.raises(OSError, match=path.parent.name):
            save_safetensors({"a": torch.ones(1)}, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.zeros(200_000)}, path)

    def write() -> None:
        for value in range(1, 20):
            save_safetensors({"a": torch.full((200_000,), float(value))}, path)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert len(read_state_dict(path)["a"].unique()) == 1
    writer.join()


@pytest.mark.parametrize("temperature", ["warm", float("nan"), -1.0, [1.0]])
def test_a_bad_temperature_leaves_the_model_untouched(temperature: object, tmp_path: Path) -> None:
    model = nn.Sequential(ODConv2d(4, 4, 3))
    torch.save({"state_dict": model.state_dict(), "odconv": {"temperature": temperature}}, tmp_path / "weights.pth")
    other = nn.Sequential(ODConv2d(4, 4, 3))
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="temperature"):
        load_checkpoint(other, tmp_path / "weights.pth")
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize("temperature", [float("nan"), -1.0, 0.0, float("inf")])
def test_a_bad_temperature_of_an_attention_leaves_the_model_untouched(temperature: object, tmp_path: Path) -> None:
    other = nn.Sequential(ODConv2d(4, 4, 3))
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    torch.save(before | {"0.attention.temperature": torch.tensor(temperature)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"no positive number: 0\.attention\.temperature is"):
        load_checkpoint(other, tmp_path / "weights.pth")
    assert_same(other.state_dict(), before)


def test_published_files_hold_the_published_keys_alone(tmp_path: Path) -> None:
    model = nn.Sequential(ODConv2d(4, 4, 3, temperature=2.5), ODConv2d(4, 4, 3, temperature=2.5))
    save_safetensors(model, path := tmp_path / "published.safetensors", published=True)
    state = read_state_dict(path)
    assert state.keys() == {key for key in model.state_dict() if "temperature" not in key}
    again = nn.Sequential(ODConv2d(4, 4, 3), ODConv2d(4, 4, 3))
    load_checkpoint(again, path)
    assert_same(again.state_dict(), model.state_dict())
    model[1].attention.set_temperature(3.0)
    with pytest.raises(ValueError, match=r"published must be False for different temperatures: 2\.5, 3\.0"):
        save_safetensors(model, path, published=True)
    save_safetensors(model, path)  # each its own
    load_checkpoint(again, path)
    assert [layer.attention.temperature.item() for layer in again] == [2.5, 3.0]
    with pytest.raises(ValueError, match="published must be False for layers with a gain or kernel_gain"):
        save_safetensors(ODConv2d(4, 4, 3, gain=2), path, published=True)


def warm(gain: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), ODConv2d(4, 4, 3, gain=gain), ODConv2d(4, 4, 1, gain=1.0)).eval()


@pytest.mark.parametrize("form", ["safetensors", "state dict", "training"])
@pytest.mark.parametrize("wrap", [copy.copy, nn.DataParallel, torch.compile], ids=["bare", "parallel", "compiled"])
def test_the_gains_come_with_the_weights(form: str, wrap: Callable, tmp_path: Path) -> None:
    trained, x = wrap(warm(2.0)), torch.randn(2, 3, 8, 8)
    if form == "safetensors":
        save_safetensors(trained, path := tmp_path / "model.safetensors")
    else:
        state = trained.state_dict()
        torch.save({"state_dict": state} if form == "training" else state, path := tmp_path / "model.pth")
    loaded = warm(1.0)
    load_checkpoint(loaded, path)
    torch.testing.assert_close(loaded(x), warm(2.0)(x), rtol=0, atol=0)
    assert [module.attention.gain for module in loaded.modules() if isinstance(module, ODConv2d)] == [2.0, 1.0]


def test_a_file_that_lost_its_metadata_keeps_the_factors(tmp_path: Path) -> None:
    torch.save(dict(warm(2.0).state_dict()), tmp_path / "plain.pth")
    safetensors_torch.save_file(warm(2.0).state_dict(), tmp_path / "others.safetensors")
    for file in ("plain.pth", "others.safetensors"):
        model, x = warm(1.0), torch.randn(2, 3, 8, 8)
        load_checkpoint(model, tmp_path / file)
        torch.testing.assert_close(model(x), warm(2.0)(x), rtol=0, atol=0)


def test_other_factors_than_those_of_the_model_are_said_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_safetensors(warm(2.0), tmp_path / "warm.safetensors")
    caplog.set_level("INFO", "odconv")
    load_checkpoint(warm(2.0), tmp_path / "warm.safetensors")
    assert not caplog.messages
    load_checkpoint(warm(1.0), tmp_path / "warm.safetensors")
    (record,) = caplog.records
    assert "1.attention: (2.0, 1.0), were (1.0, 1.0)" in record.message
    assert record.levelname == "INFO", "every command that restores a warm start would say it"


def test_a_published_file_does_not_fit_layers_with_factors(tmp_path: Path) -> None:
    torch.save(dict(warm(1.0).state_dict()), path := tmp_path / "published.pth")
    model = warm(2.0)
    with pytest.raises(ValueError, match=r"factor 1, as published; the model's layers were made with gain=2"):
        load_checkpoint(model, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.attention\.factors"):
        model.load_state_dict(warm(1.0).state_dict())
    load_checkpoint(model, path, strict=False)
    assert model[1].attention.gain == 2.0


@pytest.mark.parametrize("gain", [2.0, 1.0])
def test_files_of_version_0_1_0_noted_the_gain_beside_the_tensors(gain: float, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in warm(gain).state_dict().items() if "factors" not in key}
    save_safetensors(state, tmp_path / "old.safetensors", {"odconv.gains": json.dumps({"1.attention": gain})})
    noted = OrderedDict(state)
    noted._metadata = {"1.attention": {"gain": gain}}  # type: ignore[attr-defined]
    torch.save(noted, tmp_path / "old.pth")
    x = torch.randn(2, 3, 8, 8)
    for model in (warm(1.0), warm(2.0)):
        for file in ("old.safetensors", "old.pth"):
            load_checkpoint(model, tmp_path / file)
            torch.testing.assert_close(model(x), warm(gain)(x), rtol=0, atol=0)
        loaded = warm(3 - gain)
        loaded.load_state_dict(torch.load(tmp_path / "old.pth", weights_only=True))
        torch.testing.assert_close(loaded(x), warm(gain)(x), rtol=0, atol=0)


@pytest.mark.parametrize("gains", ['{"1.attention": -2}', '{"1.attention": "two"}', "[1]", "{", '{"1.attention": NaN}'])
def test_bad_gains_leave_the_model_untouched(gains: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors({key: tensor + 1 for key, tensor in warm(1.0).state_dict().items()}, path, {"odconv.gains": gains})
    model = warm(1.0)
    with pytest.raises(ValueError, match=r"model\.safetensors records (gains|factors) that are no"):
        load_checkpoint(model, path)
    assert_same(model.state_dict(), warm(1.0).state_dict())


def test_nothing_is_loaded_on_the_meta_device(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match=r"Sequential is on the meta device.* model\.to_empty\(device=\.\.\.\) first"):
        load_checkpoint(model, tmp_path / "weights.pth")
    load_checkpoint(model.to_empty(device="cpu"), tmp_path / "weights.pth")
    assert_same(model.state_dict(), state)


def test_resolve_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("weights").mkdir()
    Path("weights/od_resnet18.pth").touch()
    assert resolve("weights/od_resnet18.pth") == Path("weights/od_resnet18.pth")
    for missing in ("weights/od_resnet50.pth", "./weights/od_resnet50.pth", str(tmp_path / "weights/od_resnet50.pth")):
        with pytest.raises(FileNotFoundError, match=r"od_resnet50\.pth do not exist; did you mean .*od_resnet18\.pth"):
            resolve(missing)
    with pytest.raises(FileNotFoundError, match="the weights resnet18 do not exist"):
        resolve("resnet18")
    for missing in ("runs/best.ckpt", "runs/typo/best.ckpt", "runs/typo/best", "a/b/c/model.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"the weights {missing} do not exist \(nor does its folder"):
            resolve(missing)
    with pytest.raises(ValueError, match="hf://owner/name or hf://owner/name/file, got hf://model"):
        resolve("hf://model")


def hub_cache(cache: Path, repository: str, *files: str) -> None:
    """Lay a repository out as huggingface_hub's cache does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in files:
        path = root / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.ones(1)}, path)


def test_resolve_from_the_cache_of_the_hub_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    hub_cache(tmp_path, "someone/both", "pytorch_model.bin", "model.safetensors")
    hub_cache(tmp_path, "someone/od_resnet18", "pytorch_model.bin", "deep/best.pth")
    hub_cache(tmp_path, "someone/empty")
    script = """
import sys
from odconv.checkpoints import resolve
for weights in sys.argv[1:]:
    try:
        print(resolve(weights).as_posix())
    except FileNotFoundError as error:
        print("error:", error)
"""
    names = [
        "someone/both",
        "hf://someone/od_resnet18",
        "hf://someone/od_resnet18/deep/best.pth",
        "someone/empty",
        "hf://someone/nothing/model.pth",
    ]
    output = subprocess.run(
        [sys.executable, "-c", script, *names],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [Path(line).name for line in output[:3]] == ["model.safetensors", "pytorch_model.bin", "best.pth"]
    assert all(Path(line).is_file() for line in output[:3])
    assert output[3].startswith(
        "error: someone/empty is no file, and the Hugging Face Hub gives no model.safetensors or"
    )
    assert output[4].startswith("error: someone/nothing is no file, and the Hugging Face Hub gives no model.pth under")


def test_another_attentions_temperature_is_no_affair_of_ours(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Module()
            self.attention.register_buffer("temperature", torch.tensor([-1.0, 2.0, 0.0]))
            self.layer = ODConv2d(4, 4, 3, temperature=5.0)

    model, path = Other(), tmp_path / "other.safetensors"
    save_safetensors(model, path, published=True)
    assert "attention.temperature" in read_state_dict(path)
    again = Other()
    again.attention.temperature.zero_()
    load_checkpoint(again, path)
    assert_same(again.state_dict(), model.state_dict())
    state = {key: value for key, value in model.state_dict().items() if key != "attention.temperature"}
    torch.save(state | {"layer.attention.temperature": torch.tensor([2.0])}, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"1 keys missing in the file: attention\.temperature"):
        load_checkpoint(again, tmp_path / "missing.pth")
    load_checkpoint(again, tmp_path / "missing.pth", strict=False)
    assert again.layer.attention.temperature == 2
