"""A fused checkpoint as two GGUF files for llama.cpp, written by llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from headstart.model.checkpoint.atomic import atomic_folder
from headstart.model.checkpoint.download import HEADS
from headstart.model.checkpoint.engine_config import inconvertible, launch_line
from headstart.model.checkpoint.head import build_head, load_fused, read_head_file
from headstart.model.target.gguf import SUFFIX

from .vllm_sglang import fused_root, refuse_other_ends

CONVERTER = "convert_hf_to_gguf.py"
TARGET, HEAD = f"target{SUFFIX}", f"head{SUFFIX}"

Precision = Literal["auto", "f32", "f16", "bf16", "q8_0"]


def export_gguf(
    folder: str | Path,
    out: str | Path,
    source: Path,
    precision: Precision = "auto",
    verifier: str | None = None,
) -> str:
    """Write the head and its target as GGUF files, both or none; returns the line that starts
    llama.cpp's server with them.

    folder: a fused checkpoint, here or on the Hub. source: llama.cpp's source code. precision: of
    the matrices; auto takes what they are stored in. verifier: a GGUF file of the target that is
    there already, whose place none takes. ValueError where llama.cpp would not draft as the head
    does.
    """
    converter = _converter(source)
    if verifier is not None and not (verifier.endswith(SUFFIX) and Path(verifier).is_file()):
        raise ValueError(
            f"--verifier {verifier} is no {SUFFIX} file. Name the one that llama.cpp is to serve, "
            "or leave it out to have the target converted too."
        )
    root = fused_root(folder, out)
    file = read_head_file(root)
    with torch.device("meta"):
        reason = inconvertible(build_head(file, root))
    if reason is not None:
        raise ValueError(
            f"llama.cpp cannot draft with the head in {root}: {reason}. Use `headstart serve`, or "
            "`headstart export` for another engine."
        )
    _, head = load_fused(root, device="cpu")  # it also says whether the two belong together
    refuse_other_ends(head)
    with atomic_folder(Path(out), HEAD) as part:
        if verifier is None:
            _convert(converter, root, part / TARGET, precision)
        _convert(converter, root / HEADS, part / HEAD, precision, "--target-model-dir", str(root))
    where = Path(out).resolve()
    served = where / TARGET if verifier is None else Path(verifier).resolve()
    return launch_line("llama.cpp", str(served), str(where / HEAD), file.meta.steps)


def _converter(source: Path) -> Path:
    converter = source / CONVERTER
    if not converter.is_file():
        raise ValueError(
            f"There is no {CONVERTER} in {source}. Name a folder with llama.cpp's source code: "
            "`git clone https://github.com/ggml-org/llama.cpp`, or what "
            "`python -m headstart.scripts.benchmarks.build_llama_cpp` unpacks."
        )
    if find_spec("sentencepiece") is None:
        raise ValueError(
            f"llama.cpp's {CONVERTER} needs a package that is not installed (sentencepiece). Run "
            "pip install 'headstart[llama-cpp]'."
        )
    return converter


def _convert(converter: Path, folder: Path, file: Path, precision: Precision, *more: str) -> None:
    options = ["--outfile", str(file), "--outtype", precision, *more]
    command = [sys.executable, str(converter), str(folder), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(
            f"llama.cpp's {CONVERTER} does not convert {folder}: {lines[-1]}. Try the llama.cpp of "
            "another day, or `headstart export` for another engine."
        )
