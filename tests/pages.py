"""Pages of HTML: what is in them, and how they look in a browser."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<!DOCTYPE html>
<iframe srcdoc="{page}" style="width: {width}px; height: 1000px; border: 0"></iframe>
<script>
document.querySelector("iframe").onload = ({{ target }}) => {{
  const page = target.contentDocument, width = target.contentWindow.innerWidth;
  const outside = [...page.querySelectorAll("body *")].filter(
    element => !element.closest(".wide") && element.getBoundingClientRect().right > width
  );
  const box = element => element.getBoundingClientRect();
  document.body.innerHTML = `<pre>${{JSON.stringify({{
    width, scroll: page.documentElement.scrollWidth, outside: outside.map(element => element.tagName),
    text: page.body.innerText.length, label: box(page.querySelector("svg text")).height,
    pictures: [...page.querySelectorAll("svg")].map(box).map(({{ width, height }}) => [width, height]),
  }})}}</pre>`;
}};
</script>"""  # in a frame, since a window is never narrower than 500 pixels


class Page(HTMLParser):
    """Reads a page; fails on tags that do not match, ids that come twice, and anything from outside."""

    VOID = ("meta", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.labels: list[str] = []  # in pictures
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
                assert value.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
            elif not name.startswith("xmlns"):
                assert "//" not in value
                assert set(re.findall(r"url\(.", value)) <= {"url(#"}
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif data.strip():
            self.texts.append(" ".join(data.split()))
            if "svg" in self.open:
                self.labels.append(self.texts[-1])

    def shows(self, text: str) -> bool:
        return any(text in shown for shown in self.texts)


def browse(file: Path, profile: Path, *options: str, width: int = 1200) -> tuple[str, list[str]]:
    """Open a file in a browser without a window; returns what it prints, and its errors of the console."""
    command = (
        f"{CHROMIUM} --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr "
        f"--user-data-dir={profile} --window-size={width},1000"
    )
    done = subprocess.run(
        [*command.split(), *options, file.as_uri()], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measure(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """Lay a page out in some width; returns its sizes, and what goes beyond."""
    frame = folder / "frame.html"
    frame.write_text(MEASURE.format(page=escape(page.read_text(encoding="utf-8")), width=width), encoding="utf-8")
    dom, _ = browse(frame, folder / "profile", "--dump-dom")
    return json.loads(re.search("<pre>(.*)</pre>", dom)[1])
