"""The command `odconv completion`: a script by which a shell completes, without starting Python."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from odconv.app.cli import COMMANDS, choices, find_command, make_parser
from odconv.app.commands.listing import RECIPES, find_recipes
from odconv.app.engine.config import LOGGERS
from odconv.models.zoo import NAMES
from odconv.system.packages import needed_by
from odconv.system.text import suggest

SHELLS = ("bash", "zsh", "fish")


def completion(shell: Sequence[str]) -> str:
    """Print a script that completes commands, options and their values in a shell.

    Args:
        shell: bash, zsh or fish.
    """
    if len(shell) != 1 or shell[0] not in SHELLS:
        words = " ".join(shell)
        raise ValueError(f"shell must be one of {', '.join(SHELLS)}, got {words!r}{suggest(words, SHELLS)}")
    with needed_by("odconv completion", "shtab"):
        import shtab
    script = shtab.complete(_whole(shtab.FILE), shell[0])
    print(script)
    return script


def _whole(file: Any) -> argparse.ArgumentParser:
    """Return one parser of all commands, of argparse alone, as shtab reads it; `file` marks names of files."""
    whole = argparse.ArgumentParser("odconv")
    for option, text in (("--version", "show the version"), ("--debug", "after an error, show where it arose")):
        whole.add_argument(option, action="store_true", help=text)
    groups = {"": whole.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:  # detect
            groups[group] = groups[""].add_parser(group, help=f"{group} ...").add_subparsers()
        parser = groups[group].add_parser(last, help=command.purpose)
        for action in make_parser(name, find_command(name))._actions:
            if "--help" not in action.option_strings and action.help != argparse.SUPPRESS:
                _copy(action, parser, name, file)
    return whole


def _copy(action: Any, parser: argparse.ArgumentParser, command: str, file: Any) -> None:
    """Add an option to a parser, with the words that its value may be; other values may be names of files."""
    names = [name for name in action.option_strings if not name.endswith("+")] or [action.dest]
    words, hint = _words(action, command), getattr(action, "_typehint", str)
    copied = parser.add_argument(*names, nargs=action.nargs, help=action.help, choices=words or None)
    if not words and str in (hint, *get_args(hint)):
        copied.complete = file  # type: ignore[attr-defined]


def _words(action: Any, command: str) -> Sequence[str]:
    recipes = [recipe for name in RECIPES if command in (name, "recipes") for recipe in find_recipes(name)]
    known: dict[str, Sequence[str]] = {
        "config": recipes,
        "arch": NAMES,
        "names": NAMES,
        "patterns": recipes or NAMES,
        "logger": (*LOGGERS, "none"),
        "shell": SHELLS,
    }
    if isinstance(action.default, bool):
        return ("true", "false")
    return known.get(action.dest) or [*choices(getattr(action, "_typehint", None))]
