"""Targets with sparse attention: rows attend to a few columns, in a tree as in a text.

All that holds for every family is tested there (test_exact.py, test_target.py, test_graphs.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import SHAPES, answers, target_of
from families import GROUPED, MLA, SETTINGS, SPARSE, build, prompts
from mtp_checkpoints import write
from oracle import Oracle
from torch import Tensor, nn

from headstart.inference import SpeculativeModel
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.backends.visibility import tie_break_earliest
from headstart.model.cache.kv_cache import BLOCK, KVLayer
from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.lora import adapted
from headstart.model.target.sparse_attention import (
    UnusedIndexer,
    indexers,
    override_topk,
)
from headstart.model.target.support import check_config
from headstart.model.target.target import Target

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
CHOSEN, NEW_TOKENS = SPARSE["index_topk"], 20
families = pytest.mark.parametrize("family", FAMILIES)


def stock(target: Target, ids_1T: Tensor) -> list[int]:
    """What transformers generates, with its own cache."""
    options: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return target.model.generate(ids_1T, **options)[0, ids_1T.shape[1] :].tolist()


@families
def test_columns_are_left_out(family: str) -> None:
    """From the first row on that sees more than are chosen; and it changes what is said."""
    target, ids_1T = target_of(family), prompts([24])[0][None]
    sparse_TV = target.forward(ids_1T).logits_BTV[0]
    said = stock(target, ids_1T)
    with override_topk(1000, target.layers):
        full_TV = target.forward(ids_1T).logits_BTV[0]
        assert stock(target, ids_1T) != said
    off_T = (sparse_TV - full_TV).norm(dim=1) / full_TV.norm(dim=1)
    assert off_T[:CHOSEN].max() < 1e-5 and off_T[CHOSEN:].min() > 1e-3
    assert len(indexers(target.layers)) == 2 and target.num_layers == (2, 3)["glm" in family]


@families
@pytest.mark.parametrize("length", [3, 9, 40])
def test_transformers_generates_the_same(family: str, length: int) -> None:
    """Plainly, and with trees of every head kind."""
    target, ids_1T = target_of(family), prompts([length], seed=1)[0][None]
    expected = stock(target, ids_1T)
    assert len(set(expected)) > 3
    steps = decode(target, ids_1T, sampling=SamplingParams(NEW_TOKENS))
    assert answers(steps, 1) == [expected]
    for kind in kinds():
        model = SpeculativeModel(target, make_head(target, kind, {}))
        options: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        told = model.generate(ids_1T, **options)[0, length:].tolist()
        assert told == expected, kind


@cache
def undecided(family: str) -> Target:
    """With one index head, half of all scores are 0."""
    return wrap_target(build(family, SETTINGS[family] | {"index_n_heads": 1}))


@families
def test_of_columns_with_the_same_score_the_earlier_is_chosen(family: str) -> None:
    """In a tree, where other columns lie in between, too. torch alone takes any."""
    target, ids_1T = undecided(family), prompts([30], seed=3)[0][None]
    expected = answers(decode(target, ids_1T, sampling=SamplingParams(NEW_TOKENS)), 1)
    for shape in SHAPES.values():
        sampling, oracle = SamplingParams(NEW_TOKENS), Oracle(target, expected)
        steps = decode(
            target, ids_1T, sampling=sampling, speculative=SpeculativeConfig(oracle, shape)
        )
        assert answers(steps, 1) == expected
    chosen = tie_break_earliest(torch.zeros(1, 1, 1, 4000))[0, 0, 0].topk(2000).indices
    assert set(chosen.tolist()) == set(range(2000))


def test_what_an_indexer_remembers_moves_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that left its keys where they were read would be noticed when a model is opened in
    32 bits."""
    whole = KVLayer.tensors
    monkeypatch.setattr(KVLayer, "tensors", lambda layer: whole(layer)[:2])
    for family in FAMILIES:
        with pytest.raises(ValueError, match="computes a tree unlike the same sequence"):
            wrap_target(build(family, SETTINGS[family]))


def test_memory_counts_what_an_indexer_remembers() -> None:
    target = target_of("glm_moe_dsa")
    cache, ids_1T = target.new_cache(1), prompts([5])[0][None]
    target.forward(ids_1T, cache, logits=False)
    held = [layer.tensors() for layer in cache.kv_layers]
    assert [len(one) for one in held] == [3, 2, 3]  # the layer between shares the choice
    own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.kv_layers)
    assert cache.nbytes == own + 2 * BLOCK * SPARSE["index_head_dim"] * 4


def test_what_cannot_be_had_is_refused() -> None:
    dense = GROUPED | MLA | SPARSE | {"first_k_dense_replace": 2}
    with pytest.raises(ValueError, match="sparse attention, which is not computed in integers"):
        wrap_target(build("deepseek_v32", dense), quantize="int8")
    model = build("glm_moe_dsa", SETTINGS["glm_moe_dsa"])
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.pooled = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="whose indexer is not known here"):
        wrap_target(model)
    model = build("glm_moe_dsa", SETTINGS["glm_moe_dsa"])
    model.config.model_type = "another"
    with pytest.raises(ValueError, match=r"\(another\) has sparse attention whose indexer is not"):
        check_config(model.config, "one")  # before its weights are read
    kind = target_of("deepseek_v32").config.layer_types[0]
    mixed = {"layer_types": [kind, "full_attention"]}
    with pytest.raises(ValueError, match=f"with layers of {kind}"):
        wrap_target(build("deepseek_v32", SETTINGS["deepseek_v32"] | mixed))


def test_a_fused_folder_brings_no_code_that_keeps_too_little(tmp_path: Path) -> None:
    """The cache of that code holds no keys of an indexer."""
    build("deepseek_v32", SETTINGS["deepseek_v32"]).save_pretrained(tmp_path / "model")
    target = load_target(tmp_path / "model")
    save_head(make_head(target, "mtp", {}), tmp_path / "head", HeadMeta(target="tiny"))
    fuse(tmp_path / "model", tmp_path / "head", tmp_path / "out")
    assert not (tmp_path / "out" / "custom_generate").exists()
    with pytest.raises(ValueError, match="Fuse it without the index"):
        fuse(tmp_path / "model", tmp_path / "head", tmp_path / "indexed", index=True)


def test_a_target_that_learns_along_leaves_its_indexers_alone() -> None:
    pytest.importorskip("peft")
    model = adapted(build("deepseek_v32", SETTINGS["deepseek_v32"]), 2, 4.0, "all-linear")
    learning = [name for name, one in model.named_parameters() if one.requires_grad]
    assert any("kv_b_proj" in name for name in learning)
    assert not any("indexer" in name for name in learning)


@families
def test_a_head_keeps_an_indexer_that_it_does_not_use(family: str, tmp_path: Path) -> None:
    layer = write(family, tmp_path / "model")
    head = adopt(tmp_path / "model", tmp_path / "head")
    used = [name for name, _ in head.named_parameters()]
    kept = {name: one for name, one in head.named_buffers() if "indexer" in name}
    assert len(kept) == 5 and not any("indexer" in name for name in used)
    assert isinstance(head.layer.block.self_attn.indexer, UnusedIndexer)
    for name, tensor in kept.items():
        published = layer[name.removeprefix("layer.block.")]
        assert torch.equal(tensor, published.float())
