"""Shards hold every image once, byte for byte, wherever they lie; damage is noticed, and nothing leads outside."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parameters import slow_except

pytest.importorskip("torchvision")

from PIL import Image
from torch.utils.data import DataLoader

from odconv.app.cli import main
from odconv.app.data import download, open_data, shards
from odconv.app.data import pack as packing
from odconv.app.data.index_shards import describe, index_shards
from odconv.app.data.pack import pack
from odconv.app.data.shard_index import Index
from odconv.app.data.shards import ShardError, Shards, is_sharded, open_shards

KB = 1e-3
"""A kilobyte, in the megabytes that `pack` takes."""


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def make_split(folder: Path, each: int, seed: int = 0) -> dict[bytes, str]:
    """Write images, each another one, and return the class of each."""
    made = {}
    for number in range(2 * each):
        name = ("cat", "dog")[number % 2]
        path = folder / name / f"a.b {number}.{('jpg', 'JPEG')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image := jpeg(seed + number))
        made[image] = name
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    make_split(data / "train", 30)
    make_split(data / "val", 5, seed=1000)
    return data


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(data=str(folder), out=str(out), shard_mb=30 * KB, workers=2)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    for path in packed.glob("[tv]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


def classes_of(images: Shards) -> dict[bytes, str]:
    found = {images[i]: images.classes[label] for i, label in enumerate(images.labels)}
    assert len(found) == len(images)
    return found


# --- packing


def test_every_image_once_byte_for_byte(folder: Path, packed: Path, tmp_path: Path) -> None:
    train, val, classes = open_shards(str(packed))
    assert train is not None
    assert classes == ["cat", "dog"]
    assert classes_of(train) == make_split(tmp_path / "same", 30)
    assert classes_of(val) == make_split(tmp_path / "others", 5, seed=1000)
    assert sum(train.sizes) == len(train) == 60
    assert len(train.sizes) == len(list(packed.glob("train-*.tar"))) >= 4
    assert max(train.sizes) - min(train.sizes) <= 1
    assert all(path.stat().st_size < 32_000 for path in packed.glob("*.tar"))
    starts = np.cumsum([0, *train.sizes])
    assert all(len(set(train.labels[a:b])) == 2 for a, b in pairwise(starts)), "shards are mixed"


def test_names_keep_their_suffix_and_have_no_further_dot(packed: Path) -> None:
    with tarfile.open(packed / "train-00001.tar") as tar:
        names = tar.getnames()
    assert len(names) == 2 * len({name.split(".")[0] for name in names})
    assert {name.partition(".")[2] for name in names} == {"jpg", "JPEG", "cls"}
    assert all("-a_b_" in name for name in names)


def test_packing_is_the_same_every_time(folder: Path, packed: Path, tmp_path: Path) -> None:
    pack(data=str(folder), out=str(tmp_path / "again"), shard_mb=30 * KB, workers=1)
    assert contents(tmp_path / "again") == contents(packed)
    pack(data=str(folder), out=str(tmp_path / "other"), shard_mb=30 * KB, workers=1, seed=1)
    first, second = Shards(packed / "train.json"), Shards(tmp_path / "other" / "train.json")
    assert first[:] != second[:]
    assert sorted(first[:]) == sorted(second[:])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.text("aB._- é", min_size=1, max_size=9), st.binary(max_size=1500), min_size=1),
    shard_kb=st.floats(0.5, 20),
    seed=st.integers(0, 3),
)
def test_any_files_are_packed(
    files: dict[str, bytes], shard_kb: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    (root / "data" / "val" / "class").mkdir(parents=True)
    for name, content in files.items():
        (root / "data" / "val" / "class" / f"x{name}.png").write_bytes(content)
    pack(data=str(root / "data"), out=str(root / "out"), shard_mb=shard_kb * KB, seed=seed, workers=1)
    images = Shards(root / "out" / "val.json")
    assert Counter(images[:]) == Counter(files.values())
    assert not (root / "out" / "train.json").exists()


def test_damaged_images_are_packed_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_split(tmp_path / "data" / "val", 4)
    (tmp_path / "data" / "val" / "cat" / "text.png").write_text("no image")
    (tmp_path / "data" / "val" / "dog" / "half.jpg").write_bytes(cut := jpeg(5, (80, 80))[:-400])
    assert main(["pack", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    size = (tmp_path / "out" / "val-00000.tar").stat().st_size
    assert f"val: 10 images in 1 shard of {size} bytes in all; 10 of them in " in out
    assert " images/s\n" in out
    assert "val: 2 images are damaged and count as unreadable: val-00000.tar: 0" in out
    names = json.loads((tmp_path / "out" / "val.json").read_bytes())["shards"][0]["unreadable"]
    assert sorted(name[9:] for name in names) == ["half.jpg", "text.png"]
    images = Shards(tmp_path / "out" / "val.json")
    assert {b"no image", cut} < set(images[:])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    make_split(tmp_path / "data" / "val", 2)
    (tmp_path / "data" / "val" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cat/gone\.jpg"):
        pack(data=str(tmp_path / "data"), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_mb": 0.0}, "shard_mb must be above 0, got 0.0"),
        ({"shard_mb": float("nan")}, "shard_mb must be above 0, got nan"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"data": "digits"}, "folders or archives of images"),
    ],
)
def test_wrong_options(options: dict, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pack(**{"data": str(folder), "out": str(tmp_path / "out"), **options})


def test_nothing_of_others_is_overwritten(folder: Path, copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(ValueError, match="holds shards of other images or options"):
        pack(data=str(folder), out=str(copy), shard_mb=30 * KB, seed=1)
    (copy / "train-10000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds train-10000\.tar, which is not of this set"):
        pack(data=str(folder), out=str(copy), shard_mb=30 * KB)
    assert contents(copy) == {**before, "train-10000.tar": b"mine"}


def test_only_what_is_missing_is_packed(folder: Path, packed: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    (copy / "train-00000.tar").unlink()
    with (copy / "train-00002.tar").open("r+b") as file:
        file.truncate(1000)
    kept = (copy / "train-00001.tar").stat()
    pack(data=str(folder), out=str(copy), shard_mb=30 * KB, workers=1)
    out = capsys.readouterr().out
    sizes = Shards(packed / "train.json").sizes
    assert f"; {sizes[0] + sizes[2]} of them in " in out
    assert "nothing left to do" in out
    assert contents(copy) == contents(packed)
    assert (copy / "train-00001.tar").stat().st_mtime_ns == kept.st_mtime_ns


def test_one_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LOCK_WAIT", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(OSError, match="another process packs into"):
        pack(data=str(folder), out=str(tmp_path))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_killed_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_split(tmp_path / "data" / "val", 1000)
    options = {"data": str(tmp_path / "data"), "shard_mb": 50 * KB}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "odconv", "pack", "--workers=2", f"--out={out}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.Popen(command, stdout=subprocess.PIPE)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 5)
    run.kill()
    run.communicate(timeout=10)  # ends when no process of it holds the pipe any more
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert not (out / "val.json").exists(), "killed too late"
    for name in finished:
        describe(out / name, name)
    (out / ".val-00099.tar.1.partial").write_bytes(b"left over")
    pack(out=str(out), workers=2, **options)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items() >= finished.items()
    packed = Shards(out / "val.json")
    assert classes_of(packed) == images
    left = len(images) - sum(packed.sizes[int(name[4:9])] for name in finished)
    assert f"; {left} of them in " in capsys.readouterr().out
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]
    pack(out=str(tmp_path / "whole"), workers=1, **options)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_worker_is_noticed(tmp_path: Path) -> None:
    make_split(tmp_path / "data" / "val", 500)
    out = tmp_path / "out"
    options = ["--workers=2", "--shard_mb=0.05", f"--out={out}", f"--data={tmp_path / 'data'}"]
    run = subprocess.Popen([sys.executable, "-m", "odconv", "pack", *options], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.exists():
        run.kill()
        pytest.skip("no /proc")
    wait_for(lambda: list(out.glob("*.tar")))
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 1
    assert error == (
        "odconv: error: a worker process was killed, perhaps because memory ran out (fewer workers need less)\n"
    )


# --- the index


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "wids", 'no index of shards: it has no "format"'),
        (["version"], 2, "is an index of version 2; this odconv reads 1"),
        (["classes"], [], "classes must be a list of names"),
        (["classes"], ["cat", 3], "classes must be a list of names"),
        (["classes"], ["cat"], "label 1 has no name among its 1 classes"),
        (["shards"], {}, "shards must be a list of shards"),
        (["shards", 0], 3, "a shard has no file name"),
        (["shards", 0, "file"], "train-00001.tar", "names a shard twice"),
        (["shards", 0, "images"], 2.5, "images must be a whole number above 0, got 2.5"),
        (["shards", 0, "bytes"], -1, "bytes must be a whole number above 0, got -1"),
        (["shards", 0, "sha256"], "../x", "sha256 must be 64 hexadecimal digits"),
        (["shards", 0, "labels", 0], "0", "labels must be 1[0-9] whole numbers from 0"),
        (["shards", 0, "labels", 0], -1, "labels must be 1[0-9] whole numbers from 0"),
        (["shards", 0, "offsets"], [0], "offsets must be 1[0-9] whole numbers from 0"),
        (["shards", 0, "offsets", 3], 2**70, "offsets must be 1[0-9] whole numbers from 0"),
        (["shards", 0, "lengths", 3], 2**62, "has an image that ends behind its [0-9]+ bytes"),
        (["shards", 0, "unreadable"], [1], "unreadable must be a list of names"),
    ],
)
def test_a_wrong_index_is_refused(path: list, value: object, message: str, copy: Path) -> None:
    values = json.loads((copy / "train.json").read_bytes())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (copy / "train.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"train\.json.*{message}"):
        Shards(copy / "train.json")


@pytest.mark.parametrize(
    "name",
    [
        *("../x.tar", "a/../../x.tar", "/etc/passwd", "//host/x", "http://host/x.tar", "pipe:id", "C:\\x", "a\\..\\x"),
        *(".x", "", "a//b", "a/./b", "x\n", "x\0", "%2e%2e/x?"),
    ],
)
def test_names_that_lead_outside_are_refused(name: str, copy: Path) -> None:
    values = json.loads((copy / "val.json").read_bytes())
    values["shards"][0]["file"] = name
    (copy / "val.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="file must be a plain name within the folder of the index"):
        Shards(copy / "val.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\x80\x04K\x01.", b"\xff\xfe"])
def test_other_files_are_no_index(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"val\.json is no index of shards"):
        open_shards(tmp_path, need_train=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_index_raises_anything_else(data: st.DataObject, packed: Path) -> None:
    values = json.loads((packed / "val.json").read_bytes())
    inner = data.draw(st.sampled_from([values, values["shards"][0]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(json_values)
    with suppress(ValueError):
        assert len(Index.parse(json.dumps(values).encode(), "an index").shards[0].labels) == 10


# --- reading


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def unreadable(images: Shards) -> list[int]:
    def fails(index: int) -> bool:
        try:
            images[index]
        except OSError:
            return True
        return False

    return [index for index in range(len(images)) if fails(index)]


def test_a_shard_that_is_missing_or_cut(copy: Path, packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "train-00000.tar").unlink()
    with (copy / "train-00002.tar").open("r+b") as file:
        file.truncate(1000)
    images, whole = Shards(copy / "train.json"), Shards(packed / "train.json")
    starts = [0, *np.cumsum(images.sizes)]
    lost = [*range(starts[0], starts[1]), *range(starts[2], starts[3])]
    assert unreadable(images) == unreadable(images) == lost
    assert all(images[i] == whole[i] for i in range(len(images)) if i not in lost)
    missing, cut = warnings_of(caplog)
    assert f"the {images.sizes[0]} images of a shard cannot be read: " in missing
    assert "train-00000.tar" in missing
    assert "train-00002.tar has 1000 bytes, and should have " in cut
    with pytest.raises(ShardError, match="cut short or another file"):
        images[starts[2]]


def test_a_shard_that_comes_back(copy: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (copy / "val-00000.tar").read_bytes()
    (copy / "val-00000.tar").unlink()
    images = Shards(copy / "val.json")
    assert unreadable(images)
    (copy / "val-00000.tar").write_bytes(content)
    assert unreadable(images), "it is not asked for again at once"
    monkeypatch.setattr(shards, "RETRY_AFTER", 0.0)
    assert not unreadable(images)


def test_a_flipped_bit_costs_one_image(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = json.loads((copy / "val.json").read_bytes())["shards"][0]
    content = bytearray((copy / "val-00000.tar").read_bytes())
    content[shard["offsets"][3] + shard["lengths"][3] // 2] ^= 1
    (copy / "val-00000.tar").write_bytes(content)
    images = Shards(copy / "val.json")
    assert unreadable(images) == [3]
    with pytest.raises(OSError, match=r"image 3 at byte [0-9]+ of val-00000.tar is damaged: not what .*val.json says"):
        images[3]
    assert not warnings_of(caplog), "left to whoever reads the images"


def test_it_is_a_sequence(packed: Path) -> None:
    images = Shards(packed / "val.json")
    assert list(images) == [images[i] for i in range(len(images))] == images[:]
    assert images[-1] == images[9]
    for index in (10, -11):
        with pytest.raises(IndexError):
            images[index]


def test_few_files_are_open(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    images = Shards(packed / "train.json")
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    before = open_tars()
    for index in np.random.default_rng(0).permutation(len(images)):
        images[int(index)]
        assert open_tars() - before <= 2


def open_tars() -> int:
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(path).endswith(".tar")
        except OSError:  # the listing's own
            continue
    return found


@pytest.mark.parametrize("context", slow_except(["fork", "spawn"], "fork"))
def test_read_in_other_processes(context: str, packed: Path) -> None:
    images = Shards(packed / "train.json")
    assert images[0]  # a file is open
    loader = DataLoader(images, batch_size=None, num_workers=1, multiprocessing_context=context, collate_fn=bytes)
    assert list(loader) == images[:]


def test_pickled_without_files(packed: Path) -> None:
    images = Shards(packed / "train.json")
    images[0]
    assert pickle.loads(pickle.dumps(images))[:] == images[:]


def test_open_shards(packed: Path, copy: Path, tmp_path: Path) -> None:
    assert is_sharded(packed)
    assert is_sharded("https://host/data")
    assert is_sharded("s3://bucket/data")
    assert not is_sharded(tmp_path / "empty")
    (copy / "train.json").unlink()
    train, val, classes = open_shards(copy, need_train=False)
    assert train is None
    assert (len(val), classes) == (10, ["cat", "dog"])
    with pytest.raises(FileNotFoundError, match=r"there is no index of shards .*train\.json"):
        open_shards(copy)
    (copy / "train.json").write_bytes((packed / "train.json").read_bytes().replace(b'"cat"', b'"cow"', 1))
    with pytest.raises(ValueError, match=r"train\.json and val\.json of .* have different classes"):
        open_shards(copy)


# --- URLs


class Server(ThreadingHTTPServer):
    """Serves a folder, counts what it is asked for, and misbehaves where told to."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, list[Callable[[SimpleHTTPRequestHandler], None]]] = {}
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        if faults := self.server.faults.get(self.path):
            faults.pop(0)(self)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


def status(code: int) -> Callable[[SimpleHTTPRequestHandler], None]:
    return lambda handler: handler.send_error(code)


def redirect(url: str) -> Callable[[SimpleHTTPRequestHandler], None]:
    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.end_headers()

    return answer


def body(content: bytes, length: int | None = None, pause: float = 0.0) -> Callable[[SimpleHTTPRequestHandler], None]:
    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)
        handler.wfile.flush()
        time.sleep(pause)

    return answer


@pytest.fixture
def server(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with Server(copy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ODCONV_CACHE", str(path := tmp_path_factory.mktemp("cache")))
    return path / "shards"


def test_from_a_url(server: Server, cache: Path, packed: Path) -> None:
    for _ in range(2):
        train, val, classes = open_shards(f"{server.url}/")
        assert train is not None
        assert train[:] == Shards(packed / "train.json")[:]
        assert val[:] == Shards(packed / "val.json")[:]
        assert classes == ["cat", "dog"]
    tars = {f"/{path.name}" for path in packed.glob("*.tar")}
    assert server.asked == {**dict.fromkeys(tars, 1), "/train.json": 2, "/val.json": 2}
    assert sorted(path.name[17:] for path in cache.glob("*.tar")) == sorted(tar[1:] for tar in tars)


@pytest.mark.parametrize(
    "fault",
    [status(503), status(429), body(b"short", 10_000), body(b"wrong"), body(bytes(10**6)), redirect("ftp://x/")],
)
def test_passing_faults_are_outlived(fault: Callable, server: Server, cache: Path, packed: Path) -> None:
    server.faults = {"/val-00000.tar": [fault] * 3}
    _, val, _ = open_shards(server.url, need_train=False)
    assert val[:] == Shards(packed / "val.json")[:]
    assert server.asked["/val-00000.tar"] == 4


@pytest.mark.parametrize("fault", [status(503), body(b"short", 10_000)])
def test_an_index_is_asked_for_again(fault: Callable, server: Server, cache: Path) -> None:
    server.faults = {"/val.json": [fault] * 3}
    assert len(open_shards(server.url, need_train=False)[1]) == 10
    server.faults = {"/val.json": [fault] * 4}
    with pytest.raises(OSError, match=r"/val.json cannot be had: .* \(attempt 4 of 4\)"):
        open_shards(server.url, need_train=False)


def trickle(start: bytes) -> Callable[[SimpleHTTPRequestHandler], None]:
    """Begin an answer, and go on with a byte every tenth of a second."""

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        with suppress(OSError):
            for _ in range(300):
                handler.wfile.write(b"x")
                handler.wfile.flush()
                time.sleep(0.1)

    return answer


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n", "it comes at less than 50,000 bytes a second"),
        pytest.param(
            b"HTTP/1.0 200 OK\r\nContent-Type: text/plain", "not all of it within 1 s", marks=pytest.mark.slow
        ),
        (b"HTTP/1.0 200 ", "not all of it within 1 s"),
    ],
    ids=["body", "header", "status"],
)
def test_a_server_that_sends_a_byte_at_a_time_is_given_up(
    start: bytes, message: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.setattr(download, "INDEX_TIME", 1.0)
    monkeypatch.setattr(download, "SLOWEST", 50_000)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.faults = {"/val.json": [trickle(start)] * 4}
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"/val\.json cannot be had: .*({message})"):
        open_shards(server.url, need_train=False)
    assert time.monotonic() - began < 15
    server.faults = {"/val-00000.tar": [trickle(start)] * 4}
    assert unreadable(open_shards(server.url, need_train=False)[1]) == [*range(10)]
    assert time.monotonic() - began < 30


def test_an_index_that_does_not_end_is_given_up(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LARGEST_INDEX", 50_000)
    server.faults = {"/val.json": [body(bytes(20_000_000), 10**11)]}  # more than is buffered on the way
    with pytest.raises(OSError, match="it has more than the 50,000 bytes that an index may have"):
        open_shards(server.url, need_train=False)
    assert server.asked["/val.json"] == 1


def test_no_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/val.json cannot be had: Cannot connect to host"):
        open_shards("http://127.0.0.1:9", need_train=False)


@pytest.mark.parametrize(
    ("fault", "attempts", "message"),
    [
        (status(404), 1, "it is not there"),
        (status(403), 1, "the server answers 403 Forbidden"),
        (status(500), 4, "the server answers 500 Internal Server Error"),
        (body(b"x" * 50_000), 4, "it is not the file of [0-9]+ bytes that the index names"),
        (redirect("file:///etc/passwd"), 4, "file:///etc/passwd"),
        (redirect("ftp://127.0.0.1/x"), 4, "ftp://127.0.0.1/x"),
    ],
)
def test_a_shard_that_cannot_be_had_is_warned_of_once(
    fault: Callable, attempts: int, message: str, server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = {"/train-00001.tar": [fault] * 10}
    train, _, _ = open_shards(server.url)
    assert train is not None
    starts = [0, *np.cumsum(train.sizes)]
    assert unreadable(train) == unreadable(train) == [*range(starts[1], starts[2])]
    assert server.asked["/train-00001.tar"] == attempts
    (warning,) = warnings_of(caplog)
    assert f"{server.url}/train-00001.tar cannot be had: " in warning
    with pytest.raises(ShardError, match=message):
        train[starts[1]]
    assert not list(cache.glob("*train-00001.tar")), "whole or not at all"
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat x",
        "ftp://host/x",
        "s3:///x",
        "s3:bucket",
        "file:///x",
        "hdfs:/x",
        "http:///x",
        "https:x",
        "memory://x/y",
    ],
)
def test_other_schemes_are_refused(url: str) -> None:
    assert is_sharded(url)
    with pytest.raises(ValueError, match="data comes from a folder, from http://HOST/PATH or"):
        open_shards(url)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3fs"), ("gs://b/x", "gcsfs"), ("az://c/x", "adlfs")])
def test_a_store_names_the_package_that_it_needs(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # not installed
    with pytest.raises(ImportError, match=rf"data at {url[:2]}:// needs {package}: pip install {package}"):
        open_shards(url)


def test_from_a_store(packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(download.STORES, "memory", "fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket/set", recursive=True)
    train, _, classes = open_shards("memory://bucket/set")
    assert train is not None
    assert (train[:], classes) == (Shards(packed / "train.json")[:], ["cat", "dog"])
    memory.rm("/bucket/set/val-00000.tar")
    _, val, _ = open_shards("memory://bucket/set", need_train=False)
    assert unreadable(val) == [*range(10)]


@pytest.mark.parametrize("url", ["http://me:secret@host/x", "https://host/x?token=1", "https://host/x#a"])
def test_only_host_and_path(url: str) -> None:
    with pytest.raises(ValueError, match="without user name, '\\?' and '#'"):
        open_shards(url)


def read_with_others(url: str, barrier: "multiprocessing.synchronize.Barrier", queue: multiprocessing.Queue) -> None:
    train, _, _ = open_shards(url)
    assert train is not None
    barrier.wait()
    queue.put(hash(tuple(train[:])))


def test_processes_download_once(server: Server, cache: Path, packed: Path) -> None:
    context = multiprocessing.get_context("fork")  # all at the same moment, without waiting for imports
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=read_with_others, args=(server.url, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert results == {hash(tuple(Shards(packed / "train.json")[:]))}
    assert {server.asked[f"/{path.name}"] for path in packed.glob("train-*.tar")} == {1}


@pytest.mark.slow
def test_killed_while_downloading(server: Server, cache: Path, packed: Path) -> None:
    content = (packed / "val-00000.tar").read_bytes()
    server.faults = {"/val-00000.tar": [body(content[:-100], len(content), pause=30)]}
    process = multiprocessing.get_context("fork").Process(target=lambda: open_shards(server.url, False)[1][0])
    process.start()
    wait_for(lambda: list(cache.glob(".*.partial")))
    process.kill()
    process.join()
    assert not list(cache.glob("*.tar"))
    assert open_shards(server.url, need_train=False)[1][:] == Shards(packed / "val.json")[:]
    assert not list(cache.glob(".*.partial")), "what the killed one left is removed"


def test_the_cache_has_a_limit(server: Server, cache: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 1)
    size = max(path.stat().st_size for path in packed.glob("*.tar"))
    monkeypatch.setenv("ODCONV_CACHE_GB", str(2.5 * size / 1e9))
    train, _, _ = open_shards(server.url)
    assert train is not None
    firsts = [0, *np.cumsum(train.sizes)]

    def cached() -> set[str]:
        return {path.name[17:] for path in cache.glob("*.tar")}

    for shard in (0, 1, 0, 2):
        train[firsts[shard]]
        time.sleep(0.02)  # for the clock of the file system
    assert cached() == {"train-00000.tar", "train-00002.tar"}, "the one opened least recently is gone"
    assert train[:] == Shards(packed / "train.json")[:]
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 2.5 * size


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_is_a_number(value: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODCONV_CACHE_GB", value)
    with pytest.raises(ValueError, match=r"\$ODCONV_CACHE_GB must be a number above 0, got"):
        Shards(packed / "val.json")
    with pytest.raises(ValueError, match="cache_gb must be a number above 0, got '0'"):
        Shards(packed / "val.json", cache_gb=0)


def test_a_cache_that_cannot_be_written(server: Server, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file in its place")
    _, val, _ = open_shards(server.url, need_train=False)
    assert len(unreadable(val)) == 10
    assert len(warnings_of(caplog)) == 1


# --- webdataset


def test_webdataset_reads_ours(packed: Path) -> None:
    wds = pytest.importorskip("webdataset")
    images = Shards(packed / "train.json")
    samples = list(wds.WebDataset([str(path) for path in sorted(packed.glob("train-*.tar"))], shardshuffle=False))
    assert [sample.get("jpg") or sample["jpeg"] for sample in samples] == images[:]
    assert [int(sample["cls"]) for sample in samples] == images.labels.tolist()
    assert len({sample["__key__"] for sample in samples}) == len(images)


def test_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    written = []
    for split, count in (("train", 25), ("val", 5)):
        with wds.ShardWriter(str(tmp_path / f"{split}-%03d.tar"), maxcount=10, verbose=0) as writer:
            for number in range(count):
                image, label = jpeg(number), number % 3
                writer.write({"__key__": f"a/b{number}", "jpg": image, "cls": label, "json": {"any": "thing"}})
                written.append((image, label))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*names\.txt of names of classes"):
        index_shards(data=str(tmp_path), classes=str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    index_shards(data=str(tmp_path), classes=str(tmp_path / "names.txt"), workers=1)
    train, val, classes = open_shards(tmp_path)
    assert train is not None
    assert classes == ["ant", "bee", "cow"]
    assert train.sizes == [10, 10, 5]
    assert list(zip([*train, *val], [*train.labels, *val.labels], strict=True)) == written


def test_the_index_of_our_own(packed: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (copy / f"{split}.json").unlink()
    (copy / "names").write_text("cat\ndog\n")
    assert main(["index", "--data", str(copy), "--classes", str(copy / "names")]) == 0
    assert "val: 10 images in " in capsys.readouterr().out
    for split in ("train", "val"):
        made, first = (Index.parse((root / f"{split}.json").read_bytes(), root) for root in (copy, packed))
        assert made.classes == first.classes
        assert [shard.to_json() for shard in made.shards] == [shard.to_json() for shard in first.shards]
    with pytest.raises(ValueError, match=r"there is an index .*train\.json already"):
        index_shards(data=str(copy))


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.addfile(member)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_lead_outside_are_bytes_like_others(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "val.tar",
        ("../../escaped.jpg", jpeg(1)),
        ("../../escaped.cls", b"0"),
        (f"{tmp_path}/absolute.jpg", jpeg(2)),
        (f"{tmp_path}/absolute.cls", b"1"),
        link("link.jpg", "/etc/passwd"),
        link("hard.jpg", "../../escaped.jpg", tarfile.LNKTYPE),
        link("device.jpg", "", tarfile.CHRTYPE),
        ("__meta__/x.jpg", b""),
        (".hidden", b""),
        ("readme.txt", b""),
    )
    before = sorted(tmp_path.rglob("*"))
    index_shards(data=str(tmp_path / "in"), workers=1)
    images = Shards(tmp_path / "in" / "val.json")
    assert images[:] == [jpeg(1), jpeg(2)]
    assert images.classes == ["0", "1"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "in" / "val.json"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"")], "has no label of 'a'"),
        ([("a.cls", b"1")], "holds no image"),
        ([("a.jpg", b""), ("a.cls", b"1"), ("b.cls", b"1")], "has no image of 'b'"),
        ([("a.jpg", b""), ("a.png", b""), ("a.cls", b"1")], "has two images of the sample 'a'"),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"a\.cls in .* must hold a class number, got b'cat'"),
        ([("a.jpg", b""), ("a.cls", b"9" * 100)], r"a\.cls in .* must hold a class number"),
        ([("a.jpg", b""), link("a.cls", "/etc/passwd")], "has no label of 'a'"),
        ([], "holds no image"),
    ],
)
def test_shards_without_what_is_needed(members: list, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", *members)
    with pytest.raises(ValueError, match=message):
        index_shards(data=str(tmp_path), workers=1)
    assert not (tmp_path / "val.json").exists()


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        index_shards(data=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no shard in .* is called \*val\*\.tar"):
        index_shards(data=str(tmp_path))
    write_tar(tmp_path / "val.tar", ("a.jpg", b""), ("a.cls", b"7"), mode="w:gz")
    with pytest.raises(ValueError, match=r"val\.tar is damaged, or compressed"):
        index_shards(data=str(tmp_path), workers=1)
    write_tar(tmp_path / "val.tar", ("a.jpg", b""), ("a.cls", b"7"))
    with pytest.raises(ValueError, match="fits both patterns"):
        index_shards(data=str(tmp_path), train="v*.tar")
    (tmp_path / "names").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="names has 2 names, and there is a label 7"):
        index_shards(data=str(tmp_path), classes=str(tmp_path / "names"))
    (tmp_path / "val.tar").rename(tmp_path / "val(1).tar")
    with pytest.raises(ValueError, match=r"the name of a shard may have .* only, got 'val\(1\)\.tar'"):
        index_shards(data=str(tmp_path), workers=1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_shards_are_refused_or_read(data: st.DataObject, packed: Path, tmp_path: Path) -> None:
    content = bytearray((packed / "val-00000.tar").read_bytes())
    if data.draw(st.booleans()):
        used = len(content.rstrip(b"\0")) + 512  # with one of the two blocks of zeros, it is whole
        damaged = bytes(content[: data.draw(st.integers(0, used))])
        expected = False
    else:
        content[data.draw(st.integers(0, 2000))] ^= 1 << data.draw(st.integers(0, 7))
        damaged, expected = bytes(content), True
    (tmp_path / "val.tar").write_bytes(damaged)
    try:
        shard = describe(tmp_path / "val.tar", "val.tar")
    except ValueError:
        return
    assert expected, "a cut is noticed"
    assert len(shard.labels) <= 10


# --- real images


def pack_real(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_mb: float) -> Path:
    monkeypatch.setenv("ODCONV_CACHE", str(tmp_path / "cache"))
    pack(data=str(data), out=str(tmp_path / "out"), shard_mb=shard_mb, workers=1)
    return tmp_path / "out"


def files_of(data: Path) -> Counter[tuple[bytes, int]]:
    images = open_data(data, need_train=False).val
    return Counter((Path(path).read_bytes(), label) for path, label in zip(images.sources, images.labels, strict=True))


def test_real_images(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pack_real(shared_data / "imagenet-sample", tmp_path, monkeypatch, shard_mb=5)
    images = Shards(out / "val.json")
    assert len(images) == len(images.classes) == 1000
    assert len(images.sizes) == 7
    assert Counter(zip(images, images.labels, strict=True)) == files_of(shared_data / "imagenet-sample")


@pytest.mark.slow
def test_all_of_imagenette(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pack_real(shared_data / "imagenette96", tmp_path, monkeypatch, shard_mb=8)
    train, val, classes = open_shards(out)
    assert train is not None
    assert (len(train), len(val), len(classes)) == (9469, 3925, 10)
    assert Counter(zip(val, val.labels, strict=True)) == files_of(shared_data / "imagenette96")
    began = time.perf_counter()
    for index in np.random.default_rng(0).permutation(len(train)):
        assert len(train[int(index)])
    print(f"{len(train) / (time.perf_counter() - began):.0f} random images/s read")
