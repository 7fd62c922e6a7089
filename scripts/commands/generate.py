"""`headstart generate`: stream a response from a fused checkpoint, or chat with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.scripts.console import coloured, console, legend, say
from headstart.scripts.options.common import (
    Budget,
    Dtype,
    MaxNewTokens,
    Quantize,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from headstart.scripts.options.quantize_report import report_quantization
from headstart.scripts.options.tree_budget import speculative_config

if TYPE_CHECKING:
    from headstart.inference.config import SamplingParams, SpeculativeConfig
    from headstart.inference.generate import SpeculativeModel


def generate(
    folder_or_prompt: Annotated[
        str | None,
        typer.Argument(help="Fused checkpoint, a folder or Hub id (default: the shipped one)."),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="Prompt to respond to.")] = None,
    chat: Annotated[
        bool, typer.Option(help="Keep a conversation going; an empty line ends it.")
    ] = False,
    raw: Annotated[
        bool, typer.Option(help="Continue the text as it is, without a chat template.")
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    plain: Annotated[bool, typer.Option(help="Decode autoregressively, to compare.")] = False,
    budget: Budget = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Generate a response; the colour shows how many tokens one decode step emitted."""
    from headstart.inference.config import SamplingParams, SpeculativeConfig
    from headstart.inference.generate import SpeculativeModel
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    folder, prompt = _arguments(folder_or_prompt, prompt, chat)
    folder = folder or shipped_checkpoint()
    model = SpeculativeModel.from_pretrained(folder, dtype=dtype, quantize=quantize)
    report_quantization(model.target)
    if plain:
        speculative = SpeculativeConfig()
    else:
        speculative = speculative_config(model.target, model.head, budget)
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed=seed)
    messages: list[dict[str, str]] = []
    console.print(legend())
    while True:
        if prompt is None:
            prompt = console.input("[bold]> [/]").strip()
            if not prompt:
                return
        messages.append({"role": "user", "content": prompt})
        ids = _prompt_ids(model, messages, prompt, raw)
        response = stream(model, ids, sampling, speculative)
        messages.append({"role": "assistant", "content": response})
        if not chat:
            return
        prompt = None


def stream(
    model: SpeculativeModel,
    ids: list[int],
    sampling: SamplingParams,
    speculative: SpeculativeConfig,
) -> str:
    """Print a response as it comes; its text."""
    import torch

    from headstart.inference.detokenizer import pieces

    steps = model.stream(
        torch.tensor([ids]),
        speculative=speculative,
        timing=True,
        **sampling.generate_options(),
    )
    response = ""
    for piece, tokens in pieces(model.target, steps):
        console.print(coloured(piece, tokens), end="")
        response += piece
    stats = model.last_stats
    console.print()
    say(
        f"[dim]{stats.num_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {stats.acceptance_length:.2f}[/]"
    )
    return response


def _arguments(first: str | None, second: str | None, chat: bool) -> tuple[Path | None, str | None]:
    """Which of the two arguments is the checkpoint: `generate CHECKPOINT PROMPT`, `generate PROMPT`
    or `generate CHECKPOINT --chat`."""
    from headstart.model.checkpoint.download import hub_name

    if first is not None and not first.strip():
        raise ValueError(
            "The first argument is empty. Give a fused checkpoint and a prompt, or only a prompt."
        )
    if first is not None and second is not None:
        return Path(first), second
    if first is None:
        if not chat:
            raise ValueError(
                'There is no prompt. Run `headstart generate "your prompt"`, or add --chat.'
            )
        return None, None
    if Path(first).is_dir():
        if not chat:
            raise ValueError(
                f'{first} is a folder and no prompt follows. Run `headstart generate {first} "your '
                'prompt"`, or add --chat.'
            )
        return Path(first), None
    if chat and hub_name(first) is not None:
        return Path(first), None
    return None, first


def _prompt_ids(
    model: SpeculativeModel, messages: list[dict[str, str]], prompt: str, raw: bool
) -> list[int]:
    from headstart.inference.rollout import prompt_ids

    if not prompt.strip():
        raise ValueError("The prompt is empty. Write a question or an instruction.")
    if raw:
        ids: list[int] = model.target.tokenizer(prompt)["input_ids"]
        return ids
    return prompt_ids(model.target, messages)
