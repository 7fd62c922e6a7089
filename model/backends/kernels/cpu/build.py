"""The functions in C that a CPU reads and drafts with: see the files in C beside this one.

They are built with the machine's C compiler at first use, in a second or two, and kept in the
user's cache folder. Where there is no compiler, PyTorch's operations do the same, which is also
what tests compare with; only 8-bit integers need them.

    residual_norm   hidden += product;  out = norm(hidden)
    rotate_store    queries and keys normed (if the model does) and turned, keys and values stored
    attend          softmax attention; attend_exactly: with sums in float64
    gate            silu(first half) * second half
    convert         rows as a product takes them
    multiply        a product of digits, with weights from `pack`
    multiply_halves a product in bfloat16, with weights from `pack_halves`
    likeliest       the place of the largest number of each row
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
from typing import Any

from headstart.model.paths import cache_folder

SOURCES = Path(__file__).parent
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
    "multiply_halves": [_N, _N, _N, *[_P] * 4],
    "pack_halves": [_N, _N, _P, _P],
    "packed_halves": [_N],
    "likeliest": [_N, _N, _P, _P],
}


@cache
def functions() -> ctypes.CDLL | None:
    """The functions in C. None, with a warning, where they cannot be built."""
    try:
        built = _opened()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            "Steps and drafts on this CPU take two to three times as long, because the functions "
            f"in C cannot be built: {error} Install a C compiler (gcc or clang), or name one in "
            "the variable CC.",
            stacklevel=2,
        )
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, None
    built.packed_outputs.restype = built.packed_halves.restype = _N
    return built


@cache
def digest() -> str:
    """Of the functions in C and of the processor that they are built for."""
    parts = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    parts += [one.encode() for one in (FLAGS, *ATTEMPTS, _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _opened() -> ctypes.CDLL:
    """From the cache folder, if this machine has built it before."""
    built = cache_folder() / "kernels" / f"{digest()}.so"
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
                    f"{compiler[0]} does not know {ATTEMPTS[0]}, so the functions in C use "
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
