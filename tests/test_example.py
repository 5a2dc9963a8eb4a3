"""The examples do what they say; the demo shortens its trainings where they would take too long."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from examples import audio, demo, detect, finetune, volumes

import odconv
import odconv.checkpoints
from odconv.app.commands.listing import find_recipes

EXAMPLES = Path(demo.__file__).parent


@pytest.mark.parametrize(("seconds", "epochs"), [(0.1, 6), (0.7, 6), (1.0, 4), (3.0, 1), (60.0, 1)])
def test_epochs_fit_the_machine(seconds: float, epochs: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "seconds_per_step", lambda recipe: seconds)
    assert demo.choose_epochs() == epochs
    said = capsys.readouterr().out
    assert ("instead of 6" in said) == (epochs < 6)
    assert ("for 1 epoch instead" in said) == (epochs == 1)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((98.6, 98.3, 98.9), "ODConv 1x is level with ResNet18, ODConv 4x is level with ResNet18; a difference below"),
        ((94.0, 97.0, 91.0), "ODConv 1x is ahead of ResNet18, ODConv 4x is behind ResNet18; a difference below"),
        ((10.0, 27.8, 18.6), "Not all of them have learned the digits in this time: below 90 %"),
        ((98.0, 98.0, 60.0), "Not all of them have learned"),
    ],
)
def test_the_verdict_says_which_network_is_ahead(scores: tuple, verdict: str, tmp_path: Path) -> None:
    runs = {name: tmp_path / recipe for name, recipe in demo.RECIPES.items()}
    for run, top1 in zip(runs.values(), scores, strict=True):
        run.mkdir()
        (run / "result.json").write_text(json.dumps({"top1": top1}))
    assert demo.verdict(runs).startswith(verdict)


def test_a_step_is_measured() -> None:
    recipe = yaml.safe_load(find_recipes("train")["digits_od_resnet18_4x"].read_text())
    small = {"arch": "od_mobilenetv2_050", "batch_size": 2}
    assert 0 < demo.seconds_per_step(recipe | small) < demo.seconds_per_step(recipe)


def test_examples_are_short() -> None:
    for script in ("audio", "volumes", "finetune", "detect", "deploy"):
        assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_a_network_for_sound_learns_pitches() -> None:
    assert audio.train(steps=60) > 90


@pytest.mark.slow
def test_a_network_for_volumes_finds_balls() -> None:
    assert volumes.train(steps=100) > 0.8


@pytest.mark.slow
def test_a_detector_finds_discs_and_squares() -> None:
    assert detect.train(steps=100) > 80


@pytest.mark.slow
def test_pretrained_weights_are_fine_tuned(shared_data: Path) -> None:
    assert finetune.train(str(shared_data / "weights/mobilenet_v2_1.0_imagenet_fp16.pth")) > 80


@pytest.mark.slow
def test_a_file_answers_without_the_network(tmp_path: Path) -> None:
    deploy = pytest.importorskip("examples.deploy")
    torch.manual_seed(0)
    odconv.checkpoints.save_safetensors(
        odconv.create_model("od_mobilenetv2_050", kernel_num=4), tmp_path / "w.safetensors"
    )
    deploy.export(tmp_path / "net.onnx", str(tmp_path / "w.safetensors"), "od_mobilenetv2_050", 64)
    network = deploy.Network(tmp_path / "net.onnx")
    images = torch.randn(3, 3, network.size, network.size)
    model = odconv.create_model("od_mobilenetv2_050", kernel_num=4, weights=tmp_path / "w.safetensors").eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.tensor(network(images.numpy())), model(images), rtol=1e-3, atol=1e-4)
