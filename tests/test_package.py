"""What is built from this tree: an archive of the source and a wheel that hold all of it, and work installed."""

import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from test_detect_training import make_coco

from odconv import __version__
from odconv.ops import cpu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "odconv"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The archive of the source, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_both_hold_every_file_of_the_package(built: tuple[Path, Path]) -> None:
    ours = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len([name for name in ours if name.endswith(".yaml")]) == 57
    archive, wheel = built
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert ours == {name.removeprefix("src/") for name in names if name.startswith("src/")}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.startswith("weights")]
    with zipfile.ZipFile(wheel) as packed:
        assert ours == {name for name in packed.namelist() if name.startswith("odconv/")}


@pytest.fixture
def image_context(tmp_path: Path) -> Path:
    """What the Dockerfile copies into an image, and nothing else."""
    copied = re.findall(r"^COPY (.*) /odconv\S*$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(" ".join(copied).split()) == sorted(allowed)
    for name in allowed:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_what_an_image_gets_is_enough_to_install(image_context: Path, built: tuple[Path, Path]) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", str(image_context)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (image_context / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(built[1]) as other:
        assert {*one.namelist()} == {*other.namelist()}


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=3600)


@pytest.mark.slow
def test_an_image_trains(tmp_path: Path) -> None:
    if shutil.which("docker") is None or docker("info").returncode != 0:
        pytest.skip("no docker that runs")

    def succeeds(*words: str) -> str:
        done = docker(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    succeeds("build", "--tag", "odconv-test", str(ROOT))
    assert succeeds("run", "--rm", "odconv-test", "--version") == f"odconv {__version__}\n"
    run = ["run", "--rm", "--ipc", "host", "--user", str(os.getuid()), "--volume", f"{tmp_path}:/work", "odconv-test"]
    little = ["--arch", "od_mobilenetv2_050", "--epochs", "1"]
    succeeds(*run, "train", "--config", "digits_od_resnet18_1x", *little, "--out", "run")
    assert json.loads((tmp_path / "run/result.json").read_text())["epochs"] == 1


def test_the_oldest_torch_is_the_one_that_is_tested() -> None:
    allowed = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"^OLDEST := torch==([\d.]+)\.0 ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert allowed is not None
    assert tested is not None
    assert allowed[1] == tested[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("goal", ["demo", "test", "yolo", "test-oldest"])
def test_what_is_fetched_is_said_first(goal: str, tmp_path: Path) -> None:
    words = ["make", "--dry-run", "--always-make", f"--directory={ROOT}", f"VENV={tmp_path}/venv", goal]
    said, _, rest = subprocess.run(words, capture_output=True, text=True, check=True).stdout.partition("pip install")
    assert re.search(r"echo .*about \d GB, \d GB on the disk", said)
    assert "--editable" in rest


def test_one_version_everywhere(built: tuple[Path, Path]) -> None:
    archive, wheel = built
    assert archive.name == f"odconv-{__version__}.tar.gz"
    assert wheel.name == f"odconv-{__version__}-py3-none-any.whl"  # C++ is compiled where it runs
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(__version__)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `odconv` of an environment with the wheel."""
    return install(built[1], tmp_path_factory.mktemp("environment"))


def install(wheel: Path, root: Path) -> Path:
    """Make an environment with a wheel, whose other packages are those of this one, and return its `odconv`."""
    venv.create(root)
    folders = {name: sysconfig.get_path(name, "venv", {"base": str(root)}) for name in ("scripts", "purelib")}
    python = str(Path(folders["scripts"], "python"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    # behind its own, and without their .pth files, one of which leads to this tree
    Path(folders["purelib"], "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Path(folders["scripts"], "odconv")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_compiled_wheel_is_for_systems_that_the_kernel_is_for() -> None:
    code = f"""
import platform, sys
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
import hatch_build
platform.machine = lambda: "riscv64"
hatch_build.CompiledKernels.initialize(SimpleNamespace(root={str(ROOT)!r}), "standard", {{}})
"""
    environment = os.environ | {"ODCONV_COMPILED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ODCONV_COMPILED=1 makes wheels for Linux on x86_64 or aarch64, got linux on riscv64" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="the compiled kernel is not here")
def test_a_wheel_for_one_system_needs_no_compiler(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(build, env=environment | {"ODCONV_COMPILED": "1"}, check=True, capture_output=True, timeout=900)
    (wheel,) = tmp_path.glob("odconv-*-py3-none-linux_*.whl")
    python = install(wheel, tmp_path / "environment").with_name("python")
    code = """
import torch, odconv
from odconv.ops import cpu
assert cpu.available()
layer, x = odconv.ODConv2d(32, 48, 3, padding=1).eval(), torch.randn(3, 32, 9, 9, requires_grad=True)
assert odconv.explain(layer, (3, 32, 9, 9)).backend == "cpu"
y = layer(x)
y.square().sum().backward()
a = layer.attention(x)
wanted = odconv.functional.dynamic_conv(x, layer.weight, **a._asdict(), padding=1, backend="reference")
torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
print(next(line.split()[-1] for line in open("/proc/self/maps") if "/compiled/" in line))
"""
    found = set()
    for capability in ("avx2", "avx512"):
        changes = {"CXX": "no-compiler", "ODCONV_CACHE": "/nonexistent", "ATEN_CPU_CAPABILITY": capability}
        run = [str(python), "-W", "error", "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment | changes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.add(Path(done.stdout.strip()).name)
    assert "avx2.so" in found
    assert torch.backends.cpu.get_cpu_capability() != "AVX512" or len(found) == 2


@pytest.mark.slow
def test_what_is_installed_trains_by_recipes(installed: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # it may lead to this tree

    def run(program: Path, *words: str) -> list[str]:
        command, options = [str(program), *words], {"env": environment, "cwd": tmp_path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    odconv = partial(run, installed)
    (place,) = run(installed.with_name("python"), "-c", "import odconv; print(odconv.__file__)")
    assert Path(place).is_relative_to(installed.parents[1])
    assert len(odconv("recipes")) == 2 + 57
    little = ("--arch", "od_mobilenetv2_050", "--epochs", "1", "--batch_size", "256")
    odconv("train", "--config", "digits_od_resnet18_1x", *little, "--out", "digits")
    assert json.loads((tmp_path / "digits/result.json").read_text())["arch"] == "od_mobilenetv2_050"
    make_coco(tmp_path / "coco", {"train": 5, "val": 3})
    odconv(
        "detect", "train", "--config", "small_mask_rcnn_mobilenetv2_100", "--data", "coco", "--out", "boxes",
        "--epochs", "1", "--schedule", "[]", "--min_size", "[32]", "--max_size", "48", "--workers", "0",
    )  # fmt: skip
    assert json.loads((tmp_path / "boxes/result.json").read_text())["detector"] == "mask_rcnn"


@pytest.mark.parametrize(
    ("module", "function", "package", "message"),
    [
        ("odconv.hub", "", "huggingface_hub", "odconv.hub needs huggingface_hub: pip install 'odconv[models]'"),
        ("odconv.timm", "", "timm", "odconv.timm needs timm: pip install timm"),
        ("odconv.mmcv", "", "mmengine", "odconv.mmcv needs mmengine: pip install mmengine"),
        ("odconv.yolo", "register", "ultralytics", "odconv.yolo needs ultralytics: pip install ultralytics"),
        ("odconv.profiling.counters", "register_thop", "thop", "register_thop needs thop: pip install thop"),
        (
            "odconv.conversion.pruning",
            "pruners",
            "torch_pruning",
            "odconv.conversion.pruning.pruners needs torch_pruning: pip install torch-pr",
        ),
    ],
)
def test_what_is_missing_is_named_with_how_to_install_it(module, function, package, message, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=f"^{re.escape(message)}"):
        getattr(importlib.import_module(module), function)()


def test_networks_need_no_more_than_the_extra_models(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        needs = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])
    train, models = (
        {re.split(r"[^\w-]", need)[0] for need in needs if need.endswith(f"extra == '{extra}'")}
        for extra in ("train", "models")
    )
    there = models | {"pillow", "jinja2", "filelock", "pyyaml"}  # with torch, torchvision and huggingface_hub
    modules = {"scikit-learn": "sklearn", "docstring-parser": "docstring_parser"}
    blocked = {modules.get(name, name): None for name in train - there}
    assert {"lightning", "captum", "sklearn", "tensorboard", "matplotlib"} < blocked.keys()
    code = f"""
import sys
sys.modules |= {blocked}
import odconv, torch
from odconv.checkpoints import save_safetensors
from odconv.hub import HubModel
model = odconv.create_model("od_mobilenetv2_050", kernel_num=2)
save_safetensors(model, "model.safetensors")
odconv.create_model("od_mobilenetv2_050", kernel_num=2, weights="model.safetensors")
HubModel("od_mobilenetv2_050", kernel_num=2).save_pretrained("folder")
HubModel.from_pretrained("folder")
print(odconv.profile(model, (3, 32, 32)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_networks_come_by_torch_hub(tmp_path: Path) -> None:
    code = f"""
import sys, torch
model = torch.hub.load({str(ROOT)!r}, "od_mobilenetv2_050", source="local", kernel_num=2, num_classes=5).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
sys.path.append({str(ROOT)!r})
import hubconf, odconv
entries = {{name: entry for name, entry in vars(hubconf).items() if callable(entry) and name[0] != "_"}}  # as hub.list
assert entries.keys() == {{"convert", *odconv.list_models()}}
assert "kernel_num:" in entries["od_resnet18"].__doc__
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_what_ci_calls_is_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    goals = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    runs = [step["run"].split() for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {program for program, *_ in runs} == {"make"}
    called = [goal for _, goal, *_ in runs]
    assert called == ["test", "test-oldest", "docs"]
    assert {*called} <= {*goals}
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.keys() == {"bug.yml", "wish.yml", "config.yml"}
    for name in ("bug.yml", "wish.yml"):
        assert forms[name].keys() == {"name", "description", "body"}
        assert all(part["attributes"]["label"] for part in forms[name]["body"])
