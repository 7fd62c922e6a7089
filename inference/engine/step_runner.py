"""What computes a decode step: the interface of `EagerRunner` and `GraphRunner`.

Legend: B sequences, N tree nodes, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headstart.model.cache.kv_cache import KVCache
from headstart.model.target.target import Target
from headstart.model.tree.tree import Tree

from .draft import AcceptedStep
from .sampler import Sampler
from .sequence import SequenceState, sample_tree


@dataclass(frozen=True)
class DraftLimits:
    """How deep drafts can be useful in the next step.

    remaining: no sequence can use deeper drafts, because its response ends before; 0: each of them
        ends with the next token.
    context: positions that every sequence has left in the target's context; None: no limit.
    """

    remaining: int
    context: int | None


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass of the target emitted.

    sequences: those that took part.
    tokens: for each of them the tokens sampled along the accepted path, at least one. What follows
        a stop is not yet cut.
    num_nodes: verified per sequence, the root included.
    num_draft_tokens: verified over all sequences.
    tree_depth: of the verified trees; None: this was the prefill.
    drafted_depth: that the head drafted; 0: it did not draft.
    full_depth: accepted draft tokens of a sequence beyond which the policy expects none.
    expected: draft tokens over all sequences that should have been accepted; None: not known.
    """

    sequences: Sequence[SequenceState]
    tokens: Sequence[list[int]]
    num_nodes: int = 1
    num_draft_tokens: int = 0
    tree_depth: int | None = None
    drafted_depth: int = 0
    full_depth: int = 0
    expected: float | None = None


class StepRunner(Protocol):
    """Computes the steps of one batch. `prefill` comes first, then `draft` and `verify` in turn.

    Which sequences are finished is read from `SequenceState.remaining_tokens`.
    """

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> StepOutput:
        """Process the prompts (padded on the right) and sample the first token of each response."""
        ...

    def draft(self, limits: DraftLimits) -> None:
        """Take in the path that was accepted last, and draft the next trees."""
        ...

    def verify(self) -> StepOutput:
        """Run the target over the trees, sample at their nodes and accept a path of each."""
        ...

    def close(self) -> None:
        """Let go of what other runs can use. The runner is not used any more."""
        ...


def prefill(
    target: Target,
    cache: KVCache,
    taps: tuple[int, ...],
    tokens_BT: Tensor,
    lengths_B: Tensor,
    sampler: Sampler,
    sequences: Sequence[SequenceState],
) -> AcceptedStep:
    """Process the prompts and sample the first token of each response, the next `root_B`.

    The positions stay pending in the cache.
    taps: decoder layers whose output the head needs.
    """
    # Logits of a whole prompt would be large, and only the last ones are needed.
    output = target.forward(tokens_BT, cache, lengths_B=lengths_B, taps=taps, logits=False)
    last_B1 = lengths_B[:, None] - 1
    logits_B1V = target.unembed(output.gather(last_B1).lm_head_input_BTD)
    root = Tree.root(tokens_BT.gather(1, last_B1)[:, 0])
    first_B1 = sample_tree(sampler, sequences, root, logits_B1V)
    path_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    next_tokens_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B1, first_B1)
    return AcceptedStep(path_BT, lengths_B, output, next_tokens_BT)
