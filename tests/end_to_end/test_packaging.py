"""What is installed from a wheel is everything that is here, under its right name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from chat_model import save
from processes import ROOT

PACKAGES = ("model", "training", "inference", "configs", "scripts")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as a release is, but without fetching setuptools anew."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy_of_tree(out))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def copy_of_tree(out: Path) -> Path:
    """Only what a wheel is made of, so that no leftover in build/ can get in."""
    tree = out / "tree"
    for name in wanted_files() | {"pyproject.toml", "LICENSE", "README.md"}:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    return tree


def wanted_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {f"headstart/{name}" for name in wanted_files()}
    assert any(name.endswith(".jsonl") for name in inside)


@pytest.mark.slow
def test_the_wheel_has_its_command_and_licence(wheel: zipfile.ZipFile) -> None:
    meta = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    scripts = wheel.read(meta["entry_points.txt"]).decode()
    assert "headstart = headstart.scripts.cli:main" in scripts
    assert b"Apache License" in wheel.read(meta["LICENSE"])
    described = wheel.read(meta["METADATA"]).decode()
    for extra in ("cluster", "dev", "serve"):
        assert f"Provides-Extra: {extra}" in described


@pytest.mark.slow
def test_the_wheel_runs_the_demo_outside_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    target = save(tmp_path / "target", context=2048)
    inside = f"""
import headstart.scripts.cli as cli
assert cli.__file__.startswith({str(tmp_path / "site")!r}), cli.__file__
cli.main()
"""
    small = ["--prompts", "8", "--heldout", "2", "--max-new-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-c", inside, "demo", "--target", str(target), *small],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "outputs" / "demo" / "results.json").read_text())["results"]
    assert results["new head"]["identical"] == results["new head"]["prompts"] == 2
