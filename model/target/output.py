"""The output of a target's forward pass.

Legend: B sequences, T positions, P selected positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TargetOutput:
    """One forward pass of the target.

    logits_BTV: next-token logits, or None where they were not wanted.
    lm_head_input_BTD: input of the LM head, behind the final norm.
    hidden_states: outputs of the tapped decoder layers by their index (0-based).
    """

    logits_BTV: Tensor | None
    lm_head_input_BTD: Tensor
    hidden_states: Mapping[int, Tensor]

    def gather(self, index_BP: Tensor) -> TargetOutput:
        """Select positions; logits are dropped."""
        picked = {
            layer: _pick(hidden_BTD, index_BP) for layer, hidden_BTD in self.hidden_states.items()
        }
        return TargetOutput(None, _pick(self.lm_head_input_BTD, index_BP), picked)

    def slice(self, rows: slice, positions: slice) -> TargetOutput:
        """Copy some rows and positions, so that the others can be freed; logits are dropped."""
        kept = {
            layer: hidden[rows, positions].clone() for layer, hidden in self.hidden_states.items()
        }
        return TargetOutput(None, self.lm_head_input_BTD[rows, positions].clone(), kept)


def _pick(values_BTD: Tensor, index_BP: Tensor) -> Tensor:
    return values_BTD.gather(1, index_BP[..., None].expand(-1, -1, values_BTD.shape[-1]))
