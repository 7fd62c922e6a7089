"""Training objectives: agreement of head and target at every draft step.

p is the target's distribution, q the head's, both at temperature 1 and in fp32 or wider. A draft
token is accepted with probability alpha = sum(min(p, q)) = 1 - TV(p, q) (arXiv 2302.01318).

    kl       sum p log(p / q); with a draft vocabulary, p restricted to it and renormalised
    tv       1 - alpha, p not renormalised: tokens outside the draft vocabulary count as lost
    lk       lambda * kl + (1 - lambda) * tv with lambda = exp(-eta * alpha) (arXiv 2602.23881)
    e2e_tv   sum over steps j of 1 - prod(alpha_i, i <= j): a longer accepted chain (2606.12370)

The LM head is frozen, so only its input needs a gradient, which these losses have in closed form.
`loss_sum` computes loss and gradient chunk by chunk and keeps the logits of one chunk only; tests
compare it with plain autograd over everything.

Indexing: anchor t, step k, teacher row r = t + 1 + k, label x[r + 1]. One teacher row serves all
steps, so the chunks run over teacher rows.

Legend: B sequences, T positions, F flat rows b * T + t, K draft steps, R rows of a chunk,
D hidden size, V the vocabulary, W the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.training.config.schema import LossConfig
from headstart.training.data.batching import Batch

from .step_metrics import StepSums

ROUND_ROWS = 64  # chunks are padded to a multiple, so that few shapes occur
LOGITS_BYTES = 1 << 31
MOST_ROWS_GPU = 8192
MOST_ROWS_CPU = 256  # larger tensors cost a CPU more in page faults than in arithmetic
SMALLEST_LOG = -80.0  # smallest log-probability whose exponential is a normal float32
BLOCK_BYTES = 1 << 19  # size of one fp32 block of rows on a CPU: several fit in a core's cache


@dataclass(frozen=True)
class Loss:
    """Loss of a batch. total: weighted sum over all labels, with a gradient. sums: for metrics."""

    total: Tensor
    sums: StepSums


def valid_steps(batch: Batch, steps: int) -> Tensor:
    """Return K x B x T bool: whether anchor t has a label at step k."""
    mask_BT = batch.loss_mask_BT
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    mask_BT = mask_BT & (places_T < batch.lengths_B[:, None])
    padded_BT = torch.nn.functional.pad(mask_BT, (0, steps + 1))
    length = mask_BT.shape[1]
    return torch.stack([padded_BT[:, 2 + step :][:, :length] for step in range(steps)])


def label_rows(batch: Batch) -> Tensor:
    """Return flat indices of the rows whose next token is a label of the first draft step."""
    return valid_steps(batch, 1)[0].flatten().nonzero()[:, 0] + 1


def step_weights(config: LossConfig, valid_KBT: Tensor) -> Tensor:
    """Return K x B x T: the weight of each label. The loss is divided by their sum."""
    if config.kind == "e2e_tv":  # a chain ends at its first step without a label
        return valid_KBT.cumprod(0).float()
    decay_K = config.step_decay ** torch.arange(len(valid_KBT), device=valid_KBT.device)
    return valid_KBT.float() * decay_K[:, None, None]


def loss_weight(config: LossConfig, batch: Batch) -> float:
    """Return the weight of all labels of a batch, which follows from the batch alone."""
    return float(step_weights(config, valid_steps(batch, config.steps)).sum(dtype=torch.float64))


def loss_sum(
    config: LossConfig,
    head: DraftHead,
    output: TargetOutput,
    hidden: Sequence[Tensor],
    batch: Batch,
) -> Loss:
    """Return the loss of a batch, computed in chunks; under no_grad without a gradient.

    output: of the target. hidden: B x T x D per draft step, from `head.unroll`.
    """
    gradient = torch.is_grad_enabled()
    valid_KBT = valid_steps(batch, len(hidden))
    weights_KBT = step_weights(config, valid_KBT)
    work = _ChunkedLoss(config, head, output, [values.detach() for values in hidden], valid_KBT)
    if config.kind == "e2e_tv":
        work.run(torch.zeros_like(weights_KBT), gradient=False)
        alpha_KBT = work.alpha_KBT.clone()
        chains_KBT = (alpha_KBT * weights_KBT).cumprod(0)
        total = (weights_KBT - chains_KBT).sum()
        loss_K = (weights_KBT - chains_KBT).sum((1, 2))
        if gradient:
            work.run(chain_gradient(alpha_KBT, weights_KBT), gradient=True)
    else:
        work.run(weights_KBT, gradient=gradient)
        loss_K = (work.loss_KBT * valid_KBT).sum((1, 2))
        total = (work.loss_KBT * weights_KBT).sum()
    sums = StepSums.of(
        valid_KBT, loss_K, work.alpha_KBT, work.top1_KBT, total.detach(), weights_KBT
    )
    return Loss(_PrecomputedGrad.apply(total, work.gradients, *hidden), sums)


def chain_gradient(alpha_KBT: Tensor, weights_KBT: Tensor) -> Tensor:
    """d(e2e loss) / d(TV_m) = (prod of alpha_i, i < m) * S_m with S_m = 1 + alpha_{m+1} S_{m+1}."""
    alpha_KBT = alpha_KBT * weights_KBT
    before_KBT = torch.cat([torch.ones_like(alpha_KBT[:1]), alpha_KBT[:-1].cumprod(0)])
    tails = [torch.ones_like(alpha_KBT[0])]
    for step in range(len(alpha_KBT) - 1, 0, -1):
        tails.append(1 + alpha_KBT[step] * tails[-1])
    return before_KBT * torch.stack(tails[::-1]) * weights_KBT


class _PrecomputedGrad(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *hidden: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *[gradient * upstream[0] for gradient in ctx.gradients])


@dataclass(frozen=True)
class _TargetProbs:
    """The target's distribution at the rows of a chunk.

    r_RW: softmax over the draft vocabulary alone, which is never 0 / 0.
    mass_R: probability of the draft vocabulary, so p = r * mass there; None without one.
    negentropy_R: sum of r log r. top_R: argmax over the whole vocabulary.
    """

    r_RW: Tensor
    mass_R: Tensor | None
    negentropy_R: Tensor
    top_R: Tensor


class _ChunkedLoss:
    """Loss and gradient of a batch, computed chunk by chunk over its teacher rows.

    Rows and anchors are flat indices b * T + t (F of them). Buffers have one more slot, for the
    results of anchors before the start of a sequence.
    """

    def __init__(
        self,
        config: LossConfig,
        head: DraftHead,
        output: TargetOutput,
        hidden: list[Tensor],
        valid_KBT: Tensor,
    ):
        self.config, self.head = config, head
        self.shape = valid_KBT.shape
        self.lm_head_input_FD = output.lm_head_input_BTD.detach().flatten(0, 1)
        self.hidden_KFD = [values.flatten(0, 1) for values in hidden]
        # A row with a label at any step has one at step 0, except for anchors before the start.
        rows_R = valid_KBT[0].flatten().nonzero()[:, 0] + 1
        # Padded with row 0, which has no label, so that few shapes occur (data/batching.py).
        self.rows_R = torch.nn.functional.pad(rows_R, (0, -len(rows_R) % ROUND_ROWS))
        wide = torch.promote_types(torch.float32, hidden[0].dtype)
        slots = (len(hidden), self.lm_head_input_FD.shape[0] + 1)
        device = valid_KBT.device
        self._loss, self._alpha, self._top1 = (
            torch.zeros(slots, dtype=wide, device=device) for _ in range(3)
        )
        self._gradients = [
            values.new_zeros(slots[1], values.shape[-1]) for values in self.hidden_KFD
        ]

    @property
    def loss_KBT(self) -> Tensor:
        return self._loss[:, :-1].view(self.shape)

    @property
    def alpha_KBT(self) -> Tensor:
        return self._alpha[:, :-1].view(self.shape)

    @property
    def top1_KBT(self) -> Tensor:
        return self._top1[:, :-1].view(self.shape)

    @property
    def gradients(self) -> list[Tensor]:
        return [values[:-1].view(*self.shape[1:], -1) for values in self._gradients]

    def run(self, weights_KBT: Tensor, *, gradient: bool) -> None:
        """Fill the results. weights_KBT: weight of each label in the gradient."""
        spare_K1 = weights_KBT.new_zeros(len(weights_KBT), 1)
        weights_KF = torch.cat([weights_KBT.flatten(1), spare_K1], 1)
        if not len(self.rows_R):  # a rank may have no label in a batch
            return
        size = self.config.chunk_rows or chunk_rows(self.head, weights_KBT.is_cuda)
        for rows_R in self.rows_R.split(size):
            target = self._target_probs(rows_R)
            for step in range(self.shape[0]):
                anchors_R = rows_R - 1 - step
                started_R = rows_R % self.shape[2] > step
                slots_R = torch.where(started_R, anchors_R, self.lm_head_input_FD.shape[0])
                self._run_step(step, anchors_R.clamp(min=0), slots_R, target, weights_KF, gradient)

    @torch.no_grad()
    def _target_probs(self, rows_R: Tensor) -> _TargetProbs:
        logits_RV = self.head.target.unembed(self.lm_head_input_FD[rows_R])
        return _target_probs(logits_RV, self.head.draft_ids)

    def _run_step(
        self,
        step: int,
        anchors_R: Tensor,
        slots_R: Tensor,
        target: _TargetProbs,
        weights_KF: Tensor,
        gradient: bool,
    ) -> None:
        hidden_RD = self.hidden_KFD[step][anchors_R].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits_RW = self.head.logits(hidden_RD)
        rows = _ChunkLoss(
            self.config, logits_RW.detach(), target, weights_KF[step, slots_R], gradient
        )
        self._loss[step, slots_R] = rows.loss_R
        self._alpha[step, slots_R] = rows.alpha_R
        top_R = rows.top_R if self.head.draft_ids is None else self.head.draft_ids[rows.top_R]
        self._top1[step, slots_R] = (top_R == target.top_R).to(self._top1.dtype)
        if gradient:
            (gradient_RD,) = torch.autograd.grad(logits_RW, hidden_RD, rows.gradient_RW)
            self._gradients[step][slots_R] = gradient_RD


def chunk_rows(head: DraftHead, on_gpu: bool) -> int:
    """Return the rows of a chunk whose vocabulary-wide tensors fit into LOGITS_BYTES."""
    fit = LOGITS_BYTES // (4 * wide_numbers(head))
    most = MOST_ROWS_GPU if on_gpu else MOST_ROWS_CPU
    return max(1, min(most, fit // ROUND_ROWS * ROUND_ROWS))


def wide_numbers(head: DraftHead) -> int:
    """Return the float32 numbers per row of a chunk at the peak: the target's logits, their softmax
    and four tensors of the draft vocabulary's width; or, in the gradient, seven of the latter."""
    vocab, draft = head.config.vocab_size, head.config.draft_vocab or head.config.vocab_size
    return max(2 * vocab + 4 * draft, 7 * draft)


class _ChunkLoss:
    """Loss, acceptance rate and logit gradient of the rows of a chunk, block by block."""

    def __init__(
        self,
        config: LossConfig,
        logits_RW: Tensor,
        target: _TargetProbs,
        weights_R: Tensor,
        gradient: bool,
    ):
        results = []
        self.gradient_RW = torch.empty_like(logits_RW) if gradient else None
        with torch.autocast(logits_RW.device.type, enabled=False):
            for block in _blocks(logits_RW):
                results.append(self._block(config, logits_RW, target, weights_R, block))
        self.loss_R, self.alpha_R, self.top_R = (
            torch.cat(part) for part in zip(*results, strict=True)
        )

    def _block(
        self,
        config: LossConfig,
        logits_RW: Tensor,
        target: _TargetProbs,
        weights_R: Tensor,
        rows: slice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        r = p = target.r_RW[rows]
        q = logits_RW[rows].log_softmax(-1, dtype=r.dtype)
        kl = target.negentropy_R[rows] - _row_dot(r, q)
        q.clamp_(min=SMALLEST_LOG).exp_()  # denormals take a CPU eighteen times as long
        mass = torch.ones_like(kl) if target.mass_R is None else target.mass_R[rows]
        if target.mass_R is not None:
            p = r * mass[:, None]
        top = q.max(-1).indices  # several times faster than argmax on a CPU
        below = torch.le(q, p, out=torch.empty_like(p))
        below_q = _row_dot(below, q)
        alpha = below_q + mass - _row_dot(below, p)
        kl_weight, tv_weight = _mix(config, alpha)
        loss = kl_weight * kl + tv_weight * (1 - alpha)
        if self.gradient_RW is not None:
            kl_part, tv_part = weights_R[rows] * kl_weight, weights_R[rows] * tv_weight
            # kl: q - r; tv: q * (sum of q where q <= p) - q where q <= p
            slope = torch.addcmul((kl_part + tv_part * below_q)[:, None], below, -tv_part[:, None])
            slope.mul_(q).addcmul_(r, kl_part[:, None], value=-1)
            self.gradient_RW[rows] = slope
        return loss, alpha, top


def _mix(config: LossConfig, alpha_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the KL and TV parts, constants in the gradient."""
    zeros, ones = torch.zeros_like(alpha_R), torch.ones_like(alpha_R)
    if config.kind == "kl":
        return ones, zeros
    if config.kind == "lk":
        kl_weight = torch.exp(-config.eta * alpha_R)
        return kl_weight, 1 - kl_weight
    return zeros, ones


@torch.no_grad()
def _target_probs(logits_RV: Tensor, draft_ids_W: Tensor | None) -> _TargetProbs:
    wide = torch.promote_types(torch.float32, logits_RV.dtype)
    width = logits_RV.shape[-1] if draft_ids_W is None else len(draft_ids_W)
    r_RW = logits_RV.new_empty(len(logits_RV), width, dtype=wide)
    tiny = torch.finfo(wide).tiny
    results = []
    with torch.autocast(logits_RV.device.type, enabled=False):
        for rows in _blocks(logits_RV):
            p = r = logits_RV[rows].softmax(-1, dtype=wide)
            top = p.max(-1).indices
            if draft_ids_W is not None:
                r = logits_RV[rows].index_select(-1, draft_ids_W).softmax(-1, dtype=wide)
                p = p.index_select(-1, draft_ids_W)
            r_RW[rows] = r
            results.append((p.sum(-1), _row_dot(r, r.clamp(min=tiny).log()), top))
    mass_R, negentropy_R, top_R = (torch.cat(part) for part in zip(*results, strict=True))
    return _TargetProbs(r_RW, None if draft_ids_W is None else mass_R, negentropy_R, top_R)


def _row_dot(left_RW: Tensor, right_RW: Tensor) -> Tensor:
    return (left_RW * right_RW).sum(-1)  # on a CPU faster than a batched matrix product


def _blocks(values_RV: Tensor) -> Iterator[slice]:
    """Yield slices of rows: small ones on a CPU, where memory bandwidth is the limit; else one."""
    rows, width = values_RV.shape
    size = rows if values_RV.is_cuda else max(1, BLOCK_BYTES // (4 * width))
    for at in range(0, rows, size):
        yield slice(at, at + size)
