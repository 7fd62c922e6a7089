"""Two models that decode in threads of one process do not disturb each other.

Legend: B sequences, T positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from decoder_reads import a_tree
from decoding import answers, batch
from families import FAMILIES, prompts
from oracle import Oracle
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.target.gqa_attention import GROUPED, SDPA
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

TIMEOUT = 60  # seconds
SHAPE = TreeShape.dynamic(nodes=10, depth=4, width=3)


def test_a_model_may_finish_inside_the_forward_pass_of_another() -> None:
    """B starts while A runs and ends behind it, which restores nothing that A left in place."""
    models = [wrap_target(FAMILIES["llama"]()) for _ in range(2)]
    for target in models:
        target.backend = None
        assert target.decoder.module.config._attn_implementation == GROUPED
    expected = [_verify(target) for target in models]
    registered = ALL_ATTENTION_FUNCTIONS[SDPA]
    a_is_inside, b_is_inside, a_is_done = (threading.Event() for _ in range(3))

    def stop(mine: threading.Event, other: threading.Event) -> Callable[..., None]:
        def hook(*_: object) -> None:
            mine.set()
            assert other.wait(TIMEOUT)

        return hook

    a, b = models
    hook_a = a.layers[0].register_forward_hook(stop(a_is_inside, b_is_inside))
    hook_b = b.layers[0].register_forward_hook(stop(b_is_inside, a_is_done))
    with ThreadPoolExecutor(2) as pool:
        told_a = pool.submit(_verify, a)
        assert a_is_inside.wait(TIMEOUT)
        told_b = pool.submit(_verify, b)
        result_a = told_a.result(TIMEOUT)
        a_is_done.set()
        result_b = told_b.result(TIMEOUT)
    hook_a.remove()
    hook_b.remove()
    assert result_a.equal(expected[0]) and result_b.equal(expected[1])
    assert ALL_ATTENTION_FUNCTIONS[SDPA] is registered


def _verify(target: Target) -> Tensor:
    """Logits of a tree behind an unequal batch, so that its attention has a mask."""
    ids_BT = torch.stack([prompt[:5] for prompt in prompts([5, 5])])
    return target.forward(a_tree(ids_BT[:, 0])).logits_BTV  # type: ignore[return-value]


def test_threads_decode_what_they_decode_alone() -> None:
    """Through the fused decoder and through own modules with grouped heads, greedy and sampled."""
    fused, modules = (wrap_target(FAMILIES["llama"]()) for _ in range(2))
    assert fused.backend is not None
    modules.backend = None
    samplings = (SamplingParams(16), SamplingParams(16, temperature=1.0, seed=5))
    jobs = [(target, sampling) for target in (fused, modules) for sampling in samplings]
    alone = [_decode(*job, None) for job in jobs]
    assert alone[0] == alone[2] != alone[1] == alone[3]
    for numbers in ([0, 3], [0, 1, 2, 3]):
        barrier = threading.Barrier(len(numbers))

        def run(number: int, barrier: threading.Barrier = barrier) -> list[list[list[int]]]:
            barrier.wait(TIMEOUT)
            return [_decode(*jobs[number], alone[number]) for _ in range(3)]

        with ThreadPoolExecutor(len(numbers)) as pool:
            for number, told in zip(numbers, pool.map(run, numbers), strict=True):
                assert told == [alone[number]] * 3


def _decode(
    target: Target, sampling: SamplingParams, truth: list[list[int]] | None
) -> list[list[int]]:
    """Autoregressively, or with drafts that are often right about `truth`."""
    head = None if truth is None else Oracle(target, truth)
    speculative = None if head is None else SpeculativeConfig(head, SHAPE)
    steps = decode(target, *batch("llama", 3), sampling=sampling, speculative=speculative)
    return answers(steps, 3)
