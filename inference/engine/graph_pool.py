"""Captured steps that are kept from one run to the next, so that nothing is captured twice.

The pools belong to the engine, one for each target. They hold neither target nor heads, so both can
be released at any time, and what was captured for them goes with them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch

from headstart.model.backends.linear import weight_version
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

from .sampler import Sampler
from .step_graphs import StepGraphs

_pools: weakref.WeakKeyDictionary[Target, GraphPool] = weakref.WeakKeyDictionary()
# Reentrant, because garbage collection can end another run, which releases its graphs.
_lock = RLock()


def graph_pool(target: Target) -> GraphPool:
    """The pool of a target; made at the first call."""
    with _lock:
        if target not in _pools:
            _pools[target] = GraphPool()
        return _pools[target]


@dataclass
class _Entry:
    """Graphs that no run uses. head: None: they were made without one."""

    graphs: StepGraphs
    head: weakref.ref[DraftHead] | None

    @property
    def is_alive(self) -> bool:
        return self.head is None or self.head() is not None

    def fits(self, head: DraftHead | None) -> bool:
        return (None if self.head is None else self.head()) is head


class GraphPool:
    """Captured steps of one target that no run uses; the least recently used goes first.

    max_graphs: maximum number.
    max_bytes: maximum bytes of their caches; the latest stays, however large.
    """

    def __init__(self, max_graphs: int = 16, max_bytes: int = 4 << 30):
        self.max_graphs, self.max_bytes = max_graphs, max_bytes
        self._free: dict[tuple[Any, ...], _Entry] = {}
        self._lock = RLock()

    @property
    def free(self) -> list[StepGraphs]:
        """All graphs in the pool, the least recently used first."""
        with self._lock:
            return [entry.graphs for entry in self._free.values()]

    def acquire(
        self,
        target: Target,
        head: DraftHead | None,
        shape: TreeShape,
        sampler: Sampler,
        like: TargetOutput,
        capacity: int,
    ) -> StepGraphs:
        """Graphs that no other run uses until they are released. Arguments as of `StepGraphs`."""
        key = _key(target, head, shape, sampler, len(like.lm_head_input_BTD), capacity)
        with self._lock:
            entry = self._free.pop(key, None)
            if entry is not None and entry.fits(head):
                entry.graphs.attach(target, head)
                return entry.graphs
            if entry is not None:  # of an earlier head that had the same address
                entry.graphs.close()
            self._make_room(self.max_graphs - 1)
        mempool = torch.cuda.graph_pool_handle() if target.device.type == "cuda" else None
        return StepGraphs(target, head, shape, sampler, like, capacity, mempool)

    def release(self, graphs: StepGraphs) -> None:
        head = graphs.head
        key = _key(graphs.target, head, graphs.shape, graphs.sampler, graphs.batch, graphs.capacity)
        entry = _Entry(graphs, None if head is None else weakref.ref(head))
        graphs.detach()
        with self._lock:
            self._make_room(self.max_graphs - 1)
            self._free[key] = entry

    def forget(self, head: DraftHead) -> None:
        """Free the graphs of a head that is not used any more."""
        with self._lock:
            for key in [key for key, entry in list(self._free.items()) if entry.fits(head)]:
                self._free.pop(key).graphs.close()

    def _make_room(self, max_graphs: int) -> None:
        for key in [key for key, entry in list(self._free.items()) if not entry.is_alive]:
            self._free.pop(key).graphs.close()
        while self._free and (len(self._free) > max_graphs or self._bytes() > self.max_bytes):
            self._free.pop(next(iter(self._free))).graphs.close()

    def _bytes(self) -> int:
        return sum(cache.nbytes for entry in self._free.values() for cache in entry.graphs.caches)


def _key(
    target: Target,
    head: DraftHead | None,
    shape: TreeShape,
    sampler: Sampler,
    batch: int,
    capacity: int,
) -> tuple[Any, ...]:
    """All that captured steps depend on. It changes when weights are replaced or written to."""
    processors = [(type(one), *vars(one).values()) for one in sampler.processors]
    weights = [weight_version(weight) for weight in target.model.parameters()]
    temperatures = None
    if head is not None:
        weights += [weight_version(weight) for weight in head.parameters()]
        temperatures = head.temperatures
    models = id(target), id(head), hash(tuple(weights)), temperatures
    return *models, shape, sampler.sample, *processors, batch, capacity
