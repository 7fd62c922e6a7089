"""Messages of runs that fail: what is saved, and which settings may help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe


def not_finite_advice(recipe: Recipe, target: Target, saved: int | None, where: str) -> str:
    """Return what to change after a loss that is not finite.

    saved: step of the checkpoint, if any. where: describes it.
    """
    if saved is None:
        return (
            "The head's weights are not finite before the first step: start from other weights, "
            "or with another train.seed, in another train.output."
        )
    anew = "start again in another train.output with a lower train.lr"
    exact = target.dtype in (torch.float32, torch.float64)
    if recipe.train.precision == "float32" or not exact:
        return f"{where} It would meet the same batch: {anew}, or leave those conversations out."
    return f"{where} Add train.precision=float32 to it; if that fails too, {anew}."


@contextmanager
def memory_advice(recipe: Recipe, describe_saved: Callable[[], str]) -> Iterator[None]:
    """Name the settings to change when memory runs out.

    describe_saved: returns what is saved of the run.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on a CPU
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        data, loss = recipe.data, recipe.loss
        rows = loss.chunk_rows or "as many as 2 GiB hold"
        raise MemoryError(
            f"Out of memory. {describe_saved()} A resumed run may set loss.recompute=true, and "
            f"lower loss.chunk_rows (now {rows}). Where that is not enough, start again in another "
            f"train.output with a lower data.global_batch_tokens (now "
            f"{data.global_batch_tokens}; raise train.accumulate by the same factor to learn the "
            f"same), then data.max_length (now {data.max_length})."
        ) from error
