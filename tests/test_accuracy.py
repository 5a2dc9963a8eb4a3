"""The benchmark of accuracies: every cell can be built, is trained once, and is reported as it came out."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import report
from benchmarks.accuracy.cells import RECIPES, STUDIES, Recipe
from benchmarks.accuracy.networks import ABLATIONS, METHODS, STARTS, build, described
from benchmarks.accuracy.report import (
    MAIN_SETTINGS,
    ablation_tables,
    cost_key,
    difference,
    draw,
    main_tables,
    seeds,
    top1,
    write_report,
)

import odconv
from odconv.app.classify.module import ClassifierTraining
from odconv.app.classify.restore import restore
from odconv.app.commands.release import release
from odconv.layers import PerSampleConv
from odconv.models.build import shapes_alone

pytestmark = pytest.mark.slow  # of benchmarks

NETWORK = ("imagenette", "mobilenetv2_050")


@pytest.fixture
def data(tmp_path):
    """Images of two colours, 20 to train on and 4 to test on of each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for number, colour in enumerate(("dark", "light")):
            folder = tmp_path / "data" / "imagenette96" / split / colour
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(128 * number, 128 * number + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("network", ["mobilenetv2_050", "resnet18", "resnet18_025"])
def test_every_method_builds(network):
    static = sum(p.numel() for p in build(network, "static", "small", 10).parameters())
    for method in METHODS | ABLATIONS:
        with shapes_alone():
            model = build(network, method, "small", 10)
        dynamic = [m for m in model.modules() if isinstance(m, PerSampleConv)]
        assert bool(dynamic) == (method not in ("static", "se"))
        assert {getattr(layer, "kernel_num", None) for layer in dynamic} <= {(METHODS | ABLATIONS)[method].kernel_num}
        assert (sum(p.numel() for p in model.parameters()) > static) == (method != "static")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", ["dyconv", "odconv_1x", "kw_4x", "reduction_4", "norm_layer", "zero_heads"])
def test_runs_say_which_network_they_train(method, start):
    arch, options = described("mobilenetv2_050", method, start)
    with shapes_alone():
        said = odconv.create_model(arch, kernel_num=(METHODS | ABLATIONS)[method].kernel_num, **options)
        made = build("mobilenetv2_050", method, "standard", 1000, start=start)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (said, made)]
    assert {key: shape for key, shape in shapes[1].items() if key in shapes[0]} == shapes[0]
    assert all(
        key.endswith("attention.factors") for key in shapes[1].keys() - shapes[0].keys()
    )  # files bring them along


def test_cells_are_told_apart():
    for scale in ("small", "full"):
        cells = {cell for study in STUDIES.values() for cell in study(scale, 2)}
        assert len({cell.name for cell in cells}) == len(cells)
        assert {cell.split for cell in cells if cell.study == "tuning"} == {"validation"}


def test_trains_once_goes_on_and_reports(tmp_path, data, monkeypatch, capsys):
    begin = ClassifierTraining.on_train_batch_start

    def fail_in_epoch_2(self, *batch):
        if self.current_epoch == 1:
            raise RuntimeError("power failure")
        begin(self, *batch)

    recipe = Recipe(32, 2, 0.02, batch_size=20)
    monkeypatch.setitem(RECIPES, "tiny", {NETWORK: recipe})
    monkeypatch.setattr(report, "SECONDS", 0)
    out = tmp_path / "accuracy.csv"
    arguments = ["--data", data, "--scale", "tiny", "--out", out, "--runs", tmp_path / "runs", "--seeds", 1]
    with monkeypatch.context() as power:
        power.setattr(ClassifierTraining, "on_train_batch_start", fail_in_epoch_2)
        with pytest.raises(RuntimeError, match="power failure"):
            call(monkeypatch, *arguments, "--methods", "static")
    call(monkeypatch, *arguments, "--methods", "static")
    call(monkeypatch, *arguments, "--methods", "static", "odconv_4x")
    shown = capsys.readouterr().out
    assert (shown.count("epoch   1/2"), shown.count("epoch   2/2")) == (2, 2)
    static, dynamic = rows(out)
    assert (static["method"], dynamic["method"], dynamic["kernel_num"]) == ("static", "odconv_4x", "4")
    assert static["split"] == "test"
    assert float(static["top1"]) in [100 * right / 8 for right in range(9)]
    assert not list((tmp_path / "runs").rglob("last.ckpt"))

    folders = [next((tmp_path / "runs").glob(f"*_{method}_seed0_test_*")) for method in ("static", "odconv_4x")]
    for folder, row in zip(folders, (static, dynamic), strict=True):
        out_of_it = tmp_path / "released" / row["method"]
        released = release(run=str(folder), out=str(out_of_it), data_note="Two colours.", precision="float32")
        assert released["top1"] == max(float(epoch["top1"]) for epoch in rows(folder / "metrics.csv"))
        assert "min_scale: 0.35" in (out_of_it / "README.md").read_text()
    assert restore(str(folders[1] / "best.ckpt")).arch == "odl_mobilenetv2_050"

    call(monkeypatch, *arguments, "--methods", "odconv_1x", "--studies", "tuning")
    tuned = [row for row in rows(out) if row["study"] == "tuning"]
    assert {row["split"] for row in tuned} == {"validation"}
    assert {row["train_images"] for row in tuned} == {"36"}  # a tenth was cut off

    call(monkeypatch, "--report", "--out", out)
    text = (tmp_path / "accuracy.md").read_text()
    assert f"| static | 1 | {float(static['top1']):.2f} |" in text
    assert "## The recipe was chosen on: mobilenetv2_050, Imagenette, 36 training images" in text
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_minutes_train_what_has_no_row_yet(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", {NETWORK: Recipe(32, 1, 0.02, batch_size=20)})
    out = tmp_path / "accuracy.csv"
    arguments = ["--data", data, "--scale", "tiny", "--out", out, "--seeds", 1, "--device", "cpu", "--minutes", 5]
    call(monkeypatch, *arguments, "--methods", "static", "--commit", "abc")
    assert [(row["method"], row["device"], row["commit"]) for row in rows(out)] == [("static", "cpu", "abc")]
    call(monkeypatch, *arguments, "--methods", "static", "odconv_1x")
    assert [row["method"] for row in rows(out)] == ["static", "odconv_1x"]
    assert rows(out)[0]["commit"] == "abc"
    capsys.readouterr()
    call(monkeypatch, *arguments[:-1], 1e-9, "--methods", "odconv_4x")
    assert "odconv_4x seed 0: skipped" in capsys.readouterr().out


def test_differences_are_paired():
    one, other = {"0": 61.0, "1": 63.0, "2": 65.0}, {"0": 60.0, "1": 62.5, "2": 63.5, "3": 0.0}
    assert difference(one, other) == "+1.00 (-0.24 to +2.24)"  # t = 4.303 of two degrees of freedom
    assert difference({"0": 61.0}, other) == "+1.00"
    assert difference({"9": 61.0}, other) == ""


def test_what_diverged_counts_as_chance():
    trained = [{"seed": "0", "top1": "61.5"}, {"seed": "1", "top1": "diverged"}]
    assert top1(trained) == {"0": 61.5, "1": 10.0}
    assert seeds(trained) == "2, 1 diverged"


def test_recipes_are_not_mixed():
    row = dict.fromkeys(MAIN_SETTINGS, "1") | {"network": "resnet18", "dataset": "cifar10", "study": "main"}
    row |= {"seed": "0", "split": "test", "method": "static", "parameters": "1", "top5": "90", "device": "cpu"}
    rows = [row | {"top1": "50", "temp_share": "0.1"}, row | {"top1": "60", "temp_share": "2.0"}]
    costs = {cost_key(row): {"madds": "1", "training_ratio": "1", "inference_ratio": "1"}}
    text = "\n".join(main_tables(rows, costs))
    assert "30 to" not in text  # temp_init is 1
    assert "| static | 1 | 50.00 |" in text
    assert "| static | 1 | 60.00 |" in text
    with pytest.raises(ValueError, match="several of resnet18 static"):
        top1([row | {"top1": "50"}, row | {"top1": "60"}])


def test_ablations_alone_are_reported():
    row = dict.fromkeys(MAIN_SETTINGS, "1") | {"network": "resnet18", "dataset": "cifar10", "study": "ablation"}
    row |= {"seed": "0", "split": "test", "temp_init": "30", "temp_share": "2.0"}
    trained = [("odconv_4x", "52", "2.0"), ("norm_none", "50", "2.0"), ("odconv_4x", "10", "0.1")]
    rows = [row | {"method": method, "top1": top1, "temp_share": share} for method, top1, share in trained]
    text = "\n".join(ablation_tables(rows))
    assert "temperature 30 to 15.5\n" in text
    assert "| ODConv 4x | 1 | 52.00 |  |" in text
    assert "| 4x, no norm in the attention | 1 | 50.00 | -2.00 |" in text
    assert "| ODConv 4x, temperature 30 to 1 in the first 10 % | 1 | 10.00 | -42.00 |" in text


def test_every_method_has_a_colour(tmp_path):
    row = dict.fromkeys((*MAIN_SETTINGS, "device"), "1") | {"network": "resnet18", "dataset": "cifar10", "seed": "0"}
    rows = [row | {"method": name, "top1": "50"} for name in METHODS]
    costs = {cost_key(one): {"madds": "1e6", "training_ratio": "1", "inference_ratio": "1"} for one in rows}
    draw(rows, costs, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_mistakes(monkeypatch, tmp_path, capsys):
    for mistake, reason in (
        (["--methods", "odconv4x"], "invalid choice"),
        (["--seeds", "0"], "nothing is to be trained"),
        (["--threads", "0"], "must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, "--data", tmp_path, *mistake)
        assert reason in capsys.readouterr().err


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        write_report(tmp_path / "none.csv", tmp_path / "costs.csv", tmp_path)
