"""`headstart export`: write the head of a fused checkpoint in the format of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.scripts.console import show
from headstart.scripts.options.parse import OutType


def export(
    folder: Annotated[Path, typer.Argument(help="Fused checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Literal["vllm", "sglang", "llama.cpp"],
        typer.Option(help="Engine that will serve the head."),
    ],
    format_: Annotated[
        Literal["native", "speculators"],
        typer.Option("--format", help="native: for vLLM and SGLang; speculators: for vLLM."),
    ] = "native",
    verifier: Annotated[
        str | None,
        typer.Option(help="Target that the engine serves (default: FOLDER)."),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="Folder of llama.cpp's source code, which has the converter."),
    ] = None,
    outtype: Annotated[
        OutType, typer.Option(help="Precision of the GGUF files; auto keeps the stored one.")
    ] = "auto",
) -> None:
    """Write the head alone, and print the command that starts the engine with it."""
    if to != "llama.cpp":
        from headstart.model.export.vllm_sglang import export as write

        if llama_cpp is not None or outtype != "auto":
            raise ValueError("--llama-cpp and --outtype belong to --to llama.cpp.")
        show(write(folder, out, to, format_, verifier))
        return
    from headstart.model.export.llama_cpp import export_gguf

    if llama_cpp is None or format_ != "native":
        raise ValueError(
            "--to llama.cpp needs --llama-cpp FOLDER, the folder of llama.cpp's source code, whose "
            "converter writes the GGUF files; it takes no --format."
        )
    show(export_gguf(folder, out, llama_cpp, outtype, verifier))
