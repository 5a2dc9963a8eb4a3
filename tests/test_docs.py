"""The snippets of the documentation run, its links lead somewhere, and the site has every page and public name."""

import re
import shlex
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from parameters import slow_except

import odconv

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))


def test_tests_that_are_named_exist():
    named = {name for page in DOCS.glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())}
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert named - {*re.findall(r"^def (test_\w+)", text, flags=re.M)} == {"test_batch"}  # which is an option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\[[^\[\]]*\]\(([^()\s]+)(?: \"[^\"]*\")?\)", text):
        path, _, anchor = target.partition("#")
        if "://" not in path:
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_site_has_every_page():
    yaml = pytest.importorskip("yaml")

    def leaves(part):
        inner = part.values() if isinstance(part, dict) else part
        return {part} if isinstance(part, str) else {leaf for entry in inner for leaf in leaves(entry)}

    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert nav - {"contributing.md", "conduct.md", "changes.md"} == pages


def test_the_reference_has_every_public_name():
    pages = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)", page, flags=re.M)]
    assert len(shown) == len(set(shown))
    told = {*shown, *(name for page in pages for name in re.findall(r"`(odconv\.\w+)`", page))}
    assert {f"odconv.{name}" for name in odconv.__all__} <= told
    for name in told:
        if not name.startswith(("odconv.timm", "odconv.mmcv")):  # which need these
            module = re.match(r"odconv(\.[a-z]\w*)*(?=\.\w+$)", name)[0]
            assert reduce(getattr, name.removeprefix(module)[1:].split("."), import_module(module)), name


def test_names_that_are_written_exist():
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which tells of names that were
    named = {name for page in pages for name in re.findall(r"`(odconv(?:\.[a-zA-Z_]\w*)+)[`(]", page.read_text())}
    assert len(named) > 50
    for name in sorted(named - {"odconv.json"}):  # a file
        parts = name.split(".")
        if not name.startswith(("odconv.timm", "odconv.mmcv")):  # which need these
            module = next(module for i in range(len(parts), 0, -1) if (module := imported(".".join(parts[:i]))))
            assert reduce(getattr, name.removeprefix(module.__name__).split(".")[1:], module), name


def imported(name):
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    torch.save(odconv.create_model("odl_resnet18", kernel_num=4, num_classes=10).state_dict(), "best.ckpt")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["y"].shape == (2, 6, 5)


def test_commands_that_are_shown_are_understood():
    pytest.importorskip("jsonargparse")
    pytest.importorskip("torchvision")
    from odconv.app.cli import COMMANDS, find_command, parse_options

    text = "\n".join(page.read_text() for page in [*PAGES, *ROOT.glob("weights/*/README.md")])
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    shown = "".join(block for language, block in blocks if language in ("", "sh")).replace("\\\n", "")
    lines = re.findall(r"^(?:.* )?odconv ((?:detect )?\S+)(.*)$", shown, flags=re.M)
    commands = {(name, words.partition(" > ")[0]) for name, words in lines if name in COMMANDS and "..." not in words}
    assert len({name for name, _ in commands}) > 15
    for name, words in sorted(commands):
        parse_options(name, find_command(name), shlex.split(words, comments=True))


@pytest.mark.parametrize(
    "page",
    slow_except(
        [
            "index.md", "convert.md", "detect.md", "dimensions.md", "export.md", "interop.md", "layers.md",
            "networks.md", "predict.md", "report.md", "starts.md", "visualize.md", "warehouse.md", "weights.md",
        ],
        "index.md", "layers.md", "starts.md",
    ),
)  # fmt: skip
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
