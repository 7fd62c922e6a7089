"""`headstart generate`: stream an answer from a fused checkpoint, or chat with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .budgets import HELP, check_budget, contestant
from .quantizing import QUANTIZE_HELP, tell_quantized
from .ui import check_top_p, coloured, console, legend, say

if TYPE_CHECKING:
    from headstart.inference.generate import SpeculativeModel
    from headstart.inference.measure import Contestant
    from headstart.model.target import Target


def generate(
    folder_or_prompt: Annotated[
        str | None,
        typer.Argument(help="Fused checkpoint (folder or Hub id), else the shipped one."),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    chat: Annotated[bool, typer.Option(help="Keep a conversation; an empty line ends it.")] = False,
    raw: Annotated[bool, typer.Option(help="Continue the text, without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(callback=check_top_p)] = None,
    seed: int = 0,
    plain: Annotated[bool, typer.Option(help="Without speculation, to compare.")] = False,
    budget: Annotated[str | None, typer.Option(callback=check_budget, help=HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None,
) -> None:
    """Answer a prompt; the colour tells how many tokens one step of the target gave."""
    from headstart.inference.generate import SpeculativeModel

    from .shipped import shipped_checkpoint

    folder, prompt = _arguments(folder_or_prompt, prompt, chat)
    folder = folder or shipped_checkpoint()
    model = SpeculativeModel.from_pretrained(folder, dtype=dtype, quantize=quantize)
    tell_quantized(model.target)
    guesses = None if plain else contestant(model.target, model.head, budget)
    messages: list[dict[str, str]] = []
    console.print(legend())
    while True:
        if prompt is None:
            prompt = console.input("[bold]> [/]").strip()
            if not prompt:
                return
        messages.append({"role": "user", "content": prompt})
        ids = _prompt_ids(model, messages, prompt, raw)
        answer = stream(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            guesses=guesses,
        )
        messages.append({"role": "assistant", "content": answer})
        if not chat:
            return
        prompt = None


def stream(
    model: SpeculativeModel,
    ids: list[int],
    *,
    max_new_tokens: int,
    guesses: Contestant | None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """Print an answer as it comes; its text. guesses: how; None decodes plainly."""
    import torch

    from headstart.inference.generate import sampling_options

    steps = model.stream(
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        seed=seed,
        tree=guesses.shape if guesses else None,
        budget=guesses.budget if guesses else None,
        lookup=guesses is not None and guesses.lookup,
        speculate=guesses is not None,
        timing=True,
        **sampling_options(temperature, top_k=top_k, top_p=top_p),
    )
    answer = ""
    for piece, tokens in pieces(model.target, steps):
        console.print(coloured(piece, tokens), end="")
        answer += piece
    stats = model.last_stats
    console.print()
    say(
        f"[dim]{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"accepted length {stats.tau:.2f}[/]"
    )
    return answer


def pieces(target: Target, steps: Iterable[list[int]]) -> Iterable[tuple[str, int]]:
    """The text that each step adds, and how many tokens it came from."""
    from headstart.inference.text import TextStream

    text = TextStream(target)
    held = 0
    for step in steps:
        held += len(step)
        piece = text.add(step)
        if step and not text.waiting:
            yield piece, held
            held = 0
    rest = text.end()
    if rest:
        yield rest, held


def _arguments(first: str | None, second: str | None, chat: bool) -> tuple[Path | None, str | None]:
    """Which of the two arguments is the checkpoint: `generate CHECKPOINT PROMPT`, `generate PROMPT`
    or `generate CHECKPOINT --chat`."""
    from headstart.model.hub import hub_name

    if first is not None and not first.strip():
        raise ValueError(
            "The first argument is empty. Give a fused checkpoint and a prompt, or only a prompt."
        )
    if first is not None and second is not None:
        return Path(first), second
    if first is None:
        if not chat:
            raise ValueError(
                'There is nothing to answer. Run `headstart generate "your prompt"`, or add --chat.'
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
    from headstart.inference.answer import prompt_ids

    if not prompt.strip():
        raise ValueError("The prompt is empty. Write what is to be answered.")
    if raw:
        ids: list[int] = model.target.tokenizer(prompt)["input_ids"]
        return ids
    return prompt_ids(model.target, messages)
