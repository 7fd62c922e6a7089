"""From the target's logits to draws, with the meanings of transformers' `generate`.

Whatever `generate` builds (temperature, top-k, top-p, penalties, forbidden tokens) is a list of
logits processors over (prefix, logits). A tree node stands for a prefix of its own: the row's
tokens so far and the path to the node. Processing costs much more than reading off the largest
logit (top-p sorts the vocabulary), so it is done for the nodes that the accepted path comes to, and
for no others.

A draw is the largest of log p + Gumbel noise, with noise fixed by (seed, row, absolute position):
whoever gets to a position, by plain steps or by a tree, draws the same token there.

Legend: B batch rows, N tree nodes, M nodes of different rows, T positions, V vocabulary,
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

# These read the logits and nothing else.
BLIND: tuple[type, ...] = (
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
NOT_DRAWN = -1
MASK64 = (1 << 64) - 1


class Sampler:
    """How the next token is drawn.

    processors: as `generate` prepares them. A processor of your own must be a function of
    (input_ids, scores) only: of no earlier call, and not of the row's number in its input, because
    rows are regrouped by prefix length. sample: draw, or take the largest (greedy). seed: of
    the noise. ValueError for processors that cannot work on a tree.
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
                    "or runs a second model, but a tree asks for many continuations at once. Leave "
                    "the option away, or decode with transformers' own generate."
                )
        self.reads_prefix = any(type(one) not in BLIND for one in self.processors)

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

    def draw(
        self,
        tree: Tree,
        logits_BNV: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        prefixes: Sequence[Tensor],
    ) -> Tensor:
        """B x N: the token drawn after each node that a row comes to by its draws.

        Nodes that are not come to hold -1, which no token equals (where a draw is simply the
        largest logit, all nodes are drawn at). rows: the number that each row had in the batch at
        the start. positions: of the token after the root. prefixes: each row's tokens so far (1-D,
        the root is the last); read only where `reads_prefix`.
        """
        if not self.processors and not self.sample:
            return likeliest(logits_BNV)
        draws_BN = torch.full_like(tree.tokens_BN, NOT_DRAWN)
        walking = list(range(len(rows)))
        at_M = torch.zeros_like(tree.tokens_BN[:, 0])
        texts = list(prefixes)
        for depth in range(tree.nodes):
            numbers = [rows[row] for row in walking]
            ids = [texts[row] for row in walking] if self.reads_prefix else []
            scores_MV = self.scores(logits_BNV[walking, at_M], ids, numbers)
            if self.sample:
                places = [positions[row] + depth for row in walking]
                scores_MV = scores_MV + self.noise(numbers, places, scores_MV)
            drawn_M = likeliest(scores_MV)
            draws_BN[walking, at_M] = drawn_M
            if tree.nodes == 1:
                break
            right_MN = tree.tokens_BN[walking] == drawn_M[:, None]
            met_MN = right_MN & (tree.parents_BN[walking] == at_M[:, None])
            going = [place for place, met in enumerate(met_MN.any(1).tolist()) if met]
            if not going:
                break
            at_M = met_MN[going].int().argmax(1)
            walking = [walking[place] for place in going]
            if self.reads_prefix:
                for row, drawn_1 in zip(walking, drawn_M[going].split(1), strict=True):
                    texts[row] = torch.cat([texts[row], drawn_1])
        return draws_BN

    def scores(self, logits_MV: Tensor, prefixes: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Processed logits: log-probabilities up to a constant per row, float32.

        prefixes: the M texts; read only where `reads_prefix`. rows: as in `draw`.
        """
        scores_MV = logits_MV.float()
        groups = _by_length(prefixes)
        nothing_M0 = torch.empty(len(rows), 0, dtype=torch.int64, device=logits_MV.device)
        for processor in self.processors:
            if type(processor) in BLIND:
                scores_MV = _process(processor, nothing_M0, scores_MV, rows)
                continue
            parts = [
                _process(
                    processor,
                    torch.stack([prefixes[place] for place in group]),
                    scores_MV[group],
                    [rows[place] for place in group],
                )
                for group in groups
            ]
            order = [place for group in groups for place in group]
            scores_MV = torch.empty_like(scores_MV)
            scores_MV[order] = torch.cat(parts)
        return scores_MV

    def noise(self, rows: Sequence[int], positions: Sequence[int], like_MV: Tensor) -> Tensor:
        """Gumbel noise M x V for the tokens at absolute positions of rows."""
        waiting_MV = torch.empty_like(like_MV)
        generator = torch.Generator(like_MV.device)
        for waiting_V, row, position in zip(waiting_MV, rows, positions, strict=True):
            generator.manual_seed(_mixed(self.seed, row, position))
            waiting_V.exponential_(generator=generator)
        return -waiting_MV.clamp_min(torch.finfo(torch.float32).tiny).log()


def likeliest(scores_RV: Tensor) -> Tensor:
    """The index of each row's largest score, by the device's kernels."""
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
    """Places of prefixes that have one length: processors want a matrix."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prefix_T in enumerate(prefixes):
        groups[len(prefix_T)].append(place)
    return list(groups.values())


def _process(processor: object, ids_MT: Tensor, scores_MV: Tensor, rows: Sequence[int]) -> Tensor:
    """Apply a processor; those of transformers that know their row by number get the right one."""
    if isinstance(processor, hf.RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, Tensor):  # left padding of each row
            processor = hf.RepetitionPenaltyLogitsProcessor(
                processor.penalty, prompt_ignore_length=ignored[list(rows)]
            )
    elif isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = hf.PrefixConstrainedLogitsProcessor(
            lambda index, ids_T: allowed(rows[index], ids_T), 1
        )
    return processor(ids_MT, scores_MV)  # type: ignore[operator]
