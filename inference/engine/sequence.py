"""The rows of a batch on the host: what each was given, what it may still say, when it ends.

Legend: B batch rows, T prompt positions, N tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteria

from headstart.inference.config import SamplingParams
from headstart.inference.ngram import Lookup
from headstart.model.target.target import Target
from headstart.model.tree.tree import Tree

from .sampler import Sampler


@dataclass(frozen=True)
class StopCriteria:
    """When a response ends: see `SamplingParams`. The token that stops it belongs to it."""

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    criteria: tuple[StoppingCriteria, ...] = ()

    @staticmethod
    def of(params: SamplingParams, target: Target) -> StopCriteria:
        eos = params.stop_token_ids
        eos = frozenset(target.eos_ids) if eos is None else eos
        return StopCriteria(params.max_new_tokens, eos, params.stopping_criteria)


@dataclass
class SequenceState:
    """One answer in the making. number: place in the batch at the start. given: the prompt as it
    came, padding included; room: tokens that may still come; length: tokens read or drawn so far,
    padding excluded; lookup: finds earlier places of its text, where that is wanted."""

    number: int
    given: list[int]
    length: int
    remaining_tokens: int
    lookup: Lookup | None = None

    def append_tokens(self, drawn: Sequence[int], stop: StopCriteria) -> list[int]:
        """What of the drawn tokens belongs to the answer; `room` is 0 once it is complete."""
        kept: list[int] = []
        ended = False
        for token in drawn[: self.remaining_tokens]:
            kept.append(token)
            ended = token in stop.eos
            if ended:
                break
        met = self._met(kept, stop.criteria) if stop.criteria else None
        if met is not None:
            kept, ended = kept[:met], True
        self.given += kept
        if self.lookup is not None:
            self.lookup.extend(kept)
        self.length += len(kept)
        self.remaining_tokens = 0 if ended else self.remaining_tokens - len(kept)
        return kept

    def _met(self, kept: list[int], criteria: Sequence[StoppingCriteria]) -> int | None:
        """After how many of the tokens a criterion first says stop."""
        ids_1T = torch.tensor([self.given + kept])
        for count in range(1, len(kept) + 1):
            seen_1T = ids_1T[:, : len(self.given) + count]
            if any(bool(torch.as_tensor(one(seen_1T, None)).any()) for one in criteria):
                return count
        return None


def make_sequences(
    target: Target, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, lookup: bool
) -> list[SequenceState]:
    """ValueError for what cannot be continued: see `decode`."""
    _check_ids(target, tokens_BT[mask_BT != 0])
    rows = _rows(target, tokens_BT, mask_BT, stop)
    if lookup:
        for row, given_T, mask_T in zip(rows, tokens_BT, mask_BT, strict=True):
            row.lookup = Lookup(given_T[mask_T != 0].tolist())
    return rows


def draws(
    sampler: Sampler, rows: Sequence[SequenceState], tree: Tree, logits_BNV: Tensor
) -> Tensor:
    """What the target draws at the nodes of a tree behind the rows: see `Sampler.draw`."""
    prefixes: list[Tensor] = []
    if sampler.reads_prefix:
        prefixes = [torch.tensor(row.given, device=logits_BNV.device) for row in rows]
    numbers = [row.number for row in rows]
    positions = [row.length for row in rows]  # of the token after the root
    return sampler.draw(tree, logits_BNV, numbers, positions, prefixes)


def _check_ids(target: Target, ids: Tensor) -> None:
    odd = ids[(ids < 0) | (ids >= target.vocab_size)]
    if len(odd):
        raise ValueError(
            f"A prompt holds the token {int(odd[0])}, but {target.name} knows the tokens 0 to "
            f"{target.vocab_size - 1}. Use its own tokenizer."
        )


def _rows(
    target: Target, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria
) -> list[SequenceState]:
    lengths = (mask_BT != 0).sum(1).tolist()
    if not lengths or min(lengths) == 0:
        raise ValueError(
            "A prompt is empty, so there is nothing to continue. Give at least one token, for "
            "example the tokenizer's beginning-of-text token."
        )
    limit = target.context_limit
    if limit is not None and max(lengths) >= limit:
        raise ValueError(
            f"A prompt has {max(lengths)} tokens, but {target.name} reads {limit} in all, prompt "
            "and answer together. Shorten the prompt."
        )
    return [
        SequenceState(
            number,
            given,
            length,
            stop.max_new_tokens if limit is None else min(stop.max_new_tokens, limit - length),
        )
        for number, (given, length) in enumerate(zip(tokens_BT.tolist(), lengths, strict=True))
    ]
