"""The report of a run, runs side by side, and the statistics of attentions: on real runs on tiny images."""

import csv
import getpass
import json
import re
import shutil
import socket
from math import log, sqrt
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from pages import CHROMIUM, Page, browse, measure
from PIL import Image
from small_runs import OPTIONS, make_folder
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from odconv import CondConv2d, DyConv2d, ODConv2d
from odconv.app.classify import train
from odconv.app.classify.attention_log import IMAGES, AttentionStatistics
from odconv.app.cli import main
from odconv.app.engine.machine import describe_machine
from odconv.app.pages.reports import compare, write_report
from odconv.app.pages.reports.read_run import read_run
from odconv.attentions import attention_statistics
from odconv.attentions.statistics import COLUMNS, kernel_distance, mixture_entropy
from odconv.attentions.verdicts import judge_kernels, summarize, verdict
from odconv.layers import Attention

FILES = ("config.yaml", "metrics.csv", "attentions.csv", "result.json", "machine.json")
HOSTILE = "<script>alert('$x^2$')</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of a dynamic and of a static network, with one image that cannot be read."""
    root = make_folder(tmp_path_factory.mktemp("images"), {"train": 16, "val": 6})
    (root / "train" / "dot" / "broken.png").write_bytes(b"no image")
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("dynamic", "static")}
    train(**OPTIONS | {"kernel_num": 2, "epochs": 2}, data=str(root), out=str(folders["dynamic"]))
    train(**OPTIONS | {"arch": "tiny", "temp_epoch": 1}, data=str(root), out=str(folders["static"]))
    return folders


def copy(run: Path, place: Path, without: str = "") -> Path:
    """Copy what the report reads."""
    place.mkdir(parents=True)
    for name in FILES:
        if name != without and (run / name).exists():
            shutil.copyfile(run / name, place / name)
    return place


# ---- statistics


class Fixed(Attention):
    """An attention that is given."""

    def __init__(self, gain: float, **values: list) -> None:
        super().__init__(2, 2, {name: (len(value[0]),) for name, value in values.items()}, hidden=None, gain=gain)
        self.values = tuple(torch.tensor(value) for value in values.values())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.values


def test_statistics_of_given_attentions() -> None:
    layer = ODConv2d(2, 2, 1, kernel_num=2)
    layer.attention = Fixed(  # two images
        2.0, kernel=[[0.5, 0.5], [0.9, 0.1]], channel=[[0.0, 1.0], [0.5, 1.0]], filter=[[2.0, 1.99], [2.0, 1.97]]
    )
    layer.weight = nn.Parameter(torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [0, 0]]]).view(2, 2, 2, 1, 1))
    rows = {row["attention"]: row for row in attention_statistics(nn.Sequential(layer), torch.zeros(2, 2, 3, 3))}
    assert list(rows["kernel"]) == [*COLUMNS]
    assert {row["layer"] for row in rows.values()} == {"0"}
    assert rows.keys() == {"kernel", "channel", "filter"}
    kernel, channel, gates = rows["kernel"], rows["channel"], rows["filter"]
    assert (kernel["mean"], channel["mean"]) == pytest.approx((0.5, 0.625))
    assert (kernel["between_images"], channel["between_images"]) == pytest.approx((0.2, 0.125))
    assert (kernel["between_entries"], channel["between_entries"]) == pytest.approx((0.2, 0.375))
    assert [row["saturated"] for row in (kernel, channel, gates)] == [0, 0.25, 0.75]  # 1.97 of 2 is not at its maximum
    assert kernel["kernel_distance"] == pytest.approx(1)
    assert kernel["entropy"] == pytest.approx((1 - (0.9 * log(0.9) + 0.1 * log(0.1)) / log(2)) / 2, rel=1e-5)
    assert channel["kernel_distance"] is channel["entropy"] is None


def test_kernel_distance_by_its_definition() -> None:
    kernels = torch.randn(4, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.7
    pairs = [(a - b).square().sum().item() for i, a in enumerate(kernels) for b in kernels[:i]]
    norms = [kernel.square().sum().item() for kernel in kernels]
    expected = sqrt(sum(pairs) / len(pairs)) / sqrt(2) / sqrt(sum(norms) / len(norms))
    assert 0.1 < expected < 0.9
    assert kernel_distance(kernels).item() == pytest.approx(expected, rel=1e-5)
    assert kernel_distance(kernels[:1].expand(3, 3, 2, 3, 3)).item() == pytest.approx(0, abs=1e-6)
    assert kernel_distance(torch.eye(5)).item() == pytest.approx(1)


def test_entropy_of_mixtures() -> None:
    assert mixture_entropy(torch.full((3, 8), 0.4)).item() == pytest.approx(1)  # sigmoid shares, all alike
    assert mixture_entropy(torch.eye(4)).item() == 0
    shares = torch.tensor([[0.2, 0.6]])
    assert mixture_entropy(shares).item() == pytest.approx(-(0.25 * log(0.25) + 0.75 * log(0.75)) / log(2))


def test_rows_of_layers() -> None:
    model = nn.Sequential(
        ODConv2d(4, 4, 3, kernel_num=1), DyConv2d(4, 4, 1, kernel_num=1), CondConv2d(4, 4, 3, kernel_num=3)
    )
    rows = attention_statistics(model, torch.randn(5, 4, 9, 9))
    kinds = [("0", "spatial"), ("0", "channel"), ("0", "filter"), ("1", "kernel"), ("2", "kernel")]
    assert [(row["layer"], row["attention"]) for row in rows] == kinds
    assert rows[3]["kernel_distance"] is None
    assert 0.5 < rows[4]["kernel_distance"] < 1.5
    assert attention_statistics(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 4, 4)) == []


def test_nothing_is_changed() -> None:
    model, x = nn.Sequential(ODConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()), torch.randn(4, 3, 6, 6)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    assert attention_statistics(model, x) == attention_statistics(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_network() -> None:
    model, x = nn.Sequential(ODConv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(4, 3, 6, 6)
    expected = attention_statistics(model, x)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert attention_statistics(model, x) == expected
    assert len(expected) == 4


# ---- the callback


class Small(pl.LightningModule):
    """A dynamic network that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            ODConv2d(3, 4, 3, kernel_num=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 3)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)

    def on_train_batch_start(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        torch.manual_seed(self.global_step)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.model(batch[0])


def loader(images: int, batch: int, unreadable: int = 0) -> DataLoader:
    """Images, each filled with its number, of which the first ones cannot be read."""
    numbers = torch.arange(images)
    pixels = numbers.float().view(-1, 1, 1, 1).expand(-1, 3, 6, 6) / 100 + torch.eye(6)
    return DataLoader(TensorDataset(pixels, torch.where(numbers < unreadable, -100, numbers % 3)), batch)


def fit(
    out: Path, epochs: int, val: DataLoader, watch: bool = True, resume: Path | None = None
) -> tuple[pl.Trainer, AttentionStatistics]:
    out.mkdir(exist_ok=True)
    callback = AttentionStatistics(out)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback] if watch else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Small(), loader(12, 4), val, ckpt_path=resume)
    return trainer, callback


@pytest.mark.parametrize(("images", "batch"), [(500, 10), (500, 500), (40, 7), (20, 6)])
def test_the_images_are_spread_over_the_validation_set(images: int, batch: int, tmp_path: Path) -> None:
    _, callback = fit(tmp_path, 2, loader(images, batch, unreadable=2))
    numbers = [round(100 * image[0, 0, 1].item()) for image in callback.images]
    assert 0.9 * min(IMAGES, images - 2) <= len(numbers) <= IMAGES
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 2
    gaps = [b - a for a, b in zip([0, *numbers], [*numbers, images], strict=True)]
    assert max(gaps) <= 2 + 2 * max(images / IMAGES, batch if batch < images else 1)
    rows = list(csv.DictReader((tmp_path / "attentions.csv").open()))
    assert [row["epoch"] for row in rows] == ["1"] * 4 + ["2"] * 4


def test_training_is_not_changed(tmp_path: Path) -> None:
    with_it, without = (fit(tmp_path, 3, loader(40, 7), watch=watch)[0].lightning_module for watch in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    val = loader(40, 7)
    fit(tmp_path / "whole", 3, val)
    trainer, _ = fit(tmp_path / "first", 2, val)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    fit(tmp_path / "second", 3, val, resume=tmp_path / "checkpoint")
    tables = [(tmp_path / name / "attentions.csv").read_text() for name in ("whole", "first", "second")]
    assert tables[0] == tables[2]
    assert tables[0].startswith(tables[1])
    assert len(tables[0].splitlines()) == 1 + 3 * 4


# ---- what the statistics say


def row(attention: str = "channel", between_images: float = 0.0, **values: float) -> dict:
    known = {"layer": "x", "mean": 0.5, "between_entries": 0.1, "saturated": 0.0, "kernel_distance": float("nan")}
    return {**known, "attention": attention, "between_images": between_images, "entropy": 1.0, **values}


def test_verdicts() -> None:
    said = {deviation: verdict(row(between_images=deviation * 0.5)) for deviation in (0.06, 0.02, 0.002, float("nan"))}
    assert [*said.values()] == ["varies with the image", "varies slightly", "the same for every image", "not a number"]
    mixed = [row(between_images=value) for value in (0.1, 0.1, 0.0)] + [row("filter", 0.2)]
    channel, filters = summarize(mixed)
    assert channel.verdict == "varies with the image in 2 layers, the same for every image in 1 layer"
    assert channel.deviation == pytest.approx(0.2)
    assert filters.verdict == "varies with the image in 1 layer"
    assert judge_kernels(mixed) is None
    kernels = [row("kernel", kernel_distance=distance, entropy=0.5) for distance in (0.01, 0.02, 1.0)]
    assert judge_kernels(kernels).startswith(
        "The kernels differ in 1 of 3 layers: in the median layer their distance is 0.02"
    )


# ---- the page


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_has_a_report(runs: dict[str, Path]) -> None:
    page = read_page(runs["dynamic"])
    with (runs["dynamic"] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert page.shows("od_tiny, 2 kernels")
    assert page.shows(f"{float(rows[-1]['top1']):.2f} % top-1 accuracy in validation after epoch 2 of 2 on ")
    assert page.shows(f"{float(rows[-1]['val_loss']):.4f}")
    assert page.shows(f"{json.loads((runs['dynamic'] / 'result.json').read_text())['parameters']:,}")
    curves = ("Loss", "Accuracy in validation, %", "Learning rate", "Temperature after the epoch")
    speed = ("Images a second in training", "Share of the training time spent waiting for images, %")
    maps = [f"{kind} attention: deviation between images" for kind in ("Channel", "Filter", "Spatial", "Kernel")]
    for title in (*curves, *speed, *maps, "Distance of the kernels", "Entropy of the mixture"):
        assert page.shows(title)
    assert page.tags.count("svg") == page.tags.count("figure") == 12
    assert page.shows("features.5.conv.2")
    assert page.shows("The kernels differ in 15 of 15 layers")
    assert page.shows(torch.__version__.split("+")[0])
    faults = page.texts.index("unreadable in training")
    assert page.texts[faults + 2 : faults + 8] == ["1", "1", "0", "2", "1", "0"]


def test_the_options_that_were_changed_stand_first(runs: dict[str, Path]) -> None:
    texts = read_page(runs["dynamic"]).texts
    texts = texts[texts.index("Configuration") :]
    rest = texts.index("Options at their defaults")
    assert texts[texts.index("lr") : texts.index("lr") + 3] == ["lr", "0.003", "0.1"]
    assert texts.index("kernel_num") < texts.index("lr") < rest < texts.index("momentum") < texts.index("seed")
    (runs["static"] / "defaults.yaml").unlink()  # a run of an older version
    write_report(read_run(runs["static"]))
    assert not read_page(runs["static"]).shows("Options at their defaults")


def test_a_static_network_has_no_attentions(runs: dict[str, Path]) -> None:
    assert not (runs["static"] / "attentions.csv").exists()
    page = read_page(runs["static"])
    assert page.shows("The network is static")
    assert not page.shows("Temperature after the epoch")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.yaml", "The options of this run are not known."),
        ("metrics.csv", "No epoch of this run has ended."),
        pytest.param("attentions.csv", "The attentions of this run were not recorded.", marks=pytest.mark.slow),
        pytest.param("result.json", "Unfinished: ", marks=pytest.mark.slow),
        pytest.param("machine.json", "The machine of this run was not recorded.", marks=pytest.mark.slow),
    ],
)
def test_files_that_are_missing_or_damaged(runs: dict[str, Path], name: str, said: str, tmp_path: Path) -> None:
    folder = copy(runs["dynamic"], tmp_path / "missing", without=name)
    write_report(read_run(folder))
    assert read_page(folder).shows(said)
    for damage in ("{", "a: [", "epoch,layer\n1", "epoch\nx", "[1]", "\0"):
        (folder / name).write_text(damage)
        assert len(read_run(folder).problems) <= 1
    (folder / name).write_bytes(b"\xff\xfe")
    write_report(read_run(folder))
    assert read_page(folder).shows(f"{name} cannot be read: 'utf-8' codec")


def test_an_unfinished_run_of_old(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(runs["dynamic"], tmp_path / "old", without="result.json")
    with (folder / "metrics.csv").open("w") as file:
        file.write("epoch,train_loss,val_loss,top1\n1,2.5,nan,\n2,,inf,40\n")
    write_report(read_run(folder))
    page = read_page(folder)
    assert page.shows("Unfinished: 40.00 % top-1 accuracy in validation after epoch 2 of 2")
    assert page.shows("Images a second and the time spent waiting for images were not recorded.")
    assert page.shows("No times were recorded.")
    assert page.shows("Unreadable images were not counted.")
    assert not page.shows("Learning rate")


def test_everything_is_escaped(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(runs["dynamic"], tmp_path / HOSTILE.replace("/", ""))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"arch": HOSTILE, "data": HOSTILE, HOSTILE: HOSTILE}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "machine.json").write_text(json.dumps({"processor": HOSTILE, "gpus": [HOSTILE]}))
    (folder / "defaults.yaml").write_text(yaml.safe_dump({HOSTILE: "<b>"}))
    for name, before in {"attentions.csv": "features.1.conv.0.0", "metrics.csv": "train_seconds"}.items():
        table = (folder / name).read_text()
        assert before in table
        (folder / name).write_text(table.replace(before, HOSTILE))
    write_report(read_run(folder))
    page = read_page(folder)  # which refuses scripts
    assert page.labels.count(HOSTILE) == 5  # channel, spatial, kernel, distance and entropy
    assert page.texts.count(HOSTILE) > 5 + 6
    assert page.shows("<b>")


def test_machine_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: pytest.fail("the machine's name"))
    machine = describe_machine(processes=3)
    assert machine["processes"] == 3
    assert machine["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine["cores"] >= 1
    words = re.split(r"[\s/\"]+", json.dumps(machine))
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words


# ---- runs side by side


def test_compare(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = copy(runs["dynamic"], tmp_path / "started", without="metrics.csv")
    (started / "result.json").unlink()
    broken = copy(runs["dynamic"], tmp_path / "[red]")
    (broken / "machine.json").write_text("{")
    out = tmp_path / "runs.png"
    found = compare([str(folder) for folder in (runs["dynamic"], runs["static"], started, broken)], out=str(out))
    assert list(found) == ["dynamic", "static", "started", "[red]"]
    lines = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["state"] == ["finished", "finished", "unfinished", "finished"]
    assert lines["network"][:2] == ["od_tiny", "tiny"]
    assert lines["kernels"] == ["2", "-", "2", "2"]
    assert lines["epochs"] == ["2 of 2", "1 of 1", "0 of 2", "2 of 2"]
    last = read_run(runs["dynamic"]).epochs[-1]
    assert lines["top-1"][0] == f"{last['top1']:.2f} %"
    assert lines["top-1"][2] == "-"
    assert lines["validation loss"][0] == f"{last['val_loss']:.4f}"
    assert float(lines["images a second"][0]) > 0
    assert lines["temp_epoch"] == ["2", "1", "2", "2"]
    assert not {"batch_size", "out"} & lines.keys()
    assert any(line.startswith("[red]: machine.json cannot be read") for line in lines)
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 100


def test_runs_of_the_same_name(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = [copy(runs["dynamic"], tmp_path / place / "run") for place in ("a/x", "b/x", "b/y")]
    found = compare([str(folder) for folder in folders], out=str(tmp_path / "runs.svg"))
    assert list(found) == ["a/x/run", "b/x/run", "b/y/run"]
    assert all(name in (tmp_path / "runs.svg").read_text() for name in found)


def test_no_curves(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([str(copy(runs["dynamic"], tmp_path / "new", without="metrics.csv"))], out=str(tmp_path / "x.png"))
    assert "no epoch of these runs has ended" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()


def test_commands(runs: dict[str, Path], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    dynamic, static = map(str, runs.values())
    for status, said, *arguments in (
        (0, "report.html", "report", dynamic, static),
        (0, "curves in compare.png", "compare", dynamic, static),
        (2, "missing: runs", "compare"),
        (2, "missing: runs", "report"),
        (1, "runs must be different ones, got .*dynamic 2 times", "compare", dynamic, f"{dynamic}/../dynamic"),
        (1, "there is no folder nowhere", "compare", "nowhere"),
        (1, "report.html is a file, and not the folder of a run", "report", f"{dynamic}/report.html"),
        (1, "is no run: it holds neither config.yaml nor metrics.csv", "report", str(tmp_path)),
        (1, r"out must end in one of .*\.png.*, got x\.txt", "compare", dynamic, "--out", "x.txt"),
        (1, "cannot be written", "compare", dynamic, "--out", "nowhere/x.png"),
    ):
        assert main(arguments) == status
        assert re.search(said, "".join(capsys.readouterr()))
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]


# ---- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(runs: dict[str, Path], width: int, tmp_path: Path) -> None:
    report = runs["dynamic"] / "report.html"
    _, errors = browse(report, tmp_path / "profile", f"--screenshot={tmp_path / 'page.png'}", width=width)
    assert errors == []
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 1000)
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 50

    page = measure(report, tmp_path, width)
    assert page["width"] == page["scroll"] == width
    assert page["outside"] == []
    assert page["text"] > 1500
    assert len(page["pictures"]) == 12
    assert all(300 < w < width and h > 150 for w, h in page["pictures"])
    assert page["label"] >= 9


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_lets_nothing_in(runs: dict[str, Path], tmp_path: Path) -> None:
    text = (runs["dynamic"] / "report.html").read_text()
    (tmp_path / "x.html").write_text(text.replace("</body>", "<script>document.title = 'x'</script></body>"))
    dom, errors = browse(tmp_path / "x.html", tmp_path / "profile", "--dump-dom")
    assert "<title>x</title>" not in dom
    assert len(errors) == 1
