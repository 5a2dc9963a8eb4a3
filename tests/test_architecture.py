"""Imports point downward, and `import odconv` loads torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import odconv

PACKAGE = Path(__file__).parents[1] / "src" / "odconv"
BELOW: dict[str, set[str]] = {  # the rooms that a room may import from
    "system": set(),
    "ops": {"system"},
    "functional": {"ops"},
    "layers": {"system", "ops"},
    "conversion": {"system", "ops", "layers"},
    "checkpoints": {"system"},
    "models": {"system", "checkpoints", "ops", "layers", "conversion"},
    "profiling": {"system", "ops", "layers", "conversion", "models"},
    "attentions": {"system", "ops", "layers"},
    "export": {"system", "ops", "layers"},
    "timm": {"system", "conversion", "models"},
    "mmcv": {"system", "layers", "conversion"},
    "yolo": {"system", "layers", "conversion", "profiling"},
    "hub": {"system", "checkpoints", "models", "profiling"},
}
LIBRARY = {*BELOW}
BELOW |= {"public": LIBRARY, "__init__": {"public"}, "__main__": {"app.cli"}}
BELOW |= {  # the application: all may use the library, which uses none of it
    f"app.{room}": LIBRARY | {f"app.{other}" for other in others.split()}
    for room, others in {
        "data": "",
        "engine": "data",
        "pages": "data",
        "classify": "data engine pages",
        "detect": "data engine pages",
        "predict": "data engine classify",
        "demo": "data pages predict",
        "commands": "data engine pages classify detect predict",
    }.items()
}
BELOW |= {"app.__init__": set(), "app.cli": {"system", "app.commands"}}
BELOW |= {"app.completion": LIBRARY | {"app.cli", "app.commands", "app.engine"}}


def room_of(module: tuple[str, ...]) -> str:
    """Return the room of a module's path below the package: "layers", or "app.engine"."""
    return ".".join(module[:2]) if module[0] == "app" else module[0]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"odconv.{alias.name}" for alias in node.names] if node.module == "odconv" else [node.module or ""]
    return []


def test_imports_point_downward():
    for file in PACKAGE.rglob("*.py"):
        room = room_of(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                light = node.module != "odconv" or room in ("public", "__main__") or node.names[0].name == "__version__"
                assert light, f"{file} imports from odconv itself, which imports all of it"
            rooms = {room_of(tuple(name.split(".")[1:])) for name in imported(node) if name.startswith("odconv.")}
            assert rooms - {room, "__version__"} <= BELOW[room], f"{file} imports from {rooms - BELOW[room] - {room}}"


def test_the_plan_says_what_may_import_what():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    rooms = {name for name in modules if not name.startswith("__")}
    assert rooms == LIBRARY | {"app", "public"}
    assert len(rooms) <= 16
    plan = (PACKAGE.parents[1] / "docs/architecture.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in plan.splitlines() if line[:3] == "| `"]
    said = {name.strip("`"): {*filter(None, allowed.split(", "))} for name, _, allowed in cells}
    assert said.pop("public") == {"all of these"}
    wanted = {room: others - LIBRARY if room.startswith("app.") else others for room, others in BELOW.items()}
    assert said == {room: wanted[room] for room in wanted if "__" not in room and room != "public"}


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
        "safetensors timm huggingface_hub onnx onnxscript onnxruntime gradio odconv.app triton"
    )
    code = "import sys, odconv, odconv.ops.triton; odconv.ODConv2d; "
    code += f"print(*[name for name in {heavy.split()!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
