"""What the documents name exists: files, links, modules, commands with their options, settings."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from processes import ROOT

from headstart.model.heads.common.base import head_class, kinds
from headstart.scripts.cli import app
from headstart.training.config.schema import Recipe

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = "model|training|inference|scripts|configs|tests|docs"
PATH = re.compile(rf"(?<![\w/.])(?:{TOP})/[\w./-]*\w/?")
MODULE = re.compile(r"headstart(?:\.\w+)+")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
COMMAND = re.compile(r"headstart (?=[a-z])([^\n`|#&]+)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][\w-]*)")
SETTING = re.compile(rf"\b({'|'.join(Recipe.model_fields)})\.(\w+(?:\.\w+)?)=")
# Options of torchrun, accelerate, SLURM, hf and vLLM.
FOREIGN = {"--nproc-per-node", "--config_file", "--nodes", "--local-dir"} | {
    "--speculative-config",
    "--enforce-eager",
}

each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)


def text(path: Path) -> str:
    """A document, with continued command lines joined."""
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


@each_document
def test_files_links_and_modules_exist(path: Path) -> None:
    missing = [
        named
        for named in PATH.findall(text(path))
        if not (ROOT / named).exists() and "NAME" not in named
    ]
    missing += [to for to in LINK.findall(text(path)) if not (path.parent / to).exists()]
    missing += [one for one in MODULE.findall(text(path)) if not is_module(one)]
    assert not missing


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent does not exist
        return False


def commands(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Every command line in a document, and the options that its command has."""
    root: Any = typer.main.get_command(app)
    for line in COMMAND.findall(text(path)):
        words, command = line.split(), root
        while hasattr(command, "commands"):
            name = words.pop(0).rstrip(",.:;)")
            assert name in command.commands, f"{path.name}: no command {name!r} in {line!r}"
            command = command.commands[name]
        yield line, options_of(command)


def options_of(command: Any) -> set[str]:
    """The options of a command, or of all commands of a group."""
    inner = getattr(command, "commands", {}).values()
    own = {name for option in command.params for name in option.opts}
    return {"--help"} | own.union(*map(options_of, inner))


@each_document
def test_commands_have_their_options(path: Path) -> None:
    missing = [
        f"{option} in {line!r}"
        for line, known in commands(path)
        for option in OPTION.findall(line)
        if option not in known
    ]
    assert not missing


@each_document
def test_every_option_exists_somewhere(path: Path) -> None:
    known = FOREIGN | options_of(typer.main.get_command(app))
    scripts = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "scripts" / "benchmarks").glob("*.py")
    )
    missing = {
        option
        for option in OPTION.findall(text(path))
        if option not in known and f"    {option[2:].replace('-', '_')}: " not in scripts
    }
    assert not missing


@each_document
def test_settings_exist(path: Path) -> None:
    missing: list[str] = []
    for section, key in SETTING.findall(text(path)):
        if section == "head":
            known = any(key in head_class(kind)[1].model_fields for kind in kinds())
        else:
            known = has_setting(Recipe, f"{section}.{key}")
        missing += [] if known else [f"{section}.{key}"]
    assert not missing


def has_setting(model: Any, key: str) -> bool:
    """Whether a recipe has a setting, by its full name."""
    name, _, rest = key.partition(".")
    field = getattr(model, "model_fields", {}).get(name)
    if field is None or not rest:
        return field is not None
    return any(has_setting(one, rest) for one in (field.annotation, *get_args(field.annotation)))


def test_the_rules_see_what_is_wrong() -> None:
    seen = [line for path in DOCS for line, _ in commands(path)]
    assert len(seen) > 20 and any(OPTION.findall(line) for line in seen)
    assert PATH.findall("see `model/nothing.py`") == ["model/nothing.py"]
    assert OPTION.findall("`--nothing 1`, ---, a--b") == ["--nothing"]
    assert SETTING.findall("train.nothing=1") == [("train", "nothing")]
    assert not is_module("headstart.model.nothing") and is_module("headstart.model.tree.tree")
    assert has_setting(Recipe, "train.wandb.project") and not has_setting(Recipe, "train.nothing")
