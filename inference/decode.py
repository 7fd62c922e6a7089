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
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteria

from headstart.model.cache import KVCache
from headstart.model.head import DraftHead
from headstart.model.seen import Seen
from headstart.model.target import Target
from headstart.model.tree import Tree, TreeShape

from .sampling import Sampler
from .stats import Stats
from .verify import Accepted, accept

# Small enough to pay on a CPU, where every node costs a quarter of a step.
DEFAULT_TREE = TreeShape.dynamic(nodes=8, depth=4, width=3)


@dataclass(frozen=True)
class Stop:
    """When an answer ends: at `max_new_tokens`, after one of the tokens `eos`, or where one of
    transformers' stopping criteria says so. The token that stops belongs to the answer.

    Criteria are asked for one row at a time (1 x T ids: the prompt as given, then the answer), and
    get None for the scores.
    """

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    criteria: tuple[StoppingCriteria, ...] = ()


@dataclass
class _Row:
    """One answer in the making. number: place in the batch at the start. given: the prompt as it
    came, padding included; room: tokens that may still come; length: tokens read or drawn so far,
    padding excluded."""

    number: int
    given: list[int]
    length: int
    room: int

    def take(self, drawn: Sequence[int], stop: Stop) -> list[int]:
        """What of the drawn tokens belongs to the answer; `room` is 0 once it is complete."""
        kept: list[int] = []
        ended = False
        for token in drawn[: self.room]:
            kept.append(token)
            ended = token in stop.eos
            if ended:
                break
        met = self._met(kept, stop.criteria) if stop.criteria else None
        if met is not None:
            kept, ended = kept[:met], True
        self.given += kept
        self.length += len(kept)
        self.room = 0 if ended else self.room - len(kept)
        return kept

    def _met(self, kept: list[int], criteria: Sequence[StoppingCriteria]) -> int | None:
        """After how many of the tokens a criterion first says stop."""
        ids_1T = torch.tensor([self.given + kept])
        for count in range(1, len(kept) + 1):
            seen_1T = ids_1T[:, : len(self.given) + count]
            if any(bool(torch.as_tensor(one(seen_1T, None)).any()) for one in criteria):
                return count
        return None


@dataclass(frozen=True)
class _Read:
    """Positions that become part of the text: where they lie in the last read, what was seen at
    them, and the token that follows each."""

    path_BP: Tensor
    counts_B: Tensor
    seen: Seen
    next_BP: Tensor

    def keep(self, rows: Tensor) -> _Read:
        hidden = {layer: values[rows] for layer, values in self.seen.hidden.items()}
        seen = Seen(None, self.seen.last_BTD[rows], hidden)
        return _Read(self.path_BP[rows], self.counts_B[rows], seen, self.next_BP[rows])


def plain(
    target: Target,
    tokens_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    sampler: Sampler,
    stop: Stop,
    stats: Stats | None = None,
) -> Iterator[list[list[int]]]:
    """One token per pass. Arguments and result as in `decode`, without a head."""
    return _started(target, None, tokens_BT, mask_BT, sampler, stop, DEFAULT_TREE, stats)


def decode(
    target: Target,
    head: DraftHead,
    tokens_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    sampler: Sampler,
    stop: Stop,
    shape: TreeShape = DEFAULT_TREE,
    stats: Stats | None = None,
) -> Iterator[list[list[int]]]:
    """Answer prompts, several tokens per pass: exactly what `plain` would answer.

    tokens_BT: prompts. mask_BT: 1 for tokens and 0 for padding, which may be on either side; None
    for no padding. Yields once per pass, for every row of the batch, the tokens that its answer
    grew by (none for rows that are complete). ValueError for an empty prompt and for one that
    leaves no room in the target's context.
    """
    return _started(target, head, tokens_BT, mask_BT, sampler, stop, shape, stats)


# Within a caller's inference mode too: a stream may go on after it, and then could not write to a
# cache that was made in it.
@torch.inference_mode(False)
def _started(
    target: Target,
    head: DraftHead | None,
    tokens_BT: Tensor,
    mask_BT: Tensor | None,
    sampler: Sampler,
    stop: Stop,
    shape: TreeShape,
    stats: Stats | None,
) -> Iterator[list[list[int]]]:
    """Check what was given now, not at the first token."""
    if mask_BT is None:
        mask_BT = torch.ones_like(tokens_BT)
    if tokens_BT.dim() != 2 or mask_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"Prompts are a matrix of token ids with a mask of the same shape, got "
            f"{tuple(tokens_BT.shape)} and {tuple(mask_BT.shape)}. Give one row per prompt."
        )
    tokens_BT = tokens_BT.long()  # int32 is common, and no index elsewhere
    _check_ids(target, tokens_BT[mask_BT != 0])
    rows = _rows(target, tokens_BT, mask_BT, stop)
    lengths_B = torch.tensor([row.length for row in rows], device=target.device)
    # Tokens to the left in their order, padding behind them.
    order_BT = (mask_BT == 0).to(torch.uint8).argsort(dim=1, stable=True)
    packed_BT = tokens_BT.gather(1, order_BT)[:, : max(row.length for row in rows)]
    if head is not None:
        shape = _fitting(shape, head)
    loop = _Loop(target, head, rows, sampler, stop, shape, Stats() if stats is None else stats)
    return loop.run(packed_BT.to(target.device), lengths_B)


def _fitting(shape: TreeShape, head: DraftHead) -> TreeShape:
    """The shape as deep as the head can draft. ValueError if it asks for more than it knows."""
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"A tree is given as a TreeShape, got {shape!r}. For example TreeShape.chain(4)."
        )
    known = head.config.draft_vocab or head.config.vocab_size
    if shape.width > known:
        raise ValueError(
            f"The tree asks for {shape.width} guesses at one place, but the head knows only "
            f"{known} tokens. Make the tree narrower."
        )
    return shape if head.max_depth is None else shape.limited(head.max_depth)


def _check_ids(target: Target, ids: Tensor) -> None:
    odd = ids[(ids < 0) | (ids >= target.vocab_size)]
    if len(odd):
        raise ValueError(
            f"A prompt holds the token {int(odd[0])}, but {target.name} knows the tokens 0 to "
            f"{target.vocab_size - 1}. Use its own tokenizer."
        )


def _rows(target: Target, tokens_BT: Tensor, mask_BT: Tensor, stop: Stop) -> list[_Row]:
    lengths = (mask_BT != 0).sum(1).tolist()
    if not lengths or min(lengths) == 0:
        raise ValueError(
            "A prompt is empty, so there is nothing to continue. Give at least one token, for "
            "example the tokenizer's beginning-of-text token."
        )
    if stop.max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is {stop.max_new_tokens}, so there is nothing to do. Set at least 1."
        )
    limit = target.context_limit
    if limit is not None and max(lengths) >= limit:
        raise ValueError(
            f"A prompt has {max(lengths)} tokens, but {target.name} reads {limit} in all, prompt "
            "and answer together. Shorten the prompt."
        )
    return [
        _Row(
            number,
            given,
            length,
            stop.max_new_tokens if limit is None else min(stop.max_new_tokens, limit - length),
        )
        for number, (given, length) in enumerate(zip(tokens_BT.tolist(), lengths, strict=True))
    ]


class _Loop:
    """One batch on its way: what the rounds share."""

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        rows: list[_Row],
        sampler: Sampler,
        stop: Stop,
        shape: TreeShape,
        stats: Stats,
    ):
        self.target, self.head, self.sampler = target, head, sampler
        self.stop, self.shape, self.stats = stop, shape, stats
        self.rows, self.batch = rows, len(rows)
        self.limit = target.context_limit
        self.cache: KVCache = target.new_cache(self.batch)
        self.state = None if head is None else head.start(self.batch)
        self.layers = () if head is None else head.layers

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens_BT: Tensor, lengths_B: Tensor) -> Iterator[list[list[int]]]:
        self.stats.begin(self.batch, self.target.device)
        read, drawn = self._prompt(tokens_BT, lengths_B)
        depth: int | None = None
        while True:
            emitted = self._take(drawn, depth)
            self.stats.lap("host")
            yield emitted
            self.stats.pause()
            if not any(row.room for row in self.rows):
                return
            read = self._commit(read)
            self.stats.lap("verify")
            tree, depth = self._draft(read)
            self.stats.lap("draft")
            read, drawn = self._verify(tree)
            self.stats.lap("verify")

    def _prompt(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[_Read, list[list[int]]]:
        """Read the prompts and draw the first token of each answer."""
        target = self.target
        # Logits of a whole prompt would be large, and only the last ones are needed.
        seen = target.read(
            tokens_BT, self.cache, lengths_B=lengths_B, layers=self.layers, logits=False
        )
        last_B1 = lengths_B[:, None] - 1
        logits_B1V = target.unembed(seen.at(last_B1).last_BTD)
        accepted = self._accept(Tree.root(tokens_BT.gather(1, last_B1)[:, 0]), logits_B1V)
        drawn = _emitted(accepted)
        path_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        next_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B1, accepted.tokens_BP)
        self.stats.lap("prefill")
        return _Read(path_BT, lengths_B, seen, next_BT), drawn

    def _take(self, drawn: list[list[int]], depth: int | None) -> list[list[int]]:
        """Add what was drawn to the answers; the part of it that belongs there, by batch place."""
        emitted: list[list[int]] = [[] for _ in range(self.batch)]
        kept = [row.take(tokens, self.stop) for row, tokens in zip(self.rows, drawn, strict=True)]
        for row, tokens in zip(self.rows, kept, strict=True):
            emitted[row.number] = tokens
        self.stats.count([len(tokens) for tokens in kept], [len(tokens) for tokens in drawn], depth)
        return emitted

    def _commit(self, read: _Read) -> _Read:
        """Write the path down, and let the complete rows go."""
        self.cache.commit(read.path_BP, read.counts_B)
        alive = _closed_up([row.room > 0 for row in self.rows])
        if len(alive) == len(self.rows):
            return read
        self.rows = [self.rows[index] for index in alive]
        rows = torch.tensor(alive, device=self.target.device)
        self.cache.keep(rows)
        if self.head is not None:
            self.state = self.head.keep(self.state, rows)
        return read.keep(rows)

    def _draft(self, read: _Read) -> tuple[Tree, int]:
        """Take in the path and guess on; the tree and its greatest depth."""
        roots_B = read.next_BP.gather(1, read.counts_B[:, None] - 1)[:, 0]
        # Deeper guesses than any row has room for could not be used.
        depth = min(self.shape.depth, max(row.room for row in self.rows) - 1)
        if self.limit is not None:
            depth = min(depth, min(self.limit - row.length for row in self.rows))
        if self.head is None or depth == 0:  # depth 0: every row ends in this round
            return Tree.root(roots_B), 0
        self.state = self.head.advance(self.state, read.seen, read.next_BP, read.counts_B)
        return self.head.draft(self.state, self.shape.limited(depth)), depth

    def _verify(self, tree: Tree) -> tuple[_Read, list[list[int]]]:
        """Let the target read the tree, and keep a path of it."""
        seen = self.target.read(tree, self.cache, layers=self.layers)
        assert seen.logits_BTV is not None
        accepted = self._accept(tree, seen.logits_BTV)
        drawn = _emitted(accepted)
        accepted = accepted.first(max(map(len, drawn)))
        path_BP = accepted.path_BP
        return _Read(path_BP, accepted.counts_B, seen.at(path_BP), accepted.tokens_BP), drawn

    def _accept(self, tree: Tree, logits_BNV: Tensor) -> Accepted:
        prefixes: list[Tensor] = []
        if self.sampler.reads_prefix:
            prefixes = [torch.tensor(row.given, device=logits_BNV.device) for row in self.rows]
        numbers = [row.number for row in self.rows]
        positions = [row.length for row in self.rows]  # of the token after the root
        return accept(tree, self.sampler.draw(tree, logits_BNV, numbers, positions, prefixes))


def _closed_up(alive: Sequence[bool]) -> list[int]:
    """The places that are alive, the last of them moved into the gaps: most stay where they are."""
    count = sum(alive)
    last = [place for place in range(count, len(alive)) if alive[place]]
    return [place if alive[place] else last.pop() for place in range(count)]


def _emitted(accepted: Accepted) -> list[list[int]]:
    """Every row's drawn tokens, on the host."""
    packed_BP = torch.cat([accepted.counts_B[:, None], accepted.tokens_BP], 1)
    return [numbers[1 : 1 + numbers[0]] for numbers in packed_BP.tolist()]
