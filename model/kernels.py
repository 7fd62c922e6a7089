"""What lies between matrix products, in C: see kernels.c.

It is built with the machine's C compiler at first use, in a second, and kept in the user's cache
folder. Where there is no compiler, PyTorch's operations do the same, which is also what tests
compare with.

    residual_norm   hidden += product;  out = norm(hidden)
    rotate_store    queries and keys normed (if the model does) and turned, keys and values stored
    attend          softmax attention
    convert         rows as the next product takes them
    combine         what a product of digits stands for
    gate            silu(first half) * second half
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

from .files import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
# The last three let sums be computed several columns at once. They stay the same from row to row.
FLAGS = "-O3 -std=c11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS += " -fassociative-math"
ATTEMPTS = ("-march=native -fopenmp", "-march=native", "")  # Apple's compiler has no OpenMP
COMPILERS = ("cc", "gcc", "clang")

FLOAT32, BFLOAT16, DIGITS = range(3)  # the kinds of rows
NOTHING = (None, FLOAT32, None, None)  # no rows to read
LONG = 64  # new rows of a text, from which PyTorch's attention is faster
_I, _P, _D = ctypes.c_long, ctypes.c_void_p, ctypes.c_double
SIGNATURES = {
    "residual_norm": [_I, _I, _P, _P, _I, _P, _P, _P, _D, _P, _I, _P],
    "rotate_store": [_I] * 5 + [_P, _I, _P, _P, _P, _P, _D] + [_P] * 5 + [_I] * 3 + [_P],
    "attend": [_I] * 6 + [_P] * 3 + [_I] * 3 + [_P, _D, _P],
    "convert": [_I, _I, _P, _P, _I, _P],
    "combine": [_I, _I, _P, _P, _P, _P],
    "gate": [_I, _I, _P, _I, _P, _P, _P, _I, _P],
}


@cache
def library(exact: bool) -> ctypes.CDLL | None:
    """The functions of kernels.c, with attention in float64 if `exact`, else in float32. None, with
    a warning, where they cannot be built."""
    try:
        built = ctypes.CDLL(str(_build("-DEXACT" if exact else "-DFAST")))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            "Steps on this CPU take up to twice as long, because kernels.c cannot be built: "
            f"{error} Install a C compiler (gcc or clang), or name one in the variable CC.",
            stacklevel=2,
        )
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, None
    return built


def _build(variant: str) -> Path:
    """The compiled library, from the cache if this machine has built it before."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler.")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    flags = [*FLAGS.split(), variant]
    about = [SOURCE.read_bytes(), " ".join(flags).encode(), version, _processor().encode()]
    digest = hashlib.sha256(b"\0".join(about)).hexdigest()[:16]
    target = cache_folder() / "kernels" / f"{digest}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for extra in ATTEMPTS:
            command = [compiler, *flags, *extra.split(), str(SOURCE), "-o", str(made), "-lm"]
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
