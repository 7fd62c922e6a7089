"""The shorter way through models built like Llama, against their own modules."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, prompts
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.model.lean import Lean
from headstart.model.target import Target
from headstart.model.tree import Tree

LIKE_LLAMA = ["llama", "llama_tied", "mistral", "ministral", "qwen2", "qwen3", "seed_oss"]
OTHERS = ["gemma", "granite", "smollm3", "olmo2", "phi3", "cohere", "gpt2", "qwen3_moe", "glm4"]


def a_tree(roots_B: Tensor) -> Tree:
    parents_BN = torch.tensor([-1, 0, 0, 1, 1, 2, 5]).expand(len(roots_B), -1)
    tokens_BN = (roots_B[:, None] + 7 * torch.arange(7)) % 50
    return Tree(tokens_BN, parents_BN, torch.zeros(len(roots_B), 7))


def reads(target: Target, batch: int) -> list[Tensor]:
    """What is seen of a few texts, a tree behind them, and one more token each."""
    ids_BT = torch.stack(prompts([9] * batch))
    cache = target.new_cache(batch)
    seen = [target.read(ids_BT, cache, layers=(0,))]
    cache.commit(None, torch.tensor([9, 4, 7][:batch]))
    seen.append(target.read(a_tree(ids_BT[:, 0]), cache, layers=(0,)))
    cache.commit(torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, dtype=torch.int64))
    seen.append(target.read(ids_BT[:, :1], cache, layers=(0,)))
    return [part for one in seen for part in (one.logits_BTV, one.hidden[0]) if part is not None]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_it_reads_as_the_modules_do(family: str, batch: int) -> None:
    target = Target.wrap(FAMILIES[family]())
    assert target._lean is not None
    lean = reads(target, batch)
    target._lean = None
    modules = reads(target, batch)
    assert len(lean) == len(modules) == 6
    for ours, theirs in zip(lean, modules, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", OTHERS)
def test_what_computes_otherwise_keeps_its_modules(family: str) -> None:
    assert Target.wrap(FAMILIES[family]())._lean is None


def test_a_difference_far_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families scale their queries from some position on."""
    model = FAMILIES["llama"]().eval()
    layer = model.model.layers[1].self_attn
    whole = type(layer).forward

    def scaled(self, hidden_states, position_embeddings, **rest):  # type: ignore[no-untyped-def]
        far = rest["position_ids"].max() > 100
        return whole(self, hidden_states * (1.5 if far else 1.0), position_embeddings, **rest)

    monkeypatch.setattr(type(layer), "forward", scaled)
    assert Lean.of(model.model, model.model.layers, model.config) is None
    monkeypatch.undo()
    assert Lean.of(model.model, model.model.layers, model.config) is not None


def test_changed_weights_are_seen() -> None:
    target = Target.wrap(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        )
    )
    assert target._lean is not None
    before = reads(target, 1)
    with torch.no_grad():
        target.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        target.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    after = reads(target, 1)
    assert not torch.allclose(before[1], after[1])
    target._lean = None
    torch.testing.assert_close(after, reads(target, 1), rtol=1e-3, atol=1e-4)


def test_long_texts_take_the_modules() -> None:
    assert Lean.suits(torch.zeros(1, 8)) and not Lean.suits(torch.zeros(1, 65))
    assert Lean.suits(torch.zeros(8, 8)) and not Lean.suits(torch.zeros(16, 8))
