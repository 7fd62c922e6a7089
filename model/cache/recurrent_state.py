"""States of the recurrent layers of a sequence whose newest positions are pending draft tokens.

A state cannot branch, and no token can be taken out of it. So a snapshot is taken twice: before a
forward pass, and within it behind the positions that are certain (a tree's root). Where all new
positions are accepted, the states of the end stay. Otherwise the layers are restored to the last
snapshot in front of the first rejected position, and the tokens that were accepted behind it are
replayed: the next forward pass begins with them. Attention layers then write the same slots again.

A snapshot costs next to nothing: states are replaced, never written to.

Legend: W replayed tokens, N new positions, T positions of a forward pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

Snapshot = dict[str, dict[int, Any]]
INPUT = "hidden_states"  # transformers' name of a mixer's input, 1 x T x D
CHUNK = 64  # positions that its code takes at a time


class RecurrentStateLayer(LinearAttentionLayer):
    """The states of one recurrent layer, in transformers' own form."""

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def snapshot(self) -> Snapshot:
        """The layer as it is now.

        Only the short window of the convolution is written to in place, so that alone is copied.
        """
        kept = {name: dict(held) for name, held in vars(self).items() if isinstance(held, dict)}
        windows = kept["conv_states"].items()
        kept["conv_states"] = {at: None if one is None else one.clone() for at, one in windows}
        return kept

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot, which can be used once."""
        vars(self).update(snapshot)


class RecurrentStates:
    """All recurrent layers of one sequence. layers: by their index among the decoder layers."""

    def __init__(self, indices: Sequence[int]):
        self.layers = {index: RecurrentStateLayer() for index in indices}
        self._replay_W: Tensor | None = None
        self._new_N: Tensor | None = None  # pending positions
        self._certain = 0
        self._before: dict[int, Snapshot] = {}
        self._at_root: dict[int, Snapshot] = {}

    def begin(self, ids_N: Tensor, certain: int) -> Tensor:
        """Begin a forward pass; return its tokens: the replayed ones, then the new ones.

        certain: how many of the new ones are no draft tokens.
        """
        self.drop()
        self._new_N, self._certain = ids_N, certain
        self._before = {index: layer.snapshot() for index, layer in self.layers.items()}
        self._at_root = {}
        return ids_N if self._replay_W is None else torch.cat([self._replay_W, ids_N])

    @contextmanager
    def snapshot_at_root(self, mixers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Within it mixers compute the certain positions apart from the draft tokens, and take a
        snapshot in between."""
        assert self._new_N is not None
        handles = []
        if self._certain < len(self._new_N):
            replayed = 0 if self._replay_W is None else len(self._replay_W)
            for index, mixer in mixers.items():
                first_part: list[Tensor] = []
                split = partial(self._split, index, replayed + self._certain, first_part)
                handles.append(mixer.register_forward_pre_hook(split, with_kwargs=True))
                handles.append(mixer.register_forward_hook(partial(_joined, first_part)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def commit(self, count: int) -> None:
        """Accept the first `count` of the new positions."""
        assert self._new_N is not None, "there was no forward pass"
        new_N, self._new_N = self._new_N, None
        if count == len(new_N):
            self._replay_W = None
        elif self._at_root and count >= self._certain:
            self._restore(self._at_root)
            more = new_N[self._certain : count]
            self._replay_W = more if len(more) else None
        else:
            self._restore(self._before)
            kept = [new_N[:count]] if self._replay_W is None else [self._replay_W, new_N[:count]]
            self._replay_W = torch.cat(kept)

    def drop(self) -> None:
        """Undo a forward pass that was not committed."""
        if self._new_N is not None:
            self._restore(self._before)
            self._new_N = None

    def _restore(self, snapshots: Mapping[int, Snapshot]) -> None:
        for index, snapshot in snapshots.items():
            self.layers[index].restore(snapshot)

    def _split(
        self,
        index: int,
        count: int,
        first_part: list[Tensor],
        mixer: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Compute the first `count` positions; leave the rest to the call behind this hook."""
        whole_1TD: Tensor = named[INPUT]
        first_part.append(mixer.forward(*given, **named | _arguments(whole_1TD[:, :count])))
        self._at_root[index] = self.layers[index].snapshot()
        return given, named | _arguments(whole_1TD[:, count:])


def _arguments(hidden_1TD: Tensor) -> dict[str, Any]:
    """A few positions as a mixer takes them.

    transformers' own code pads them to chunks of 64, which costs 5.0 ms in a layer with 16 heads of
    128 channels; a chunk of 8 costs 0.8 (one thread).
    """
    positions = hidden_1TD.shape[1]
    short = hidden_1TD.is_cpu and positions <= CHUNK // 2
    return {INPUT: hidden_1TD} | ({"chunk_size": -(-positions // 8) * 8} if short else {})


def _joined(first_part: list[Tensor], _: nn.Module, __: object, rest: Tensor) -> Tensor:
    return torch.cat([first_part.pop(), rest], 1)
