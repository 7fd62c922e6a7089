"""The protocol of draft heads. One file in `model/heads/` holds one kind.

Legend: B sequences, T positions, P newly committed positions, F frontier nodes, R any leading
dimensions, D hidden size, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.model.backends.int8 import quantize_linears
from headstart.model.backends.linear import pack_linears
from headstart.model.backends.ops import Ops
from headstart.model.backends.select import select_ops
from headstart.model.backends.torch_ops import TORCH_OPS
from headstart.model.target.output import TargetOutput
from headstart.model.tree.grow import Children, ShouldDeepen
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .layers import use_ops

if TYPE_CHECKING:
    from headstart.model.target.target import Target


UNSET = -1  # offset of a draft vocabulary that is not set yet


class HeadConfig(BaseModel):
    """Settings that every kind has. Sizes are taken from the target unless given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(description="Kind of head: the name of its file in model/heads/.")
    hidden_size: int = Field(description="Hidden size of the target.")
    vocab_size: int = Field(description="Vocabulary size of the target.")
    draft_vocab: int | None = Field(
        default=None,
        ge=1,
        description="Number of tokens the head can propose: the most frequent ones of the target's "
        "own responses (default: the whole vocabulary). Limits draft tokens, never output.",
    )


class DraftHead(nn.Module, ABC):
    """A small module that drafts the next tokens of a frozen target.

    kind: name of the kind, that of its file.
    taps: decoder layers of the target (0-based) whose outputs the head uses, besides the input of
        the LM head, which it always gets.
    max_depth: longest path it can draft; None: no limit.
    recompute: whether `unroll` keeps less for the backward pass and recomputes it there.
    ops: operations that it computes with (model/backends/).
    temperatures: one per depth, dividing the draft logits so that path probabilities are
        calibrated. The last one also holds for deeper tokens; without any it is 1.
    rank_acceptance: per depth, the acceptance rate of the candidate of each rank. Like the
        temperatures it is stored in the checkpoint's `HeadMeta`, from where `load_head` sets it.

    The target's embedding and LM head are borrowed by `bind` and never part of the state dict.
    """

    kind: ClassVar[str]
    taps: tuple[int, ...] = ()
    max_depth: int | None = None
    recompute: bool = False
    ops: Ops = TORCH_OPS
    temperatures: tuple[float, ...] = ()
    rank_acceptance: tuple[tuple[float, ...], ...] = ()

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.d2t: Tensor | None
        offsets = None
        if config.draft_vocab is not None:
            offsets = torch.full((config.draft_vocab,), UNSET)
        self.register_buffer("d2t", offsets)
        self._target: list[Target] = []  # in a list, so that it is no submodule
        self._draft_ids: Tensor | None = None
        self._decoded: Callable[[Tensor], Tensor] | None = None  # `logits` for decoding

    @property
    def target(self) -> Target:
        assert self._target, "bind(target) comes first"
        return self._target[0]

    def bind(self, target: Target) -> DraftHead:
        """Borrow the target's embedding and LM head. Raises ValueError if the head does not fit."""
        for name, ours, theirs in (
            ("hidden size", self.config.hidden_size, target.hidden_size),
            ("vocabulary", self.config.vocab_size, target.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"This head was made for a target with {name} {ours}, but {target.name} has "
                    f"{theirs}. Use the target that the head was trained on, or train a new head."
                )
        if any(layer >= target.num_layers or layer < 0 for layer in self.taps):
            raise ValueError(
                f"The head taps the layers {list(self.taps)}, but {target.name} has only "
                f"{target.num_layers} (0 to {target.num_layers - 1}). Choose other layers."
            )
        self._target = [target]
        self._draft_ids = self._decoded = None
        return self

    def for_decoding(self, target: Target) -> DraftHead:
        """Move this head to the target's device and dtype, bind it, and make it ready to draft.

        Where heads draft in int8 (`Target.drafts_in_int8`), it cannot be trained any more.
        """
        dtype = torch.float32 if target.drafts_in_int8 else target.dtype
        self.to(device=target.device, dtype=dtype).bind(target).eval()
        if target.drafts_in_int8:
            quantize_linears(self)
        else:
            pack_linears(self)
        if target.drafts_in_int8 or target.device.type != "cpu":
            self.use_ops(select_ops(target.device))
        self._decoded = target.draft_logits(self.draft_ids)
        return self

    def use_ops(self, ops: Ops) -> None:
        """Compute with these operations from now on. Those with kernels have no gradients."""
        self.ops = ops
        use_ops(self, ops)

    def set_draft_vocab(self, token_ids: Tensor) -> None:
        """Set the draft vocabulary. It is stored as sorted offsets id - index (`d2t`)."""
        assert self.d2t is not None
        ids = token_ids.to(self.d2t.device).sort().values
        if len(ids) != len(self.d2t) or len(ids.unique()) != len(ids):
            raise ValueError(
                f"The draft vocabulary needs exactly {len(self.d2t)} different tokens, "
                f"got {len(ids.unique())}. Lower head.draft_vocab or train on more responses."
            )
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self._draft_ids = self._decoded = None

    @property
    def draft_ids(self) -> Tensor | None:
        """Token ids of the draft vocabulary, ascending; None: the whole vocabulary."""
        if self.d2t is not None and self._draft_ids is None:
            with torch.inference_mode(False):  # they are kept, and training may use them later
                ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
            if bool(ids[0] < 0) or not bool((ids[1:] > ids[:-1]).all()):
                raise ValueError(
                    "The head's draft vocabulary was never set: its offset table d2t holds no "
                    "ascending token ids. Call set_draft_vocab, or load a trained head."
                )
            self._draft_ids = ids
        return self._draft_ids

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Draft logits R x Vd of the head's hidden states, by the target's LM head."""
        if self._decoded is not None:
            return self._decoded(hidden_RD)
        return self.target.unembed(hidden_RD, self.draft_ids)

    def candidates(self, hidden_BFD: Tensor, width: int, depth: int = 0) -> Children:
        """Log-probabilities and ids of the top tokens after each node, B x F x width, best first.

        depth: of the nodes whose children are drafted, 0 for the root.
        """
        logits_BFV = self.logits(hidden_BFD)
        width, temperature = min(width, logits_BFV.shape[-1]), 1.0
        if self.temperatures:
            temperature = self.temperatures[min(depth, len(self.temperatures) - 1)]
        logp_BFW, index_BFW = self.ops.topk_logprobs(logits_BFV, width, temperature)
        ids = self.draft_ids
        return logp_BFW, index_BFW if ids is None else ids[index_BFW]

    @classmethod
    @abstractmethod
    def defaults(cls, target: Target) -> dict[str, Any]:
        """Settings of this kind that follow from the target (heads, widths, RoPE, taps)."""

    @abstractmethod
    def init_from_target(self) -> None:
        """Initialise from the bound target's weights where that helps."""

    @abstractmethod
    def unroll(self, seen: TargetOutput, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        """Run the draft steps of training: for each step k, hidden states B x T x D for `logits`.

        Position t of step k attends to the target's features up to t and the tokens x[t+1] to
        x[t+1+k]. Its teacher is the target's distribution at position t+1+k and its label x[t+2+k].
        Positions past the end hold anything: the loss ignores them.
        """

    @abstractmethod
    def start(self, batch_size: int) -> Any:
        """An empty decoding state."""

    @abstractmethod
    def advance(
        self, state: Any, seen: TargetOutput, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> Any:
        """Add newly committed positions to the state.

        seen: target output at P positions per sequence; the first counts_B[b] >= 1 are valid.
        next_tokens_BP: the committed token after each of them; the last valid one is the root of
            the next tree.
        """

    @abstractmethod
    def draft(
        self, state: Any, shape: TreeShape, should_deepen: ShouldDeepen | None = None
    ) -> Tree:
        """Draft a tree of at most `shape.nodes` nodes after the last committed token.

        should_deepen: asked after each depth; may end the tree earlier (see `grow`).
        """

    @abstractmethod
    def select_rows(self, state: Any, rows: Tensor) -> Any:
        """The state of some sequences only: finished ones leave the batch."""


def kinds() -> list[str]:
    """All head kinds: the file names in `model/heads/`."""
    package = importlib.import_module("headstart.model.heads")
    found = pkgutil.iter_modules(package.__path__)
    return sorted(module.name for module in found if not module.ispkg)


def head_class(kind: str) -> tuple[type[DraftHead], type[HeadConfig]]:
    """Return a kind's `Head` and `Config`. Raises ValueError for an unknown kind."""
    if kind not in kinds():
        raise ValueError(f"Unknown head kind {kind!r}. There are: {', '.join(kinds())}.")
    module = importlib.import_module(f"headstart.model.heads.{kind}")
    return module.Head, module.Config


def make_head(target: Target, kind: str, settings: dict[str, Any]) -> DraftHead:
    """Build a new head for a target: sizes from the target, the rest from `settings`."""
    head_type, config_type = head_class(kind)
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    config = config_type.model_validate(
        {"kind": kind} | head_type.defaults(target) | sizes | settings
    )
    return head_type(config).to(target.device).bind(target)
