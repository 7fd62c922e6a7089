"""What only a GPU can show: that rounds are captured, and say what plain decoding says."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from decoder_reads import reads
from decoding import LENGTHS, SHAPES, answers, batch, sampling_of
from families import FAMILIES
from graph_decoding import USED, Prophet, random_head, replayed
from step_costs import USUAL

from headstart.inference.engine.cuda_graph import CapturedFunction
from headstart.inference.engine.graph_pool import GraphPool
from headstart.inference.engine.loop import decode
from headstart.inference.tree_policy.defaults import clamp_to_head
from headstart.model.backends.cuda_ops import TritonOps
from headstart.model.heads.common.base import kinds
from headstart.model.target.load import wrap_target

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_function_that_waits_is_called_and_a_warning_says_so() -> None:
    total = torch.zeros(4, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    replay = CapturedFunction(lambda: total.add_(1).sum().item(), total.device, pool, [total])
    with pytest.warns(UserWarning, match="waits for the device"):
        replay()
    replay()
    assert replay.graph is None and total.tolist() == [2.0] * 4


def test_what_an_earlier_graph_leaves_is_not_collected_in_a_capture() -> None:
    total = torch.zeros(4, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    collects: list[bool] = []

    def add() -> None:
        collects.append(gc.isenabled())
        total.add_(1)

    replay = CapturedFunction(add, total.device, pool, [total])
    replay()
    replay()
    assert replay.graph is not None and total.tolist() == [2.0] * 4
    assert collects == [True, True, False] and gc.isenabled()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("family", USED)
def test_a_whole_decode_on_cuda(family: str, rows: int, sampled: bool) -> None:
    target, prompts = wrap_target(FAMILIES[family]().to("cuda")), batch(family, rows)
    sampling = sampling_of("top-p" if sampled else "")
    truth = answers(decode(target, *prompts, sampling=sampling), rows)
    heads = [Prophet(target, LENGTHS[rows], truth)]
    heads += [random_head(target, kind) for kind in kinds()]
    for head in (None, *heads):
        pool = GraphPool()
        for shape in (SHAPES["chain"], SHAPES["dynamic"]):
            shape = shape if head is None else clamp_to_head(shape, head)
            for costs in (None, USUAL, None):  # the last one on graphs of the first
                told, _ = replayed(target, head, prompts, shape, sampling, costs, pool)
                assert told == truth, head
        for graphs in pool.free:
            verifies = [*graphs.verify_graphs.values()]
            # In float32 the experts of mixtral may ask the host how many tokens each of them got.
            assert family == "mixtral" or all(one.graph is not None for one in verifies)
            drafts = graphs.draft_graphs.values()
            assert all(one.graph is not None for one in drafts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_read_as_well_as_by_the_modules(family: str) -> None:
    model = FAMILIES[family]()
    exact = reads(wrap_target(copy.deepcopy(model).to("cuda")), 3)
    target = wrap_target(model.to("cuda", torch.bfloat16))
    assert target.backend is not None and isinstance(target.backend.ops, TritonOps)
    errors, shorter = [], target.backend
    for way in (shorter, None):
        target.backend = way
        pairs = zip(reads(target, 3), exact, strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] < 1.5 * errors[1] < 0.1
