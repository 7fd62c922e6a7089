"""What reading tokens showed: the currency between target, heads, training and decoding.

Legend: B batch rows, T positions, P picked positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TargetOutput:
    """One forward pass of the target.

    logits_BTV: next-token logits, or None when they were not asked for. last_BTD: the input of
    the LM head (after the final norm). hidden: output of decoder layer j (0-based) under key j,
    for the layers that were asked for.
    """

    logits_BTV: Tensor | None
    lm_head_input_BTD: Tensor
    hidden_states: Mapping[int, Tensor]

    def gather(self, index_BP: Tensor) -> TargetOutput:
        """The same at picked positions; logits are dropped."""
        picked = {
            layer: _pick(hidden_BTD, index_BP) for layer, hidden_BTD in self.hidden_states.items()
        }
        return TargetOutput(None, _pick(self.lm_head_input_BTD, index_BP), picked)

    def slice(self, rows: slice, columns: slice) -> TargetOutput:
        """Some rows and positions, copied so that the others can go; logits are dropped."""
        kept = {
            layer: hidden[rows, columns].clone() for layer, hidden in self.hidden_states.items()
        }
        return TargetOutput(None, self.lm_head_input_BTD[rows, columns].clone(), kept)


def _pick(values_BTD: Tensor, index_BP: Tensor) -> Tensor:
    return values_BTD.gather(1, index_BP[..., None].expand(-1, -1, values_BTD.shape[-1]))
