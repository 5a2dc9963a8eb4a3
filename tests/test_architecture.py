"""Imports point downward, and `import odconv` loads torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import odconv

PACKAGE = Path(__file__).parents[1] / "src" / "odconv"
BELOW = {  # the rooms that a room may import from
    "files": set(),
    "packages": set(),
    "devices": set(),
    "words": set(),
    "ops": {"files"},
    "functional": {"ops"},
    "checkpoints": {"files", "words"},
    "data": {"files"},
    "layers": {"ops"},
    "conversion": {"layers", "ops"},
    "freeze": {"conversion", "layers", "ops"},
    "fusion": {"layers"},
    "explanation": {"layers", "ops"},
    "groups": {"layers"},
    "pruning": {"packages", "layers"},
    "acceleration": {"layers", "ops"},
    "mmcv": {"packages", "conversion", "layers"},
    "counters": {"packages", "layers", "ops", "profiling"},
    "yolo": {"packages", "conversion", "counters", "fusion", "layers"},
    "zoo": set(),
    "models": {"packages", "zoo", "conversion", "layers", "ops", "checkpoints", "files"},
}
LEAVES = ("train", "detect", "export", "predict", "profiling", "visualize", "timm")
BELOW |= {leaf: {*BELOW} for leaf in LEAVES}
BELOW |= {"report": {"files", "layers", "models", "profiling", "visualize", "words"}}
BELOW["train"].add("report")
BELOW["detect"].add("train")
BELOW["export"] |= {"train", "detect"}
BELOW["predict"] |= {"train", "export", "hub"}
BELOW |= {"demo": {"data", "export", "files", "layers", "predict", "profiling", "visualize"}}
BELOW |= {"inspection": {*BELOW} - {"demo", "detect", "export"}}
BELOW |= {"reporting": {*BELOW, "report"}}
BELOW |= {"hub": {"packages", "models", "checkpoints", "profiling"}}
BELOW |= {"listing": {"zoo"}}
BELOW |= {"cli": {*BELOW}, "__main__": {"cli"}, "public": {*BELOW}, "__init__": {"public"}}


def test_imports_point_downward():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                light = node.module != "odconv" or room in ("public", "__main__") or node.names[0].name == "__version__"
                assert light, f"{file} imports from odconv itself, which imports all of it"
                modules = [f"odconv.{alias.name}" if node.module == "odconv" else node.module for alias in node.names]
            rooms = {module.split(".")[1] for module in modules if module.startswith("odconv.")} - {room, "__version__"}
            assert rooms <= BELOW[room], f"{file} imports from {rooms - BELOW[room]}"


def test_no_module_hides_a_public_name():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules & {*odconv.__all__} == {"functional"}
    assert odconv.functional is sys.modules["odconv.functional"]
    assert {*odconv.__all__} <= {*dir(odconv)}
    with pytest.raises(AttributeError, match="module 'odconv' has no attribute 'ODConv4d'"):
        odconv.ODConv4d  # noqa: B018


def test_import_odconv_is_light():
    heavy = (
        "torchvision lightning pytorch_lightning torchmetrics jsonargparse matplotlib rich yaml sklearn PIL "
        "safetensors timm huggingface_hub onnx onnxscript onnxruntime gradio"
    )
    code = f"import sys, odconv; odconv.ODConv2d; print(*[name for name in {heavy.split()!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
