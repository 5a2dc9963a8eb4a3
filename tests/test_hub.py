"""Networks are saved for the Hub with what builds them, and come back the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch

import odconv
from odconv.checkpoints import save_safetensors

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")
HubModel = pytest.importorskip("odconv.hub").HubModel
load_classifier = pytest.importorskip("odconv.app.predict").load_classifier

NAME, OPTIONS = (
    tiny.DYNAMIC,
    {"kernel_num": 2, "num_classes": 10, "reduction": 0.125, "dropout": 0.1, "stem": "small"},
)


def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(image())


def test_a_network_comes_back_from_a_folder_as_it_was(tmp_path):
    network = HubModel(NAME, **OPTIONS)
    odconv.set_temperature(network, 7.5)
    network.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"name": NAME, **OPTIONS}
    again = HubModel.from_pretrained(tmp_path)
    assert not again.training
    assert again.config == network.config
    torch.testing.assert_close(logits(again), logits(network), rtol=0, atol=0)
    plain = odconv.create_model(NAME, **OPTIONS, weights=tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(plain), logits(network), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    third = HubModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(third), logits(network), rtol=0, atol=0)


def test_a_misspelt_name_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    HubModel(NAME, **OPTIONS).save_pretrained(tmp_path / "released_4x")
    monkeypatch.setenv("ODCONV_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", None)
    assert HubModel.from_pretrained("released_4x").config["name"] == NAME
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor owner/name .*; did you mean released_4x\?"):
        HubModel.from_pretrained("released_4")


def test_a_warm_start_and_training_checkpoints_come_back_too(tmp_path):
    static = odconv.create_model(tiny.STATIC, num_classes=10)
    warm = odconv.convert(static, kernel_num=2)
    for parameter in warm.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # trained
    save_safetensors(warm, tmp_path / "warm.safetensors")
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in warm.state_dict().items()}}, tmp_path / "cold.ckpt"
    )
    network = HubModel(NAME, kernel_num=2, num_classes=10, weights=tmp_path / "warm.safetensors")
    torch.testing.assert_close(logits(network), logits(warm), rtol=0, atol=0)
    network.save_pretrained(tmp_path / "hub")
    assert "weights" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    torch.testing.assert_close(logits(HubModel.from_pretrained(tmp_path / "hub")), logits(warm), rtol=0, atol=0)
    cold = HubModel(NAME, kernel_num=2, num_classes=10, weights=tmp_path / "cold.ckpt")
    torch.testing.assert_close(logits(cold), logits(warm), rtol=0, atol=0)  # the gain is a tensor, too


def test_the_card_has_the_costs_and_the_accuracy_only_if_given(tmp_path):
    network = HubModel("od_resnet18")
    counts = odconv.profile(network.model, (3, 224, 224))
    card = str(network.generate_model_card())
    assert f"| parameters | {counts.parameters / 1e6:.2f}M |" in card
    assert f"| multiply-adds at 224 x 224 | {counts.madds / 1e9:.3f}G |" in card
    assert "library_name: odconv" in card
    assert "accuracy" not in card
    network = HubModel(NAME, **OPTIONS)
    facts = {"accuracy": "93.1 % top-1 on Imagenette", "image_size": 32, "repo_id": "someone/flowers"}
    network.save_pretrained(tmp_path, model_card_kwargs=facts)
    card = (tmp_path / "README.md").read_text()
    assert "| accuracy | 93.1 % top-1 on Imagenette |" in card
    assert "multiply-adds at 32 x 32" in card
    assert 'HubModel.from_pretrained("someone/flowers")' in card
    assert huggingface_hub.ModelCard(card).data.pipeline_tag == "image-classification"


def test_push_to_hub_uploads_the_saved_folder(tmp_path, monkeypatch):
    def create_repo(api, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return repo_id

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    network = HubModel(NAME, **OPTIONS)
    assert network.push_to_hub("someone/flowers", model_card_kwargs={"image_size": 32}) == "someone/flowers"
    torch.testing.assert_close(
        logits(HubModel.from_pretrained(tmp_path / "someone" / "flowers")), logits(network), rtol=0, atol=0
    )


def test_a_repository_in_the_cache_is_read_without_a_network(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "cache" / "models--someone--flowers"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    network = HubModel(NAME, **OPTIONS)
    network.save_pretrained(root / "snapshots" / commit, model_card_kwargs={"image_size": 32})
    torch.save(logits(network), tmp_path / "logits.pt")
    torch.save(image(), tmp_path / "image.pt")
    script = f"""
import tiny, torch, odconv
from odconv.hub import HubModel
x, expected = torch.load("image.pt"), torch.load("logits.pt")
plain = odconv.create_model({NAME!r}, **{OPTIONS!r}, weights="someone/flowers").eval()
for model in (HubModel.from_pretrained("someone/flowers"), plain):
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)


def test_what_does_not_fit_is_explained(tmp_path):
    HubModel(NAME, **OPTIONS).save_pretrained(tmp_path, model_card_kwargs={"image_size": 32})
    with pytest.raises(ValueError, match="num_classes is 10 in the file, 20 in the model"):
        HubModel.from_pretrained(tmp_path, num_classes=20)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json that names a network of odconv"):
        HubModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown model 'od_resnet19'"):
        HubModel("od_resnet19")
    with pytest.raises(TypeError, match="kernels"):
        HubModel("od_resnet18", kernels=4)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weights": "/etc/passwd"}, "config.json of .* must not say weights: model.safetensors are its weights"),
        ({"weights": "someone/else", "warm_start": True}, "must not say weights and warm_start"),
        ({"num_classes": 10**12}, r"model\.safetensors of .* bytes cannot hold the [0-9,]+ numbers of its"),
        ({"kernel_num": 10**9}, r"model\.safetensors of .* bytes cannot hold the [0-9,]+ numbers of its"),
        ({"kernel_num": 10**18}, "cannot hold the network that goes with it"),
        ({"endpoint": "http://127.0.0.1:9"}, r"config\.json is malformed: TypeError: .*endpoint"),
        ({"kernels": 4}, r"config\.json is malformed: TypeError: .*kernels"),
        ({"name": ["od_resnet18"]}, "unknown model"),
        ({"num_classes": None}, "num_classes must be an int of at least 1"),
    ],
)
def test_config_json_says_what_builds_the_network_and_nothing_else(said, message, tmp_path):
    HubModel(NAME, **OPTIONS).save_pretrained(tmp_path, model_card_kwargs={"image_size": 32})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(ValueError, match=message):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '"text"'])
def test_a_config_json_that_is_malformed(text, tmp_path):
    HubModel(NAME, **OPTIONS).save_pretrained(tmp_path, model_card_kwargs={"image_size": 32})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is malformed"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("name", [tiny.DYNAMIC, f"cond_{tiny.STATIC}", f"dy_{tiny.STATIC}"])
def test_a_warm_start_is_not_repeated(tmp_path, name):
    static = odconv.create_model(tiny.STATIC, num_classes=3)
    torch.save(static.state_dict(), tmp_path / "static.pth")
    options = {"kernel_num": 2, "num_classes": 3, "weights": tmp_path / "static.pth", "warm_start": True}
    network = HubModel(name, **options).eval()
    network.save_pretrained(tmp_path / "saved")
    again = HubModel.from_pretrained(tmp_path / "saved")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), network(x), rtol=0, atol=0)
        torch.testing.assert_close(again(x), static.eval()(x), rtol=1e-4, atol=1e-5)
