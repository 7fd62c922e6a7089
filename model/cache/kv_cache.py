"""Keys and values of a ragged batch, of which the newest rows are only guesses.

Row b's committed keys are the columns [0, lengths_B[b]). A read writes its N rows right behind
them: they are pending. `commit` keeps the accepted ones, moves those that do not lie where they
belong yet, and forgets the rest, which the next read overwrites. Sliding windows are left to the
mask: a layer that drops old columns cannot take a guess back.

A cache grows by blocks, and a read sees the columns up to the longest row's last. With a fixed
capacity it sees all columns each time, every shape stays the same and no number is read on the
host: what CUDA graphs and compiled code need. The mask hides what is not written yet. The lengths
then change in place, because a graph knows them by their address.

Recurrent layers have states instead of columns: see states.py. Sparse attention has keys of an
indexer beside its own: see sparse.py.

Legend: B batch rows, P accepted positions, N new rows of a read, M pending rows, L layers, H heads,
S columns, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .recurrent_state import RecurrentStates

BLOCK = 256  # columns by which a layer grows


@dataclass
class _WriteSlots:
    """Where the new rows of a read lie; all layers share it.

    first: the column of the first one where that is the same for all batch rows, else None, and
    `scattered` says it. end: the columns that a read sees. fixed: whether that never changes.
    """

    first: int | None = 0
    end: int = 0
    fixed: bool = False
    lengths_B: Tensor | None = None
    steps: tuple[int, int] = (0, 0)
    _scattered: tuple[Tensor, Tensor] | None = None

    def expect(self, lengths_B: Tensor, after: int, new: int) -> None:
        self.lengths_B, self.steps, self._scattered = lengths_B, (after, after + new), None

    def scattered(self) -> tuple[Tensor, Tensor]:
        """Rows B x 1 and columns B x N. Worked out for those who ask."""
        if self._scattered is None:
            assert self.lengths_B is not None
            rows_B1 = torch.arange(len(self.lengths_B), device=self.lengths_B.device)[:, None]
            steps_N = torch.arange(*self.steps, device=self.lengths_B.device)
            self._scattered = rows_B1, self.lengths_B[:, None] + steps_N
        return self._scattered


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, preallocated. Key and value sizes may differ (MLA).

    indexed: keys of sparse attention's indexer, B x 1 x S x D, where the layer has one.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, place: _WriteSlots) -> None:
        super().__init__()
        self.place = place
        self.indexed: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = _grown(key_states[:, :, :0], self.place)
        self.values = _grown(value_states[:, :, :0], self.place)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new rows (B x H x N x D) to their place; the columns that a read sees."""
        keys, values = self.room(key_states, value_states)
        return _written(keys, key_states, self.place), _written(values, value_states, self.place)

    def room(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All columns, with room for new rows like these, which are not written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.place.end > self.keys.shape[2]:
            self.keys = _grown(self.keys, self.place)
            self.values = _grown(self.values, self.place)
        return self.keys, self.values

    def update_indexer(self, key_states: Tensor) -> Tensor:
        """As `update`, with an indexer's keys B x N x D."""
        new_B1ND = key_states[:, None]
        if self.indexed is None:
            self.indexed = new_B1ND[:, :, :0]
        if self.place.end > self.indexed.shape[2]:
            self.indexed = _grown(self.indexed, self.place)
        return _written(self.indexed, new_B1ND, self.place)[:, 0]

    def held(self) -> list[Tensor]:
        """All that it holds, each B x H x S x D."""
        both = [self.keys, self.values] if self.is_initialized else []
        return both if self.indexed is None else [*both, self.indexed]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.end, 0

    def get_seq_length(self) -> int:
        """Columns in front of the new rows, where those follow each other without a gap."""
        return self.place.first or 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class KVCache(Cache):
    """What the target remembers of a batch: see the head of this file.

    capacity: columns of a cache that does not grow; None for one that does. recurrent: places of
    the layers that have states instead, which hold one row. lengths_B: committed tokens of each
    row.
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
        self._place = _WriteSlots(end=capacity or 0, fixed=capacity is not None)
        self.states = RecurrentStates(recurrent) if recurrent else None
        states = self.states.layers if self.states is not None else {}
        self.kv_layers = [KVLayer(self._place) for _ in range(num_layers - len(states))]
        columns = iter(self.kv_layers)
        super().__init__(
            layers=[states[at] if at in states else next(columns) for at in range(num_layers)]
        )
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size  # the same on the host: no device read per step
        self._pending = self._after = 0
        self._stacks: tuple[Tensor, Tensor] | None = None  # all layers' keys and values, L x

    @property
    def preallocated(self) -> bool:
        return self._place.fixed

    @property
    def width(self) -> int:
        """The longest row's committed tokens. Of a growing cache only."""
        assert not self.preallocated
        return max(self._lengths, default=0)

    @property
    def columns(self) -> int:
        """How many columns the current read sees."""
        return self._place.end

    @property
    def size(self) -> int:
        """Bytes of all columns."""
        return sum(one.nbytes for layer in self.kv_layers for one in layer.held())

    @property
    def after(self) -> int:
        """Pending rows in front of those of the current read."""
        return self._after

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    @property
    def equal_lengths(self) -> bool:
        """True where every row is known to hold as many tokens as the others."""
        return not self.preallocated and min(self._lengths) == self.width

    def reserve(self, new: int, after: int = 0, again: int = 0) -> None:
        """The next read writes `new` rows; of those pending before, the first `after` stay, and the
        last `again` committed columns are written once more."""
        place, self._pending, self._after = self._place, after + new, after
        place.first = self.width + after - again if self.equal_lengths else None
        place.expect(self.lengths_B, after, new)
        if not self.preallocated:
            place.end = self.width + self._pending

    def new_columns(self, new: int) -> Tensor:
        """B x N: where the new rows of a read lie."""
        place = self._place
        if place.first is None:
            return place.scattered()[1]
        first = torch.arange(place.first, place.first + new, device=self.lengths_B.device)
        return first.expand(self.rows, -1).contiguous()

    def visible(self, pending_BNM: Tensor) -> Tensor:
        """B x N x S: True where a new row sees a column: committed ones, and of the pending ones
        those that `pending_BNM` says."""
        batch, new, pending = pending_BNM.shape
        assert pending == self._pending
        if self.equal_lengths:
            old_BNS = pending_BNM.new_ones(batch, new, self.width)
            return torch.cat([old_BNS, pending_BNM], -1)
        behind_BS = self._behind()
        if not pending:
            return (behind_BS < 0)[:, None].expand(batch, new, -1)
        index_B1S = behind_BS.clamp(0, pending - 1)[:, None]
        seen_BNS = pending_BNM.gather(2, index_B1S.expand(batch, new, -1))
        seen_BNS = seen_BNS & (behind_BS < pending)[:, None]
        return seen_BNS | (behind_BS < 0)[:, None]

    def positions(self, steps_BM: Tensor) -> Tensor:
        """B x S: each column's position in the text. steps_BM: those of the pending rows, counted
        from the first token that is not committed."""
        behind_BS = self._behind()
        steps_BS = steps_BM.gather(1, behind_BS.clamp(0, self._pending - 1))
        return self.lengths_B[:, None] + torch.where(behind_BS < 0, behind_BS, steps_BS)

    def commit(self, path_BP: Tensor | None, counts_B: Tensor) -> None:
        """Keep the pending rows path_BP[b, :counts_B[b]] of the last read, in that order.

        None: the first counts_B[b] ones. The rest is dropped. Entries past the count are ignored.
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
        """From now on exactly so many columns. Of an empty cache only."""
        assert not self.preallocated and self.width == 0 and self.states is None
        self._place.end, self._place.fixed = capacity, True

    def copy_from(self, other: KVCache) -> None:
        """Hold what another cache of as many rows and layers holds. Of a fixed cache only, whose
        tensors stay where they are. Pending rows are dropped."""
        held = other.columns if other.preallocated else other.width
        assert self.preallocated and held <= self.columns and other.rows == self.rows
        if not any(layer.is_initialized for layer in self.kv_layers):
            self._make_room(other)
        for layer, source in zip(self.kv_layers, other.kv_layers, strict=True):
            if source.is_initialized:
                for mine, theirs in zip(layer.held(), source.held(), strict=True):
                    mine[:, :, :held] = theirs[:, :, :held]
        self.lengths_B.copy_(other.lengths_B)
        self._pending = 0

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep these batch rows only, in this order. Pending rows are dropped.

        Works in place, and only rows that change their place are copied: a batch may hold
        gigabytes, and its rows finish one by one.
        """
        rows = rows_B.tolist()
        if self.states is not None:
            self.states.drop()
        moved = [place for place, row in enumerate(rows) if place != row]
        places_M = torch.tensor(moved, dtype=torch.int64, device=rows_B.device)
        for layer in self.kv_layers:
            if layer.is_initialized:
                layer.keys = _kept(layer.keys, rows_B, places_M)
                layer.values = _kept(layer.values, rows_B, places_M)
            if layer.indexed is not None:
                layer.indexed = _kept(layer.indexed, rows_B, places_M)
        self.lengths_B = self.lengths_B[rows_B]
        self._lengths = [self._lengths[row] for row in rows]
        self._pending = 0

    def _behind(self) -> Tensor:
        """B x S: how far each column lies behind the row's committed ones; negative inside."""
        columns_S = torch.arange(self.columns, device=self.lengths_B.device)
        return columns_S - self.lengths_B[:, None]

    def _make_room(self, like: KVCache) -> None:
        """Where all layers have one shape, in one tensor: a path is then moved in all of them at
        once, not by a few small operations per layer."""
        pairs = list(zip(self.kv_layers, like.kv_layers, strict=True))
        for mine, one in pairs:
            if one.indexed is not None:
                mine.indexed = _grown(one.indexed[:, :, :0], self._place)
        known = [one for _, one in pairs if one.is_initialized]
        shapes = {(one.keys.shape, one.values.shape, one.keys.dtype) for one in known}
        if len(shapes) != 1 or len(known) < len(pairs):
            for mine, one in pairs:
                if one.is_initialized:
                    mine.lazy_initialization(one.keys, one.values)
            return
        layers, (rows, heads, _, size) = len(pairs), known[0].keys.shape
        value_size = known[0].values.shape[-1]
        keys_LBHSD = known[0].keys.new_zeros(layers, rows, heads, self.columns, size)
        values_LBHSD = keys_LBHSD.new_zeros(layers, rows, heads, self.columns, value_size)
        self._stacks = keys_LBHSD, values_LBHSD
        for mine, keys, values in zip(self.kv_layers, keys_LBHSD, values_LBHSD, strict=True):
            mine.keys, mine.values, mine.is_initialized = keys, values, True

    def _blocks(self) -> list[Tensor]:
        """All that is held, ... x B x H x S x D."""
        if self._stacks is None:
            return [one for layer in self.kv_layers for one in layer.held()]
        indexed = [layer.indexed for layer in self.kv_layers if layer.indexed is not None]
        return [*self._stacks, *indexed]

    def _commit_on_host(self, path_BP: Tensor | None, counts: list[int]) -> None:
        assert len(counts) == self.rows and max(counts) <= self._pending, "paths do not fit"
        if path_BP is not None:
            paths = zip(path_BP.tolist(), counts, strict=True)
            kept = [path[:count] for path, count in paths]
            assert all(0 <= node < self._pending for path in kept for node in path), "not pending"
            moved = [_in_place(path) for path in kept if _in_place(path) < len(path)]
            assert not moved or self.states is None, "a state has read no branch"
            if moved:
                first, last = min(moved), max(counts)
                self._move(path_BP[:, first:last], first)
        self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]

    def _move(self, path_BP: Tensor, first: int) -> None:
        """Copy pending rows to the columns from lengths_B + first on.

        Entries past a row's count land in columns that are free afterwards: never read.
        """
        steps_P = torch.arange(first, first + path_BP.shape[1], device=path_BP.device)
        target_BP = self.lengths_B[:, None] + steps_P
        source_BP = self.lengths_B[:, None] + path_BP.clamp(0, self._pending - 1)
        rows_B1 = torch.arange(self.rows, device=path_BP.device)[:, None]
        for held in self._blocks():
            held[..., rows_B1, :, target_BP, :] = held[..., rows_B1, :, source_BP, :]


def _written(columns: Tensor, new_BHND: Tensor, place: _WriteSlots) -> Tensor:
    """Put the new rows where they belong; what a read sees."""
    if place.first is not None:
        columns[:, :, place.first : place.first + new_BHND.shape[2]] = new_BHND
    else:
        rows_B1, columns_BN = place.scattered()
        columns[rows_B1, :, columns_BN] = new_BHND.transpose(1, 2)
    return columns[:, :, : place.end]


def _in_place(path: list[int]) -> int:
    """How many of the path's first rows already lie where they belong."""
    same = (place for place, node in enumerate(path) if place != node)
    return next(same, len(path))


def _kept(columns: Tensor, rows_B: Tensor, places_M: Tensor) -> Tensor:
    """The rows rows_B as a view; places_M: where another row than before comes to lie."""
    if len(places_M):
        columns[places_M] = columns[rows_B[places_M]]
    return columns[: len(rows_B)]


def _grown(columns: Tensor, place: _WriteSlots) -> Tensor:
    """The same columns with room for what a read sees.

    New ones are zero: a masked column has weight 0, and 0 times a stray NaN would be NaN.
    """
    batch, heads, used, size = columns.shape
    capacity = place.end if place.fixed else -(-place.end // BLOCK) * BLOCK
    grown = columns.new_zeros(batch, heads, capacity, size)
    grown[:, :, :used] = columns
    return grown
