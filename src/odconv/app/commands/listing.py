"""The commands `odconv models` and `odconv recipes`, and where recipes are; without PyTorch."""

from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

from odconv.models.zoo import NAMES

RECIPES = {"train": "classify/recipes", "detect train": "detect/recipes"}
"""The commands that take recipes, and the folders with those that come with odconv."""


def find_recipes(command: str) -> dict[str, Path]:
    """Return the recipes that come with odconv for a command, by name."""
    files = Path(str(resources.files("odconv.app"))).joinpath(RECIPES[command]).glob("*.yaml")
    return {file.stem: file for file in sorted(files)}


def models(patterns: Sequence[str] = ("*",)) -> list[str]:
    """List the networks that can be trained, measured and exported.

    Args:
        patterns: Names, or patterns such as 'od_*'.
    """
    names = _matching(patterns, NAMES, "network", "models")
    print(*names, sep="\n")
    return names


def recipes(patterns: Sequence[str] = ("*",)) -> list[str]:
    """List the recipes that come with odconv, and what each trains.

    Args:
        patterns: Names, or patterns such as '*resnet18*'.
    """
    found = {command: find_recipes(command) for command in RECIPES}
    chosen = _matching(patterns, [name for known in found.values() for name in known], "recipe", "recipes")
    for command, known in found.items():
        shown = {name: path for name, path in known.items() if name in chosen}
        if shown:
            print(f"odconv {command} --config")
        for name, path in shown.items():
            with path.open(encoding="utf-8") as file:  # the first line says what it is
                print(f"  {name:{max(map(len, known))}}  {file.readline().removeprefix('#').strip()}")
    return chosen


def _matching(patterns: Sequence[str], names: Sequence[str], what: str, command: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"there is no {what} {pattern!r}; `odconv {command}` lists all")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
