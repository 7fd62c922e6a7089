"""From the target's logits to sampled tokens, as transformers' `generate` defines them.

Whatever `generate` builds (temperature, top-k, top-p, penalties, forbidden tokens) is a list of
logits processors over (prefix, logits). A tree node stands for a prefix of its own: the sequence's
tokens and the path to the node. Processing costs much more than an argmax (top-p sorts the
vocabulary), so it is done only for the nodes on the accepted path.

A sampled token is the argmax of log p + Gumbel noise, with noise fixed by (seed, sequence, absolute
position): autoregressive steps and trees sample the same token at a position.

Legend: B sequences, N tree nodes, M nodes of different sequences, T positions, V vocabulary,
R any leading dimensions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from headstart.inference.config import SamplingParams
from headstart.model.backends.select import select_ops
from headstart.model.tree.tree import Tree

# These read only the logits.
LOGITS_ONLY: tuple[type, ...] = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
# These run the model themselves, remember earlier calls, or belong to other kinds of models.
REFUSED: tuple[type, ...] = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.AlternatingCodebooksLogitsProcessor,
    hf.WhisperTimeStampLogitsProcessor,
    hf.WhisperNoSpeechDetection,
)
NOT_SAMPLED = -1
MASK64 = (1 << 64) - 1


class Sampler:
    """How the next token is sampled.

    processors: as `generate` prepares them. A processor of your own must be a function of
        (input_ids, scores) only: not of earlier calls, and not of the row index in its input,
        because rows are regrouped by prefix length.
    sample: whether to sample; False: greedy.
    seed: of the noise.
    ValueError for processors that cannot work on a tree.
    """

    def __init__(
        self, processors: Iterable[object] = (), *, sample: bool = False, seed: int = 0
    ) -> None:
        self.processors = list(processors)
        self.sample, self.seed = sample, seed
        for processor in self.processors:
            if isinstance(processor, REFUSED):
                raise ValueError(
                    f"{type(processor).__name__} cannot be used here: it keeps state between calls "
                    "or runs a second model, but a tree has many continuations at once. Leave "
                    "the option away, or decode with transformers' own generate."
                )
        self.reads_prefix = any(type(one) not in LOGITS_ONLY for one in self.processors)

    @staticmethod
    def of(params: SamplingParams) -> Sampler:
        """Processors in the order in which `generate` applies them."""
        processors: list[object] = []
        if params.repetition_penalty is not None:
            processors.append(hf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
        processors += params.logits_processors
        if params.is_greedy:
            return Sampler(processors)
        if params.temperature != 1:
            processors.append(hf.TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k is not None:
            processors.append(hf.TopKLogitsWarper(params.top_k))
        if params.top_p is not None:
            processors.append(hf.TopPLogitsWarper(float(params.top_p)))
        return Sampler(processors, sample=True, seed=params.seed)

    def sample_tree(
        self,
        tree: Tree,
        logits_BNV: Tensor,
        numbers: Sequence[int],
        positions: Sequence[int],
        prefixes: Sequence[Tensor],
    ) -> Tensor:
        """Sample B x N: the token after each node on the path that the samples take.

        numbers: of each sequence, its place in the batch at the start.
        positions: of the token after the root.
        prefixes: each sequence's tokens so far (1-D, the root is the last); read only where
            `reads_prefix`.

        Other nodes hold -1, which no token equals; greedy decoding without processors samples at
        all nodes.
        """
        if not self.processors and not self.sample:
            return argmax(logits_BNV)
        sampled_BN = torch.full_like(tree.tokens_BN, NOT_SAMPLED)
        active = list(range(len(numbers)))
        node_M = torch.zeros_like(tree.tokens_BN[:, 0])
        ids = list(prefixes)
        for depth in range(tree.nodes):
            own_numbers = [numbers[row] for row in active]
            own_ids = [ids[row] for row in active] if self.reads_prefix else []
            scores_MV = self.scores(logits_BNV[active, node_M], own_ids, own_numbers)
            if self.sample:
                own_positions = [positions[row] + depth for row in active]
                scores_MV = scores_MV + self.noise(own_numbers, own_positions, scores_MV)
            token_M = argmax(scores_MV)
            sampled_BN[active, node_M] = token_M
            if tree.nodes == 1:
                break
            equal_MN = tree.tokens_BN[active] == token_M[:, None]
            child_MN = equal_MN & (tree.parents_BN[active] == node_M[:, None])
            kept = [place for place, found in enumerate(child_MN.any(1).tolist()) if found]
            if not kept:
                break
            node_M = child_MN[kept].int().argmax(1)
            active = [active[place] for place in kept]
            if self.reads_prefix:
                for row, token_1 in zip(active, token_M[kept].split(1), strict=True):
                    ids[row] = torch.cat([ids[row], token_1])
        return sampled_BN

    def scores(
        self, logits_MV: Tensor, prefixes: Sequence[Tensor], numbers: Sequence[int]
    ) -> Tensor:
        """Processed logits M x V: log-probabilities up to a constant per row, float32.

        prefixes: token ids of the M nodes; read only where `reads_prefix`.
        numbers: of their sequences, as in `sample_tree`.
        """
        scores_MV = logits_MV.float()
        groups = _by_length(prefixes)
        empty_M0 = torch.empty(len(numbers), 0, dtype=torch.int64, device=logits_MV.device)
        for processor in self.processors:
            if type(processor) in LOGITS_ONLY:
                scores_MV = _process(processor, empty_M0, scores_MV, numbers)
                continue
            parts = [
                _process(
                    processor,
                    torch.stack([prefixes[place] for place in group]),
                    scores_MV[group],
                    [numbers[place] for place in group],
                )
                for group in groups
            ]
            order = [place for group in groups for place in group]
            scores_MV = torch.empty_like(scores_MV)
            scores_MV[order] = torch.cat(parts)
        return scores_MV

    def noise(self, numbers: Sequence[int], positions: Sequence[int], like_MV: Tensor) -> Tensor:
        """Gumbel noise M x V for the tokens at absolute positions of sequences."""
        exponential_MV = torch.empty_like(like_MV)
        generator = torch.Generator(like_MV.device)
        for row_V, number, position in zip(exponential_MV, numbers, positions, strict=True):
            generator.manual_seed(_mixed(self.seed, number, position))
            row_V.exponential_(generator=generator)
        return -exponential_MV.clamp_min(torch.finfo(torch.float32).tiny).log()


def argmax(scores_RV: Tensor) -> Tensor:
    """`argmax(-1)`, the first of equals, by the device's kernels."""
    return select_ops(scores_RV.device).argmax(scores_RV)


def _mixed(*numbers: int) -> int:
    """One well-mixed 64-bit number (the finaliser of splitmix64 after each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def _by_length(prefixes: Sequence[Tensor]) -> list[list[int]]:
    """Indices of prefixes of equal length: processors take a matrix."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prefix_T in enumerate(prefixes):
        groups[len(prefix_T)].append(place)
    return list(groups.values())


def _process(
    processor: object, ids_MT: Tensor, scores_MV: Tensor, numbers: Sequence[int]
) -> Tensor:
    """Apply a processor; those that index by batch row get the number of the sequence."""
    if isinstance(processor, hf.RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, Tensor):  # left padding of each sequence
            processor = hf.RepetitionPenaltyLogitsProcessor(
                processor.penalty, prompt_ignore_length=ignored[list(numbers)]
            )
    elif isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = hf.PrefixConstrainedLogitsProcessor(
            lambda index, ids_T: allowed(numbers[index], ids_T), 1
        )
    return processor(ids_MT, scores_MV)  # type: ignore[operator]
