"""The weights of a run in a folder for others: the same network, smaller, with a card, wherever a checkpoint serves."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from odconv import create_model, load_checkpoint
from odconv.app.classify.restore import restore
from odconv.app.cli import main
from odconv.app.commands.release import release
from odconv.app.data import normalise, open_data
from odconv.app.demo import command, demo
from odconv.app.demo import networks as demo_networks
from odconv.app.predict import load_classifier
from odconv.checkpoints import find_released, read_state_dict, resolve
from odconv.hub import HubModel

ROOT = Path(__file__).parents[1]
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
    (network,) = demo_networks.load(str(released), None, None)
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


# ---- by name


@pytest.fixture
def at_hand(released: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, with the released one in its folder `weights`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ODCONV_WEIGHTS", raising=False)
    shutil.copytree(released, tmp_path / "weights" / "noise")
    return tmp_path


def test_a_name_is_enough(at_hand: Path, released: Path, folder: Path) -> None:
    wanted = logits(restore(str(released)).model)
    assert torch.equal(logits(restore("noise").model), wanted)
    assert torch.equal(logits(load_classifier("noise").model), wanted)
    options = {"kernel_num": 1, "num_classes": 3, "stem": "small"}
    assert torch.equal(logits(create_model(tiny.DYNAMIC, **options, weights="noise").eval()), wanted)
    for place in ("noise", Path("noise"), "weights/noise", released):
        model = create_model(tiny.DYNAMIC, **options)
        load_checkpoint(model, place)
        assert torch.equal(logits(model.eval()), wanted)
    assert main(["evaluate", "--weights", "noise", "--data", str(folder)]) == 0
    assert main(["predict", str(folder / "val"), "--weights", "noise", "--out", "found.csv"]) == 0
    assert main(["visualize", str(folder / "val"), "--weights", "noise", "--out", "look", "--shown", "2"]) == 0
    assert "noise" in Path("look/attentions.html").read_text()


def test_the_environment_says_where_names_are(
    at_hand: Path, released: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(released, elsewhere / "other")
    monkeypatch.setenv("ODCONV_WEIGHTS", str(elsewhere))
    assert find_released("other") == elsewhere / "other"
    assert resolve("other") == elsewhere / "other" / "model.safetensors"
    assert find_released("noise") == Path("noise")  # in the folder that counts no longer
    monkeypatch.setenv("ODCONV_WEIGHTS", "")
    assert find_released("noise") == Path("weights/noise")


def test_what_is_at_a_path_comes_before_names(at_hand: Path, trained: Path) -> None:
    shutil.copy(trained / "best.ckpt", "noise")
    assert find_released("noise") == resolve("noise") == Path("noise")
    Path("noise").unlink()
    Path("noise").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the folder noise has no config.json"):
        restore("noise")


def test_a_name_that_is_not_there_names_those_that_are(at_hand: Path) -> None:
    there = r"by name there is noise in the folder weights \(\$ODCONV_WEIGHTS names another\)"
    for attempt in (restore, load_classifier, read_state_dict, resolve):
        with pytest.raises(
            FileNotFoundError, match=f"nois(es)? do(es)? not exist; {there}|noises do(es)? not.*{there}"
        ):
            attempt("noises")
    Path("noises.csv").touch()
    with pytest.raises(FileNotFoundError, match=rf"noises do not exist; {there}; did you mean noise\?$"):
        resolve("noises")
    for outside in ("../weights/noise", "weights/../noise", ".", ".."):  # a name leads nowhere else
        assert find_released(outside) == Path(outside)
    with pytest.raises(FileNotFoundError) as caught:  # what has the suffix of a file is meant as one
        resolve("noise.pth")
    assert "by name" not in str(caught.value)
    shutil.rmtree("weights")
    with pytest.raises(FileNotFoundError, match="by name there is nothing in the folder weights"):
        resolve("noise")


def test_the_demo_shows_two_by_name(at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*names: str | None) -> None:
        loaded.append(names)
        raise InterruptedError

    monkeypatch.setattr(demo_networks, "load", load)
    monkeypatch.setattr(command, "check_free", lambda host, port: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which it sets
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    shutil.copytree("weights/noise", "weights/imagenette_static")
    with pytest.raises(ValueError, match="imagenette_odconv_4x are not in the folder weights"):
        demo()
    shutil.copytree("weights/noise", "weights/imagenette_odconv_4x")
    pytest.importorskip("gradio")
    for options in ({}, {"static": "noise"}, {"weights": "noise"}):
        with pytest.raises(InterruptedError):
            demo(**options)
    both = ("imagenette_odconv_4x", "imagenette_static", None)
    assert loaded == [both, ("imagenette_odconv_4x", "noise", None), ("noise", None, None)]


def test_classes_are_called_as_a_file_says(trained: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a bar\na dot\na gap\n")
    out = tmp_path / "named"
    release(run=str(trained), out=str(out), data_note=NOTE, classes=str(tmp_path / "names.txt"))
    assert load_classifier(str(out)).classes == ["a bar", "a dot", "a gap"]
    assert restore(str(out)).classes == ["bar", "dot", "gap"]  # by which the data are measured
    assert "3: a bar, a dot, a gap" in (out / "README.md").read_text()
    assert (
        main(["visualize", str(folder / "val"), "--weights", str(out), "--out", str(tmp_path / "look"), "--shown", "2"])
        == 0
    )
    assert "a dot" in (tmp_path / "look/attentions.html").read_text()
    notes = json.loads((out / "classifier.json").read_text())
    for wrong in (["a bar"], [1, 2, 3], 3):
        (out / "classifier.json").write_text(json.dumps(notes | {"names": wrong}))
        with pytest.raises(ValueError, match=r"classifier.json is malformed"):
            restore(str(out))
    (tmp_path / "names.txt").write_text("a bar\n")
    with pytest.raises(ValueError, match="classes must be a file of 3 lines"):
        release(run=str(trained), out=str(tmp_path / "wrong"), data_note=NOTE, classes=str(tmp_path / "names.txt"))
    assert not (tmp_path / "wrong").exists()


# ---- those of this tree

COMMITTED = sorted(path.parent.name for path in (ROOT / "weights").glob("*/config.json"))


def rows() -> dict[str, dict[str, str]]:
    with (ROOT / "benchmarks/results/weights.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_every_folder_has_its_row_and_stays_small() -> None:
    assert {*COMMITTED} == {*rows()} >= {command.STATIC, command.DYNAMIC}
    for name in COMMITTED:
        size = sum(file.stat().st_size for file in (ROOT / "weights" / name).iterdir())
        assert f"{size / 1e6:.2f}" == rows()[name]["megabytes"]
        assert size < 8e6


@pytest.mark.parametrize("name", COMMITTED)
def test_a_card_says_what_was_measured_and_whose_the_images_are(name: str) -> None:
    texts = [file.read_text() for file in (ROOT / "weights" / name).iterdir() if file.suffix != ".safetensors"]
    assert not [found for text in texts for found in re.findall(r"(?<![\w.])/(?:work|tmp|home|root)/\S*", text)]
    card = (ROOT / "weights" / name / "README.md").read_text()
    row = rows()[name]
    assert f"top-1 {float(row['top1']):.2f} %, top-5 {float(row['top5']):.2f} %, on the 3,925 images" in card
    for words in ("Apache-2.0", "non-commercial", "which these same images chose"):
        assert words in card


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_weights_know_the_classes(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODCONV_WEIGHTS", str(ROOT / "weights"))
    network = restore(name)
    assert load_classifier(name).classes[4] == "church"
    images = open_data(
        shared_data / "imagenette96", image_size=network.image_size, resize_size=network.resize_size, need_train=False
    ).val
    every = range(0, len(images), 40)
    with torch.inference_mode():
        answers = network.model(normalise(torch.stack([images[i][0] for i in every]))).argmax(1)
    right = 100 * (answers == torch.tensor([images.labels[i] for i in every])).double().mean().item()
    assert right == pytest.approx(float(rows()[name]["top1"]), abs=15)  # three deviations of 99 images
