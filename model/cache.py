"""Keys and values of a ragged batch, of which the newest rows are only guesses.

Row b's committed keys are the columns [0, lengths_B[b]). A read writes its N rows into the columns
[width, width + N), where width = max(lengths_B): they are pending. `commit` moves the accepted
ones behind the row's committed columns and forgets the rest, which the next read overwrites.
Sliding windows are left to the mask: a layer that drops old columns cannot take a guess back.

Legend: B batch rows, P accepted positions, N pending rows, H heads, S columns, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 256  # columns by which a layer grows


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, preallocated. Key and value sizes may differ (MLA)."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.width = 0  # first column of the pending rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new rows (B x H x N x D) behind the committed columns; all columns so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.width + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys = _grown(self.keys, self.width, end)
            self.values = _grown(self.values, self.width, end)
        self.keys[:, :, self.width : end] = key_states
        self.values[:, :, self.width : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class KVCache(Cache):
    """What the target remembers of a batch: see the head of this file.

    lengths_B: committed tokens of each row.
    """

    def __init__(self, batch_size: int, num_layers: int, device: torch.device):
        self.kv_layers = [KVLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.kv_layers))
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size  # the same on the host: no device read per step
        self._pending = 0

    @property
    def width(self) -> int:
        """Columns in front of the pending rows: the longest row's committed tokens."""
        return self.kv_layers[0].width

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def even(self) -> bool:
        """True where every row holds as many tokens as the others."""
        return min(self._lengths) == self.width

    def expect(self, pending: int) -> None:
        """The next read writes this many rows; what was pending before is dropped."""
        self._pending = pending

    def commit(self, path_BP: Tensor, counts_B: Tensor) -> None:
        """Keep the pending rows path_BP[b, :counts_B[b]] of the last read, in that order.

        The rest is dropped. Entries of path_BP past the count are ignored.
        """
        paths, counts = path_BP.tolist(), counts_B.tolist()
        assert len(paths) == self.rows and max(counts) <= path_BP.shape[1], "paths do not fit"
        kept = [path[:count] for path, count in zip(paths, counts, strict=True)]
        assert all(0 <= node < self._pending for path in kept for node in path), "not pending"
        width = self.width
        first = min(map(_in_place, kept, self._shifts()), default=0)
        last = max(counts)
        if first < last:
            self._move(path_BP[:, first:last], first)
        self.lengths_B = self.lengths_B + counts_B
        self._set_lengths([n + count for n, count in zip(self._lengths, counts, strict=True)])
        assert self.width <= width + self._pending
        self._pending = 0

    def keep(self, rows_B: Tensor) -> None:
        """Keep these batch rows only, in this order. Pending rows are dropped.

        Works in place, and only rows that change their place are copied: a batch may hold
        gigabytes, and its rows finish one by one.
        """
        rows = rows_B.tolist()
        moved = [place for place, row in enumerate(rows) if place != row]
        places_M = torch.tensor(moved, dtype=torch.int64, device=rows_B.device)
        for layer in self.kv_layers:
            if layer.is_initialized:
                layer.keys = _kept(layer.keys, rows_B, places_M)
                layer.values = _kept(layer.values, rows_B, places_M)
        self.lengths_B = self.lengths_B[rows_B]
        self._set_lengths([self._lengths[row] for row in rows])
        self._pending = 0

    def _shifts(self) -> list[int]:
        """How many columns each row's first pending row lies behind its committed ones."""
        return [self.width - length for length in self._lengths]

    def _move(self, path_BP: Tensor, first: int) -> None:
        """Copy pending rows to the columns from lengths_B + first on.

        Entries past a row's count land in columns that are free afterwards: never read.
        """
        steps_P = torch.arange(first, first + path_BP.shape[1], device=path_BP.device)
        target_BP = self.lengths_B[:, None] + steps_P
        source_BP = self.width + path_BP.clamp(0, self._pending - 1)
        rows_B1 = torch.arange(self.rows, device=path_BP.device)[:, None]
        for layer in self.kv_layers:
            if layer.is_initialized:
                layer.keys[rows_B1, :, target_BP] = layer.keys[rows_B1, :, source_BP]
                layer.values[rows_B1, :, target_BP] = layer.values[rows_B1, :, source_BP]

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths
        for layer in self.kv_layers:
            layer.width = max(lengths, default=0)


def _in_place(path: list[int], shift: int) -> int:
    """How many of the path's first rows already lie where they belong."""
    if shift:
        return 0
    same = (place for place, node in enumerate(path) if place != node)
    return next(same, 1 << 62)


def _kept(columns: Tensor, rows_B: Tensor, places_M: Tensor) -> Tensor:
    """The rows rows_B as a view; places_M: where another row than before comes to lie."""
    if len(places_M):
        columns[places_M] = columns[rows_B[places_M]]
    return columns[: len(rows_B)]


def _grown(columns: Tensor, used: int, needed: int) -> Tensor:
    """The same columns with room for at least `needed`.

    New ones are zero: a masked column has weight 0, and 0 times a stray NaN would be NaN.
    """
    batch, heads, _, size = columns.shape
    capacity = -(-needed // BLOCK) * BLOCK
    grown = columns.new_zeros(batch, heads, capacity, size)
    grown[:, :, :used] = columns[:, :, :used]
    return grown
