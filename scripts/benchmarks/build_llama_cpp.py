"""Build llama.cpp's server and quantiser, next to its converter.

    python -m headstart.scripts.benchmarks.build_llama_cpp FOLDER

The source code comes from the source package of llama-cpp-python on PyPI. Needs cmake, a C++
compiler and about six minutes on two cores. The last line printed is the folder of the source code,
for --llama-cpp; the programs are in its build/bin.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import friendly, show

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"  # of 2026-10
TARGETS = ("llama-server", "llama-quantize")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def build_llama_cpp(
    folder: Annotated[Path, typer.Argument(help="New folder for source code and programs.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Parallel compiler processes (default: all cores).")
    ] = None,
) -> None:
    """Download, unpack and build; an interrupted build resumes."""
    if shutil.which("cmake") is None:
        raise ValueError("llama.cpp is built with cmake, which is not installed. Install it first.")
    source = folder / "llama.cpp"
    if not source.is_dir():
        with tempfile.TemporaryDirectory() as place:
            _unpack(_download(place), source)
    build = source / "build"
    _run(["cmake", "-S", str(source), "-B", str(build), *OPTIONS], "configuring")
    count = str(jobs or os.cpu_count() or 1)
    _run(["cmake", "--build", str(build), "-j", count, "--target", *TARGETS], "building")
    show(str(source.resolve()))


def _download(place: str) -> Path:
    """Download the source package."""
    source = ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "--dest", place]
    _run([sys.executable, "-m", "pip", "download", *source], "downloading")
    return next(Path(place).glob("*.tar.gz"))


def _unpack(package: Path, source: Path) -> None:
    """Extract llama.cpp from the package, atomically."""
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source.parent) as part:
        with tarfile.open(package) as archive:
            archive.extractall(part, filter="data")
        next(Path(part).glob("*/vendor/llama.cpp")).rename(source)


def _run(command: Sequence[str], what: str) -> None:
    show(f"{what}: {' '.join(command)}")
    if subprocess.run(command).returncode:
        raise ValueError(f"{what.capitalize()} failed; see the lines above.")


if __name__ == "__main__":
    typer.run(friendly(build_llama_cpp))
