"""The snippets of the documentation run."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import odconv

DOCS = Path(__file__).parents[1] / "docs"


def test_tests_that_are_named_exist():
    named = {name for page in DOCS.glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())}
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert named - {*re.findall(r"^def (test_\w+)", text, flags=re.M)} == {"test_batch"}  # which is an option


@pytest.mark.parametrize(
    "page",
    ["convert.md", "detect.md", "export.md", "predict.md", "report.md", "visualize.md", "warehouse.md", "weights.md"],
)
def test_the_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    for package in ("torchvision", "safetensors", "huggingface_hub"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.save(odconv.create_model("od_resnet18", kernel_num=4).state_dict(), "odconv4x_resnet18.pth.tar")
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        if all(find_spec(package) for package in re.findall(r"^import (\w+)", snippet, flags=re.M)):
            exec(compile(snippet, page, "exec"), names)
