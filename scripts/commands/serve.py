"""`headstart serve`: an OpenAI-compatible server for a fused checkpoint, on one machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headstart.scripts.console import show
from headstart.scripts.options.common import Budget, Checkpoint, Dtype, Quantize
from headstart.scripts.options.quantize_report import report_quantization
from headstart.scripts.options.tree_budget import speculative_config

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    folder: Checkpoint = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="HEADSTART_API_KEY", help="Refuse requests without this key (default: none)."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Model name in the API (default: the folder's name).")
    ] = None,
    max_queued: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting requests.")
    ] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum new tokens per response (default: remaining context)."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Maximum tokens of prompt and response (default: the target's context)."
        ),
    ] = None,
    budget: Budget = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    print_: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option("--print", help="Print the command of another engine, and exit."),
    ] = None,
) -> None:
    """Serve /v1/chat/completions and /v1/completions, one request at a time."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    folder = folder or shipped_checkpoint()
    if print_ is not None:
        show(_engine_command(print_, folder))
        return
    _check_extra()
    from headstart.inference.generate import SpeculativeModel
    from headstart.inference.serving.server import ServerConfig, make_server

    model = SpeculativeModel.from_pretrained(folder, dtype=dtype, quantize=quantize)
    report_quantization(model.target)
    config = ServerConfig(
        served_model_name=served_model_name or folder.resolve().name,
        host=host,
        port=port,
        api_key=api_key,
        max_queued=max_queued,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
    )
    speculative = speculative_config(model.target, model.head, budget)
    make_server(
        model,
        speculative,
        config,
        lambda address: show(f"{config.served_model_name} is served at {address}/v1"),
    ).run()


def _engine_command(engine: Literal["vllm", "sglang"], folder: Path) -> str:
    """The command that serves a fused checkpoint with another engine."""
    from headstart.model.checkpoint.download import hub_name
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.checkpoint.launch import launch_line
    from headstart.model.checkpoint.layout import HEADS
    from headstart.model.export.vllm_sglang import check_engine_support

    if hub_name(folder) is not None:
        raise ValueError(
            f"There is no folder {folder}, and other engines load a head from a local folder. "
            f"`hf download {folder} --local-dir FOLDER` downloads it from the Hub."
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
