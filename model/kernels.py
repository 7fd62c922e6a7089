"""The functions in C that a CPU reads and drafts with: see the folder c/.

They are built with the machine's C compiler at first use, in a second or two, and kept in the
user's cache folder. Where there is no compiler, PyTorch's operations do the same, which is also
what tests compare with; only 8-bit integers need them.

    residual_norm   hidden += product;  out = norm(hidden)
    rotate_store    queries and keys normed (if the model does) and turned, keys and values stored
    attend          softmax attention; attend_exactly: with sums in float64
    gate            silu(first half) * second half
    convert         rows as a product takes them
    multiply        a product of digits, with weights from `pack`
    likeliest       the place of the largest number of each row
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from .files import cache_folder

SOURCES = Path(__file__).parent / "c"
# The last three let sums be computed several columns at once. They stay the same from row to row.
FLAGS = "-O3 -std=c11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS += " -fassociative-math"
COARSE, FINE = 63, 64  # steps of an activation to each side, and in each of them: see quantized.py
GROUP = 4  # inputs that one instruction adds up
FLAGS += f" -DCOARSE={COARSE} -DFINE={FINE} -DGROUP={GROUP}"
ATTEMPTS = ("-march=native -fopenmp", "-march=native", "")  # Apple's compiler has no OpenMP
COMPILERS = ("cc", "gcc", "clang")

FLOAT32, BFLOAT16, DIGITS = range(3)  # the kinds of rows
NOTHING = (None, FLOAT32)  # no rows to read
LONG = 64  # new rows of a text, from which PyTorch's attention is faster
_N, _P, _K, _D = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_double
_ATTEND = [*[_N] * 6, *[_P] * 3, _K, _N, _N, _P, _D, _P]
SIGNATURES: dict[str, list[Any]] = {
    "residual_norm": [_N, _N, _P, _P, _K, _P, _D, _P, _K, _P],
    "rotate_store": [*[_N] * 5, _P, _K, _P, _P, _D, *[_P] * 5, _K, _N, _N, _P],
    "attend": _ATTEND,
    "attend_exactly": _ATTEND,
    "gate": [_N, _N, _P, _K, _P, _K, _P],
    "convert": [_N, _N, _P, _P, _K, _P],
    "multiply": [_N, _N, _N, *[_P] * 7],
    "pack": [_N, _N, _P, _P, _P],
    "packed_outputs": [_N],
    "likeliest": [_N, _N, _P, _P],
}


@cache
def library() -> ctypes.CDLL | None:
    """The functions in C. None, with a warning, where they cannot be built."""
    try:
        built = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            "Steps on this CPU take up to twice as long, because the functions in C cannot be "
            f"built: {error} Install a C compiler (gcc or clang), or name one in the variable CC.",
            stacklevel=2,
        )
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, None
    built.packed_outputs.restype = _N
    return built


def _build() -> Path:
    """The compiled library, from the cache if this machine has built it before."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler.")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    about = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
    about += [FLAGS.encode(), *map(str.encode, ATTEMPTS), version, _processor().encode()]
    digest = hashlib.sha256(b"\0".join(about)).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"{digest}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for extra in ATTEMPTS:
            command = [compiler, *FLAGS.split(), *extra.split(), *files, "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                made.replace(target)
                return target
    raise RuntimeError(f"{compiler} failed with: {done.stderr.strip()[-500:]}.")


def _processor() -> str:
    """What the machine code is made for: a cache folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([sys.platform, platform.machine(), platform.processor(), *features[:2]])
