"""Shared by tests: graph decoding."""

from __future__ import annotations

import torch
from decoding import answers
from oracle import Oracle
from torch import Tensor

from headstart.inference.config import SamplingParams
from headstart.inference.engine.graph_pool import GraphPool
from headstart.inference.engine.graph_runner import GraphRunner
from headstart.inference.engine.loop import DecodeLoop
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.sequence import StopCriteria, make_sequences
from headstart.inference.engine.stats import Stats
from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.inference.tree_policy.cost_model import Costs
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.autoregressive import HeadState
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.grow import Children, Frontier, ShouldDeepen, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

USED = ["llama", "qwen2", "gemma3_text", "mixtral"]


class Prophet(Oracle):
    """An oracle that asks the host nothing: which drafts are right follows from the position."""

    def __init__(self, target: Target, prompts: list[int], told: list[list[int]]):
        super().__init__(target, told)
        self.prompts_B = torch.tensor(prompts, device=target.device)
        self.told_BT = torch.tensor(told, device=target.device)

    def start(self, batch_size: int) -> HeadState:  # type: ignore[override]
        return HeadState(KVCache(batch_size, 0, self.target.device))

    def advance(
        self, state: HeadState, seen: TargetOutput, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> HeadState:
        assert (
            seen.hidden_states[0].shape[:2]
            == seen.lm_head_input_BTD.shape[:2]
            == next_tokens_BP.shape
        )
        state.cache.reserve(next_tokens_BP.shape[1])
        state.cache.commit(None, counts_B)
        return HeadState(state.cache, None, next_tokens_BP.gather(1, counts_B[:, None] - 1)[:, 0])

    def draft(
        self, state: HeadState, shape: TreeShape, should_deepen: ShouldDeepen | None = None
    ) -> Tree:
        assert state.root_B is not None
        # After the pairs of a prompt and of k tokens of the answer, the root is token k.
        root_B1 = (state.cache.lengths_B - self.prompts_B)[:, None]
        ranks_W = torch.arange(shape.width, device=root_B1.device)
        true_BF = torch.ones_like(root_B1, dtype=torch.bool)

        def truth(depth: int) -> Tensor:
            places_B1 = (root_B1 + depth).clamp(0, self.told_BT.shape[1] - 1)
            return self.told_BT.gather(1, places_B1)

        def children(depth: int) -> Children:
            truth_B11, hash_B11 = truth(depth)[..., None], (root_B1 + depth)[..., None] * 71 % 64
            right_BF1 = (hash_B11 % 5 > 0) & true_BF[..., None]
            wrong_BFW = (truth_B11 + 1 + ranks_W) % self.config.vocab_size
            at_BFW = right_BF1 & (ranks_W == hash_B11 % shape.width)
            tokens_BFW = torch.where(at_BFW, truth_B11, wrong_BFW)
            return (-0.2 - 0.7 * ranks_W).expand(tokens_BFW.shape), tokens_BFW

        def step(frontier: Frontier) -> Children:
            nonlocal true_BF
            right_BF = frontier.tokens_BF == truth(frontier.depth)
            true_BF = true_BF.gather(1, frontier.parents_BF) & right_BF
            return children(frontier.depth + 1)

        return grow(state.root_B, children(1), step, shape, should_deepen)


def random_head(target: Target, kind: str) -> DraftHead:
    torch.manual_seed(0)
    head = make_head(target, kind, {})
    head.init_from_target()
    return head.for_decoding(target)


def replayed(
    target: Target,
    head: DraftHead | None,
    prompts: tuple[Tensor, Tensor],
    shape: TreeShape,
    sampling: SamplingParams,
    costs: Costs | None = None,
    pool: GraphPool | None = None,
) -> tuple[list[list[int]], Stats]:
    """Responses of a `GraphRunner`, and its counts."""
    stop, sampler, stats = StopCriteria.of(sampling, target), Sampler.of(sampling), Stats()
    sequences = make_sequences(target, *prompts, stop, False)
    policy = None if costs is None or head is None else AdaptivePolicy(costs)
    pool = GraphPool() if pool is None else pool
    runner = GraphRunner(target, head, shape, sampler, sequences, policy, stats, pool)
    loop = DecodeLoop(target, runner, sequences, len(sequences), stop, policy, stats)
    lengths_B = torch.tensor([one.length for one in sequences], device=target.device)
    return answers(loop.run(prompts[0].to(target.device), lengths_B), len(sequences)), stats
