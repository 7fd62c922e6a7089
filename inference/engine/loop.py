"""The decode loop: `decode` for any target, head and source of drafts.

A decode step drafts a tree of candidates, verifies it in one forward pass of the target, and
accepts a path of it. A `StepRunner` computes the step; the loop cuts the emitted tokens at the
first stop, updates the adaptive policy and the statistics, and limits how deep drafts may become.
Autoregressive decoding is the same loop with trees of one node, so both share the engine, the
sampler and the stopping rules, and a comparison of their speed is a fair one.

Legend: B sequences, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.inference.tree_policy.defaults import (
    DEFAULT_TREE,
    WIDEST_TREE,
    clamp_to_head,
    for_target,
)
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

from .eager_runner import EagerRunner
from .graph_pool import graph_pool
from .graph_runner import GraphRunner, supports_cuda_graphs
from .sampler import Sampler
from .sequence import SequenceState, StopCriteria, make_sequences
from .stats import Stats
from .step_runner import DraftLimits, StepOutput, StepRunner

StepStream = Iterator[list[list[int]]]  # per forward pass, the tokens that each response grew by


# Within a caller's inference mode too: a stream may outlive it, and then could not write to a cache
# that was made in it.
@torch.inference_mode(False)
def decode(
    target: Target,
    tokens_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    sampling: SamplingParams,
    speculative: SpeculativeConfig | None = None,
    stats: Stats | None = None,
) -> StepStream:
    """Generate responses to prompts, several tokens per forward pass of the target.

    tokens_BT: prompts.
    mask_BT: 1 for tokens and 0 for padding, which may be on either side; None: no padding.
    sampling: how tokens are sampled, and when a response ends.
    speculative: where drafts come from; None: autoregressive decoding. The tokens are the same.
    stats: counts and times are added to it.

    Yields once per forward pass, for each sequence, the tokens that its response grew by (none for
    a finished one). Targets with recurrent layers verify chains, and one sequence after the other.
    ValueError for an empty prompt and for one that leaves no room in the target's context, and for
    sampling that a tree cannot do; all before the first token.
    """
    speculative = speculative or SpeculativeConfig()
    stats = Stats() if stats is None else stats
    sampler, stop = Sampler.of(sampling), StopCriteria.of(sampling, target)
    head, shape = speculative.head, _tree_shape(target, speculative)
    tokens_BT, mask_BT = _check_prompts(tokens_BT, mask_BT)
    sequences = make_sequences(target, tokens_BT, mask_BT, stop, speculative.ngram)
    packed_BT, lengths_B = _pack(target, tokens_BT, mask_BT, sequences)
    batches = [[one] for one in sequences] if target.recurrent else [sequences]
    use_graphs = not speculative.eager
    use_graphs = use_graphs and supports_cuda_graphs(target, head, sampler, speculative.ngram)
    runs: list[StepStream] = []
    for batch in batches:
        policy = None if speculative.costs is None else AdaptivePolicy(speculative.costs)
        runner: StepRunner
        if use_graphs:
            pool = graph_pool(target)
            runner = GraphRunner(target, head, shape, sampler, batch, policy, stats, pool)
        else:
            runner = EagerRunner(target, head, shape, sampler, batch, policy, stats)
        loop = DecodeLoop(target, runner, batch, len(sequences), stop, policy, stats)
        rows, longest = [one.number for one in batch], max(one.length for one in batch)
        runs.append(loop.run(packed_BT[rows, :longest], lengths_B[rows]))
    return chain.from_iterable(runs)


class DecodeLoop:
    """Decodes one batch with a runner.

    sequences: of this batch.
    total: sequences of the whole call; what is yielded has one list for each of them.
    """

    def __init__(
        self,
        target: Target,
        runner: StepRunner,
        sequences: Sequence[SequenceState],
        total: int,
        stop: StopCriteria,
        policy: AdaptivePolicy | None,
        stats: Stats,
    ):
        self.target, self.runner, self.sequences, self.total = target, runner, sequences, total
        self.stop, self.policy, self.stats = stop, policy, stats

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens_BT: Tensor, lengths_B: Tensor) -> StepStream:
        """tokens_BT: prompts, padded on the right. lengths_B: their lengths."""
        self.stats.begin(len(self.sequences), self.target.device)
        try:
            output = self.runner.prefill(tokens_BT, lengths_B)
            while True:
                emitted = self._append_tokens(output)
                self.stats.lap("host")
                yield emitted
                self.stats.pause()
                active = [one for one in self.sequences if one.remaining_tokens]
                if not active:
                    return
                self.runner.draft(self._limits(active))
                output = self.runner.verify()
                self._update_policy(output)
        finally:
            self.runner.close()

    def _append_tokens(self, output: StepOutput) -> list[list[int]]:
        """Add the emitted tokens to the responses, up to a stop; those of each sequence."""
        emitted: list[list[int]] = [[] for _ in range(self.total)]
        kept: list[int] = []
        for sequence, tokens in zip(output.sequences, output.tokens, strict=True):
            emitted[sequence.number] = sequence.append_tokens(tokens, self.stop)
            kept.append(len(emitted[sequence.number]))
        sampled = [len(tokens) for tokens in output.tokens]
        self.stats.count(kept, sampled, output.tree_depth, output.num_draft_tokens)
        return emitted

    def _limits(self, active: Sequence[SequenceState]) -> DraftLimits:
        remaining = max(one.remaining_tokens for one in active) - 1
        limit = self.target.context_limit
        if limit is None:
            return DraftLimits(remaining, None)
        return DraftLimits(remaining, min(limit - one.length for one in active))

    def _update_policy(self, output: StepOutput) -> None:
        if self.policy is None:
            return
        self.policy.update(
            batch=len(output.sequences),
            emitted=sum(map(len, output.tokens)),
            nodes=output.num_nodes,
            depth=output.drafted_depth,
            full_depth=output.full_depth,
            expected=output.expected,
        )


def _tree_shape(target: Target, speculative: SpeculativeConfig) -> TreeShape:
    if not speculative.drafts:
        return TreeShape.chain(1)
    default = DEFAULT_TREE if speculative.costs is None else WIDEST_TREE
    shape = speculative.shape or for_target(target, default)
    return shape if speculative.head is None else clamp_to_head(shape, speculative.head)


def _check_prompts(tokens_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts and their mask; ValueError unless they fit together."""
    if mask_BT is None:
        mask_BT = torch.ones_like(tokens_BT)
    if tokens_BT.dim() != 2 or mask_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"Prompts are a matrix of token ids with a mask of the same shape, got "
            f"{tuple(tokens_BT.shape)} and {tuple(mask_BT.shape)}. Give one row per prompt."
        )
    return tokens_BT.long(), mask_BT  # int32 is common, and no index elsewhere


def _pack(
    target: Target, tokens_BT: Tensor, mask_BT: Tensor, sequences: Sequence[SequenceState]
) -> tuple[Tensor, Tensor]:
    """Prompts with all padding on the right, and their lengths, on the target's device."""
    lengths_B = torch.tensor([one.length for one in sequences], device=target.device)
    order_BT = (mask_BT == 0).to(torch.uint8).argsort(dim=1, stable=True)
    packed_BT = tokens_BT.gather(1, order_BT)[:, : max(one.length for one in sequences)]
    return packed_BT.to(target.device), lengths_B
