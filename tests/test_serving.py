"""The server answers images in batches and refuses what is none; Triton's configuration fits an exported file."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
import torch
from hostile_images import postscript, progressive
from torch import nn

import odconv

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
SERVING = Path(__file__).parents[1] / "examples" / "serving"


def network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [odconv.ODConv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
    return nn.Sequential(*layers).eval()


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = io.BytesIO()
    image.fromarray(pixels.numpy()).save(stream, kind)
    return stream.getvalue()


def blank(side: int) -> bytes:
    stream = io.BytesIO()
    pytest.importorskip("PIL.Image").new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "net.onnx"
    names = [f"class {i}" for i in range(7)]
    odconv.export_onnx(network(7), path, (3, 32, 32), metadata={"classes": names, "image_size": 32, "resize_size": 36})
    return path


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process; its address, once it answers or is gone."""
    pytest.importorskip("mosec")
    port = free_port()
    command = [sys.executable, str(SERVING / "server.py"), "--port", str(port), *options]
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            while process.poll() is None and time.monotonic() < end:
                try:
                    urlopen(address, timeout=5).close()
                    break
                except (URLError, ConnectionError):
                    time.sleep(0.2)
            yield address, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server(weights) -> Iterator[str]:
    with serving("--weights", str(weights), "--wait", "700", "--batch", "4", "--megabytes", "1") as (address, _):
        yield address


def post(address: str, body: bytes) -> tuple[int, str]:
    try:
        with urlopen(f"{address}/inference", body, timeout=60) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def batches(address: str) -> tuple[int, int]:
    """How many images were computed, in how many batches."""
    with urlopen(f"{address}/metrics", timeout=60) as response:
        counted = response.read().decode()
    found = [re.search(rf'batch_size_{what}{{stage="Classify_2".*}} (\S+)', counted) for what in ("sum", "count")]
    return tuple(int(float(match[1])) if match else 0 for match in found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_answered_as_by_the_network_itself(server, weights, kind):
    from odconv.app.data import read_image
    from odconv.app.predict import load_classifier

    image = encoded(1, kind)
    status, answer = post(server, image)
    assert status == 200
    classifier = load_classifier(str(weights))
    wanted = classifier(classifier.prepare(read_image(image))[None]).softmax(1)[0]
    order = wanted.argsort(descending=True).tolist()[:5]
    assert [guess["class"] for guess in json.loads(answer)] == [f"class {i}" for i in order]
    assert [guess["probability"] for guess in json.loads(answer)] == pytest.approx(wanted[order].tolist(), abs=1e-4)


def test_images_that_come_together_are_computed_together(server):
    apart = [post(server, encoded(seed))[1] for seed in range(3)]
    before = batches(server)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: post(server, body), [*map(encoded, range(3)), b"no image"]))
    after = batches(server)
    assert answers[:3] == [(200, answer) for answer in apart]
    assert answers[3] == (422, answers[3][1])
    assert after[0] - before[0] == 3
    assert 1 <= after[1] - before[1] < 3


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"no image", 422, "unreadable image of 8 bytes: it is no image, or of an unknown kind"),
        (encoded(0)[:200], 422, "unreadable image of 200 bytes"),
        (bytes(2 * 10**6), 413, "too large"),
        (blank(8000), 422, "it has 8000 x 8000 pixels, and 50,000,000 are allowed"),
        (postscript(), 422, "it is no image, or of an unknown kind"),
        (progressive(2000, 500), 422, "its 500 scans of 4,000,000 pixels each take too long to decode"),
    ],
    ids=["none", "truncated", "large", "many pixels", "PostScript", "many scans"],
)
def test_what_is_refused(server, body, status, message):
    got, answer = post(server, body)
    assert got == status
    assert message in answer
    assert post(server, encoded(0))[0] == 200


def test_other_machines_are_kept_out(server):
    port = int(server.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):  # what listens on 0.0.0.0 is there, too
        socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.slow
def test_one_at_a_time_and_the_end(weights):
    with serving("--weights", str(weights), "--batch", "1") as (address, process):
        assert post(address, encoded(0))[0] == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--weights", "none.onnx"], 1, "server.py: error: there is no file none.onnx"),
        (["--weights", "net.pt2"], 1, "server.py: error: net.pt2 can run code when it is opened"),
        (["--weights", ".", "--batch", "0"], 2, "server.py: error: --batch must be at least 1, got 0"),
    ],
)
def test_mistakes_are_said_in_a_line(options, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pt2").touch()
    with serving(*options) as (_, process):
        said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.splitlines()[-1].startswith(message)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_port_that_is_taken(server, weights):
    with serving("--weights", str(weights), "--port", server.rpartition(":")[2]) as (_, process):
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.match(r"server\.py: error: .* is in use", said.splitlines()[-1])
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(SERVING.glob("triton/*/config.pbtxt")), ids=lambda path: path.parent.name)
def test_the_configuration_for_triton(config, tmp_path):
    """Triton's own parser takes it, and an exported file has the inputs and outputs that it names."""
    described = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    model = text_format.Parse(config.read_text(), described.ModelConfig())
    assert model.name == config.parent.name
    assert model.backend == "onnxruntime"
    odconv.export_onnx(network(1000), tmp_path / "model.onnx", (3, 224, 224))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for said, there in ((model.input, session.get_inputs()), (model.output, session.get_outputs())):
        assert [value.name for value in said] == [value.name for value in there]
        assert [["batch", *value.dims] for value in said] == [value.shape for value in there]
        assert {value.type for value in there} == {"tensor(float)"}
        assert {described.DataType.Name(value.data_type) for value in said} == {"TYPE_FP32"}
    batching = model.dynamic_batching
    assert max(batching.preferred_batch_size) <= model.max_batch_size
    assert 0 < batching.max_queue_delay_microseconds < 10**5
    assert [group.count for group in model.instance_group] == [1]
    assert model.parameters["intra_op_thread_count"].string_value.isdigit()
