"""Commands as a user calls them, and objects as a file gives them back."""

from __future__ import annotations

import io
from typing import Any

import torch
from typer.testing import CliRunner, Result

from headstart.scripts.cli import app


def run(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if ok and result.exit_code:
        raise AssertionError(result.output) from result.exception
    return result


def refused(*arguments: object) -> str:
    """The message of a command that has to fail as a user's mistake: no traceback, status 2."""
    result = run(*arguments, ok=False)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("\u2502", " ").split())


def pickled(module: Any) -> Any:
    """Saved and loaded again."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
