"""The page in the browser: real networks, a real server, and a browser that drops images on it."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import tiny
import torch
from hostile_images import progressive
from parameters import slow_except
from PIL import Image
from small_runs import COMMAND, wait_until

import odconv
from odconv.app.cli import main
from odconv.app.data import Images, normalise, open_data

pytest.importorskip("gradio")

from odconv.app.demo.cards import show_answers, show_problem
from odconv.app.demo.examples import make_examples
from odconv.app.demo.networks import Answer, ask, load
from odconv.app.demo.uploads import MEGABYTES, read_upload
from odconv.app.predict import load_classifier

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DIGITS = [*"0123456789"]


def save_network(path: Path, arch: str, classes: list[str] = DIGITS, **options: int) -> str:
    """Write a network that has seen digits, but not learnt them, as `odconv train` writes a trained one."""
    torch.manual_seed(0)
    model = odconv.create_model(arch, num_classes=len(classes), stem="small", **options)
    digits = normalise(torch.stack([image for image, _ in list(open_digits())[:64]]))
    with torch.no_grad():
        for _ in range(10):
            model(digits)  # for the statistics of batch norm
        *_, weight, _ = model.parameters()  # of the classifier
        weight *= 2 / model.eval()(digits).std()
    parameters = {"arch": arch, "stem": "small", "image_size": 8, "resize_size": 8, **options}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": parameters, "odconv": {"classes": classes}}, path)
    return str(path)


def open_digits() -> Images:
    return open_data("digits", image_size=8, resize_size=8).val


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options that name a dynamic and a static network that know digits."""
    folder = tmp_path_factory.mktemp("networks")
    dynamic = save_network(folder / "dynamic.ckpt", tiny.DYNAMIC, kernel_num=2)
    return {"weights": dynamic, "static": save_network(folder / "static.ckpt", tiny.STATIC)}


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digit.png"
    Image.fromarray(open_digits().sources[7]).save(path)
    return path


# ---- images


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20), "red")
    photo.paste("blue", (0, 0, 20, 20))  # on the left
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    photo.save(tmp_path / "photo.jpg", exif=exif)
    image = read_upload(tmp_path / "photo.jpg")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5))[2] > 200  # blue on top


def test_images_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.jpg")  # PIL would give it to Ghostscript
    for name, side in {"large.png": 8000, "huge.png": 30000}.items():  # bitmaps, whatever their names say
        Image.new("RGB", (1, 1)).save(tmp_path / name, "BMP")
        content = bytearray((tmp_path / name).read_bytes())
        content[18:26] = struct.pack("<ii", side, side)
        (tmp_path / name).write_bytes(content)
    Image.effect_noise((99, 99), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "scans.jpg").write_bytes(progressive(2000, 500))
    for name, reason in {
        "missing.png": "no image", "text.jpg": "no image", "empty.png": "no image", "drawing.jpg": "no image",
        "pipe.png": "no image", "large.png": "8000 x 8000 pixels", "huge.png": "far more than 50 million",
        "half.png": "cannot be read: .*truncated",
        "scans.jpg": "cannot be read: its 500 scans of 4,000,000 pixels each take too long",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} .*{reason}"):
            read_upload(tmp_path / name)


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    places = [tmp_path / name for name in ("digits", "photos", "own", "none")]
    for place in places:
        place.mkdir()
    digits = make_examples(None, DIGITS, places[0])
    assert [path.name for path in digits.files] == [f"{digit}.png" for digit in range(10)]
    assert len({path.read_bytes() for path in digits.files}) == 10
    photos = make_examples(None, ["tree", "house"], places[1])
    assert [read_upload(path).size for path in photos.files] == [(640, 427)] * 2
    assert "CC BY" in photos.source
    folder = tmp_path / "folder"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(folder / name / "same.png")
    (folder / "a" / "broken.png").touch()
    own = make_examples(str(folder), DIGITS, places[2])
    assert [path.name for path in own.files] == ["same.png"] * 2
    assert all(path.is_relative_to(places[2]) for path in own.files)
    assert "broken.png is no image" in capsys.readouterr().err
    (folder / "a" / "same.png").unlink()
    with pytest.raises(FileNotFoundError, match="none of the images"):
        make_examples(str(folder / "a"), DIGITS, places[3])


# ---- answers


def test_answers_are_those_of_the_networks(networks: dict[str, str], digit: Path) -> None:
    answers = ask(load(**networks, static_arch=None), read_upload(digit))
    assert [answer.network.classifier.name for answer in answers] == [tiny.STATIC, tiny.DYNAMIC]
    assert [bool(answer.network.layers) for answer in answers] == [False, True]
    for answer, path in zip(answers, (networks["static"], networks["weights"]), strict=True):
        classifier = load_classifier(path)
        shares = classifier(classifier.prepare(read_upload(digit))[None])[0].softmax(0)
        top = [
            (str(i), pytest.approx(100 * shares[i].item(), rel=1e-3)) for i in shares.argsort(descending=True).tolist()
        ]
        assert answer.top == top[:5]
        assert answer.milliseconds > 0


def test_names_are_text(networks: dict[str, str]) -> None:
    (network,) = load(networks["weights"], None, None)
    page = show_answers([Answer(network, [("<script>alert(1)</script>", 99.0), ("a & b", 1.0)], 1.5)], "1 CPU thread")
    assert "<script>" not in page
    assert "a &amp; b" in page
    assert "<b>1.5</b> ms" in page
    assert "<img" not in show_problem("<img src=x onerror=alert(1)>.png is no image")


def test_networks_that_cannot_be_compared(networks: dict[str, str], tmp_path: Path) -> None:
    other = save_network(tmp_path / "other.ckpt", tiny.STATIC, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"classes .* must be the same, got 2 \(cat, dog\) and 10 \(.* and 2 more\)"):
        load(networks["weights"], other, None)
    for name in ("none.onnx", "none.pt2"):  # refused by its name: opening some would run code
        with pytest.raises(ValueError, match=rf"{name} is an exported network, which nobody can look into"):
            load(networks["weights"], str(tmp_path / name), None)


# ---- the command


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_mistakes(
    networks: dict[str, str], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADIO_TEMP_DIR", "no_proxy"):  # the command sets them
        monkeypatch.setenv(name, str(tmp_path))
    sigterm = signal.getsignal(signal.SIGTERM)

    def complaint(*options: str) -> str:
        assert main(["demo", *options]) in (1, 2)
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)  # away from this tree's weights
    monkeypatch.delenv("ODCONV_WEIGHTS", raising=False)
    assert re.search("imagenette_static and .* are not in the folder weights.*`make demo`", complaint(), flags=re.S)
    weights = f"--weights={networks['weights']}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be opened" in complaint(weights, f"--port={port}")
    assert "port must be from 1 to 65535, got 0" in complaint(weights, "--port=0")
    assert "cannot be opened" in complaint(weights, "--host=192.0.2.1")
    port = free_port()
    assert "nothing.ckpt do not exist" in complaint("--weights=nothing.ckpt", f"--port={port}")
    assert "no such file or folder" in complaint(weights, f"--port={port}", "--examples=nowhere")
    signal.signal(signal.SIGTERM, sigterm)


class Demo(NamedTuple):
    """A running page."""

    process: subprocess.Popen
    url: str
    folder: Path
    """What stands for /tmp."""
    outside: socket.socket
    """Where requests to other hosts go instead."""


@pytest.fixture(scope="module")
def demo(networks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    with socket.create_server(("127.0.0.1", 0)) as outside:
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        environment = {**os.environ, "TMPDIR": str(folder), "http_proxy": proxy, "https_proxy": proxy}
        options = [f"--{name}={value}" for name, value in {**networks, "port": port}.items()]
        process = subprocess.Popen([*COMMAND, "demo", *options], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: listens("127.0.0.1", port), process)
            yield Demo(process, f"http://127.0.0.1:{port}", folder, outside)
        finally:
            process.kill()


def listens(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def test_only_this_machine_and_only_uploads(demo: Demo, digit: Path) -> None:
    port = int(demo.url.rpartition(":")[2])
    assert listens("127.0.0.1", port)
    assert not listens("127.0.0.2", port)  # as a page that is open to everybody would
    too_much = httpx.post(f"{demo.url}/gradio_api/upload", files={"files": ("a.png", bytes(MEGABYTES * 2**20 + 1))})
    assert too_much.status_code == 413
    (name,) = httpx.post(f"{demo.url}/gradio_api/upload", files={"files": digit.read_bytes()}).json()
    assert Path(name).is_relative_to(demo.folder)
    assert httpx.get(f"{demo.url}/gradio_api/file={name}").status_code == 200
    assert httpx.get(f"{demo.url}/gradio_api/file={digit}").status_code == 403
    assert tiny.DYNAMIC in classify(demo, name)[0]
    assert classify(demo, str(digit)) == []
    assert "digit.png was not dropped here" in classify(demo, str(digit), kind=None)[0]
    assert "was not dropped here" in classify(demo, "../../../etc/passwd", kind=None)[0]
    for drawing in ("draw", "draw_1"):
        assert "base64" in classify(demo, name, "", function=drawing)[0]
        assert classify(demo, str(digit), "", function=drawing, kind=None) == [""]


def classify(
    demo: Demo, path: str, *more: str, function: str = "answer", kind: str | None = "gradio.FileData"
) -> list[str]:
    """What the page would be told of a file of the server, past the browser; gradio checks files of its own kind."""
    functions = httpx.get(f"{demo.url}/config").json()["dependencies"]
    (index,) = [listed["id"] for listed in functions if listed["api_name"] == function]
    upload = {"path": path} | ({"meta": {"_type": kind}} if kind else {})
    call = {"data": [upload, *more], "fn_index": index, "session_hash": "test"}
    assert httpx.post(f"{demo.url}/gradio_api/queue/join", json=call).status_code == 200
    with httpx.stream("GET", f"{demo.url}/gradio_api/queue/data?session_hash=test", timeout=30) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line else {"msg": ""}
            if event["msg"] == "process_completed":
                return event["output"]["data"] if event["success"] else []
    raise AssertionError("the stream of events ended")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def browse(demo: Demo, chromium: Any) -> Iterator[Any]:
    """Open the page in the browser; fails on a request to another host and on errors of scripts."""
    requests: list[str] = []
    errors: list[str] = []

    def browse(**options: Any) -> Any:
        page = chromium.new_page(**options)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo.url)
        page.wait_for_selector("[type=file]", state="attached")
        return page

    yield browse
    for context in chromium.contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((demo.url, "data:", "blob:"))] == []
    assert len(requests) > 10


def drop(page: Any, file: Path) -> None:
    """Drop a file on the page as from a window of the desktop."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [file.name, base64.b64encode(file.read_bytes()).decode()],
    )
    page.dispatch_event("[aria-dropeffect=copy]", "drop", {"dataTransfer": transfer})


def test_drop_an_image(browse: Any, networks: dict[str, str], digit: Path) -> None:
    page = browse(viewport={"width": 1280, "height": 900})
    drop(page, digit)
    page.wait_for_selector(".answer")
    expected = ask(load(networks["weights"], networks["static"], None), read_upload(digit))
    cards = page.query_selector_all(".answer")
    boxes = [card.bounding_box() for card in cards]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side
    for card, answer in zip(cards, expected, strict=True):
        assert card.query_selector("h2").inner_text() == answer.network.classifier.name
        assert float(card.query_selector(".time b").inner_text()) > 0
        shown = [row.inner_text().split("\n")[:2] for row in card.query_selector_all("li")]
        assert shown == [[name, f"{share:.1f} %"] for name, share in answer.top]
    picture = page.wait_for_selector(".scroll img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 1000
    before = picture.get_attribute("src")
    page.click("[aria-label^=Attentions]")
    page.click("[role=option] >> nth=3")
    page.wait_for_function("before => document.querySelector('.scroll img').src != before", arg=before)

    before = page.inner_text(".answer")
    page.click(".gallery-item >> nth=4")
    page.wait_for_function("before => document.querySelector('.answer').innerText != before", arg=before)
    page.click("[aria-label='Remove Image']")
    page.wait_for_selector(".invitation")
    page.wait_for_selector(".scroll", state="detached")


@pytest.mark.parametrize("scheme", slow_except(["light", "dark"], "dark"))
def test_on_a_phone(browse: Any, digit: Path, scheme: str) -> None:
    page = browse(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_input_files("[type=file]", digit)
    page.wait_for_selector(".scroll img")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    upper, lower = [card.bounding_box() for card in page.query_selector_all(".answer")]
    assert upper["y"] + upper["height"] < lower["y"]
    text, paper = (
        sum(int(part) for part in re.findall(r"\d+", page.evaluate(f"getComputedStyle({element}).{what}"))[:3])
        for element, what in (
            ("document.querySelector('.answer .class')", "color"),
            ("document.body", "backgroundColor"),
        )
    )
    assert (text < 250 and paper > 600) if scheme == "light" else (text > 600 and paper < 250)


def test_files_that_are_no_images(browse: Any, digit: Path, tmp_path: Path) -> None:
    page = browse()
    (tmp_path / "text.jpg").write_text("no image")
    page.set_input_files("[type=file]", tmp_path / "text.jpg")
    page.wait_for_selector(".problem >> text=text.jpg is no image")
    page.click("[aria-label='Remove Image']")
    page.wait_for_selector(".invitation")
    (tmp_path / "large.png").write_bytes(bytes(MEGABYTES * 2**20 + 1))
    page.set_input_files("[type=file]", tmp_path / "large.png")
    page.wait_for_selector("text=exceed the maximum allowed size of 20.0 Mb")
    page.set_input_files("[type=file]", digit)
    page.wait_for_selector(".answer")


def test_nothing_leaves_and_nothing_stays(demo: Demo) -> None:
    demo.outside.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody called
        demo.outside.accept()
    assert [*demo.folder.iterdir()]
    demo.process.send_signal(signal.SIGINT)
    output = demo.process.communicate(timeout=60)[0]
    assert f"{demo.url} is open" in output
    assert demo.process.returncode == 0
    assert [*demo.folder.iterdir()] == []
