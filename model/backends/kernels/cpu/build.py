"""Build the kernels in C with the machine's compiler, at first use, in a second or two.

The library is kept in the user's cache folder. functions.py says what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

from headstart.model.paths import cache_folder

SOURCES = Path(__file__).parent
# The last three let sums be vectorised. They stay the same from row to row.
FLAGS = "-O3 -std=c11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS += " -fassociative-math"
COARSE, FINE = 63, 64  # levels of an activation to each side, and in each of them: int8.py
GROUP = 4  # inputs that one instruction sums
FLAGS += f" -DCOARSE={COARSE} -DFINE={FINE} -DGROUP={GROUP}"
ATTEMPTS = ("-march=native -fopenmp", "-march=native", "")  # Apple's compiler has no OpenMP
COMPILERS = ("cc", "gcc", "clang")


@cache
def kernel_hash() -> str:
    """Hash of the sources and of the processor that they are built for."""
    parts = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    parts += [one.encode() for one in (FLAGS, *ATTEMPTS, _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def open_library() -> ctypes.CDLL:
    """Open the library, from the cache folder if this machine has built it before.

    OSError, RuntimeError or subprocess.SubprocessError where it cannot be built.
    """
    built = cache_folder() / "kernels" / f"{kernel_hash()}.so"
    if built.is_file():
        try:
            return ctypes.CDLL(str(built))
        except OSError:  # damaged
            built.unlink(missing_ok=True)
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=built.parent)
    except OSError:  # a cache that cannot be written to: built for this process only
        return ctypes.CDLL(str(_build(Path(tempfile.mkdtemp()) / built.name)))
    try:
        _build(Path(folder) / built.name).replace(built)  # whole, whoever else builds it now
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ctypes.CDLL(str(built))


def _build(target: Path) -> Path:
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [*filter(None, map(shutil.which, COMPILERS))][:1]
    if not compiler:
        raise RuntimeError("there is no C compiler.")
    files = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    for extra in ATTEMPTS:
        flags = [*FLAGS.split(), *extra.split()]
        command = [*compiler, *flags, *files, "-o", str(target), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            if extra != ATTEMPTS[0]:
                warnings.warn(
                    f"{compiler[0]} does not know {ATTEMPTS[0]}, so its kernels use "
                    f"{extra or 'neither'}: slower than they could be. gcc, or clang with libomp, "
                    "knows both.",
                    stacklevel=2,
                )
            return target
    raise RuntimeError(f"{compiler[0]} failed with: {done.stderr.strip()[-500:]}.")


def _processor() -> str:
    """What the machine code is made for: a cache folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([sys.platform, platform.machine(), platform.processor(), *features[:2]])
