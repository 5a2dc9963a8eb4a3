"""The weights of a run in a folder for others: the same network, smaller, with a card, wherever a checkpoint serves."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from odconv import create_model
from odconv.app.classify.restore import restore
from odconv.app.cli import main
from odconv.app.commands.release import release
from odconv.app.demo import networks as demo
from odconv.app.predict import load_classifier
from odconv.hub import HubModel

NOTE = "Coarse noise in three colours, made for tests. Nobody's property."


@pytest.fixture(scope="module")
def released(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a folder, in half precision."""
    out = tmp_path_factory.mktemp("release") / "noise"
    words = ["--run", str(trained), "--out", str(out), "--data_note", NOTE]
    assert main(["release", *words]) == 0
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_a_folder_of_half_the_size_answers_like_the_run(released: Path, trained: Path) -> None:
    assert {file.name for file in released.iterdir()} == {
        "README.md", "classifier.json", "config.json", "model.safetensors"
    }  # fmt: skip
    state = load_file(released / "model.safetensors")
    assert {tensor.dtype for tensor in state.values() if tensor.ndim > 1} == {torch.float16}
    assert {tensor.dtype for tensor in state.values() if tensor.ndim < 2} == {torch.float32, torch.int64}
    run, again = restore(str(trained / "best.ckpt")), restore(str(released))
    assert again[1:] == run[1:]
    torch.testing.assert_close(logits(again.model), logits(run.model), rtol=0.01, atol=0.01)
    (temperature,) = {float(value) for name, value in state.items() if name.endswith("temperature")}
    assert temperature == next(m.temperature.item() for m in run.model.modules() if hasattr(m, "temperature"))
    for model in (
        HubModel.from_pretrained(released),
        create_model(
            tiny.DYNAMIC, kernel_num=1, num_classes=3, stem="small", weights=released / "model.safetensors"
        ).eval(),
    ):
        assert torch.equal(logits(model), logits(again.model))


def test_full_precision_changes_nothing(trained: Path, tmp_path: Path) -> None:
    release(run=str(trained), out=str(tmp_path), data_note=NOTE, precision="float32")
    wanted = logits(restore(str(trained / "best.ckpt")).model)
    assert torch.equal(logits(restore(str(tmp_path)).model), wanted)


def test_the_card_says_what_was_measured_and_how_it_was_trained(released: Path, trained: Path, tmp_path: Path) -> None:
    card = (released / "README.md").read_text()
    best = json.loads((trained / "result.json").read_text())["best_top1"]
    assert (
        main(
            ["evaluate", "--weights", str(released), "--data", str(yaml_of(trained)["data"]), "--out", f"{tmp_path}/x"]
        )
        == 0
    )
    measured = json.loads((tmp_path / "x").read_text())
    assert f"| top-1 {measured['top1']:.2f} %, top-5 {measured['top5']:.2f} %, on the 15 images" in card
    assert f"best top-1 {best:.2f} %, after epoch" in card
    assert f"## Data\n\n{NOTE}\n" in card
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe.items() <= yaml_of(trained).items()
    assert {"arch", "epochs", "lr"} <= recipe.keys()
    assert str(trained.parent) not in card
    assert str(Path(yaml_of(trained)["data"]).parent) not in card


def yaml_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_it_serves_wherever_a_checkpoint_does(released: Path, folder: Path, tmp_path: Path) -> None:
    classifier = load_classifier(str(released))
    assert (classifier.classes, classifier.image_size, classifier.resize_size) == (["bar", "dot", "gap"], 16, 16)
    (network,) = demo.load(str(released), None, None)
    assert network.classifier.classes == classifier.classes
    assert network.layers
    look = ["visualize", str(folder / "val"), "--weights", str(released), "--out", str(tmp_path / "look")]
    assert main([*look, "--shown", "2"]) == 0
    assert (tmp_path / "look/attentions.html").exists()


def test_what_is_no_release_is_refused(released: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json of .* says what network it is; leave out kernel_num"):
        restore(str(released), kernel_num=4)
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no model.safetensors; did you mean .*best"):
        restore(str(trained))
    copy = shutil.copytree(released, tmp_path / "copy")
    notes = json.loads((copy / "classifier.json").read_text())
    for wrong in ({**notes, "classes": ["a"] * 4}, {**notes, "classes": [1, 2, 3]}, {"classes": []}, []):
        (copy / "classifier.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"classifier.json is malformed"):
            restore(str(copy))
    (copy / "classifier.json").write_text(json.dumps(notes | {"image_size": 10**9}))
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        restore(str(copy))
    with pytest.raises(FileExistsError, match="out must be an empty folder"):
        release(run=str(trained), out=str(copy), data_note=NOTE)
    run = shutil.copytree(trained, tmp_path / "run")
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    next(tensor for tensor in checkpoint["state_dict"].values() if tensor.ndim == 5).mul_(1e9)
    torch.save(checkpoint, run / "best.ckpt")
    with pytest.raises(ValueError, match=r"precision must be float32, since .*weight is too large for float16"):
        release(run=str(run), out=str(tmp_path / "large"), data_note=NOTE)
    assert not (tmp_path / "large").exists()
    (run / "config.yaml").write_text("detector: faster_rcnn\narch: resnet18\n")
    with pytest.raises(ValueError, match="run must be the folder of a run of odconv train"):
        release(run=str(run), out=str(tmp_path / "large"), data_note=NOTE)
