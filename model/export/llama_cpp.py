"""Export a fused checkpoint as two GGUF files, with llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from headstart.model.checkpoint.atomic import atomic_folder
from headstart.model.checkpoint.engine_support import support
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import build_head, read_head_file
from headstart.model.checkpoint.launch import launch_line
from headstart.model.checkpoint.layout import HEADS
from headstart.model.target.gguf import SUFFIX

from .vllm_sglang import check_embedding_and_lm_head, fused_root

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
    """Write the head and its target as GGUF files, atomically.

    folder: a fused checkpoint, as a folder or Hub id.
    out: the folder to write.
    source: folder with llama.cpp's source code.
    precision: of the matrices (auto: as they are stored).
    verifier: an existing GGUF file of the target, to be used instead of converting the target.

    Returns the command that starts llama.cpp's server with them. ValueError if llama.cpp would not
    draft the same tokens as the head.
    """
    converter = _converter(source)
    if verifier is not None and not (verifier.endswith(SUFFIX) and Path(verifier).is_file()):
        raise ValueError(
            f"--verifier {verifier} is not a {SUFFIX} file. Name the file that llama.cpp is to "
            "serve, or leave the option out to convert the target too."
        )
    root = fused_root(folder, out)
    file = read_head_file(root)
    with torch.device("meta"):
        reason = support(build_head(file, root), "llama.cpp")
    if reason is not None:
        raise ValueError(
            f"llama.cpp cannot draft with the head in {root}: {reason}. Use `headstart serve`, or "
            "`headstart export` for another engine."
        )
    _, head = load_fused(root, device="cpu")  # also checks that head and target fit
    check_embedding_and_lm_head(head)
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
            f"llama.cpp's {CONVERTER} needs the package sentencepiece, which is not installed. Run "
            "pip install 'headstart[llama-cpp]'."
        )
    return converter


def _convert(converter: Path, folder: Path, file: Path, precision: Precision, *more: str) -> None:
    options = ["--outfile", str(file), "--outtype", precision, *more]
    command = [sys.executable, str(converter), str(folder), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(
            f"llama.cpp's {CONVERTER} failed to convert {folder}: {lines[-1]}. Try another version "
            "of llama.cpp, or `headstart export` for another engine."
        )
