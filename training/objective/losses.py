"""What a draft head is trained for: agreement with the target, step by step.

p is the target's distribution, q the head's, both at temperature 1 and in fp32 or wider. A drafted
token is accepted with probability alpha = sum(min(p, q)) = 1 - TV(p, q) (arXiv 2302.01318).

    kl       sum p log(p / q); with a draft vocabulary, p restricted to it and renormalised
    tv       1 - alpha, p not renormalised: what the head cannot propose is lost
    lk       lambda * kl + (1 - lambda) * tv with lambda = exp(-eta * alpha) (arXiv 2602.23881)
    e2e_tv   sum over steps j of 1 - prod(alpha_i, i <= j): a longer accepted chain (2606.12370)

The LM head is frozen, so only the hidden rows need a gradient, and that of these losses is known in
closed form. `loss_sum` computes loss and gradient chunk by chunk, keeping the logits of one chunk
only; the tests hold it to plain autograd over everything.

Indexing: anchor t, step k, teacher row r = t + 1 + k, label x[r + 1]. One teacher row serves all
steps, so the chunks run over teacher rows.

Legend: B batch rows, T positions, F flat rows b * T + t, K draft steps, R rows of a chunk,
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

ROUND_ROWS = 64
LOGITS_BYTES = 1 << 31
MOST_ROWS_GPU = 8192
MOST_ROWS_CPU = 256  # larger tensors cost a CPU more in page faults than in arithmetic
SMALLEST_LOG = -80.0  # of a probability: its exponential is a normal float32 still
BLOCK_BYTES = 1 << 19  # of one fp32 row block on a CPU: several of them fit in a core's cache


@dataclass(frozen=True)
class Loss:
    """total: weighted sum of the loss over valid rows, with a gradient. sums: for the metrics.

    divergence: in joint training, the sum over answer rows (training/joint.py), with a gradient.
    """

    total: Tensor
    sums: StepSums
    divergence: Tensor | None = None


def valid_steps(batch: Batch, steps: int) -> Tensor:
    """K x B x T bool: anchor t has a label to learn at step k."""
    mask_BT = batch.loss_mask_BT
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    mask_BT = mask_BT & (places_T < batch.lengths_B[:, None])
    padded_BT = torch.nn.functional.pad(mask_BT, (0, steps + 1))
    length = mask_BT.shape[1]
    return torch.stack([padded_BT[:, 2 + step :][:, :length] for step in range(steps)])


def answer_rows(batch: Batch) -> Tensor:
    """F, as flat indices: rows whose next token is of an answer that the head learns from."""
    return valid_steps(batch, 1)[0].flatten().nonzero()[:, 0] + 1


def step_weights(config: LossConfig, valid_KBT: Tensor) -> Tensor:
    """K x B x T: how much each row counts; their sum is what the loss is divided by."""
    if config.kind == "e2e_tv":  # a chain ends at its first invalid step
        return valid_KBT.cumprod(0).float()
    decay_K = config.step_decay ** torch.arange(len(valid_KBT), device=valid_KBT.device)
    return valid_KBT.float() * decay_K[:, None, None]


def loss_weight(config: LossConfig, batch: Batch) -> float:
    """What the loss total of this batch is to be divided by. Known before any forward pass."""
    return float(step_weights(config, valid_steps(batch, config.steps)).sum(dtype=torch.float64))


def loss_sum(
    config: LossConfig, head: DraftHead, seen: TargetOutput, hidden: Sequence[Tensor], batch: Batch
) -> Loss:
    """The objective over a batch, in chunks. hidden: B x T x D per step, from `head.unroll`.

    Under no_grad no gradient is worked out.
    """
    gradient = torch.is_grad_enabled()
    valid_KBT = valid_steps(batch, len(hidden))
    weights_KBT = step_weights(config, valid_KBT)
    work = _Chunks(config, head, seen, [values.detach() for values in hidden], valid_KBT)
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
    return Loss(_Known.apply(total, work.gradients, *hidden), sums)


def chain_gradient(alpha_KBT: Tensor, weights_KBT: Tensor) -> Tensor:
    """d(e2e loss) / d(TV_m) = (prod of alpha_i, i < m) * S_m with S_m = 1 + alpha_{m+1} S_{m+1}."""
    alpha_KBT = alpha_KBT * weights_KBT
    before_KBT = torch.cat([torch.ones_like(alpha_KBT[:1]), alpha_KBT[:-1].cumprod(0)])
    tails = [torch.ones_like(alpha_KBT[0])]
    for step in range(len(alpha_KBT) - 1, 0, -1):
        tails.append(1 + alpha_KBT[step] * tails[-1])
    return before_KBT * torch.stack(tails[::-1]) * weights_KBT


class _Known(torch.autograd.Function):
    """A number whose gradient has been worked out already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *hidden: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *[gradient * upstream[0] for gradient in ctx.gradients])


@dataclass(frozen=True)
class _Teacher:
    """The target at the rows of a chunk.

    r_RW: its softmax over the draft vocabulary alone, which no small mass can make 0 / 0.
    mass_R: what the draft vocabulary has of p, so p = r * mass there; None without one.
    negentropy_R: sum of r log r.
    """

    r_RW: Tensor
    mass_R: Tensor | None
    negentropy_R: Tensor
    top_R: Tensor


class _Chunks:
    """Walks the teacher rows of a batch, filling per-row results and gradients.

    Rows and anchors are flat indices b * T + t (F of them). Buffers have one slot more, where the
    results of anchors before the sequence's start go.
    """

    def __init__(
        self,
        config: LossConfig,
        head: DraftHead,
        seen: TargetOutput,
        hidden: list[Tensor],
        valid_KBT: Tensor,
    ):
        self.config, self.head = config, head
        self.shape = valid_KBT.shape
        self.last_FD = seen.lm_head_input_BTD.detach().flatten(0, 1)
        self.hidden_KFD = [values.flatten(0, 1) for values in hidden]
        # A row that teaches any step also teaches step 0, but for anchors before the start.
        rows_R = valid_KBT[0].flatten().nonzero()[:, 0] + 1
        # Filled up with row 0, which teaches nothing, so that few shapes occur (see data.py).
        self.rows_R = torch.nn.functional.pad(rows_R, (0, -len(rows_R) % ROUND_ROWS))
        wide = torch.promote_types(torch.float32, hidden[0].dtype)
        slots = (len(hidden), self.last_FD.shape[0] + 1)
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
        """weights_KBT: how much each row's loss counts in the gradient."""
        spare_K1 = weights_KBT.new_zeros(len(weights_KBT), 1)
        weights_KF = torch.cat([weights_KBT.flatten(1), spare_K1], 1)
        if not len(self.rows_R):  # a process may have nothing to learn in a batch
            return
        size = self.config.chunk_rows or chunk_rows(self.head, weights_KBT.is_cuda)
        for rows_R in self.rows_R.split(size):
            teacher = self._teach(rows_R)
            for step in range(self.shape[0]):
                anchors_R = rows_R - 1 - step
                started_R = rows_R % self.shape[2] > step
                slots_R = torch.where(started_R, anchors_R, self.last_FD.shape[0])
                self._learn(step, anchors_R.clamp(min=0), slots_R, teacher, weights_KF, gradient)

    @torch.no_grad()
    def _teach(self, rows_R: Tensor) -> _Teacher:
        logits_RV = self.head.target.unembed(self.last_FD[rows_R])
        return _teacher(logits_RV, self.head.draft_ids)

    def _learn(
        self,
        step: int,
        anchors_R: Tensor,
        slots_R: Tensor,
        teacher: _Teacher,
        weights_KF: Tensor,
        gradient: bool,
    ) -> None:
        hidden_RD = self.hidden_KFD[step][anchors_R].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits_RW = self.head.logits(hidden_RD)
        rows = _Rows(self.config, logits_RW.detach(), teacher, weights_KF[step, slots_R], gradient)
        self._loss[step, slots_R] = rows.loss_R
        self._alpha[step, slots_R] = rows.alpha_R
        top_R = rows.top_R if self.head.draft_ids is None else self.head.draft_ids[rows.top_R]
        self._top1[step, slots_R] = (top_R == teacher.top_R).to(self._top1.dtype)
        if gradient:
            (gradient_RD,) = torch.autograd.grad(logits_RW, hidden_RD, rows.gradient_RW)
            self._gradients[step][slots_R] = gradient_RD


def chunk_rows(head: DraftHead, on_gpu: bool) -> int:
    """How many rows keep all that is as wide as a vocabulary under LOGITS_BYTES."""
    fit = LOGITS_BYTES // (4 * wide_numbers(head))
    most = MOST_ROWS_GPU if on_gpu else MOST_ROWS_CPU
    return max(1, min(most, fit // ROUND_ROWS * ROUND_ROWS))


def wide_numbers(head: DraftHead) -> int:
    """Numbers (float32) per row of a chunk at the peak: the target's logits, their softmax and four
    tensors of the draft vocabulary's width; or, in the gradient, seven of the latter."""
    vocab, draft = head.config.vocab_size, head.config.draft_vocab or head.config.vocab_size
    return max(2 * vocab + 4 * draft, 7 * draft)


class _Rows:
    """Loss, acceptance and logit gradient of the rows of a chunk, block by block."""

    def __init__(
        self,
        config: LossConfig,
        logits_RW: Tensor,
        teacher: _Teacher,
        weights_R: Tensor,
        gradient: bool,
    ):
        results = []
        self.gradient_RW = torch.empty_like(logits_RW) if gradient else None
        with torch.autocast(logits_RW.device.type, enabled=False):
            for block in _blocks(logits_RW):
                results.append(self._block(config, logits_RW, teacher, weights_R, block))
        self.loss_R, self.alpha_R, self.top_R = (
            torch.cat(part) for part in zip(*results, strict=True)
        )

    def _block(
        self,
        config: LossConfig,
        logits_RW: Tensor,
        teacher: _Teacher,
        weights_R: Tensor,
        rows: slice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        r = p = teacher.r_RW[rows]
        q = logits_RW[rows].log_softmax(-1, dtype=r.dtype)
        kl = teacher.negentropy_R[rows] - _row_dot(r, q)
        q.clamp_(min=SMALLEST_LOG).exp_()  # below, a CPU takes eighteen times as long
        mass = torch.ones_like(kl) if teacher.mass_R is None else teacher.mass_R[rows]
        if teacher.mass_R is not None:
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
    """Weights of the KL part and the TV part, taken as constants."""
    zeros, ones = torch.zeros_like(alpha_R), torch.ones_like(alpha_R)
    if config.kind == "kl":
        return ones, zeros
    if config.kind == "lk":
        kl_weight = torch.exp(-config.eta * alpha_R)
        return kl_weight, 1 - kl_weight
    return zeros, ones


@torch.no_grad()
def _teacher(logits_RV: Tensor, draft_ids_W: Tensor | None) -> _Teacher:
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
    return _Teacher(r_RW, None if draft_ids_W is None else mass_R, negentropy_R, top_R)


def _row_dot(left_RW: Tensor, right_RW: Tensor) -> Tensor:
    return (left_RW * right_RW).sum(-1)  # on a CPU faster than a batched matrix product


def _blocks(values_RV: Tensor) -> Iterator[slice]:
    """Slices of rows: a few on a CPU, where memory traffic is the bottleneck; else all."""
    rows, width = values_RV.shape
    size = rows if values_RV.is_cuda else max(1, BLOCK_BYTES // (4 * width))
    for at in range(0, rows, size):
        yield slice(at, at + size)
