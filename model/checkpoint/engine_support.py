"""Which engine can draft with which head."""

from __future__ import annotations

from typing import Literal

from headstart.model.heads import eagle3, mtp
from headstart.model.heads.common.base import DraftHead
from headstart.model.heads.common.layers import ZeroCentredNorm
from headstart.model.heads.common.target_layer import FamilyLayer
from headstart.model.target.sparse_attention import indexers

from .custom_generate.drafting import KINDS

Engine = Literal["vllm", "sglang", "llama.cpp"]  # those that are given a head as a folder or file
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")  # those that draft with a fused folder as it is
# Two more ways to draft outside Headstart: engines that compute the multi-token prediction layer of
# the target itself, in whose place a head can be, and transformers with the code of a fused folder.
Drafter = Literal[Engine, "native_mtp", "transformers"]


def support(head: DraftHead, engine: Drafter) -> str | None:
    """Return why an engine cannot draft with a head, or None if it can.

    The reason is a clause without a full stop, to be put behind "cannot draft with this head: ".
    "transformers" needs a head that is bound to its target, the others only its configuration.
    """
    if engine == "transformers":
        return _custom_generate(head)
    kind = "mtp" if engine == "native_mtp" else "eagle3"
    if head.kind != kind:
        return f"only heads of kind {kind} are supported, and this one is {head.kind}"
    if getattr(head, "window", None) is not None:
        return "their heads attend to the whole sequence, and this one has an attention window"
    if not isinstance(head, eagle3.Head):
        return None  # MTP layers draft one step, which all attention layouts have in common
    return _eagle3(head) or (_llama_cpp(head) if engine == "llama.cpp" else None)


def _eagle3(head: eagle3.Head) -> str | None:
    """vLLM and SGLang share one folder, so what one of them lacks rules out both."""
    assert isinstance(head.config, eagle3.Config)
    if head.attention_layout != "append":
        return f"they draft in the attention layout append, not in {head.attention_layout}"
    if len(head.taps) == 1:
        return "SGLang leaves out fc if the head reads a single layer of the target"
    if head.config.layer.qk_norm:
        return "their EAGLE-3 layer has no norm on queries and keys"
    if head.config.layer.attention_bias:
        return "SGLang's EAGLE-3 layer has no bias on queries, keys and values"
    return None


def _llama_cpp(head: eagle3.Head) -> str | None:
    if len(head.taps) != 3:
        return f"it taps three layers of the target, and this head taps {len(head.taps)}"
    if len(head.fc_norm) > 0 or head.norm_output:
        return (
            "it does not know the norms of EAGLE-3.1 (train with head.fc_norm=false and "
            "head.norm_output=false)"
        )
    return None


def _custom_generate(head: DraftHead) -> str | None:
    """What `custom_generate/drafting.py` lacks."""
    if head.kind not in KINDS:
        return f"the code in custom_generate does not know heads of kind {head.kind}"
    if isinstance(head, mtp.Head) and isinstance(head.layer, FamilyLayer):
        return "the head has a decoder layer of its target's family"
    if isinstance(head, mtp.Head) and isinstance(head.norm, ZeroCentredNorm):
        return "the weights of the head's norms are zero-centred"
    if head.target.recurrent:
        return "the target has recurrent layers"
    if indexers(head.target.layers):
        return "the target has sparse attention"
    return None
