"""Steps of fixed shape, mostly called eagerly: they emit what autoregressive decoding emits, never
wait for the device, and leave their tensors where they are.

Legend: B batch rows, F frontier nodes, W children per node, P places of a path.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from decoding import (
    GREEDY,
    LENGTHS,
    NEW_TOKENS,
    SHAPES,
    answers,
    batch,
    reference,
    sampling_of,
    target_of,
)
from families import FAMILIES
from graph_decoding import USED, Prophet, random_head, replayed
from oracle import Oracle
from step_costs import DEAR, FREE, USUAL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine import graph_runner
from headstart.inference.engine.cuda_graph import WARM_UPS, CapturedFunction
from headstart.inference.engine.graph_pool import GraphPool, graph_pool
from headstart.inference.engine.graph_runner import supports_cuda_graphs
from headstart.inference.engine.loop import decode
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.step_graphs import StepGraphs
from headstart.inference.tree_policy.cost_model import Costs
from headstart.inference.tree_policy.defaults import clamp_to_head
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.output import TargetOutput
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

SPARSE = "glm_moe_dsa"  # what it chooses from are all columns of a cache of fixed size
LARGE = TreeShape.dynamic(nodes=20, depth=5, width=3)


def prophet(family: str, rows: int, sampling: str = "") -> Prophet:
    return Prophet(target_of(family), LENGTHS[rows], reference(family, rows, sampling))


def ragged(truth: list[list[int]], sampling: str = "") -> tuple[SamplingParams, list[list[int]]]:
    """A token at which the rows end at different lengths, and the answers then."""
    eos = truth[0][5]
    cut = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in truth]
    assert len(truth) == 1 or len({len(answer) for answer in cut}) > 1
    return replace(sampling_of(sampling), stop_token_ids=frozenset({eos})), cut


@pytest.mark.parametrize("costs", [None, FREE, USUAL, DEAR], ids=["none", "free", "usual", "dear"])
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("family", [*USED, SPARSE])
def test_guesses_that_are_often_right(family: str, rows: int, costs: Costs | None) -> None:
    """Deep paths and side branches, rows that end early, and all sizes of trees."""
    target, prompts = target_of(family), batch(family, rows)
    sampling, truth = ragged(reference(family, rows))
    for shape in (*SHAPES.values(), LARGE):
        told, stats = replayed(target, prophet(family, rows), prompts, shape, sampling, costs)
        assert told == truth
        assert stats.num_tokens == sum(map(len, truth)) and stats.num_sequences == rows
        assert costs is DEAR or stats.acceptance_length > 1.2
    told, stats = replayed(target, None, prompts, LARGE, sampling)
    assert told == truth and stats.acceptance_length == 1


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("family", USED)
def test_every_head_kind(family: str, kind: str) -> None:
    target = target_of(family)
    head = random_head(target, kind)
    for rows in LENGTHS:
        truth = [answer[:10] for answer in reference(family, rows)]
        for shape in SHAPES.values():
            shape, prompts = clamp_to_head(shape, head), batch(family, rows)
            told, stats = replayed(target, head, prompts, shape, SamplingParams(10))
            assert told == truth, (shape, rows)
            assert stats.tried_per_position[0] > 0, "nothing was drafted"


@pytest.mark.parametrize("kind", kinds())
def test_a_head_drafts_what_it_drafts_in_caches_that_grow(kind: str) -> None:
    """Round after round: what it took in is the same, so its trees are."""
    target = target_of("llama")
    head, shape = random_head(target, kind), TreeShape.dynamic(10, 3, 3)
    trees: list[list[Tree]] = [[], []]
    drafted, prompts = head.draft, batch("llama", 3)

    def draft(*given: Any) -> Tree:
        trees[-1].append(drafted(*given))
        return trees[-1][-1]

    head.draft = draft  # type: ignore[method-assign]
    replayed(target, head, prompts, shape, GREEDY)
    fixed = trees.pop()
    list(decode(target, *prompts, sampling=GREEDY, speculative=SpeculativeConfig(head, shape)))
    grown = trees.pop()
    assert min(len(grown), len(fixed)) > 14
    for one, other in zip(grown[:-4], fixed, strict=False):  # the last ones end with the answer
        torch.testing.assert_close(one.scores_BN, other.scores_BN, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampling", ["temperature", "top-k", "top-p"])
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_seeded_sampling(family: str, rows: int, sampling: str) -> None:
    target, prompts = target_of(family), batch(family, rows)
    params, truth = ragged(reference(family, rows, sampling), sampling)
    head = prophet(family, rows, sampling)
    for shape in (*SHAPES.values(), LARGE):
        for costs in (None, USUAL):
            told, stats = replayed(target, head, prompts, shape, params, costs)
            assert told == truth and sum(stats.accepted_per_position) > 2
    assert replayed(target, None, prompts, LARGE, params)[0] == truth


def test_noise_of_a_position_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new plan with another run too, whose noise is another."""
    drawn: list[tuple[int, int]] = []
    whole = Sampler.noise

    def watched(sampler: Sampler, rows: Any, positions: Any, like_MV: Tensor) -> Tensor:
        drawn.extend(zip(rows, positions, strict=True))
        return whole(sampler, rows, positions, like_MV)

    monkeypatch.setattr(Sampler, "noise", watched)
    target, prompts, pool = target_of("llama"), batch("llama", 3), GraphPool()
    head = prophet("llama", 3, "temperature")
    for _ in range(2):
        drawn.clear()
        replayed(target, head, prompts, LARGE, sampling_of("temperature"), pool=pool)
        assert 3 * NEW_TOKENS <= len(drawn) == len(set(drawn)) < 3 * (NEW_TOKENS + LARGE.depth + 1)


@pytest.mark.parametrize("family", [*USED, SPARSE])
def test_full_caches_are_replaced(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_runner, "MIN_CAPACITY", 8)
    monkeypatch.setattr(graph_runner, "HEADROOM", 2)
    target = target_of(family)
    sampling, truth = ragged(reference(family, 3))
    for head in (prophet(family, 3), *(random_head(target, kind) for kind in kinds())):
        pool = GraphPool(9)
        told, _ = replayed(target, head, batch(family, 3), SHAPES["chain"], sampling, pool=pool)
        assert told == truth
        plans = pool.free
        assert len(plans) > 1, "no cache was ever full"
        lengths = plans[-1].cache.lengths_B.tolist()
        assert lengths[0] <= plans[-1].max_path < max(lengths), "a complete row goes on growing"


def test_up_to_the_end_of_the_context() -> None:
    """Learned positions: a node behind the last one would not be found."""
    target, sampling = target_of("gpt2"), SamplingParams(50)
    length = (target.context_limit or 0) - 9
    ids_BT = batch("gpt2", 3)[0][:, :4].repeat(1, length)[:, :length]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, -3:] = 0
    truth = answers(decode(target, ids_BT, mask_BT, sampling=sampling), 3)
    assert [len(answer) for answer in truth] == [9, 12, 9]
    head = random_head(target, "mtp")
    assert replayed(target, head, (ids_BT, mask_BT), SHAPES["chain"], sampling)[0] == truth


def test_graphs_are_used_again_and_their_tensors_keep_their_addresses() -> None:
    """A graph knows them by address."""
    target, pool, places = target_of("llama"), GraphPool(), []
    head, (sampling, truth) = random_head(target, "mtp"), ragged(reference("llama", 3))
    for _ in range(2):
        assert replayed(target, head, batch("llama", 3), LARGE, sampling, pool=pool)[0] == truth
        (graphs,) = pool.free
        tensors = [*graphs.carried(), graphs.active_B, graphs.report, *graphs.tree_parts]
        for cache in graphs.caches:
            tensors.append(cache.lengths_B)
            tensors += [part for one in cache.kv_layers for part in (one.keys, one.values)]
        places.append([(one.data_ptr(), one.shape) for one in tensors])
    assert places[0] == places[1]


def test_graphs_in_use_are_not_given_to_another_run() -> None:
    target, pool = target_of("llama"), GraphPool(max_graphs=2)
    like = TargetOutput(None, torch.zeros(1, 1, target.hidden_size), {})

    def acquire(temperature: float = 0.0) -> StepGraphs:
        sampler = Sampler.of(SamplingParams(temperature=temperature))
        return pool.acquire(target, None, LARGE, sampler, like, 64)

    one, other = acquire(), acquire()
    pool.release(one)
    assert one is not other and acquire(1.0) is not one and acquire() is one
    for graphs in (one, acquire(1.0), acquire(0.5)):
        pool.release(graphs)
    assert len(pool.free) == 2 and acquire() is not one  # the oldest went


def test_a_pool_is_limited_in_memory() -> None:
    target, pool = target_of("llama"), GraphPool(max_bytes=0)
    head, (sampling, truth) = random_head(target, "mtp"), ragged(reference("llama", 3))
    for shape in (LARGE, SHAPES["chain"]):
        assert replayed(target, head, batch("llama", 3), shape, sampling, pool=pool)[0] == truth
        (graphs,) = pool.free  # the latest stays, however large
    sizes = [cache.nbytes for cache in graphs.caches]
    assert graphs.shape == SHAPES["chain"] and min(sizes) > 0
    roomy = GraphPool(max_bytes=3 * sum(sizes))
    for shape in (LARGE, SHAPES["chain"]):
        replayed(target, head, batch("llama", 3), shape, sampling, pool=roomy)
    assert len(roomy.free) == 2
    roomy.forget(head)
    assert not roomy.free


def test_a_pool_keeps_neither_target_nor_head_in_memory() -> None:
    target = wrap_target(FAMILIES["llama"]())
    head, pool, shape = random_head(target, "mtp"), graph_pool(target), SHAPES["chain"]
    assert graph_pool(target) is pool and graph_pool(target_of("llama")) is not pool
    for one in (None, head):
        replayed(target, one, batch("llama", 1), shape, GREEDY, pool=pool)
    assert len(pool.free) == 2
    gone = weakref.ref(head)
    del head, one
    gc.collect()
    assert gone() is None
    replayed(target, None, batch("llama", 1), LARGE, GREEDY, pool=pool)
    assert all(graphs.max_path == 1 for graphs in pool.free), "those of the head are freed"
    held, freed = weakref.ref(target), weakref.ref(pool)
    del target, pool
    gc.collect()
    assert held() is None and freed() is None


class Tape(TorchDispatchMode):
    """What a graph is, without a device for it: the operations of one call, done again with the
    same numbers from the host, on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def record(self, function: Callable[[], object]) -> None:
        with self:
            function()

    def play(self) -> None:
        made: dict[int, Tensor] = {}
        for func, args, kwargs, out in self.steps:
            args, kwargs = tree_map_only(Tensor, lambda t: made.get(id(t), t), (args, kwargs))
            again = tree_leaves(func(*args, **kwargs))
            made.update(zip(map(id, tree_leaves(out)), again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["", "top-p"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_records_stay_right(family: str, sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: a few calls that leave no trace, one that is recorded, and then the record."""
    tapes: dict[int, Tape] = {}

    def call(replay: CapturedFunction) -> None:
        if id(replay) not in tapes:
            for _ in range(WARM_UPS):
                replay._call_and_restore()
            tapes[id(replay)] = Tape()
            record = partial(tapes[id(replay)].record, replay.function)
            CapturedFunction(record, replay.device, None, replay.in_place)._call_and_restore()
        tapes[id(replay)].play()

    monkeypatch.setattr(CapturedFunction, "__call__", call)
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.functions.load_kernels", lambda: None)
    target, pool, prompts = target_of(family), GraphPool(max_graphs=9), batch(family, 3)
    monkeypatch.setattr(target, "backend", None)
    params, truth = ragged(reference(family, 3, sampling), sampling)
    knows = prophet(family, 3, sampling)
    others = [(random_head(target, kind), None) for kind in kinds()]
    for head, costs in ((None, None), (knows, None), (knows, USUAL), *others):
        told, _ = replayed(target, head, prompts, LARGE, params, costs, pool)
        assert told == truth


# What a graph cannot hold: numbers that the host needs, and tensors that it sends.
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda tensor: tensor.sum().item(),
    "tolist": lambda tensor: tensor.tolist(),
    "mask": lambda tensor: tensor[tensor > 0],
    "to the host": lambda tensor: tensor.cpu(),
    "from the host": lambda tensor: torch.tensor([1], device=tensor.device),
    "two devices": lambda tensor: tensor + torch.arange(tensor.shape[0]),
}


@contextmanager
def on_no_device() -> Iterator[None]:
    """For tensors without numbers: whoever reads or sends one fails."""
    made = torch.tensor

    def tensor(*given: Any, **options: Any) -> Tensor:
        if torch.device(options.get("device") or "cpu").type != "cpu":
            raise RuntimeError("a tensor is sent from the host")
        return made(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        yield


@pytest.mark.parametrize("wait", WAITING)
def test_waiting_for_the_device_is_noticed(wait: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)), on_no_device():
        WAITING[wait](torch.empty(3, device="meta"))


@pytest.mark.parametrize(("family", "kind"), [*product(USED, kinds()), (SPARSE, "medusa")], ids=str)
def test_no_part_of_a_round_waits_for_the_device(family: str, kind: str) -> None:
    # Experts have a way without waiting in bfloat16 only.
    target = wrap_target(FAMILIES[family]().bfloat16())
    target.model.to("meta")
    target.device, target.backend = torch.device("meta"), None
    head = make_head(target, kind, {}).for_decoding(target)
    values = torch.empty(3, 1, target.hidden_size, device="meta", dtype=target.dtype)
    seen = TargetOutput(None, values, dict.fromkeys(head.taps, values))
    hot = Sampler.of(SamplingParams(temperature=0.8, top_k=5, top_p=0.9))
    for shape in (SHAPES["chain"], clamp_to_head(SHAPES["static"], head), LARGE.limited(4)):
        graphs = StepGraphs(target, head, shape, hot, seen, 64, None)
        torch.no_grad()(graphs.draft)(shape.depth)  # sends the numbers of a static tree, once
        with torch.no_grad(), on_no_device():
            for depth in range(shape.depth + 1):
                graphs.draft(depth)
            for nodes in graphs.node_counts:
                graphs.verify(nodes)


def test_what_suits() -> None:
    target, cold = wrap_target(FAMILIES["llama"]()), Sampler()
    warm = Sampler.of(SamplingParams(temperature=0.7, top_k=5, top_p=0.9))
    penalty = Sampler.of(SamplingParams(temperature=0.7, repetition_penalty=1.2))
    assert not supports_cuda_graphs(target, None, cold)  # nothing is gained on a CPU
    target.device = torch.device("cuda")
    assert supports_cuda_graphs(target, None, cold) and supports_cuda_graphs(target, None, warm)
    assert not supports_cuda_graphs(target, None, penalty)
    assert not supports_cuda_graphs(target, None, cold, ngram=True)
    assert not supports_cuda_graphs(target, Oracle(target, [[1]]), cold)  # counts on the host
