"""A real model with the shipped head: exact, with a useful acceptance length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from benchmarking import benchmark

from headstart.inference.benchmark.metrics import AUTOREGRESSIVE
from headstart.inference.config import SpeculativeConfig
from headstart.inference.rollout import prompt_ids
from headstart.model.checkpoint.head import load_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.scripts.options.default_checkpoint import shipped_head
from headstart.scripts.options.prompts import read_prompts, shipped_prompts

pytestmark = pytest.mark.slow
SHAPES = {
    "chain": TreeShape.chain(3),
    "static": TreeShape.static([[0], [1], [0, 0], [0, 1], [0, 0, 0]]),
    "dynamic": TreeShape.dynamic(nodes=8, depth=4, width=3),
}
TOKENS = 24
MEGABYTES = 12  # what the shipped head may weigh


@pytest.fixture
def on_cores() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target(smollm2: Path) -> Target:
    return load_target(smollm2, dtype="float32")


# Two threads wait for each other while another test has one of the cores.
@pytest.mark.parametrize(("threads", "count"), [(1, 5), (2, 1)])
def test_responses_to_real_prompts_are_identical(target, on_cores, threads, count):
    on_cores(threads)
    head = load_head(shipped_head(), target)
    prompts, _ = read_prompts([str(shipped_prompts("heldout"))])
    ids = [
        prompt_ids(target, [{"role": "user", "content": one.turns[0]}])
        for one in prompts[:: len(prompts) // count][:count]
    ]
    configs = {name: SpeculativeConfig(head, shape) for name, shape in SHAPES.items()}
    results = benchmark(target, configs, ids, max_new_tokens=TOKENS)
    for name in SHAPES:
        assert results[name].prompts == count
        assert results[name].identical == count, (name, results[name].differences)
        # A head without accepted draft tokens would be exact too.
        assert results[name].stats.acceptance_length > 1.3
    assert results[AUTOREGRESSIVE].stats.acceptance_length == 1


def test_shipped_head_is_small():
    size = sum(file.stat().st_size for file in shipped_head().iterdir())
    assert size <= MEGABYTES * 1e6
