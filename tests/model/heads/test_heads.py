"""The training computation equals sequential drafting, for every head kind and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint.engine_support import support
from headstart.model.heads.common.base import DraftHead, kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.grow import Children
from headstart.model.tree.shape import TreeShape

POSITIONS, STEPS, VOCAB = 17, 4, 97
CASES = [("medusa", {}), ("eagle3", {"fc_norm": True, "norm_output": True})]
CASES += [
    (kind, {"attention_layout": layout})
    for kind in ("eagle3", "mtp")
    for layout in ("append", "kvshare")
]
CASES += [
    ("eagle3", {"attention_layout": "append", "window": 3}),
    ("eagle3", {"attention_layout": "kvshare", "window": 3}),
    ("mtp", {"attention_layout": "append", "window": 6}),
]
IDS = ["-".join([kind, *map(str, settings.values())]) for kind, settings in CASES]


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return wrap_target(LlamaForCausalLM(config).double())


def fresh(target: Target, kind: str, settings: dict) -> DraftHead:
    torch.manual_seed(1)
    head = make_head(target, kind, settings).double()
    for parameter in head.parameters():  # zero blocks and identities would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def forced(head: DraftHead, follow: list[int]) -> list[Tensor]:
    """Make a head draft given tokens; returns the list that its hidden states will go to."""
    hidden: list[Tensor] = []

    def candidates(hidden_BFD: Tensor, width: int, depth: int = 0) -> Children:
        token = follow[len(hidden)]
        hidden.append(hidden_BFD[:, 0])
        return torch.zeros(1, 1, 1).double(), torch.full((1, 1, 1), token)

    head.candidates = candidates  # type: ignore[method-assign]
    return hidden


def first_rows(seen: TargetOutput, rows: int) -> TargetOutput:
    return seen.gather(torch.arange(rows)[None])


def test_every_kind_is_tested():
    assert {kind for kind, _ in CASES} == set(kinds())


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_training_equals_sequential_drafting(target, kind, settings):
    head = fresh(target, kind, settings)
    tokens_BT = torch.randint(VOCAB, (1, POSITIONS))
    seen = target.forward(tokens_BT, taps=head.taps)
    trained = head.unroll(seen, tokens_BT, STEPS)
    compared = 0
    for anchor in range(POSITIONS - STEPS - 1):
        hidden = forced(head, tokens_BT[0, anchor + 2 :].tolist())
        next_BP = tokens_BT[:, 1 : anchor + 2]
        counts_B = torch.tensor([anchor + 1])
        state = head.advance(head.start(1), first_rows(seen, anchor + 1), next_BP, counts_B)
        head.draft(state, TreeShape.chain(STEPS))
        for step in range(STEPS):
            torch.testing.assert_close(
                hidden[step], trained[step][:, anchor], rtol=1e-12, atol=1e-12
            )
            compared += 1
    assert compared == STEPS * (POSITIONS - STEPS - 1)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_crossed_layouts_differ(target, kind):
    append = fresh(target, kind, {"attention_layout": "append"})
    kvshare = fresh(target, kind, {"attention_layout": "kvshare"})
    kvshare.load_state_dict(append.state_dict())
    tokens_BT = torch.randint(VOCAB, (1, POSITIONS))
    seen = target.forward(tokens_BT, taps=append.taps)
    ours = append.unroll(seen, tokens_BT, 2)
    theirs = kvshare.unroll(seen, tokens_BT, 2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    assert (ours[1] - theirs[1]).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_chunked_training_attention_equals_whole(target, kind, settings, monkeypatch):
    head = fresh(target, kind, settings)
    tokens_BT = torch.randint(VOCAB, (2, POSITIONS))
    seen = target.forward(tokens_BT, taps=head.taps)

    def hidden_and_gradients() -> list[Tensor]:
        hidden = head.unroll(seen, tokens_BT, STEPS)
        gradients = torch.autograd.grad(
            sum(step.square().sum() for step in hidden), list(head.parameters())
        )
        return [*hidden, *gradients]

    whole = hidden_and_gradients()
    monkeypatch.setattr("headstart.model.heads.common.autoregressive.QUERY_CHUNK", 5)
    for ours, theirs in zip(hidden_and_gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_a_tree_node_is_drafted_like_its_path(target, kind, settings):
    head = fresh(target, kind, settings)
    tokens_BT = torch.randint(VOCAB, (1, 9))
    seen = target.forward(tokens_BT, taps=head.taps)
    counts_B = torch.tensor([8])
    state = head.advance(head.start(1), first_rows(seen, 8), tokens_BT[:, 1:], counts_B)
    tree = head.draft(state, TreeShape.dynamic(nodes=14, depth=3, width=3))
    assert tree.nodes == 14 and int(tree.depths_BN.max()) >= 2
    for node in range(1, tree.nodes):
        path = [m for m in range(1, tree.nodes) if tree.ancestors_BNN[0, node, m]]
        tokens = tree.tokens_BN[0, path].tolist()
        hidden = forced(head, tokens)
        head.draft(state, TreeShape.chain(len(path)))
        del head.candidates
        total = 0.0
        for depth, token in enumerate(tokens):
            logp_V = head.logits(hidden[depth]).log_softmax(-1)[0]
            total += float(logp_V[token])
        assert total == pytest.approx(float(tree.scores_BN[0, node]), abs=1e-5)


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_ragged_rows_draft_as_if_alone(target, kind, settings):
    head = fresh(target, kind, settings)
    lengths = [3, 9, 6]
    tokens_BT = torch.randint(VOCAB, (3, 10))
    seen = target.forward(tokens_BT, taps=head.taps)
    shape = TreeShape.dynamic(nodes=9, depth=3, width=2)
    counts_B = torch.tensor(lengths)
    state = head.advance(
        head.start(3), seen.gather(torch.arange(9).expand(3, -1)), tokens_BT[:, 1:], counts_B
    )
    together = head.draft(state, shape)
    again = head.draft(head.select_rows(state, torch.tensor([1, 2])), shape)
    for row, length in enumerate(lengths):
        one = tokens_BT[row : row + 1]
        seen_one = target.forward(one, taps=head.taps)
        state = head.advance(
            head.start(1),
            first_rows(seen_one, length),
            one[:, 1 : length + 1],
            torch.tensor([length]),
        )
        alone = head.draft(state, shape)
        assert alone.tokens_BN.tolist() == together.tokens_BN[row : row + 1].tolist()
        assert alone.parents_BN.tolist() == together.parents_BN[row : row + 1].tolist()
        torch.testing.assert_close(alone.scores_BN, together.scores_BN[row : row + 1])
        if row > 0:
            assert alone.tokens_BN[0].tolist() == again.tokens_BN[row - 1].tolist()


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_draft_vocabulary_limits_guesses(target, kind, settings):
    head = fresh(target, kind, settings | {"draft_vocab": 11})
    allowed = torch.randperm(VOCAB)[:11]
    with pytest.raises(ValueError, match="never set"):
        _ = head.draft_ids
    head.set_draft_vocab(allowed)
    assert head.draft_ids.tolist() == sorted(allowed.tolist())
    tokens_BT = torch.randint(VOCAB, (1, 6))
    seen = target.forward(tokens_BT, taps=head.taps)
    state = head.advance(head.start(1), first_rows(seen, 5), tokens_BT[:, 1:], torch.tensor([5]))
    tree = head.draft(state, TreeShape.dynamic(nodes=10, depth=3, width=3))
    assert set(tree.tokens_BN[0, 1:].tolist()) <= set(allowed.tolist())


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_head_for_another_target_is_refused(target, kind):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    head = fresh(target, kind, {})
    with pytest.raises(ValueError, match="hidden size"):
        head.bind(wrap_target(LlamaForCausalLM(config)))


def test_a_window_is_seen_and_kept_from_engines(target):
    whole = fresh(target, "eagle3", {"attention_layout": "append"})
    narrow = fresh(target, "eagle3", {"attention_layout": "append", "window": 5})
    narrow.load_state_dict(whole.state_dict())
    tokens_BT = torch.randint(VOCAB, (1, POSITIONS))
    seen = target.forward(tokens_BT, taps=whole.taps)
    for all_of_it, some in zip(
        whole.unroll(seen, tokens_BT, 3), narrow.unroll(seen, tokens_BT, 3), strict=True
    ):
        torch.testing.assert_close(all_of_it[:, :5], some[:, :5], rtol=1e-12, atol=1e-12)
        assert ((all_of_it - some)[:, 5:].abs().amax(-1) > 1e-3).all()
    assert support(whole, "vllm") is None and "window" in str(support(narrow, "vllm"))
