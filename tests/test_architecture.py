"""Imports point downward, and `import odconv` loads torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "odconv"
BELOW = {  # the rooms that a room may import from
    "files": set(),
    "words": set(),
    "ops": {"files"},
    "functional": {"ops"},
    "checkpoints": {"files"},
    "data": {"files"},
    "layers": {"ops"},
    "convert": {"layers", "ops"},
    "freeze": {"convert", "layers", "ops"},
    "fusion": {"layers"},
    "groups": {"layers"},
    "pruning": {"layers"},
    "mmcv": {"convert", "layers"},
    "counters": {"layers", "ops", "profile"},
    "yolo": {"convert", "counters", "fusion", "layers"},
    "models": {"convert", "layers", "ops", "checkpoints", "files"},
}
LEAVES = ("train", "detect", "export", "predict", "profile", "visualize", "timm")
BELOW |= {leaf: {*BELOW} for leaf in LEAVES}
BELOW |= {"report": {"files", "layers", "models", "profile", "visualize", "words"}}
BELOW["train"].add("report")
BELOW["detect"].add("train")
BELOW["export"] |= {"train", "detect"}
BELOW["predict"] |= {"train", "export", "hub"}
BELOW |= {"demo": {"data", "layers", "predict", "profile", "visualize"}}
BELOW |= {"inspection": {*BELOW} - {"demo", "detect", "export"}}
BELOW |= {"reporting": {*BELOW, "report"}}
BELOW |= {"hub": {"models", "checkpoints", "profile"}}
BELOW |= {"cli": {*BELOW}, "__main__": {"cli"}, "__init__": {*BELOW, "functional"}}


def test_imports_point_downward():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                modules = [f"odconv.{alias.name}" if node.module == "odconv" else node.module for alias in node.names]
            rooms = {module.split(".")[1] for module in modules if module.startswith("odconv.")} - {room, "__version__"}
            assert rooms <= BELOW[room], f"{file} imports from {rooms - BELOW[room]}"


def test_import_odconv_is_light():
    heavy = (
        "torchvision lightning pytorch_lightning torchmetrics jsonargparse matplotlib rich yaml sklearn PIL "
        "safetensors timm huggingface_hub onnx onnxscript onnxruntime gradio"
    )
    code = f"import sys, odconv; print(*[name for name in {heavy.split()!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
