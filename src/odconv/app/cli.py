"""The command `odconv`: a table of commands; what a command needs is imported when it is called."""

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from odconv import __version__
from odconv.app.commands.listing import RECIPES, find_recipes
from odconv.system.text import printable, suggest


class Command(NamedTuple):
    """A command: "module:function", and what it does."""

    target: str
    purpose: str


COMMANDS = {
    "models": Command("odconv.app.commands.listing:models", "list the networks"),
    "recipes": Command("odconv.app.commands.listing:recipes", "list the recipes"),
    "train": Command("odconv.app.classify:train", "train a network on images"),
    "evaluate": Command("odconv.app.classify:evaluate", "measure the accuracy of a checkpoint"),
    "predict": Command("odconv.app.predict:predict", "classify images"),
    "demo": Command("odconv.app.demo:demo", "show a static and a dynamic network on your images, in a browser"),
    "report": Command("odconv.app.commands.report:report", "write report.html to the folders of runs"),
    "compare": Command("odconv.app.pages.reports:compare", "compare runs: a table and their curves"),
    "visualize": Command("odconv.app.commands.visualize:visualize", "show what is dynamic in a network"),
    "export": Command("odconv.app.commands.export:export", "export a network: ONNX, torch.export or AOTInductor"),
    "release": Command("odconv.app.commands.release:release", "turn a run into a small folder of weights, for others"),
    "profile": Command("odconv.app.commands.profile:profile_networks", "count multiply-adds and measure latency"),
    "detect train": Command("odconv.app.detect:train", "train a detector on data in COCO's format"),
    "detect evaluate": Command("odconv.app.detect:evaluate", "measure the average precision of a detector"),
    "detect predict": Command("odconv.app.detect:predict", "detect objects on images and draw them"),
    "detect export": Command("odconv.app.commands.export:export_backbone", "export a detector's backbone and pyramid"),
    "sort-val": Command("odconv.app.data:sort_validation", "sort ImageNet's flat validation folder into classes"),
    "pack": Command("odconv.app.data.pack:pack", "pack a folder of images into shards"),
    "index": Command("odconv.app.data.index_shards:index_shards", "index shards that another tool packed"),
    "completion": Command("odconv.app.completion:completion", "print a script that completes commands in a shell"),
}

USAGE = """usage: odconv COMMAND [options]

commands:
{commands}

options:
  --help     this text; odconv COMMAND --help lists the options of a command
  --version  the version
  --debug    after an error, show where it arose"""


PLAIN = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""Errors that are raised on purpose, in plain words."""


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process.

    Returns:
        Exit status: 0, 1 after an error, 2 for a command line that cannot be understood, 130 after Ctrl-C, 141
        where nobody reads on.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        _run([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")  # torchrun starts several processes, which mostly fail alike
        print(
            f"odconv: error{f' in process {rank}' if rank != '0' else ''}: {printable(_explain(error))}",
            file=sys.stderr,
        )
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _run(arguments: list[str]) -> None:
    name, *options = arguments or ["--help"]
    if name == "detect" and options[:1] not in ([], ["--help"], ["-h"]):
        name, *options = f"{name} {options[0]}", *options[1:]
    if name in ("--help", "-h", "detect"):
        shown = {other: command for other, command in COMMANDS.items() if name != "detect" or other.startswith(name)}
        print(USAGE.format(commands="\n".join(f"  {name:15} {command.purpose}" for name, command in shown.items())))
    elif name == "--version":
        print(f"odconv {__version__}")
    elif name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{suggest(name, COMMANDS)}; odconv --help lists all")
    else:
        command = find_command(name)
        command(**parse_options(name, command, options))


def find_command(name: str) -> Callable[..., Any]:
    """Return the function of a command."""
    module, _, function = COMMANDS[name].target.partition(":")
    return getattr(importlib.import_module(module), function)


def make_parser(name: str, function: Callable[..., Any]) -> Any:
    """Return a parser of a command's options: the parameters of its function, those before a `*` as positional."""
    import docstring_parser
    import jsonargparse

    class Recipe(jsonargparse.ActionConfigFile):  # type: ignore[name-defined]
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            super().__call__(parser, cfg, _find_recipe(values, name), option_string)

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    docs = docstring_parser.parse(function.__doc__ or "")
    parser = jsonargparse.ArgumentParser(
        prog=f"odconv {name}", description=docs.short_description, exit_on_error=False, allow_abbrev=False
    )
    if name in RECIPES:
        parser.add_argument("--config", action=Recipe, help="Recipe: a YAML file of options, or the name of one here.")
    help_texts = {param.arg_name: param.description for param in docs.params}
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for parameter in positional:  # each a list of words
        many = {"nargs": "+"} if parameter.default is parameter.empty else {"nargs": "*", "default": parameter.default}
        parser.add_argument(parameter.name, help=help_texts[parameter.name], **many)
    if len(positional) < len(parameters):  # not in vain: it looks for the function in odconv too, which imports PyTorch
        parser.add_function_arguments(function, as_group=False, skip={parameter.name for parameter in positional})
    for action in parser._actions:
        if _is_switch(action):
            action.nargs = "?"  # in the help; _arrange adds the value
    return parser


def _is_switch(action: Any) -> bool:
    """Return whether an option is true or false, or one of these where nothing says which."""
    hint = getattr(action, "_typehint", None)
    return isinstance(action.default, bool) or {*get_args(hint)} == {bool, NoneType}


def parse_options(name: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """Read the options of a command, see :func:`make_parser`."""
    import jsonargparse

    parser = make_parser(name, function)
    switches = [action for action in parser._actions if _is_switch(action)]
    switch_names = {name for action in switches for name in action.option_strings}
    try:
        options = parser.parse_args(_arrange(arguments, switch_names, name in RECIPES)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UsageError(_clear(str(error), parser._actions, name in RECIPES)) from error
    options.pop("config", None)
    return options


def _arrange(arguments: Sequence[str], switches: Collection[str], recipes: bool) -> list[str]:
    """Put recipes first, for all other options to override them, and "=true" behind a switch without a value."""
    first: list[str] = []
    if recipes:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config", action="append", default=[])
        found, arguments = parser.parse_known_args(arguments)
        first = [f"--config={recipe}" for recipe in found.config]
    values = ("true", "false", "null")
    pairs = pairwise([*arguments, ""])
    return first + [f"{word}=true" if word in switches and after not in values else word for word, after in pairs]


def _find_recipe(name: str, command: str) -> str:
    """Return the path of a recipe: a file, or else one that comes with odconv for a command."""
    import yaml

    if Path(name).is_file():
        try:
            options = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"the recipe {name} is no YAML: {' '.join(str(error).split())}") from error
        if not options or not isinstance(options, dict):
            raise ValueError(f"the recipe {name} holds no options, such as lr: 0.1")
        return name
    recipes = find_recipes(command)
    if name not in recipes:
        others = [other for other in RECIPES if name in find_recipes(other)]
        hint = f"; it is one of odconv {others[0]}" if others else suggest(Path(name).stem, recipes)
        raise FileNotFoundError(f"odconv {command} has neither a file nor a recipe {name!r}{hint}")
    return str(recipes[name])


def _clear(message: str, actions: Iterable[Any], recipes: bool) -> str:
    """Put a message of jsonargparse, which has nothing but its text, in plain words."""
    known = {action.dest: action for action in actions}
    flags = {name: (action.option_strings or [name])[-1] for name, action in known.items()}
    if found := re.search(r"Option '(\S+)' is not accepted", message):  # in a recipe
        return f"unknown option {found[1]!r}{suggest(found[1], known)}"
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return f"unknown option {found[1]}{suggest(found[1], flags.values())}"
    if found := re.search(r"arguments are required: (.+)", message):
        hint = "; a recipe may have them: --config NAME (odconv recipes lists them)" if recipes else ""
        return f"missing: {', '.join(flags[name] for name in found[1].split(', '))}{hint}"
    if found := re.search(r"argument (\S+): expected one argument", message):
        return f"{found[1]} needs a value"
    if found := re.search(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL):
        name, value = found.groups()
        hint = known[name]._typehint
        return f"{name} must be {_allowed(hint)}, got {value}{suggest(value, choices(hint))}"
    return " ".join(message.split())


KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", ""),
    str: ("a word", "words"),
    dict: ("a mapping, such as {name: value}", ""),
}
"""How types are called, one and several."""


def _allowed(hint: Any) -> str:
    """Say what values a type has: "a whole number or auto"."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return f"{', '.join(parts[:-1])} or {parts[-1]}" if parts[1:] else str(parts[0])
    if kind is Sequence:
        return f"a list of {KINDS[parts[0]][1]} in brackets"
    if kind in KINDS:
        return KINDS[kind][0]
    return " or ".join(_allowed(part) for part in parts if part is not NoneType)


def choices(hint: Any) -> Iterable[str]:
    """Return the words that a type allows."""
    return get_args(hint) if get_origin(hint) is Literal else chain.from_iterable(map(choices, get_args(hint)))


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("odconv"):
        extra = "detect" if error.name == "faster_coco_eval" else "train"
        return f"{error}; the command line needs more packages: pip install 'odconv[{extra}]'"
    if isinstance(error, PLAIN):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"
