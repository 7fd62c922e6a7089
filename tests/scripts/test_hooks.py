"""The hooks for git find their tools, whether or not the virtual environment is activated."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_names_its_tool_in_the_environment(hook: dict[str, str]) -> None:
    tool = hook["entry"].split()[0]
    assert Path(tool).parent == Path(".venv/bin")
    assert shutil.which(Path(tool).name, path=str(Path(sys.executable).parent))
