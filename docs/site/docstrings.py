"""Docstrings as the reference shows them: roles become links, and a class without a docstring has its base's."""

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parents[1] / "reference"
SHOWN = {name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.M)}


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visit every object of the package."""
        self.visit(pkg)

    def visit(self, part: Any) -> None:
        """Rewrite the docstring of an object, and of all that it holds."""
        if part.is_class and part.docstring is None and part.bases:
            part.docstring = next((base.docstring for base in part.mro() if base.docstring), None)
        elif part.docstring is not None:
            part.docstring.value = re.sub(r":\w+:`~?([\w.]+)`", link, part.docstring.value)
        for member in part.members.values():
            if not member.is_alias:
                self.visit(member)


def link(role: re.Match[str]) -> str:
    """Return a name as code, with a link where the reference has it."""
    name = role[1]
    short = f"odconv.{name.rpartition('.')[2]}"
    shown = name if name in SHOWN else short if name.startswith("odconv.") and short in SHOWN else None
    return f"[`{name}`][{shown}]" if shown else f"`{name}`"
