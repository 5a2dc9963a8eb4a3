"""Training from shards, in a folder and at a URL: each image once an epoch, exact resuming, damage counted."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import OPTIONS, RANDOM, checkpoint, rows, same_weights, start, wait_until, without_times

from odconv.app.classify import evaluate, train
from odconv.app.data import TrainingSampler, open_data
from odconv.app.data.pack import pack
from odconv.app.engine.checkpoint_io import LAST


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    pack(data=str(folder), out=str(out), shard_mb=0.05, workers=1)
    return out


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(sizes=SIZES, world_size=st.integers(1, 5), epoch=st.integers(0, 3), in_shards=st.booleans())
def test_each_image_once_an_epoch(sizes: list[int], world_size: int, epoch: int, in_shards: bool) -> None:
    length, shards = sum(sizes), sizes if in_shards else None
    drawn = []
    for rank in range(world_size):
        sampler = TrainingSampler(length, 7, rank, world_size, shards)
        sampler.set_epoch(epoch)
        share = list(sampler)
        assert len(share) == len(sampler)
        drawn += share
    indices = [index for index, _ in drawn]
    assert {*indices} == {*range(length)}
    assert len(indices) < length + world_size  # what fills the shares up
    assert len({seed for _, seed in drawn}) == length  # an image has one seed an epoch, whoever draws it


@given(length=st.integers(1, 100), start=st.integers(0, 50), epoch=st.integers(0, 3), in_shards=st.booleans())
def test_going_on_in_mid_epoch(length: int, start: int, epoch: int, in_shards: bool) -> None:
    shards = [length // 2, length - length // 2] if in_shards else None
    whole, rest = (TrainingSampler(length, 3, shards=shards) for _ in range(2))
    whole.set_epoch(epoch)
    rest.go_to(epoch, start)
    rest.set_epoch(epoch)  # as Lightning does before each epoch
    assert list(rest) == list(whole)[start:]
    rest.set_epoch(epoch + 1)
    whole.set_epoch(epoch + 1)
    assert list(rest) == list(whole)
    assert length < 6 or list(TrainingSampler(length, 4)) != list(TrainingSampler(length, 3))


@given(steps=st.integers(0, 6), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
def test_going_on_with_another_number_of_processes(steps: int, before: int, after: int) -> None:
    def draw(processes: int, first: int, last: int | None) -> list[int]:
        indices = []
        for rank in range(processes):
            sampler = TrainingSampler(56, 0, rank, processes)
            share = 8 // processes
            sampler.go_to(2, first * share)
            indices += [index for index, _ in sampler][: None if last is None else last * share]
        return indices

    assert sorted(draw(before, 0, steps) + draw(after, steps, None)) == [*range(56)]


def test_few_shards_at_a_time() -> None:
    sizes = [1000] * 64
    for rank in range(8):
        shards = [index // 1000 for index, _ in TrainingSampler(64_000, 0, rank, 8, sizes)]
        assert len({*shards}) == 8  # an eighth of them
        assert len({*shards[:4096]}) <= 5
    assert shards[:4096] != sorted(shards[:4096])


def test_shards_are_the_folder(folder: Path, shards: Path) -> None:
    one, other = (open_data(place, image_size=16, resize_size=16) for place in (folder, shards))
    assert one.classes == other.classes

    def contents(images) -> list:
        return sorted((label, image.numpy().tobytes()) for image, label in images)

    assert contents(one.val) == contents(other.val)
    assert len(other.train) == len(one.train) == 105
    with pytest.raises(ValueError, match="neither arrays nor shards"):
        pack(data=str(shards), out=str(shards / "again"))


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_shards(shards: Path, tmp_path: Path) -> None:
    options = OPTIONS | RANDOM | {"data": str(shards), "epochs": 2}
    train(**options, out=str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = start(options | {"out": killed, "save_every": 2})
    wait_until(lambda: (killed / LAST).exists() and checkpoint(killed / LAST)["odconv"]["batch"] > 0, process)
    process.kill()
    process.communicate()
    train(**options, out=str(killed), resume="auto")
    assert without_times(rows(killed)) == without_times(rows(tmp_path / "whole"))
    assert same_weights(killed / LAST, tmp_path / "whole" / LAST)


@pytest.mark.slow
def test_two_processes_train_from_a_url(url: str, shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ODCONV_CACHE", str(tmp_path / "cache"))
    options = OPTIONS | {"data": url, "out": tmp_path / "run", "temp_epoch": 100, "devices": 2, "workers": 1}
    process = start(options)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "105 images to train on and 15 to evaluate on" in output
    downloaded = {path.name.partition("-")[2] for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    assert downloaded == {path.name for path in shards.glob("*.tar")}
    result = evaluate(weights=str(tmp_path / "run" / LAST), data=str(shards), workers=0)
    assert result["loss"] == pytest.approx(rows(tmp_path / "run")[0]["val_loss"], rel=1e-5)


def test_damaged_and_missing_shards_are_counted(folder: Path, tmp_path: Path, caplog) -> None:
    place = tmp_path / "shards"
    pack(data=str(folder), out=str(place), shard_mb=0.05, workers=1)
    splits = open_data(place, image_size=16)
    first, second, *_ = sorted(place.glob("train-*.tar"))
    sizes = splits.train.sources.sizes
    os.truncate(first, first.stat().st_size - 512)
    offset = int(splits.train.sources._offsets[sizes[0]])
    content = bytearray(second.read_bytes())
    content[offset + 20] ^= 1
    second.write_bytes(content)
    train(**OPTIONS | {"epochs": 2, "batch_size": 7}, data=str(place), out=str(tmp_path / "run"))
    assert [row["train_corrupt"] for row in rows(tmp_path / "run")] == [sizes[0] + 1] * 2
    assert caplog.text.count(first.name) == 1  # a warning for the shard, not for each image
    assert f"of {second.name} is damaged" in caplog.text


@pytest.mark.parametrize("scheme", ["ftp", "pipe", "file", "hdfs"])
def test_other_schemes_are_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="http"):
        train(**OPTIONS, data=f"{scheme}://example.org/data", out=str(tmp_path))
