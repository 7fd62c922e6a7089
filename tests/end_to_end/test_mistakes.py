"""Errors of users and of the system end in a message, never in a traceback."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from chat_model import save
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target
from headstart.scripts import console
from headstart.scripts.cli import app
from headstart.scripts.options.prompts import read_prompts

pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("target"), context=128)


@pytest.fixture(scope="module")
def fused(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    opened = load_target(target)
    save_head(make_head(opened, "mtp", {}), folder / "head", HeadMeta(target=opened.name))
    fuse(str(target), folder / "head", folder / "fused")
    return folder / "fused"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    return result.output


def prompt_file(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_messages_without_a_user_are_named(tmp_path):
    path = prompt_file(tmp_path / "p.jsonl", {"messages": [{"role": "system", "content": "x"}]})
    with pytest.raises(ValueError, match=r"p\.jsonl:1 has no user message"):
        read_prompts([str(path)])


@pytest.mark.parametrize("line", ["{oops\n", '{"prompt": " "}\n'])
def test_the_advice_on_broken_lines_fits_the_command(line, target, fused, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    message = refused("data", path, "--target", target, "--out", tmp_path / "o.jsonl")
    assert "p.jsonl:1" in message and "--skip-broken" in message and "data." not in message
    message = refused("eval", fused, "--prompts", path)
    assert "p.jsonl:1" in message and "Fix or remove" in message and "skip" not in message


def test_eval_names_a_prompt_without_room_before_it_decodes(fused, tmp_path, monkeypatch):
    from headstart.inference.benchmark import runner

    monkeypatch.setattr(runner, "run_benchmark", lambda *_, **__: pytest.fail("it decoded"))
    values = [{"id": "short", "prompt": "a"}, {"id": "[b]long", "prompt": "a" * 200}]
    message = refused("eval", fused, "--prompts", prompt_file(tmp_path / "p.jsonl", *values))
    assert "'[b]long'" in message and "is 128" in message


def test_eval_creates_the_folder_of_its_metrics(fused, tmp_path):
    prompts = prompt_file(tmp_path / "p.jsonl", {"prompt": "a"})
    out = tmp_path / "new" / "deep" / "metrics.json"
    settings = ("--prompts", prompts, "--max-new-tokens", 4)
    result = run("eval", fused, *settings, "--out", out)
    assert result.exit_code == 0, result.output
    assert list(out.parent.iterdir()) == [out] and "results" in json.loads(out.read_text())
    assert "is a folder" in refused("eval", fused, *settings, "--out", tmp_path)


def test_explain_prints_lists_as_they_are(tmp_path):
    for paths in ("[/x/a.jsonl,/x/b.jsonl]", "[red,bold]"):
        result = run("train", "demo", f"data.path={paths}", "--explain")
        assert result.exit_code == 0, result.output
        assert f"path: {paths.replace(',', ', ')}" in result.output


def test_names_are_printed_as_they_are(capsys):
    console.show("[/x/a.jsonl] [bold]b[/]")
    assert capsys.readouterr().out == "[/x/a.jsonl] [bold]b[/]\n"


def test_an_empty_folder_is_not_this_one(fused, monkeypatch):
    monkeypatch.chdir(fused)
    assert "first argument is empty" in refused("generate", "", "hello")
    assert "first argument is empty" in refused("generate", "")


@pytest.mark.parametrize("value", [0, -0.5, 1.5])
def test_top_p_out_of_range(value, tmp_path):
    for command in (["generate", "x"], ["data", "x", "--target", "y", "--out", tmp_path / "o"]):
        message = " ".join(refused(*command, "--top-p", value).replace("\u2502", " ").split())
        assert "is out of range" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left"), "disk is full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk is full"),
        (SafetensorError("I/O error: No space left (os error 28)"), "disk is full"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "A part of the path"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "remove the existing one"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "permissions"),
        (OSError(errno.EIO, "Input/output error"), "Check the path, the disk"),
        (FileNotFoundError("a message of ours"), "a message of ours"),
    ],
)
def test_errors_of_the_system(error, advice, capsys):
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        console.friendly(command)()
    assert stop.value.code == 2 and advice in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("x"), SafetensorError("header too large")])
def test_bugs_keep_their_traceback(error):
    def command() -> None:
        raise error

    with pytest.raises(type(error)):
        console.friendly(command)()


def test_ctrl_c_reports_what_was_kept(capsys):
    def command() -> None:
        raise KeyboardInterrupt

    for stopped in (console.UNCHANGED, console.KEPT):
        with pytest.raises(SystemExit) as stop:
            console.friendly(command, stopped)()
        assert stop.value.code == 130 and stopped in capsys.readouterr().err
