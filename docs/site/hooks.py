"""What the site has besides docs/: rows and pages from elsewhere in the tree, and links to them."""

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CODE_OF_CONDUCT.md": "conduct.md", "CHANGELOG.md": "changes.md"}
PAGES |= {"LICENSE": "LICENSE"}
"""Files that stand at the root of the tree, and their places on the site."""
RESULTS = "benchmarks/results"
EXAMPLES = "examples"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages of the root, the measured rows and the examples."""
    rows = {path.relative_to(ROOT).as_posix(): f"results/{path.name}" for path in (ROOT / RESULTS).iterdir()}
    found = [path for name in ("*.py", "notebooks/*.ipynb") for path in (ROOT / EXAMPLES).glob(name)]
    examples = {place: place for place in (path.relative_to(ROOT).as_posix() for path in found)}
    for source, place in (PAGES | rows | examples).items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to their places on the site; what is not there keeps its words alone."""
    home = next((source for source, place in PAGES.items() if place == page.file.src_uri), f"docs/{page.file.src_uri}")

    def follow(link: re.Match[str]) -> str:
        words, target, title = link.groups()
        path, hash, anchor = target.partition("#")
        if not path or "://" in path:
            return link[0]
        source = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
        place = find_place(source)
        if place is None:
            return words[1:-1]
        return f"{words}({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{hash}{anchor}{title})"

    return re.sub(r"(\[[^\[\]]*\])\(([^()\s]+)((?: \"[^\"]*\")?)\)", follow, markdown)


def find_place(source: str) -> str | None:
    """Where a file of the tree is on the site; None where it is not."""
    if source in PAGES:
        return PAGES[source]
    if source == "README.md":
        return "index.md"
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if source.startswith(f"{EXAMPLES}/") and source.endswith((".py", ".ipynb")):
        return source
    if source.startswith(f"{RESULTS}/"):
        return f"results/{posixpath.basename(source)}"
    return None


class Fetched(HTMLParser):
    """Collects what a page would fetch from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag if it fetches something from another host."""
        for name, value in attrs:
            fetches = name in ("src", "srcset") or (tag == "link" and name == "href")
            if fetches and re.match(r"\w+://|//", value or ""):
                self.found.append(f"{tag} {value}")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that fetches anything from another host."""
    if found := Fetched(output).found:
        raise PluginError(f"{page.file.src_uri} would fetch {', '.join(found)}: the site must do without other hosts")
    return output
