"""The snippets of the documentation run."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["convert.md"])
def test_the_snippets_of_a_page_run_one_after_the_other(page):
    pytest.importorskip("torchvision")
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
