"""Set up the project's virtual environment, then run the demo or the tests in it.

    python scripts/bootstrap.py            only set up
    python scripts/bootstrap.py demo       set up, then `headstart demo`
    python scripts/bootstrap.py test       set up, then lint, types and tests

Standard library only, any system. A second run skips the set-up: a stamp in `.venv` records for
which pyproject.toml it was installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "headstart.json"

# Without a GPU: a CPU build of torch, from PyTorch's own index or from wherever pip is configured
# to look. Pinned, so that 2.13.0+cpu is preferred to PyPI's 2.13.0, which on Linux depends on
# gigabytes of CUDA libraries.
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PACKAGES = ("nvidia-", "cuda-")

INTERRUPTED = 130  # the shell's exit status for Ctrl-C

TESTS = (
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
    ["pytest"],
)


def main() -> None:
    commands = {"": [], "demo": [["headstart", "demo"]], "test": list(TESTS)}
    task = sys.argv[1] if len(sys.argv) > 1 else ""
    if task not in commands or len(sys.argv) > 2:
        sys.exit(__doc__)
    set_up()
    for command in commands[task]:
        print("+", *command, flush=True)
        tool = shutil.which(command[0], path=str(BIN))
        if tool is None:
            sys.exit(f"{command[0]} is missing in {VENV}. Remove that folder and run this again.")
        code = run(tool, *command[1:])
        if code:
            sys.exit(code)


def run(*command: str) -> int:
    """Run a command and return its exit status, also after Ctrl-C.

    The command gets the signal too and may need time to save; subprocess.run would kill it.
    """
    child = subprocess.Popen(command, cwd=ROOT)
    interrupted = False
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            interrupted = True
            continue
        return INTERRUPTED if interrupted else code


def set_up() -> None:
    """Bring `.venv` up to date with pyproject.toml and with the list of files."""
    wanted = {"pyproject": pyproject_hash(), "files": files_hash()}
    have = stamp() if runs(PYTHON) else {}
    if have == wanted:
        return
    began = time.monotonic()
    if have.get("pyproject") == wanted["pyproject"]:
        # The strict editable install links single files, so new ones have to be linked.
        install("--no-deps", "--no-build-isolation", "--editable", ".")
    else:
        make_venv()
        if not has_gpu() and not torch_version():
            install_cpu_torch()
        print("Installing headstart and its dependencies", flush=True)
        torch = torch_version()
        install("--editable", ".[dev]", *([f"torch=={torch}"] if torch else []))
    beside = STAMP.with_suffix(".part")
    beside.write_text(json.dumps(wanted))
    os.replace(beside, STAMP)
    print(f"Set up in {time.monotonic() - began:.0f} s: {VENV}", flush=True)


def stamp() -> dict[str, str]:
    """The hashes that `.venv` was set up for; empty if unknown or truncated."""
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def pyproject_hash() -> str:
    """A hash of pyproject.toml and of the project's path, as editable installs contain it."""
    text = (ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()
    return hashlib.sha256(text).hexdigest()


def files_hash() -> str:
    """A hash of the names of all files of the package."""
    folders = ("model", "training", "inference", "configs", "scripts")
    names = sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def runs(python: Path) -> bool:
    """Whether a Python runs and has pip: false for missing, incomplete or broken environments."""
    if not python.exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv() -> None:
    # pip's own message would not name a remedy.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            f"Headstart needs Python 3.11 or newer; this is {sys.version.split()[0]}. "
            "Name a newer one: make PYTHON=python3.12 demo"
        )
    if not runs(PYTHON):
        print(f"Creating {VENV}", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode:
            sys.exit(
                "The virtual environment could not be created (see above). "
                "On Debian and Ubuntu: apt install python3-venv"
            )
    install("pip>=23.1")  # the first that resolves from metadata alone, without downloading wheels


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, judged by its driver."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def torch_version() -> str:
    """The installed version, which is kept, so that another build (such as ROCm) can be installed
    by hand."""
    code = "from importlib.metadata import version; print(version('torch'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()


def install_cpu_torch() -> None:
    """Install torch without CUDA, or stop before anything large is downloaded."""
    source = ["--extra-index-url", CPU_INDEX] if reachable(f"{CPU_INDEX}/torch/") else []
    found = resolve(CPU_TORCH, *source)
    cuda = sorted(name for name in found if name.startswith(CUDA_PACKAGES))
    if cuda:
        sys.exit(
            f"No NVIDIA GPU was found, but pip offers only a CUDA build of {CPU_TORCH} "
            f"({len(cuda)} packages such as {cuda[0]}): {CPU_INDEX} could not be reached. "
            f"Nothing was installed. Install a CPU build into {VENV} by hand "
            f"({PYTHON} -m pip install <wheel>) and run this again."
        )
    print(f"No NVIDIA GPU here: installing torch {found['torch']} (CPU, about 200 MB)", flush=True)
    install("--no-deps", CPU_TORCH, *source)


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return True
    except OSError:
        return False


def resolve(*requirements: str) -> dict[str, str]:
    """Versions that pip would install for the requirements, by package name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip("--dry-run", "--ignore-installed", "--report", str(report), *requirements)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = [item["metadata"] for item in items]
    return {package["name"].lower(): package["version"] for package in packages}


def install(*arguments: str) -> None:
    pip("--config-settings", "editable_mode=strict", *arguments)


def pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    code = run(*command, *arguments)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        sys.exit("pip failed (see above). Check the network, then run the same command again.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
