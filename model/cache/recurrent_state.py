"""States of recurrent layers behind a text of which the newest rows are only guesses.

A state cannot branch, and no token can be taken out of it. So it is noted twice: before a read, and
within the read behind the rows that are certain (a tree's root). Where all rows of a read are
accepted, the states of its end stay. Otherwise the layers return to the last note in front of the
first rejected row, and the tokens that were accepted behind it wait: the next read begins with
them, in the same pass as its own rows. Attention layers then write the same columns again.

A note costs next to nothing: states are replaced, never written to.

Legend: W tokens that wait, N new rows of a read, T rows of a read in all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

Note = dict[str, dict[int, Any]]
INPUT = "hidden_states"  # transformers' name of what a mixer reads, 1 x T x D
CHUNK = 64  # rows that its code reads at a time


class RecurrentStateLayer(LinearAttentionLayer):
    """The states of one recurrent layer, in transformers' own form."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def snapshot(self) -> Note:
        """The layer as it is now. Only the short window of the convolution is written to in place,
        so that alone is copied."""
        kept = {name: dict(held) for name, held in vars(self).items() if isinstance(held, dict)}
        windows = kept["conv_states"].items()
        kept["conv_states"] = {at: None if one is None else one.clone() for at, one in windows}
        return kept

    def restore(self, note: Note) -> None:
        """Be as noted. A note can be used once."""
        vars(self).update(note)


class RecurrentStates:
    """All recurrent layers of one text. layers: by their place among the decoder layers."""

    def __init__(self, places: Sequence[int]):
        self.layers = {place: RecurrentStateLayer() for place in places}
        self._waiting_W: Tensor | None = None
        self._new_N: Tensor | None = None  # pending rows
        self._certain = 0
        self._before: dict[int, Note] = {}
        self._within: dict[int, Note] = {}

    def begin(self, ids_N: Tensor, certain: int) -> Tensor:
        """The tokens of a read: those that wait, then the new ones, of which the first `certain`
        are no guesses."""
        self.drop()
        self._new_N, self._certain = ids_N, certain
        self._before = {place: layer.snapshot() for place, layer in self.layers.items()}
        self._within = {}
        return ids_N if self._waiting_W is None else torch.cat([self._waiting_W, ids_N])

    @contextmanager
    def snapshot_at_root(self, mixers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Within it mixers read the certain rows apart from the guesses, and are noted between."""
        assert self._new_N is not None
        handles = []
        if self._certain < len(self._new_N):
            waiting = 0 if self._waiting_W is None else len(self._waiting_W)
            for place, mixer in mixers.items():
                halves: list[Tensor] = []
                first = partial(self._first, place, waiting + self._certain, halves)
                handles.append(mixer.register_forward_pre_hook(first, with_kwargs=True))
                handles.append(mixer.register_forward_hook(partial(_joined, halves)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def commit(self, count: int) -> None:
        """The first `count` of the new rows are part of the text."""
        assert self._new_N is not None, "nothing was read"
        new_N, self._new_N = self._new_N, None
        if count == len(new_N):
            self._waiting_W = None
        elif self._within and count >= self._certain:
            self._go_back(self._within)
            more = new_N[self._certain : count]
            self._waiting_W = more if len(more) else None
        else:
            self._go_back(self._before)
            kept = [new_N[:count]] if self._waiting_W is None else [self._waiting_W, new_N[:count]]
            self._waiting_W = torch.cat(kept)

    def drop(self) -> None:
        """A read that was not committed leaves nothing behind."""
        if self._new_N is not None:
            self._go_back(self._before)
            self._new_N = None

    def _go_back(self, notes: Mapping[int, Note]) -> None:
        for place, note in notes.items():
            self.layers[place].restore(note)

    def _first(
        self,
        place: int,
        rows: int,
        halves: list[Tensor],
        mixer: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the first rows, and leave the rest to the call that this hook precedes."""
        whole_1TD: Tensor = named[INPUT]
        halves.append(mixer.forward(*given, **named | _rows(whole_1TD[:, :rows])))
        self._within[place] = self.layers[place].snapshot()
        return given, named | _rows(whole_1TD[:, rows:])


def _rows(some_1TD: Tensor) -> dict[str, Any]:
    """A few rows as a mixer takes them. transformers' own code fills them up to chunks of 64, which
    costs 5.0 ms in a layer with 16 heads of 128 channels; a chunk of 8 costs 0.8 (one thread)."""
    rows = some_1TD.shape[1]
    shorter = some_1TD.is_cpu and rows <= CHUNK // 2
    return {INPUT: some_1TD} | ({"chunk_size": -(-rows // 8) * 8} if shorter else {})


def _joined(halves: list[Tensor], _: nn.Module, __: object, rest: Tensor) -> Tensor:
    return torch.cat([halves.pop(), rest], 1)
