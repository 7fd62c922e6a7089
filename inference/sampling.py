"""From the target's logits to draws, with the meanings of transformers' `generate`.

Whatever `generate` builds (temperature, top-k, top-p, penalties, forbidden tokens) is a list of
logits processors over (prefix, logits). A tree node stands for a prefix of its own: the row's
tokens so far and the path to the node. Processors that are known to look at the logits only run on
all nodes at once; the others run per prefix length.

A draw is the largest of log p + Gumbel noise, with noise fixed by (seed, row, absolute position):
whoever gets to a position, by plain steps or by a tree, draws the same token there.

Legend: B batch rows, N tree nodes, C depths (0 is the root), M nodes of one length, T positions,
V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from headstart.model.tree import Tree

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
        self._noise: dict[tuple[int, int, int, torch.device], Tensor] = {}

    @staticmethod
    def of(
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> Sampler:
        """The common settings, in the order in which `generate` applies them. Temperature 0 is
        greedy."""
        processors: LogitsProcessorList = LogitsProcessorList()
        if repetition_penalty is not None:
            processors.append(hf.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if temperature == 0:
            return Sampler(processors)
        processors.append(hf.TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            processors.append(hf.TopKLogitsWarper(top_k))
        if top_p is not None:
            processors.append(hf.TopPLogitsWarper(float(top_p)))
        return Sampler(processors, sample=True, seed=seed)

    def scores(
        self, tree: Tree, logits_BNV: Tensor, prefixes: Sequence[Tensor], rows: Sequence[int]
    ) -> Tensor:
        """Processed logits: log-probabilities up to a constant per node, float32.

        prefixes: each row's tokens so far (1-D, the root is the last); read only where
        `reads_prefix`. rows: the number that each row had in the batch at the start.
        """
        scores_BNV = logits_BNV.float()
        groups: list[_Group] | None = None
        for processor in self.processors:
            if type(processor) in BLIND:
                flat = scores_BNV.flatten(0, 1)
                none = torch.empty(len(flat), 0, dtype=torch.int64, device=flat.device)
                scores_BNV = processor(none, flat).view_as(scores_BNV)  # type: ignore[operator]
                continue
            if groups is None:
                groups = _by_length(tree, prefixes)
                scores_BNV = scores_BNV.clone()  # written to below; the logits are not ours
            for group in groups:
                numbers = [rows[row] for row in group.rows]
                at = (group.rows, group.nodes)
                scores_BNV[at] = _process(processor, group.ids_MT, scores_BNV[at], numbers)
        return scores_BNV

    def noise(
        self, rows: Sequence[int], positions: Sequence[int], depths: int, logits_BNV: Tensor
    ) -> Tensor | None:
        """Gumbel noise B x depths x V for the tokens at positions[b], positions[b] + 1, ..., or
        None for greedy.

        What a tree did not use up is kept for the next round, so that noise is made once per
        position.
        """
        if not self.sample:
            return None
        vocabulary, device = logits_BNV.shape[-1], logits_BNV.device
        keys = [
            [(row, position + depth, vocabulary, device) for depth in range(depths)]
            for row, position in zip(rows, positions, strict=True)
        ]
        before = self._noise
        self._noise = {
            key: before[key] if key in before else self._fresh(*key)
            for row_keys in keys
            for key in row_keys
        }
        return torch.stack(
            [torch.stack([self._noise[key] for key in row_keys]) for row_keys in keys]
        )

    def _fresh(self, row: int, position: int, vocabulary: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device)
        generator.manual_seed(_mixed(self.seed, row, position))
        waiting_V = torch.empty(vocabulary, device=device).exponential_(generator=generator)
        return -waiting_V.clamp_min(torch.finfo(torch.float32).tiny).log()


def _mixed(*numbers: int) -> int:
    """One well-mixed 64-bit number (the finaliser of splitmix64 after each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


class _Group:
    """Nodes, of any rows, whose prefixes have one length."""

    def __init__(self, members: list[tuple[int, int, Tensor]]):
        self.rows = [row for row, _, _ in members]
        self.nodes = [node for _, node, _ in members]
        self.ids_MT = torch.stack([ids_T for _, _, ids_T in members])


def _by_length(tree: Tree, prefixes: Sequence[Tensor]) -> list[_Group]:
    members: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    tokens, parents = torch.stack([tree.tokens_BN, tree.parents_BN]).tolist()
    for row, prefix_T in enumerate(prefixes):
        paths: list[list[int]] = [[]]
        for node in range(tree.nodes):
            parent = parents[row][node]
            if node:
                paths.append([*paths[parent], tokens[row][node]] if parent >= 0 else [])
            if node == 0 or parent >= 0:  # not padding
                ids_T = torch.cat([prefix_T, prefix_T.new_tensor(paths[node])])
                members[len(ids_T)].append((row, node, ids_T))
    return [_Group(nodes) for nodes in members.values()]


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
