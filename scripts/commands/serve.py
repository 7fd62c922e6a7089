"""`headstart serve`: a fused checkpoint behind OpenAI's API, on one machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.scripts.console import show
from headstart.scripts.options.quantize_report import QUANTIZE_HELP, tell_quantized
from headstart.scripts.options.tree_budget import HELP, check_budget, contestant

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Fused checkpoint (folder or Hub id), else the shipped one."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from elsewhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HEADSTART_API_KEY", help="Requests without it are refused."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model: default the folder's name.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: what the context leaves.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Prompt and answer. Default: the model's own.")
    ] = None,
    budget: Annotated[str | None, typer.Option(callback=check_budget, help=HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None,
    print_: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option("--print", help="Only print how this engine serves the checkpoint."),
    ] = None,
) -> None:
    """Answer /v1/chat/completions and /v1/completions, one request at a time."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    folder = folder or shipped_checkpoint()
    if print_ is not None:
        show(_line_of(print_, folder))
        return
    _check_extra()
    from headstart.inference.generate import SpeculativeModel
    from headstart.inference.serving.server import Settings, make_server

    model = SpeculativeModel.from_pretrained(folder, dtype=dtype, quantize=quantize)
    tell_quantized(model.target)
    settings = Settings(
        name=name or folder.resolve().name,
        host=host,
        port=port,
        key=api_key,
        queue=queue,
        context=context,
        max_tokens=max_tokens,
    )
    candidates = contestant(model.target, model.head, budget)
    make_server(
        model,
        candidates,
        settings,
        lambda address: show(f"{settings.name} answers at {address}/v1"),
    ).run()


def _line_of(engine: Literal["vllm", "sglang"], folder: Path) -> str:
    """The command that serves a fused checkpoint with another engine."""
    from headstart.model.checkpoint.download import hub_name
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.checkpoint.launch import launch_line
    from headstart.model.checkpoint.layout import HEADS
    from headstart.model.export.vllm_sglang import check_engine_support

    if hub_name(folder) is not None:
        raise ValueError(
            f"There is no folder {folder}, and other engines find a head by its folder. "
            f"`hf download {folder} --local-dir FOLDER` brings it from the Hub."
        )
    file = read_head_file(folder)
    check_engine_support(file, folder)
    return launch_line(engine, str(folder), str(folder / HEADS), file.meta.steps)


def _check_extra() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Serving needs packages that are not installed ({', '.join(missing)}). Run "
            "pip install 'headstart[serve]'."
        )
