"""The benchmark of accuracies on a GPU, in little on the CPU: its rows, its images, and what it leaves out in time."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning")
from benchmarks.accuracy import device as study
from benchmarks.accuracy.cells import Cell, Recipe
from benchmarks.accuracy.training import open_images, train
from small_runs import make_folder

pytestmark = pytest.mark.slow  # of benchmarks

CPU = torch.device("cpu")
RECIPE = Recipe(16, 2, 0.02, stem="small", batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_folder(root / "imagenette96", {"train": 10, "val": 4})
    return root


def cell(method="static", seed=0, recipe=RECIPE, split="test") -> Cell:
    return Cell("main", "imagenette", "mobilenetv2_050", method, seed, recipe, split)


def trained(cells, data, left=600.0) -> list[dict]:
    return [*study.train_cells(cells, data, CPU, compile=False, deadline=time.monotonic() + left)]


def without_times(rows) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def noise(count=200, size=32) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=seeded(7))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rows_are_those_of_the_other_trainer(data, tmp_path):
    one = cell("odconv_4x", recipe=Recipe(16, 1, 0.02, stem="small", batch_size=8))
    (row,), expected = trained([one], data), train(one, data, tmp_path, 0)
    assert [*row] == [*expected]
    measured = {"top1", "top5", "train_loss", "seconds"}
    assert {row[name] == value for name, value in expected.items() if name not in measured} == {True}
    assert float(row["top1"]) in [pytest.approx(100 * right / 12, abs=1e-4) for right in range(13)]
    assert row["top5"] == "100.0000"  # of three classes
    assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=0.5)


def test_side_by_side_as_alone(data, capsys):
    recipe = Recipe(16, 2, 0.02, stem="small", augment="small", batch_size=8, dropout=0.2)
    cells = [cell("static", 0, recipe), cell("odconv_4x", 0, recipe), cell("static", 1, recipe)]
    together = without_times(trained(cells, data))
    assert "ms a step side by side" in capsys.readouterr().out
    assert together == [row for one in cells for row in without_times(trained([one], data))]
    assert together[0]["train_loss"] != together[2]["train_loss"]


def test_a_network_learns(data):
    (row,) = trained([cell(recipe=Recipe(16, 24, 0.02, stem="small", batch_size=8))], data)
    assert float(row["train_loss"]) < 0.8 * math.log(3)


def test_what_diverges(data):
    diverging, fine = cell(recipe=Recipe(16, 2, 1e30, stem="small", batch_size=8)), cell()
    (row,) = trained([diverging], data)
    assert [row[name] for name in ("top1", "top5", "train_loss")] == ["diverged"] * 3
    assert "diverged" not in trained([fine], data)[0].values()


def test_too_little_time(data, capsys):
    assert trained([cell()], data, left=-1) == []
    assert "imagenette mobilenetv2_050 static seed 0: skipped" in capsys.readouterr().out
    long = cell(recipe=Recipe(16, 10**6, 0.02, stem="small", batch_size=8))
    assert trained([long], data, left=60) == []
    assert "minutes are needed and" in capsys.readouterr().out


def test_stopped_in_the_middle(data, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESERVE", 0.0)  # as if it had been fast at first
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    long = cell(recipe=Recipe(16, 10**6, 0.02, stem="small", batch_size=8))
    assert [*study.train_cells([long], data, CPU, compile=False, deadline=70)] == []
    assert "stopped, no time is left" in capsys.readouterr().out


def test_groups_in_the_order_given():
    other = Recipe(16, 3, 0.02)
    cells = [*(cell(method, seed) for seed in (0, 1) for method in ("static", "se")), cell(recipe=other), cell("se")]
    groups = [*study.plan(cells, 3)]
    assert [len(group) for group in groups] == [3, 1, 1, 1]
    assert [one for group in groups for one in group] == cells


def test_minutes(monkeypatch, data, capsys):
    cells = [cell("static", seed) for seed in range(3)]
    calls = []

    def train_cells(group, *_, **__):
        calls.append(group)
        return iter([{"seed": group[0].seed}] if fits else [])

    monkeypatch.setattr(study, "train_cells", train_cells)
    for fits, minutes, called in ((True, 1, 3), (False, 1, 1), (True, 0, 0)):
        calls.clear()
        rows = [*study.run_within(cells, data, CPU, minutes, compile=False, groups_of=1)]
        assert [row["seed"] for row in rows] == ([0, 1, 2][:called] if fits else [])
        assert len(calls) == called
        assert capsys.readouterr().out.count("skipped") == 3 - called


def test_temperature_is_set_where_it_changes(monkeypatch, data):
    temperatures = []
    monkeypatch.setattr(study.odconv, "set_temperature", lambda model, value: temperatures.append(value))
    recipe = Recipe(16, 4, 0.02, stem="small", batch_size=10, temp_init=7.0, temp_share=0.5)  # 3 steps an epoch
    trained([cell("odconv_4x", recipe=recipe)], data)
    assert temperatures == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    temperatures.clear()
    trained([cell("odconv_4x", recipe=Recipe(16, 1, 0.02, stem="small", temp_share=0.0))], data)
    assert temperatures == []


@pytest.mark.parametrize("split", ["test", "validation"])
def test_images_are_those_of_the_other_trainer(data, split):
    one = cell(recipe=Recipe(16, 1, 0.02, images=20), split=split)
    _, labels, tests, test_labels, classes = study.choose_images(one, data, CPU)
    training, measured, names = open_images(one, data)
    assert (labels.tolist(), classes) == (training.labels, names)
    pixels, truth = zip(*measured, strict=True)
    assert test_labels.tolist() == [*truth]
    assert (tests.int() - torch.stack(pixels).int()).abs().max() <= 1  # resized as bytes, not by PIL


@pytest.mark.parametrize("how", ["imagenet", "small"])
def test_augmentation(how):
    images = noise()
    seen = study.augment(images, how, seeded())
    assert (seen.shape, seen.dtype) == (images.shape, torch.uint8)
    assert torch.equal(seen, study.augment(images, how, seeded()))
    assert not torch.equal(seen, study.augment(images, how, seeded(1)))
    assert study.augment(torch.full_like(images, 255), how, seeded()).max() == 255
    rising = torch.arange(32, dtype=torch.uint8).expand(400, 3, 32, 32).contiguous() * 4 + 50
    turned = study.augment(rising, how, seeded())[:, :, 4:-4, 4:-4].float()
    mirrored = (turned[..., -1] < turned[..., 0]).all((1, 2))
    assert 0.4 < mirrored.float().mean() < 0.6


def test_shifts_are_exact():
    images = noise(50)
    padded = F.pad(images, (4,) * 4)
    views = [padded[..., y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    possible = torch.stack([*views, *(view.flip(-1) for view in views)])
    seen = study.augment(images, "small", seeded())
    matches = (possible == seen).all((2, 3, 4))
    assert matches.any(0).all()
    assert matches.any(1).sum() > 30  # of 162 kinds


def test_crops_lie_in_the_image():
    sides, centres = study.draw_crops(2000, 96, seeded())
    assert (centres.abs() + sides <= 1 + 1e-6).all()
    area, ratio = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert 0.349 < area.min() < 0.37
    assert 0.95 < area.max() <= 1
    assert 0.749 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.334


def test_batches_of_an_epoch():
    images, labels = noise(30, 16), torch.arange(30)
    batches = study.make_batches(images, labels, RECIPE, seed=0, epoch=0)
    assert [len(part) for part, _ in batches] == [8, 8, 8]
    assert len({label.item() for _, part in batches for label in part}) == 24
    again = study.make_batches(images, labels, RECIPE, seed=0, epoch=0)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    later = study.make_batches(images, labels, RECIPE, seed=0, epoch=1)
    assert not torch.equal(batches[0][1], later[0][1])
