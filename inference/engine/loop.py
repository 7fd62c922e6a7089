"""The decode loop, and plain decoding beside it: the reference that it must equal.

`plain` is the same loop with a tree of one node, so both share the engine, the sampler and the
stopping rules, and a comparison of their speed is a fair one.

A round: the head drafts a tree, the target reads it in one pass, `accept` keeps a path, the host
cuts what the path emits at the first stop, finished rows leave the batch, and cache and head take
in the path. The prompt is a round too: its root is the last prompt token. Here the loop waits for
the device once per round, for the numbers of `_emitted`.

Legend: B batch rows, N tree nodes, T prompt positions, P places of a path, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.tree_policy.defaults import (
    DEFAULT_TREE,
    WIDEST_TREE,
    clamp_to_head,
    for_target,
)
from headstart.model.cache.kv_cache import KVCache
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .draft import AcceptedStep, Drafter, read_prompts
from .graph_loop import GraphLoop
from .sampler import Sampler
from .sequence import SequenceState, StopCriteria, draws, make_sequences
from .stats import Stats
from .step_graphs import Graphs, supports_cuda_graphs
from .verify import Accepted, accept

StepStream = Iterator[list[list[int]]]  # per pass, for every row of the batch, the tokens it gave


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
    shape = _shape(target, speculative)
    head, budget = speculative.head, speculative.costs
    tokens_BT, mask_BT = _checked(tokens_BT, mask_BT)
    rows = make_sequences(target, tokens_BT, mask_BT, stop, speculative.ngram)
    lengths_B = torch.tensor([row.length for row in rows], device=target.device)
    # Tokens to the left in their order, padding behind them.
    order_BT = (mask_BT == 0).to(torch.uint8).argsort(dim=1, stable=True)
    packed_BT = tokens_BT.gather(1, order_BT)[:, : max(row.length for row in rows)]
    packed_BT = packed_BT.to(target.device)
    if not speculative.eager and supports_cuda_graphs(target, head, sampler, speculative.ngram):
        kept = Graphs.of(target)
        graphs = GraphLoop(target, head, rows, sampler, stop, shape, budget, stats, kept)
        return graphs.run(packed_BT, lengths_B)
    together = [[row] for row in rows] if target.recurrent else [rows]
    runs: list[StepStream] = []
    for some in together:
        drafter = Drafter(head, shape, budget, len(some), stats, chain=target.recurrent)
        places = [row.number for row in some]
        longest = max(row.length for row in some)
        loop = _Loop(target, drafter, some, len(rows), sampler, stop, stats)
        runs.append(loop.run(packed_BT[places, :longest], lengths_B[places]))
    return chain.from_iterable(runs)


def _shape(target: Target, speculative: SpeculativeConfig) -> TreeShape:
    if not speculative.drafts:
        return TreeShape.chain(1)
    default = DEFAULT_TREE if speculative.costs is None else WIDEST_TREE
    shape = speculative.shape or for_target(target, default)
    return shape if speculative.head is None else clamp_to_head(shape, speculative.head)


def _checked(tokens_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts and their mask; ValueError unless they fit together."""
    if mask_BT is None:
        mask_BT = torch.ones_like(tokens_BT)
    if tokens_BT.dim() != 2 or mask_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"Prompts are a matrix of token ids with a mask of the same shape, got "
            f"{tuple(tokens_BT.shape)} and {tuple(mask_BT.shape)}. Give one row per prompt."
        )
    return tokens_BT.long(), mask_BT  # int32 is common, and no index elsewhere


class _Loop:
    """Rows of one batch on their way: what the rounds share. batch: rows that it has in all."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rows: list[SequenceState],
        batch: int,
        sampler: Sampler,
        stop: StopCriteria,
        stats: Stats,
    ):
        self.target, self.drafter, self.sampler = target, drafter, sampler
        self.stop, self.stats = stop, stats
        self.rows, self.batch = rows, batch
        self.cache: KVCache = target.new_cache(len(rows))

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens_BT: Tensor, lengths_B: Tensor) -> StepStream:
        self.stats.begin(len(self.rows), self.target.device)
        read, drawn = self._prompt(tokens_BT, lengths_B)
        tree: Tree | None = None
        while True:
            emitted = self._take(drawn, tree)
            self.stats.lap("host")
            yield emitted
            self.stats.pause()
            if not any(row.remaining_tokens for row in self.rows):
                return
            read = self._commit(read)
            tree = self._draft(read)
            read, drawn = self._verify(tree)
            self.drafter.update_policy(tree, sum(map(len, drawn)))

    def _prompt(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[AcceptedStep, list[list[int]]]:
        """Read the prompts and draw the first token of each answer."""
        layers = self.drafter.taps
        read = read_prompts(self.target, self.cache, layers, tokens_BT, lengths_B, self._draw)
        drawn = read.root_B[:, None].tolist()
        self.stats.lap("prefill")
        return read, drawn

    def _take(self, drawn: list[list[int]], tree: Tree | None) -> list[list[int]]:
        """Add what was drawn to the answers; the part of it that belongs there, by batch place."""
        emitted: list[list[int]] = [[] for _ in range(self.batch)]
        kept = [
            row.append_tokens(tokens, self.stop)
            for row, tokens in zip(self.rows, drawn, strict=True)
        ]
        for row, tokens in zip(self.rows, kept, strict=True):
            emitted[row.number] = tokens
        counts = [len(tokens) for tokens in kept], [len(tokens) for tokens in drawn]
        if tree is None:
            self.stats.count(*counts, None)
        elif tree.nodes == 1:
            self.stats.count(*counts, 0)
        else:
            drafted = int(tree.valid_BN.sum()) - len(kept)
            self.stats.count(*counts, int(tree.depths_BN.max()), drafted)
        return emitted

    def _commit(self, read: AcceptedStep) -> AcceptedStep:
        """Write the path down, and let the complete rows go."""
        self.cache.commit(read.path_BP, read.counts_B)
        alive = _closed_up([row.remaining_tokens > 0 for row in self.rows])
        if len(alive) == len(self.rows):
            return read
        self.rows = [self.rows[index] for index in alive]
        rows = torch.tensor(alive, device=self.target.device)
        self.cache.select_rows(rows)
        self.drafter.select_rows(rows)
        return read.select_rows(rows)

    def _draft(self, read: AcceptedStep) -> Tree:
        # Deeper guesses than any row has room for could not be used.
        depth = min(self.drafter.shape.depth, max(row.remaining_tokens for row in self.rows) - 1)
        limit = self.target.context_limit
        if limit is not None:
            depth = min(depth, min(limit - row.length for row in self.rows))
        if depth == 0:  # every row ends in this round
            return Tree.root(read.root_B)
        tree = self.drafter.tree(read, self.rows, depth)
        self.stats.lap("host")
        return tree

    def _verify(self, tree: Tree) -> tuple[AcceptedStep, list[list[int]]]:
        """Let the target read the tree, and keep a path of it."""
        seen = self.target.forward(tree, self.cache, taps=self.drafter.taps)
        self.stats.lap("verify")
        assert seen.logits_BTV is not None
        accepted = accept(tree, self._draw(tree, seen.logits_BTV))
        drawn = _emitted(accepted)
        if self.stats.timing and tree.nodes > 1:
            self.stats.lap("host")
            _judge(self.stats, tree, accepted)
            self.stats.pause()
        accepted = accepted.first(max(map(len, drawn)))
        path_BP = accepted.path_BP
        return AcceptedStep(
            path_BP, accepted.counts_B, seen.gather(path_BP), accepted.tokens_BP
        ), drawn

    def _draw(self, tree: Tree, logits_BNV: Tensor) -> Tensor:
        return draws(self.sampler, self.rows, tree, logits_BNV)


def _judge(stats: Stats, tree: Tree, accepted: Accepted) -> None:
    """What the draft had said of the nodes, and which of them came true."""
    came_BN = torch.zeros_like(tree.valid_BN).scatter(1, accepted.path_BP, True)
    guessed_BN = tree.valid_BN.clone()
    guessed_BN[:, 0] = False
    stats.judge(tree.scores_BN.exp()[guessed_BN].tolist(), came_BN[guessed_BN].tolist())


def _closed_up(alive: Sequence[bool]) -> list[int]:
    """The places that are alive, the last of them moved into the gaps: most stay where they are."""
    count = sum(alive)
    last = [place for place in range(count, len(alive)) if alive[place]]
    return [place if alive[place] else last.pop() for place in range(count)]


def _emitted(accepted: Accepted) -> list[list[int]]:
    """Every row's drawn tokens, on the host."""
    packed_BP = torch.cat([accepted.counts_B[:, None], accepted.tokens_BP], 1)
    return [numbers[1 : 1 + numbers[0]] for numbers in packed_BP.tolist()]
