"""The objective: chunked and eager agree, gradients are right, labels are where they should be.

Legend: B batch rows, T positions, K draft steps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from tiny_run import VOCAB, follower, rule_rows, rule_target, tiny_head, tiny_target
from torch import Tensor

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.tree.shape import TreeShape
from headstart.training.config.schema import LossConfig
from headstart.training.data.batching import Batch
from headstart.training.objective.losses import (
    chain_gradient,
    loss_sum,
    loss_weight,
    step_weights,
    valid_steps,
)

STEPS = 3
KINDS = get_args(LossConfig.model_fields["kind"].annotation)
Case = tuple[DraftHead, TargetOutput, Batch]


@pytest.fixture(scope="module", params=[None, 20], ids=["whole", "draft vocabulary"])
def case(request) -> Case:
    """A float64 head and a ragged batch whose mask has gaps."""
    target = tiny_target()
    target.model.double()
    head = tiny_head(target, draft_vocab=request.param).double()
    if request.param is not None:
        head.set_draft_vocab(torch.randperm(VOCAB)[: request.param])
    tokens_BT = torch.randint(0, VOCAB, (3, 11))
    mask_BT = torch.rand(3, 11) < 0.85
    batch = Batch(tokens_BT, torch.tensor([11, 7, 3]), mask_BT)
    return head, target.forward(tokens_BT, lengths_B=batch.lengths_B, logits=False), batch


def draft_hidden(seen: TargetOutput) -> list[Tensor]:
    """Hidden states of a fair draft: the target's own at the teacher row, and noise."""
    generator = torch.Generator().manual_seed(5)
    hidden = []
    for step in range(STEPS):
        true_BTD = seen.lm_head_input_BTD.roll(-1 - step, dims=1)
        noise_BTD = torch.randn(true_BTD.shape, generator=generator, dtype=torch.float64)
        hidden.append((true_BTD + 0.6 * noise_BTD).requires_grad_())
    return hidden


def gradients(
    seen: TargetOutput, total: Callable[[list[Tensor]], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    hidden = draft_hidden(seen)
    value = total(hidden)
    (2.5 * value).backward()
    assert all(values.grad is not None for values in hidden)
    return value.detach(), [values.grad for values in hidden if values.grad is not None]


def loss_sum_eager(
    config: LossConfig, head: DraftHead, seen: TargetOutput, hidden: list[Tensor], batch: Batch
) -> Tensor:
    """The total of `loss_sum` in plain autograd, all logits at once."""
    weights_KBT = step_weights(config, valid_steps(batch, len(hidden)))
    with torch.no_grad():
        target_BTV = head.target.unembed(seen.lm_head_input_BTD)
        wide = torch.promote_types(torch.float32, target_BTV.dtype)
        ids = slice(None) if head.draft_ids is None else head.draft_ids
        p_BTW = target_BTV.softmax(-1, dtype=wide)[..., ids]
        r_BTW = target_BTV[..., ids].softmax(-1, dtype=wide)
    losses, alphas = [], []
    for step, hidden_BTD in enumerate(hidden):
        teacher_BTW = p_BTW.roll(-1 - step, dims=1)  # what rolls around is invalid
        restricted_BTW = r_BTW.roll(-1 - step, dims=1)
        logq_BTW = head.logits(hidden_BTD).log_softmax(-1, dtype=wide)
        kl_BT = torch.nn.functional.kl_div(logq_BTW, restricted_BTW, reduction="none").sum(-1)
        alpha_BT = torch.minimum(teacher_BTW, logq_BTW.exp()).sum(-1)
        constant_BT = alpha_BT.detach()
        mixed = {"kl": torch.ones_like(constant_BT), "lk": torch.exp(-config.eta * constant_BT)}
        kl_weight = mixed.get(config.kind, torch.zeros_like(constant_BT))
        losses.append(kl_weight * kl_BT + (1 - kl_weight) * (1 - alpha_BT))
        alphas.append(alpha_BT)
    if config.kind == "e2e_tv":
        chains_KBT = torch.stack(alphas).mul(weights_KBT).cumprod(0)
        return (weights_KBT - chains_KBT).sum()
    return (torch.stack(losses) * weights_KBT).sum()


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_eager(case, kind, chunk_rows):
    head, seen, batch = case
    config = LossConfig(kind=kind, steps=STEPS, step_decay=0.8, chunk_rows=chunk_rows)
    fast = gradients(seen, lambda hidden: loss_sum(config, head, seen, hidden, batch).total)
    slow = gradients(seen, lambda hidden: loss_sum_eager(config, head, seen, hidden, batch))
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-12, atol=0)
    for ours, theirs in zip(fast[1], slow[1], strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lk"])  # lk holds its mix fixed
def test_gradient_is_the_derivative(case, kind):
    head, seen, batch = case
    config = LossConfig(kind=kind, steps=STEPS, chunk_rows=4)

    def total(*hidden: Tensor) -> Tensor:
        return loss_sum(config, head, seen, list(hidden), batch).total

    assert torch.autograd.gradcheck(total, tuple(draft_hidden(seen)), fast_mode=True)


def test_chain_gradient_is_the_derivative():
    weights_KBT = torch.tensor([1, 1, 1, 0]).double()[:, None, None].expand(4, 2, 3)
    alpha_KBT = torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True)
    total = (weights_KBT - (alpha_KBT * weights_KBT).cumprod(0)).sum()
    (gradient_KBT,) = torch.autograd.grad(total, alpha_KBT)
    ours_KBT = chain_gradient(alpha_KBT.detach(), weights_KBT)
    torch.testing.assert_close(ours_KBT, -gradient_KBT)


def test_valid_anchors_have_their_label_in_the_mask():
    mask_BT = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1]]).bool()
    batch = Batch(torch.zeros(1, 8).long(), torch.tensor([7]), mask_BT)  # x[7] is padding
    expected = {(k, t) for k in range(3) for t in range(8) if t + 2 + k in (3, 4, 6)}
    found = {(k, t) for k, _, t in valid_steps(batch, 3).nonzero().tolist()}
    assert found == expected
    assert loss_weight(LossConfig(steps=3), batch) == len(expected)
    chained = {(k, t) for k, t in expected if all((j, t) in expected for j in range(k))}
    assert len(chained) < len(expected)
    assert loss_weight(LossConfig(kind="e2e_tv", steps=3), batch) == len(chained)


def test_metrics_against_plain_counting(case):
    head, seen, batch = case
    hidden = draft_hidden(seen)
    config = LossConfig(kind="tv", steps=STEPS, chunk_rows=4)
    metrics = loss_sum(config, head, seen, hidden, batch).sums.metrics()
    p_BTV = head.target.unembed(seen.lm_head_input_BTD).softmax(-1)
    ids = torch.arange(VOCAB) if head.draft_ids is None else head.draft_ids
    alphas: list[list[float]] = [[] for _ in range(STEPS)]
    hits: list[list[float]] = [[] for _ in range(STEPS)]
    lengths = []
    for row in range(3):
        for anchor in range(11):
            chain, greedy, complete = [], [], True
            for step in range(STEPS):
                label = anchor + 2 + step
                valid = label < int(batch.lengths_B[row]) and bool(batch.loss_mask_BT[row, label])
                complete &= valid
                if not valid:
                    continue
                q_V = torch.zeros(VOCAB, dtype=torch.float64)
                q_V[ids] = head.logits(hidden[step][row, anchor]).softmax(-1).detach()
                p_V = p_BTV[row, anchor + 1 + step]
                chain.append(float(torch.minimum(p_V, q_V).sum()))
                greedy.append(float(p_V.argmax() == q_V.argmax()))
                alphas[step].append(chain[-1])
                hits[step].append(greedy[-1])
            if complete:
                lengths.append((_chain_length(greedy), _chain_length(chain)))
    mean = [sum(values) / len(values) for values in (*alphas, *hits)]
    ours = [
        metrics[f"{name}_{k + 1}"]
        for name in ("acceptance_rate", "top1_accuracy")
        for k in range(STEPS)
    ]
    assert ours == pytest.approx(mean)
    assert metrics["loss"] == pytest.approx(1 - sum(map(sum, alphas)) / sum(map(len, alphas)))
    assert len(lengths) > 3
    for index, name in enumerate(("acceptance_length_t0", "acceptance_length_t1")):
        mean_length = sum(length[index] for length in lengths) / len(lengths)
        assert metrics[name] == pytest.approx(mean_length)


def _chain_length(accepted: list[float]) -> float:
    length, product = 1.0, 1.0
    for value in accepted:
        product *= value
        length += product
    return length


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_labels_gives_no_gradient(case, kind):
    head, seen, batch = case
    empty = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    config = LossConfig(kind=kind, steps=STEPS)
    value, grads = gradients(seen, lambda hidden: loss_sum(config, head, seen, hidden, empty).total)
    assert float(value) == 0 and not any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_works_out_no_gradient(case, kind, monkeypatch):
    head, seen, batch = case
    config = LossConfig(kind=kind, steps=STEPS, step_decay=0.8, chunk_rows=4)
    trained = loss_sum(config, head, seen, draft_hidden(seen), batch)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        measured = loss_sum(config, head, seen, draft_hidden(seen), batch)
    assert torch.equal(measured.sums.pack(), trained.sums.pack())
    assert torch.equal(measured.total, trained.total.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reported_loss_is_what_is_minimised(case, kind):
    head, seen, batch = case
    config = LossConfig(kind=kind, steps=STEPS, step_decay=0.5)
    loss = loss_sum(config, head, seen, draft_hidden(seen), batch)
    assert loss.sums.metrics()["loss"] == pytest.approx(
        float(loss.total) / loss_weight(config, batch)
    )


def test_a_teacher_outside_the_draft_vocabulary_stays_bounded():
    """A target that is certain of a token which the head cannot propose."""
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    head.set_draft_vocab(torch.arange(20))
    with torch.no_grad():
        target.model.get_output_embeddings().weight[40] *= 1000
    tokens_BT = torch.randint(0, VOCAB, (2, 9))
    batch = Batch(tokens_BT, torch.tensor([9, 9]), torch.ones(2, 9).bool())
    seen = target.forward(tokens_BT, logits=False)
    hidden = [values.float().detach().requires_grad_() for values in draft_hidden(seen)]
    config = LossConfig(kind="kl", steps=STEPS)
    total = loss_sum(config, head, seen, hidden, batch).total
    slow = loss_sum_eager(config, head, seen, hidden, batch)
    torch.testing.assert_close(total, slow)
    assert 0 < float(total) / loss_weight(config, batch) < 20
    total.backward()
    assert all(bool(values.grad.isfinite().all()) for values in hidden if values.grad is not None)


def test_logits_never_exceed_a_chunk(case, monkeypatch):
    head, seen, batch = case
    rows: list[int] = []
    for owner, name in ((head, "logits"), (head.target, "unembed")):
        true = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda hidden, *rest, true=true: (
                rows.append(hidden.shape[:-1].numel()) or true(hidden, *rest)
            ),
        )
    loss_sum(LossConfig(steps=STEPS, chunk_rows=4), head, seen, draft_hidden(seen), batch)
    assert rows and max(rows) <= 4


def train_on_rule(shift: int) -> tuple[DraftHead, float]:
    """A head trained on a target that follows a rule; shift: how far the teacher is misplaced."""
    target = rule_target()
    head = tiny_head(target)
    tokens_BT = torch.tensor(rule_rows(24, 16))
    batch = Batch(tokens_BT, torch.full((24,), 16), torch.ones(24, 16).bool())
    seen = target.forward(tokens_BT, logits=False)
    taught = replace(seen, lm_head_input_BTD=seen.lm_head_input_BTD.roll(shift, dims=1))
    config = LossConfig(kind="kl", steps=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    top1 = 0.0
    for _ in range(60):
        loss = loss_sum(config, head, taught, head.unroll(seen, tokens_BT, 2), batch)
        (loss.total / loss_weight(config, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        top1 = loss.sums.metrics()["top1_accuracy_1"]
    return head.eval(), top1


def drafted(head: DraftHead, tokens: list[int]) -> list[int]:
    """What the head really proposes behind some tokens."""
    tokens_BT = torch.tensor([tokens])
    seen = head.target.forward(tokens_BT[:, :-1], logits=False)
    counts_B = torch.tensor([len(tokens) - 1])
    state = head.advance(head.start(1), seen, tokens_BT[:, 1:], counts_B)
    return head.draft(state, TreeShape.chain(2)).tokens_BN[0, 1:].tolist()


@pytest.mark.parametrize(("shift", "accepted"), [(0, True), (1, False)])
def test_a_shifted_label_trains_well_and_drafts_nothing(shift, accepted):
    head, top1 = train_on_rule(shift)
    assert top1 > 0.95  # the training metrics look fine either way
    proposals = [drafted(head, row) for row in rule_rows(20, 9)]
    truth = [
        [int(follower()[row[-1]]), int(follower()[follower()[row[-1]]])] for row in rule_rows(20, 9)
    ]
    right = sum(ours == theirs for ours, theirs in zip(proposals, truth, strict=True))
    assert (right >= 18) if accepted else (right == 0)
