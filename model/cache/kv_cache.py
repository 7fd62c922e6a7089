"""Keys and values of a ragged batch, of which the newest positions are pending draft tokens.

The committed keys of sequence b are in the slots [0, lengths_B[b]). A forward pass writes its N new
positions right behind them: they are pending. `commit` keeps the accepted ones, moves those that
are not in their final slots yet, and drops the rest, which the next pass overwrites. Sliding
windows are left to the mask: a layer that drops old slots could not take a draft token back.

A cache grows by blocks, and a pass sees the slots up to the last one of the longest sequence. A
preallocated cache shows all slots each time: every shape stays the same and nothing is copied to
the host, as CUDA graphs and compiled code need it. The mask hides what is not written yet. The
lengths then change in place, because a graph knows them by their address.

Recurrent layers have states instead of slots (recurrent_state.py). Sparse attention has keys of an
indexer beside its own (target/sparse_attention.py).

Legend: B sequences, P accepted positions, N new positions, M pending positions, L layers, H heads
of keys and values, S slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .recurrent_state import RecurrentStates

BLOCK = 256  # slots by which a layer grows


@dataclass
class WriteSlots:
    """The slots of the new positions; all layers share it.

    first: slot of the first new position where that is the same for all sequences, else None: see
        `indices`.
    end: number of slots that a forward pass sees.
    fixed: whether `end` never changes.
    steps: range of the new positions, counted from the first uncommitted one.
    """

    first: int | None = 0
    end: int = 0
    fixed: bool = False
    lengths_B: Tensor | None = None
    steps: tuple[int, int] = (0, 0)
    _indices: tuple[Tensor, Tensor] | None = None

    def place(self, lengths_B: Tensor, pending_before: int, new: int) -> None:
        """Put the new positions behind the committed and the earlier pending ones."""
        self.lengths_B, self._indices = lengths_B, None
        self.steps = (pending_before, pending_before + new)

    def indices(self) -> tuple[Tensor, Tensor]:
        """Sequences B x 1 and slots B x N, computed once per pass, when first needed."""
        if self._indices is None:
            assert self.lengths_B is not None
            rows_B1 = torch.arange(len(self.lengths_B), device=self.lengths_B.device)[:, None]
            steps_N = torch.arange(*self.steps, device=self.lengths_B.device)
            self._indices = rows_B1, self.lengths_B[:, None] + steps_N
        return self._indices


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer. Their head_dims may differ (MLA).

    indexer_keys: keys of sparse attention's indexer, B x 1 x S x D, where the layer has one.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, write_slots: WriteSlots) -> None:
        super().__init__()
        self.write_slots = write_slots
        self.indexer_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = _grown(key_states[:, :, :0], self.write_slots)
        self.values = _grown(value_states[:, :, :0], self.write_slots)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values B x H x N x D to their slots; return the visible slots."""
        keys, values = self.allocate(key_states, value_states)
        place = self.write_slots
        return _written(keys, key_states, place), _written(values, value_states, place)

    def allocate(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All slots, grown for new positions like these, which are not written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.write_slots.end > self.keys.shape[2]:
            self.keys = _grown(self.keys, self.write_slots)
            self.values = _grown(self.values, self.write_slots)
        return self.keys, self.values

    def update_indexer(self, key_states: Tensor) -> Tensor:
        """As `update`, with an indexer's keys B x N x D."""
        new_B1ND = key_states[:, None]
        if self.indexer_keys is None:
            self.indexer_keys = new_B1ND[:, :, :0]
        if self.write_slots.end > self.indexer_keys.shape[2]:
            self.indexer_keys = _grown(self.indexer_keys, self.write_slots)
        return _written(self.indexer_keys, new_B1ND, self.write_slots)[:, 0]

    def tensors(self) -> list[Tensor]:
        """All tensors of the layer, each B x H x S x D."""
        both = [self.keys, self.values] if self.is_initialized else []
        return both if self.indexer_keys is None else [*both, self.indexer_keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.write_slots.end, 0

    def get_seq_length(self) -> int:
        """Slots in front of the new positions, where all sequences have equally many."""
        return self.write_slots.first or 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class KVCache(Cache):
    """The cache of a batch; see the head of this file.

    capacity: slots of a preallocated cache; None for one that grows.
    recurrent: indices of the layers that have states instead of slots, for B = 1 only.
    lengths_B: committed tokens of each sequence.
    """

    def __init__(
        self,
        batch_size: int,
        num_layers: int,
        device: torch.device,
        capacity: int | None = None,
        recurrent: Sequence[int] = (),
    ):
        assert batch_size == 1 or not recurrent
        self._write_slots = WriteSlots(end=capacity or 0, fixed=capacity is not None)
        self.states = RecurrentStates(recurrent) if recurrent else None
        states = self.states.layers if self.states is not None else {}
        self.kv_layers = [KVLayer(self._write_slots) for _ in range(num_layers - len(states))]
        attention = iter(self.kv_layers)
        super().__init__(
            layers=[states[at] if at in states else next(attention) for at in range(num_layers)]
        )
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [
            0
        ] * batch_size  # the same on the host, so that no step waits for the device
        self._pending = self._pending_before = 0
        self._stacks: tuple[Tensor, Tensor] | None = None  # all layers' keys and values, L x

    @property
    def preallocated(self) -> bool:
        return self._write_slots.fixed

    @property
    def max_length(self) -> int:
        """Committed tokens of the longest sequence. Of a growing cache only."""
        assert not self.preallocated
        return max(self._lengths, default=0)

    @property
    def slots(self) -> int:
        """Number of slots that the current forward pass sees."""
        return self._write_slots.end

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(one.nbytes for layer in self.kv_layers for one in layer.tensors())

    @property
    def pending_before(self) -> int:
        """Pending positions in front of those of the current forward pass."""
        return self._pending_before

    @property
    def num_sequences(self) -> int:
        return len(self.lengths_B)

    @property
    def equal_lengths(self) -> bool:
        """Whether all sequences are known to have the same length."""
        return not self.preallocated and min(self._lengths) == self.max_length

    def reserve(self, new: int, pending_before: int = 0, rewrite: int = 0) -> None:
        """Prepare for a forward pass over `new` positions.

        pending_before: pending positions of earlier passes that stay, in front of the new ones.
        rewrite: last committed slots that the pass writes once more.
        """
        slots, self._pending_before = self._write_slots, pending_before
        self._pending = pending_before + new
        slots.first = self.max_length + pending_before - rewrite if self.equal_lengths else None
        slots.place(self.lengths_B, pending_before, new)
        if not self.preallocated:
            slots.end = self.max_length + self._pending

    def new_slots(self, new: int) -> Tensor:
        """Slots of the new positions, B x N."""
        slots = self._write_slots
        if slots.first is None:
            return slots.indices()[1]
        slots_N = torch.arange(slots.first, slots.first + new, device=self.lengths_B.device)
        return slots_N.expand(self.num_sequences, -1).contiguous()

    def visible(self, pending_BNM: Tensor) -> Tensor:
        """True where a new position sees a slot, B x N x S: all committed ones, and the pending
        ones that are True in `pending_BNM`."""
        batch, new, pending = pending_BNM.shape
        assert pending == self._pending
        if self.equal_lengths:
            old_BNS = pending_BNM.new_ones(batch, new, self.max_length)
            return torch.cat([old_BNS, pending_BNM], -1)
        offsets_BS = self._offsets()
        if not pending:
            return (offsets_BS < 0)[:, None].expand(batch, new, -1)
        index_B1S = offsets_BS.clamp(0, pending - 1)[:, None]
        visible_BNS = pending_BNM.gather(2, index_B1S.expand(batch, new, -1))
        visible_BNS = visible_BNS & (offsets_BS < pending)[:, None]
        return visible_BNS | (offsets_BS < 0)[:, None]

    def positions(self, steps_BM: Tensor) -> Tensor:
        """Position in the sequence of each slot, B x S.

        steps_BM: positions of the pending ones, counted from the first uncommitted one.
        """
        offsets_BS = self._offsets()
        steps_BS = steps_BM.gather(1, offsets_BS.clamp(0, self._pending - 1))
        return self.lengths_B[:, None] + torch.where(offsets_BS < 0, offsets_BS, steps_BS)

    def commit(self, path_BP: Tensor | None, counts_B: Tensor) -> None:
        """Commit the pending positions path_BP[b, :counts_B[b]] in that order; drop the others.

        path_BP: None for the first ones. Entries past the count are ignored.
        """
        if self.preallocated:
            if path_BP is not None:
                self._move(path_BP, 0)
            self.lengths_B += counts_B
        else:
            counts = counts_B.tolist()
            self._commit_on_host(path_BP, counts)
            if self.states is not None:
                self.states.commit(counts[0])
            self.lengths_B = self.lengths_B + counts_B
        self._pending = 0

    def preallocate(self, capacity: int) -> None:
        """Use exactly `capacity` slots from now on. Of an empty cache only."""
        assert not self.preallocated and self.max_length == 0 and self.states is None
        self._write_slots.end, self._write_slots.fixed = capacity, True

    def copy_from(self, other: KVCache) -> None:
        """Copy the committed slots of another cache with as many sequences and layers.

        Of a preallocated cache only, whose tensors keep their addresses. Pending positions are
        dropped.
        """
        held = other.slots if other.preallocated else other.max_length
        assert (
            self.preallocated and held <= self.slots and other.num_sequences == self.num_sequences
        )
        if not any(layer.is_initialized for layer in self.kv_layers):
            self._allocate_like(other)
        for layer, source in zip(self.kv_layers, other.kv_layers, strict=True):
            if source.is_initialized:
                for mine, theirs in zip(layer.tensors(), source.tensors(), strict=True):
                    mine[:, :, :held] = theirs[:, :, :held]
        self.lengths_B.copy_(other.lengths_B)
        self._pending = 0

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep these rows of the batch only, in this order. Pending positions are dropped.

        In place, and only rows that move are copied: a batch may hold gigabytes, and its sequences
        finish one by one.
        """
        rows = rows_B.tolist()
        if self.states is not None:
            self.states.drop()
        changed = [index for index, row in enumerate(rows) if index != row]
        moved = torch.tensor(changed, dtype=torch.int64, device=rows_B.device)
        for layer in self.kv_layers:
            if layer.is_initialized:
                layer.keys = _selected(layer.keys, rows_B, moved)
                layer.values = _selected(layer.values, rows_B, moved)
            if layer.indexer_keys is not None:
                layer.indexer_keys = _selected(layer.indexer_keys, rows_B, moved)
        self.lengths_B = self.lengths_B[rows_B]
        self._lengths = [self._lengths[row] for row in rows]
        self._pending = 0

    def _offsets(self) -> Tensor:
        """Distance of each slot from the first uncommitted one, B x S; negative if committed."""
        slots_S = torch.arange(self.slots, device=self.lengths_B.device)
        return slots_S - self.lengths_B[:, None]

    def _allocate_like(self, like: KVCache) -> None:
        """Allocate layers of the shapes of another cache's.

        Layers of one shape share a tensor, so that `commit` moves a path in all of them at once
        instead of with a few small operations per layer.
        """
        pairs = list(zip(self.kv_layers, like.kv_layers, strict=True))
        for mine, one in pairs:
            if one.indexer_keys is not None:
                mine.indexer_keys = _grown(one.indexer_keys[:, :, :0], self._write_slots)
        known = [one for _, one in pairs if one.is_initialized]
        shapes = {(one.keys.shape, one.values.shape, one.keys.dtype) for one in known}
        if len(shapes) != 1 or len(known) < len(pairs):
            for mine, one in pairs:
                if one.is_initialized:
                    mine.lazy_initialization(one.keys, one.values)
            return
        layers, (batch, heads, _, key_dim) = len(pairs), known[0].keys.shape
        value_dim = known[0].values.shape[-1]
        keys_LBHSD = known[0].keys.new_zeros(layers, batch, heads, self.slots, key_dim)
        values_LBHSD = keys_LBHSD.new_zeros(layers, batch, heads, self.slots, value_dim)
        self._stacks = keys_LBHSD, values_LBHSD
        for mine, keys, values in zip(self.kv_layers, keys_LBHSD, values_LBHSD, strict=True):
            mine.keys, mine.values, mine.is_initialized = keys, values, True

    def _stacked(self) -> list[Tensor]:
        """All tensors, ... x B x H x S x D, those of several layers in one where possible."""
        if self._stacks is None:
            return [one for layer in self.kv_layers for one in layer.tensors()]
        indexers = [one.indexer_keys for one in self.kv_layers if one.indexer_keys is not None]
        return [*self._stacks, *indexers]

    def _commit_on_host(self, path_BP: Tensor | None, counts: list[int]) -> None:
        assert len(counts) == self.num_sequences and max(counts) <= self._pending, (
            "paths do not fit"
        )
        if path_BP is not None:
            paths = zip(path_BP.tolist(), counts, strict=True)
            kept = [path[:count] for path, count in paths]
            assert all(0 <= node < self._pending for path in kept for node in path), "not pending"
            moved = [_prefix_in_place(path) for path in kept if _prefix_in_place(path) < len(path)]
            assert not moved or self.states is None, "a state cannot branch"
            if moved:
                first, last = min(moved), max(counts)
                self._move(path_BP[:, first:last], first)
        self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]

    def _move(self, path_BP: Tensor, first: int) -> None:
        """Copy pending positions to the slots from lengths_B + first on.

        Entries past a sequence's count end up in slots that are free afterwards.
        """
        steps_P = torch.arange(first, first + path_BP.shape[1], device=path_BP.device)
        target_BP = self.lengths_B[:, None] + steps_P
        source_BP = self.lengths_B[:, None] + path_BP.clamp(0, self._pending - 1)
        rows_B1 = torch.arange(self.num_sequences, device=path_BP.device)[:, None]
        for held in self._stacked():
            held[..., rows_B1, :, target_BP, :] = held[..., rows_B1, :, source_BP, :]


def _written(cached_BHSD: Tensor, new_BHND: Tensor, write_slots: WriteSlots) -> Tensor:
    """Write the new positions to their slots; return the slots that the pass sees."""
    first = write_slots.first
    if first is not None:
        cached_BHSD[:, :, first : first + new_BHND.shape[2]] = new_BHND
    else:
        rows_B1, slots_BN = write_slots.indices()
        cached_BHSD[rows_B1, :, slots_BN] = new_BHND.transpose(1, 2)
    return cached_BHSD[:, :, : write_slots.end]


def _prefix_in_place(path: list[int]) -> int:
    """Number of leading positions of a path that are in their final slots already."""
    moved = (index for index, node in enumerate(path) if index != node)
    return next(moved, len(path))


def _selected(cached_BHSD: Tensor, rows_B: Tensor, moved: Tensor) -> Tensor:
    """The rows `rows_B` as a view. moved: indices into it whose row changes its place."""
    if len(moved):
        cached_BHSD[moved] = cached_BHSD[rows_B[moved]]
    return cached_BHSD[: len(rows_B)]


def _grown(cached_BHSD: Tensor, write_slots: WriteSlots) -> Tensor:
    """The same slots and more, as many as a pass sees, in whole blocks.

    New ones are zero: a masked slot has weight 0, and 0 times a stray NaN would be NaN.
    """
    batch, heads, used, head_dim = cached_BHSD.shape
    end = write_slots.end
    capacity = end if write_slots.fixed else -(-end // BLOCK) * BLOCK
    grown = cached_BHSD.new_zeros(batch, heads, capacity, head_dim)
    grown[:, :, :used] = cached_BHSD
    return grown
