"""The sequences of a batch on the host: their tokens, what may still come, and when they end.

Legend: B sequences, T prompt positions, N tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteria

from headstart.inference.config import SamplingParams
from headstart.inference.ngram import NgramIndex
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
    """One sequence while it is decoded.

    number: its place in the batch at the start.
    token_ids: the prompt as it was given, padding included, then the response.
    length: tokens of prompt and response, padding excluded.
    remaining_tokens: that the response may still grow by; 0: finished.
    ngrams: the index of its n-gram drafts; None: no such drafts.
    """

    number: int
    token_ids: list[int]
    length: int
    remaining_tokens: int
    ngrams: NgramIndex | None = None

    def append_tokens(self, sampled: Sequence[int], stop: StopCriteria) -> list[int]:
        """Add sampled tokens to the response, up to the first stop; those that were added."""
        kept: list[int] = []
        ended = False
        for token in sampled[: self.remaining_tokens]:
            kept.append(token)
            ended = token in stop.eos
            if ended:
                break
        met = self._first_met(kept, stop.criteria) if stop.criteria else None
        if met is not None:
            kept, ended = kept[:met], True
        self.token_ids += kept
        if self.ngrams is not None:
            self.ngrams.extend(kept)
        self.length += len(kept)
        self.remaining_tokens = 0 if ended else self.remaining_tokens - len(kept)
        return kept

    def _first_met(self, kept: list[int], criteria: Sequence[StoppingCriteria]) -> int | None:
        """After how many of the tokens a criterion first stops the response."""
        ids_1T = torch.tensor([self.token_ids + kept])
        for count in range(1, len(kept) + 1):
            so_far_1T = ids_1T[:, : len(self.token_ids) + count]
            if any(bool(torch.as_tensor(one(so_far_1T, None)).any()) for one in criteria):
                return count
        return None


def make_sequences(
    target: Target, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, ngram: bool
) -> list[SequenceState]:
    """One state per prompt. ValueError for prompts that cannot be continued: see `decode`."""
    _check_ids(target, tokens_BT[mask_BT != 0])
    sequences = _sequences(target, tokens_BT, mask_BT, stop)
    if ngram:
        for sequence, tokens_T, mask_T in zip(sequences, tokens_BT, mask_BT, strict=True):
            sequence.ngrams = NgramIndex(tokens_T[mask_T != 0].tolist())
    return sequences


def sample_tree(
    sampler: Sampler, sequences: Sequence[SequenceState], tree: Tree, logits_BNV: Tensor
) -> Tensor:
    """The tokens B x N that the target samples at the nodes: see `Sampler.sample_tree`."""
    prefixes: list[Tensor] = []
    if sampler.reads_prefix:
        prefixes = [torch.tensor(one.token_ids, device=logits_BNV.device) for one in sequences]
    numbers = [one.number for one in sequences]
    positions = [one.length for one in sequences]  # of the token after the root
    return sampler.sample_tree(tree, logits_BNV, numbers, positions, prefixes)


def _check_ids(target: Target, ids: Tensor) -> None:
    unknown = ids[(ids < 0) | (ids >= target.vocab_size)]
    if len(unknown):
        raise ValueError(
            f"A prompt holds the token {int(unknown[0])}, but {target.name} knows the tokens 0 to "
            f"{target.vocab_size - 1}. Use its own tokenizer."
        )


def _sequences(
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
            f"A prompt has {max(lengths)} tokens, but the context of {target.name} is {limit} "
            "tokens, prompt and response together. Shorten the prompt."
        )
    return [
        SequenceState(
            number,
            token_ids,
            length,
            stop.max_new_tokens if limit is None else min(stop.max_new_tokens, limit - length),
        )
        for number, (token_ids, length) in enumerate(zip(tokens_BT.tolist(), lengths, strict=True))
    ]
