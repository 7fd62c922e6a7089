"""What differs between families of language models, and which ones cannot be read.

Windows, recurrent layers and the last step to the logits follow from the configuration, not from
the family's name, and a probe at load compares the result with the model itself. Sparse attention
alone goes by name: in 16 bits a probe cannot tell what is chosen.

Legend: B batch rows, N new rows (tree nodes or text positions), S cache columns, D hidden size.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .cache import KVCache
from .sparse import FAMILIES, SPARSE, earlier_first, few_chosen, indexers
from .tree import Tree

if TYPE_CHECKING:
    from .target import Target

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, MIXER = "linear_attention", "linear_attn"  # a recurrent layer, and what is recurrent in it
# What the code of a model with windows builds its masks with.
WINDOW_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)


@dataclass(frozen=True)
class Windows:
    """How far each kind of layer looks back.

    kinds: the kinds of attention that occur. sliding: a position sees itself and the sliding - 1
    before it. chunked: a position sees only its own chunk of that many positions. sparse: an
    indexer chooses among what the mask shows (sparse.py).
    """

    kinds: tuple[str, ...]
    sliding: int = 0
    chunked: int = 0
    sparse: bool = False

    @staticmethod
    def of(config: PretrainedConfig) -> Windows:
        """From a configuration; the same reading as transformers' `create_masks_for_generate`."""
        settings = config.to_dict()
        sliding = settings.get("sliding_window") or 0
        chunked = settings.get("attention_chunk_size") or 0
        kinds = settings.get("layer_types")
        if kinds and set(kinds) <= set(SPARSE):
            return Windows((FULL,), sparse=True)
        if kinds is not None:
            kinds = [kind for kind in kinds if kind != LINEAR]
        else:
            kinds = [SLIDING if sliding else CHUNKED if chunked else FULL]
        return Windows(tuple(sorted(set(kinds))), sliding, chunked)

    def mask(
        self, cache: KVCache, depths_BN: Tensor, tree: Tree | None, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Additive mask B x 1 x N x S of the cache's new rows, one per kind if there are more.

        tree: whose nodes see their ancestors; None for a text, whose rows see those before them.
        """
        seen_BNS = cache.visible(among_new(depths_BN, tree))
        if self.kinds == (FULL,):
            return self._additive(seen_BNS, dtype)
        new_places_BN = depths_BN + cache.lengths_B[:, None]
        return self._of_kinds(seen_BNS, new_places_BN, cache.positions(depths_BN), dtype)

    def mask_texts(self, starts_BT: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """As `mask`, for rows of several texts that see themselves only (`Target.read`)."""
        places_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
        seen_BTT = (places_T <= places_T[:, None]) & (places_T >= starts_BT[:, :, None])
        positions_BT = places_T - starts_BT
        return self._of_kinds(seen_BTT, positions_BT, positions_BT, dtype)

    def ranked(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor] | None:
        """The mask of whole texts where ours says more than the model's own: which of the columns
        scored 0 are chosen. None elsewhere."""
        return self.mask_texts(torch.zeros_like(ids_BT), dtype) if self.sparse else None

    def _of_kinds(
        self, seen_BNS: Tensor, query_BN: Tensor, key_BS: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        masks = {
            kind: self._additive(seen_BNS & self._near(kind, query_BN, key_BS), dtype)
            for kind in self.kinds
        }
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _additive(self, seen_BNS: Tensor, dtype: torch.dtype) -> Tensor:
        mask_B1NS = additive(seen_BNS, dtype)
        return earlier_first(mask_B1NS) if self.sparse else mask_B1NS

    def _near(self, kind: str, query_BN: Tensor, key_BS: Tensor) -> Tensor:
        """True where a key's position lies in the window of a query's, B x N x S."""
        query_BN1, key_B1S = query_BN[:, :, None], key_BS[:, None, :]
        if kind == SLIDING:
            return query_BN1 - key_B1S < self.sliding
        if kind == CHUNKED:
            return query_BN1 // self.chunked == key_B1S // self.chunked
        return torch.ones((), dtype=torch.bool, device=query_BN.device)


def among_new(depths_BN: Tensor, tree: Tree | None) -> Tensor:
    """B x N x N: True where a new row sees another one. Arguments as of `Windows.mask`."""
    if tree is None:
        return depths_BN[:, :, None] >= depths_BN[:, None, :]
    return tree.ancestors_BNN


def additive(seen_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else the lowest number: right for eager and for fused attention."""
    mask_BNS = torch.zeros(seen_BNS.shape, dtype=dtype, device=seen_BNS.device)
    return mask_BNS.masked_fill_(~seen_BNS, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class LogitsRule:
    """What a family does to the LM head's output: divide, multiply, cap. 0 leaves a step out."""

    divide: float = 0.0
    multiply: float = 0.0
    cap: float = 0.0

    @staticmethod
    def of(config: PretrainedConfig) -> LogitsRule:
        settings = config.to_dict()
        return LogitsRule(
            divide=settings.get("logits_scaling") or 0.0,  # Granite
            multiply=settings.get("logit_scale") or 0.0,  # Cohere
            cap=settings.get("final_logit_softcapping") or 0.0,  # Gemma
        )

    def __call__(self, logits: Tensor) -> Tensor:
        if self.divide:
            logits = logits / self.divide
        if self.multiply:
            logits = logits * self.multiply
        if self.cap:
            logits = (logits / self.cap).tanh() * self.cap
        return logits


def context_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None where its configuration names no limit.

    With longrope (Phi) that is the length it was first trained for. Past it, transformers turns all
    positions of a read by other angles, while the keys in the cache keep the old ones. What a token
    then sees depends on which read it came in: a tree would switch sooner than single tokens do.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)  # ALiBi has none
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(one for one in rope.values() if isinstance(one, dict)),
    ]
    first = [
        one["original_max_position_embeddings"]
        for one in kinds
        if one.get("rope_type") == "longrope"
    ]
    return min(first if limit is None else [limit, *first], default=None)


def output_head(model: PreTrainedModel, name: str) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name} ({type(model).__name__}) has no plain linear LM head (found {type(head)}), so "
            "draft heads cannot share it. Use a causal language model with an LM head."
        )
    return head


def inner_model(model: PreTrainedModel) -> nn.Module:
    """The model below the LM head: token ids in, the LM head's input out."""
    decoder: nn.Module = model.get_decoder()
    if decoder is not model:
        return decoder
    # a few families name their prefix wrongly, and nothing is found under it
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def cache_name(decoder: nn.Module) -> str:
    """What the model calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def decoder_layers(decoder: nn.Module, config: PretrainedConfig, name: str) -> nn.ModuleList:
    """The list of decoder layers: the outermost list as long as the configuration says."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ValueError(
        f"{name} has no list of {config.num_hidden_layers} decoder layers, so their outputs cannot "
        "be read. Use another target."
    )


def recurrent_mixers(
    layers: nn.ModuleList, config: PretrainedConfig, name: str
) -> dict[int, nn.Module]:
    """What is recurrent in the decoder layers that are, by their place. ValueError for those whose
    states are not known to be held as `states.py` holds them."""
    kinds = config.to_dict().get("layer_types") or ()
    known = enumerate(zip(kinds, layers, strict=False))  # some name the kinds of more layers
    recurrent = {place: layer for place, (kind, layer) in known if kind == LINEAR}
    if any(not hasattr(layer, MIXER) for layer in recurrent.values()):
        raise ValueError(_recurrent(name, config))
    return {place: getattr(layer, MIXER) for place, layer in recurrent.items()}


def refuse(model: PreTrainedModel, name: str) -> None:
    """ValueError for what is known not to work; `probe` finds the rest."""
    config = model.config.get_text_config(decoder=True)
    refuse_config(config, name)
    if Windows.of(config).sparse and not indexers(model):
        raise ValueError(_unknown_choice(name, config))
    if model._is_stateful and LINEAR not in (config.to_dict().get("layer_types") or ()):
        raise ValueError(_recurrent(name, config))
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} was built with {attention} attention, which takes no tree mask. "
            'Build it with attn_implementation="sdpa" or "eager".'
        )


def refuse_config(config: PretrainedConfig, name: str) -> None:
    """What a configuration already tells, before any weight is read."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model ({config.model_type}). Tree decoding needs a "
            "decoder-only causal language model. Use another target."
        )
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        raise ValueError(
            f"{name} ({config.model_type}) cuts its local windows by place in the cache, where the "
            "branches of a tree lie side by side. Use another target."
        )
    kinds = set(config.to_dict().get("layer_types") or ())
    if kinds & set(SPARSE) and config.model_type not in FAMILIES:
        raise ValueError(_unknown_choice(name, config))
    odd = kinds - {FULL, SLIDING, CHUNKED}
    if odd and kinds != {FULL, LINEAR} and not kinds <= set(SPARSE):
        raise ValueError(_recurrent(name, config, f", with layers of {', '.join(sorted(odd))}"))


def refuse_unused_window(decoder: nn.Module, config: PretrainedConfig, name: str) -> None:
    """ValueError where the configuration names a window that the model's code does not apply.

    The window can be longer than any text that is cheap to try, so the code is looked at: it must
    use transformers' masks with windows.
    """
    modules = [sys.modules.get(one.__module__) for one in type(decoder).__mro__]
    windowed = any(hasattr(module, mask) for module in modules for mask in WINDOW_MASKS)
    if Windows.of(config).kinds != (FULL,) and not windowed:
        raise ValueError(
            f"{name} ({config.model_type}) has an attention window in its configuration, but its "
            "code does not apply it in a known way. Use another target."
        )


def _recurrent(name: str, config: PretrainedConfig, layers: str = "") -> str:
    return (
        f"{name} ({config.model_type}{layers}) does not use softmax attention in every layer, and "
        "what it uses there is not known here (known: gated delta nets, as in Qwen3-Next; sparse "
        "attention in all layers, as in GLM-5). Use a target with softmax attention throughout."
    )


def _unknown_choice(name: str, config: PretrainedConfig) -> str:
    return (
        f"{name} ({config.model_type}) has sparse attention whose indexer is not known here "
        "(known: that of DeepSeek-V3.2 and GLM-5). Use another target."
    )


def probe(target: Target) -> None:
    """Compare a few tokens with the model's own forward pass. ValueError if they differ.

    Catches families that compute logits in their own way, or ignore the mask or the positions.
    """
    ids = [5, 3, 7, 2, 6, 4, 1]
    text_1T = torch.tensor([[i % target.vocab_size for i in ids]], device=target.device)
    try:
        with torch.no_grad(), few_chosen(target.layers, target.dtype):
            mask = Windows.of(target.config).ranked(text_1T, target.dtype)
            whole = target.model(input_ids=text_1T, attention_mask=mask, use_cache=False)
            plain = target.read(text_1T)
            branch = (_read_chains if target.recurrent else _read_branches)(target, text_1T)
            theirs = whole.logits
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{target.name} ({target.config.model_type}) cannot be read with own positions, mask "
            f"and cache: {error} Use a target of another family."
        ) from error
    assert plain.logits_BTV is not None
    if not _close(plain.logits_BTV, theirs):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) computes its logits in a way that is not "
            "known here (known: a linear LM head, then scaling, then a soft cap). Use a target of "
            "another family."
        )
    if not _close(branch, plain.last_BTD[:, 3:]):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) reads a tree unlike the same text: its "
            "attention ignores the mask or the positions, or recurrent layers the state in front "
            "of several tokens. Use a target of another family."
        )


def _read_branches(target: Target, text_1T: Tensor) -> Tensor:
    """The last four positions again, read as one branch of a tree whose other branch is noise."""
    cache = target.new_cache(1)
    target.read(text_1T[:, :3], cache, logits=False)
    counts_B = torch.tensor([3], device=target.device)
    cache.commit(torch.arange(3, device=target.device)[None], counts_B)
    root, one, two, three = text_1T[0, 3:].tolist()
    tokens_BN = torch.tensor([[root, two, one, root, two]], device=target.device)
    parents_BN = torch.tensor([[-1, 0, 0, 1, 2]], device=target.device)
    tree = Tree(tokens_BN, parents_BN, torch.zeros(1, 5, device=target.device))
    first = target.read(tree, cache, logits=False).last_BTD[:, [0, 2, 4]]
    cache.commit(torch.tensor([[0, 2, 4]], device=target.device), counts_B)
    last_token = torch.tensor([[three]], device=target.device)
    return torch.cat([first, target.read(last_token, cache, logits=False).last_BTD], 1)


def _read_chains(target: Target, text_1T: Tensor) -> Tensor:
    """The last four positions again, behind a rejected guess, a chain that was accepted in part,
    and one that was accepted in whole."""
    cache = target.new_cache(1)
    two, three, four, five, six = text_1T[0, 2:].tolist()
    target.read(text_1T[:, :2], cache, logits=False)
    cache.commit(None, torch.tensor([2], device=target.device))
    seen = []
    for chain, accepted in (([two, six], 1), ([three, four, three], 2), ([five, six], 2)):
        tokens_1N = torch.tensor([chain], device=target.device)
        parents_1N = torch.arange(len(chain), device=target.device)[None] - 1
        tree = Tree(tokens_1N, parents_1N, torch.zeros(1, len(chain), device=target.device))
        seen.append(target.read(tree, cache, logits=False).last_BTD[:, :accepted])
        cache.commit(None, torch.tensor([accepted], device=target.device))
    return torch.cat(seen, 1)[:, 1:]


@torch.no_grad()
def probe_packed(target: Target) -> None:
    """ValueError if several texts in one row are not read as each of them alone."""
    lengths = (3, 5, 2)
    ids = [5, 3, 7, 2, 6, 4, 1, 2, 3, 6]
    texts = [i % target.vocab_size for i in ids]
    row_1T = torch.tensor([texts], device=target.device)
    bounds = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    starts = [start for start, size in zip(bounds, lengths, strict=False) for _ in range(size)]
    starts_1T = torch.tensor([starts], device=target.device)
    whole_1 = torch.tensor([len(ids)], device=target.device)
    with few_chosen(target.layers, target.dtype):
        together = target.read_texts(row_1T, whole_1, starts_1T).last_BTD
        apart = [
            target.read(row_1T[:, start:end], logits=False).last_BTD
            for start, end in pairwise(bounds)
        ]
    if not _close(together, torch.cat(apart, 1)):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) does not read several texts in one row as "
            "each of them alone: its code ignores the mask or the positions. Leave data.pack out."
        )


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding: in half precision rounding can be large, a wrong mask is larger."""
    if ours.shape != theirs.shape:
        return False
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 0.2
    return float((ours.float() - theirs.float()).norm()) <= tolerance * float(theirs.float().norm())
