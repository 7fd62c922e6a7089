"""Reading a tree is reading its paths, whatever the family; and what cannot be read is refused.

The reference is always the model's own forward pass over whole texts, without any cache.
Legend: B batch rows, N tree nodes, T positions, P committed positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from families import BASE, FAMILIES, VOCAB, WINDOW, build, padded, prompts
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from headstart.model.cache.kv_cache import BLOCK, KVCache
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.tree import NO_PARENT, Tree

LENGTHS = {1: [2 * WINDOW + 3], 3: [2 * WINDOW + 3, 5, 14]}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads that wait for each other cost more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def target_of(family: str) -> Target:
    return wrap_target(FAMILIES[family]())


def random_tree(roots_B: Tensor, nodes: int, seed: int) -> Tree:
    """Random tokens and parents; the last node of every second row is padding."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(roots_B)
    tokens_BN = torch.randint(4, VOCAB, (batch, nodes), generator=generator)
    tokens_BN[:, 0] = roots_B
    parents_BN = torch.full((batch, nodes), NO_PARENT)
    for node in range(1, nodes):
        low = max(0, node - 4)  # recent parents, so that paths get long
        parents_BN[:, node] = torch.randint(low, node, (batch,), generator=generator)
    parents_BN[1::2, -1] = NO_PARENT
    return Tree(tokens_BN, parents_BN, torch.zeros(batch, nodes))


def path_to(tree: Tree, row: int, node: int) -> list[int]:
    return tree.ancestors_BNN[row, node].nonzero().flatten().tolist()


def own_logits(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    """What the model itself says to whole texts (padded on the right, which changes nothing)."""
    with torch.no_grad():
        return model(input_ids=padded(texts)[0], use_cache=False).logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


class Batch:
    """Rows of text that grow round by round, beside the cache that must stay equal to them."""

    def __init__(self, target: Target, lengths: list[int]):
        self.target, self.texts = target, prompts(lengths)
        self.cache = target.new_cache(len(lengths))
        self.read(self.texts)

    def read(self, texts: list[Tensor]) -> TargetOutput:
        tokens_BT, lengths_B = padded(texts)
        seen = self.target.forward(tokens_BT, self.cache, lengths_B=lengths_B)
        path_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
        self.cache.commit(path_BT, lengths_B)
        return seen

    def check_tree(self, seed: int) -> None:
        """Read a tree, compare every node with its path as a text, commit one path per row."""
        tree = random_tree(torch.tensor([7, 8, 9])[: len(self.texts)], 9, seed)
        seen = self.target.forward(tree, self.cache)
        assert seen.logits_BTV is not None
        wanted = [(b, n) for b, n in tree.valid_BN.nonzero().tolist()]
        whole = [
            torch.cat([self.texts[b], tree.tokens_BN[b, path_to(tree, b, n)]]) for b, n in wanted
        ]
        theirs = own_logits(self.target.model, whole)
        ends = torch.tensor([len(text) - 1 for text in whole])
        rows_B, nodes_B = torch.tensor(wanted).T
        assert_same(seen.logits_BTV[rows_B, nodes_B], theirs[torch.arange(len(whole)), ends])
        self.commit(tree, [(3 * seed + row) % 8 for row in range(len(self.texts))])

    def commit(self, tree: Tree, nodes: list[int]) -> None:
        paths = [torch.tensor(path_to(tree, row, node)) for row, node in enumerate(nodes)]
        path_BP, counts_B = padded(paths)
        self.cache.commit(path_BP, counts_B)
        for row, path in enumerate(paths):
            self.texts[row] = torch.cat([self.texts[row], tree.tokens_BN[row, path]])
        assert self.cache.lengths_B.tolist() == [len(text) for text in self.texts]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_read_equals_path_reads_round_after_round(family: str, batch: int) -> None:
    rows = Batch(target_of(family), LENGTHS[batch])
    for seed in (1, 2):
        rows.check_tree(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_two_parts_equals_one(family: str) -> None:
    rows = Batch(target_of(family), LENGTHS[3])
    more = prompts([4, 12, 1], seed=1)
    seen = rows.read(more)
    whole = [torch.cat(parts) for parts in zip(rows.texts, more, strict=True)]
    theirs = own_logits(rows.target.model, whole)
    assert seen.logits_BTV is not None
    for row, text in enumerate(more):
        end = len(whole[row])
        assert_same(seen.logits_BTV[row, : len(text)], theirs[row, end - len(text) : end])


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_and_logits_equal_the_models_own(family: str) -> None:
    target = target_of(family)
    tokens_BT, _ = padded(prompts([20]))
    with torch.no_grad():
        theirs = target.model(input_ids=tokens_BT, use_cache=False, output_hidden_states=True)
    layers = tuple(range(target.num_layers))
    seen = target.forward(tokens_BT, taps=layers)
    assert set(seen.hidden_states) == set(layers)
    for layer in layers[:-1]:  # entry 0 is the embedding, the last one comes after the final norm
        assert_same(seen.hidden_states[layer], theirs.hidden_states[layer + 1])
    assert_same(seen.lm_head_input_BTD, theirs.hidden_states[-1])
    assert_same(target.unembed(seen.lm_head_input_BTD), theirs.logits)
    ids = torch.tensor([3, 50, 17, VOCAB - 1])
    assert_same(target.unembed(seen.lm_head_input_BTD, ids), theirs.logits[..., ids])
    assert target.embed(tokens_BT).shape[:2] == tokens_BT.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_are_not_degenerate(family: str) -> None:
    """A model that repeats one token would let every test of decoding pass."""
    target = target_of(family)
    tokens_BT = prompts([10])[0][None]
    cache = target.new_cache(1)
    said = []
    for _ in range(16):
        logits_BTV = target.forward(tokens_BT, cache).logits_BTV
        assert logits_BTV is not None
        cache.commit(torch.arange(tokens_BT.shape[1])[None], torch.tensor([tokens_BT.shape[1]]))
        tokens_BT = logits_BTV[:, -1:].argmax(-1)
        said.append(int(tokens_BT))
    assert len(set(said)) > 3, said


@pytest.mark.parametrize("left", [[2, 1], [0, 1], [1, 2], [1, 0]])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "deepseek_v3", "glm_moe_dsa", "gpt_oss"]
)
def test_finished_rows_can_leave(family: str, left: list[int]) -> None:
    rows = Batch(target_of(family), LENGTHS[3])
    rows.check_tree(1)
    rows.cache.select_rows(torch.tensor(left))
    rows.texts = [rows.texts[row] for row in left]
    rows.check_tree(2)


def test_a_cache_grows_by_blocks() -> None:
    rows = Batch(target_of("llama"), [BLOCK - 6, 3])
    for seed in (1, 2, 3):
        rows.check_tree(seed)
    layer = rows.cache.kv_layers[0]
    assert (
        layer.keys is not None and layer.keys.shape[2] == 2 * BLOCK > rows.cache.max_length > BLOCK
    )


def test_a_chain_in_place_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("llama")
    cache = target.new_cache(1)
    moves = []
    monkeypatch.setattr(KVCache, "_move", lambda *arguments: moves.append(arguments))
    target.forward(prompts([6])[0][None], cache)
    cache.commit(torch.arange(6)[None], torch.tensor([6]))
    target.forward(random_tree(torch.tensor([5]), 6, seed=0), cache)
    cache.commit(torch.tensor([[0, 1, 2]]), torch.tensor([2]))
    assert not moves and cache.lengths_B.tolist() == [8]
    target.forward(random_tree(torch.tensor([5]), 6, seed=0), cache)
    cache.commit(torch.tensor([[0, 2]]), torch.tensor([2]))
    assert len(moves) == 1


def test_a_second_read_replaces_what_was_pending() -> None:
    rows = Batch(target_of("llama"), LENGTHS[3])
    rows.target.forward(random_tree(torch.tensor([4, 5, 6]), 12, seed=9), rows.cache)
    rows.check_tree(1)


def test_padding_may_hold_anything() -> None:
    target = target_of("llama")
    texts = prompts([6, 3])
    tokens_BT, lengths_B = padded(texts)
    tokens_BT[1, 3:] = -100
    logits_BTV = target.forward(tokens_BT, lengths_B=lengths_B).logits_BTV
    assert logits_BTV is not None
    assert_same(logits_BTV[1, :3], own_logits(target.model, texts)[1, :3])


def test_a_tree_without_a_cache_stands_at_the_start() -> None:
    target = target_of("llama")
    tree = Tree(torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]), torch.zeros(1, 3))
    logits_BTV = target.forward(tree).logits_BTV
    assert logits_BTV is not None
    assert_same(logits_BTV[0, 2], own_logits(target.model, [torch.tensor([5, 7])])[0, 1])


def test_the_lm_head_runs_only_when_asked_for() -> None:
    target = target_of("llama")
    runs = []
    handle = target.model.get_output_embeddings().register_forward_hook(lambda *_: runs.append(1))
    seen = target.forward(prompts([5])[0][None], logits=False)
    handle.remove()
    assert seen.logits_BTV is None and not runs and not seen.hidden_states


def test_gradients_pass_the_lm_head_and_stop_at_the_target() -> None:
    target = target_of("gemma2")
    hidden = torch.randn(2, target.hidden_size, requires_grad=True)
    target.unembed(hidden).square().sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert not target.forward(prompts([5])[0][None]).lm_head_input_BTD.requires_grad


def test_rows_of_the_lm_head_are_gathered_once_and_follow_changes() -> None:
    target = wrap_target(FAMILIES["phi"]())
    hidden = torch.randn(2, target.hidden_size)
    ids = torch.tensor([9, 2, 30])
    first = target._lm_head.rows(ids)
    assert target._lm_head.rows(ids) is first
    ids[0] = 11
    assert_same(target.unembed(hidden, ids), target.unembed(hidden)[:, ids])
    for other in range(20):
        target.unembed(hidden, torch.tensor([other]))
    assert len(target._lm_head._subsets) <= 4


RECURRENT = {
    "qwen3_next": {"layer_types": ["linear_attention"] * 2, "head_dim": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
    "mamba": {},
    "falcon_h1": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_models_are_refused(model_type: str) -> None:
    model = build(model_type, RECURRENT[model_type])
    with pytest.raises(ValueError, match=r"softmax attention in every layer"):
        wrap_target(model)


def test_a_model_with_position_biases_is_refused() -> None:
    """ALiBi is built inside from a plain mask, so a tree cannot be told to it."""
    with pytest.raises(ValueError, match=r"another family"):
        wrap_target(build("bloom", {"n_head": 4, "n_layer": 2}))


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "window_size": 8},
            "by cache slot",
        ),
        ("moshi", {"sliding_window": WINDOW, "head_dim": 8}, "does not apply it"),
    ],
)
def test_windows_that_are_not_told_by_a_mask_are_refused(
    model_type: str, settings: dict[str, object], said: str
) -> None:
    sizes = {"num_layers": 2, "num_heads": 4} if model_type == "gpt_neo" else {}
    with pytest.raises(ValueError, match=said):
        wrap_target(build(model_type, sizes | settings))


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"encoder-decoder"):
        wrap_target(T5ForConditionalGeneration(config))


def test_models_without_an_lm_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no plain linear LM head"):
        wrap_target(AutoModel.from_config(AutoConfig.for_model("llama", **BASE)))


def test_unknown_logits_are_refused() -> None:
    def square_logits(module: nn.Module, args: object, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        output.logits.square_()

    model = FAMILIES["llama"]()
    model.lm_head.register_forward_hook(lambda module, args, output: output.square())
    wrap_target(model)  # inside the LM head, which is run as it is
    model.register_forward_hook(square_logits)
    with pytest.raises(ValueError, match=r"computes its logits"):
        wrap_target(model)


def test_a_folder_opens_as_it_was(tmp_path: Path) -> None:
    model = FAMILIES["qwen3"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "draft_heads").mkdir()  # a fused folder has this beside the model
    target = load_target(tmp_path, device="cpu")
    assert target.dtype == torch.float32 and target.name == str(tmp_path)
    texts = prompts([9])
    assert_same(target.forward(texts[0][None]).logits_BTV, own_logits(model, texts))
    with pytest.raises(ValueError, match=r"has no tokenizer"):  # transformers makes an empty one
        _ = target.tokenizer
    assert target.pad_id == 0 and target.eos_ids == ()
    assert load_target(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"Unknown dtype 'int8'.*bfloat16"):
        load_target(tmp_path, dtype="int8")


def test_a_folder_with_missing_weights_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        load_target(tmp_path, device="cpu")


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no folder"):
        load_target(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_target(tmp_path)
    with pytest.raises(ValueError, match=r"There is no file"):
        load_target(tmp_path / "nothing.gguf")
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ValueError, match=r"Name one of its GGUF files: some\.gguf"):
        load_target(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be opened"):
        load_target("headstart-tests/no-such-model")


def test_rows_without_any_padding_token_cannot_be_batched() -> None:
    target = wrap_target(build("llama", {"pad_token_id": None}))
    with pytest.raises(ValueError, match=r"cannot be batched"):
        _ = target.pad_id
    target.model.generation_config.eos_token_id = [7, 3]
    assert target.pad_id == 7 and target.eos_ids == (7, 3)
