"""The frozen model whose output is kept exactly: a forward pass over tokens or a tree.

Any causal language model of transformers with softmax attention, its own code untouched: it gets
explicit positions, a mask of ours and our cache. Where layers are recurrent it takes chains instead
of trees (linear_attention.py). `load.py` builds targets, and refuses models that do not qualify.

Legend: B sequences, N tree nodes, T positions, S cache slots, D hidden size, V vocabulary, R any
leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headstart.model.backends.fused_decoder import FusedDecoder
from headstart.model.backends.int8 import available
from headstart.model.backends.visibility import Visibility
from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.tree import Tree

from .decoder import ModuleDecoder
from .lm_head import LMHead
from .modules import context_limit
from .output import TargetOutput
from .sharding import is_sharded, is_tensor_parallel


class Target:
    """A frozen causal language model.

    model: the transformers model, in eval mode; no parameter requires a gradient.
    config: the configuration of its text part.
    name: where it came from.
    decoder: the layers below the LM head, run through the model's own modules.
    backend: a faster computation of the same layers, for the passes that it accepts; or None.
    hidden_size: width D of the LM head's input.
    vocab_size: rows V of the LM head, which can be more than the tokenizer has tokens.
    quantized: "int8" if it computes in 8-bit integers, else None.
    weight_only: what the weights of its layers are stored in, if not in `dtype`.
    is_sharded: whether the layers are sharded over several processes.
    is_tensor_parallel: whether those processes must be given the same batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | str,
        name: str,
        decoder: ModuleDecoder,
        lm_head: LMHead,
        *,
        backend: FusedDecoder | None = None,
        quantized: str | None = None,
        weight_only: str | None = None,
    ):
        """tokenizer: or the reason why there is none."""
        self.model: Any = model  # transformers' own classes are typed in part only
        self.name, self._tokenizer = name, tokenizer
        self.config = model.config.get_text_config(decoder=True)
        self.decoder, self.backend, self._lm_head = decoder, backend, lm_head
        self.quantized, self.weight_only = quantized, weight_only
        linear = lm_head.linear
        self.hidden_size, self.vocab_size = linear.in_features, linear.out_features
        self.device, self.dtype = linear.weight.device, linear.weight.dtype
        self.is_sharded, self.is_tensor_parallel = is_sharded(model), is_tensor_parallel(model)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.decoder.layers

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def recurrent(self) -> bool:
        """Whether layers have states, so that it takes chains and one sequence at a time."""
        return self.decoder.recurrent

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self._tokenizer, str):
            raise ValueError(
                f"{self.name} has no tokenizer, so it takes token ids but no text. "
                f"{self._tokenizer} Save the tokenizer of the model into its folder."
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return not isinstance(self._tokenizer, str)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens; empty where the model names none."""
        generation = self.model.generation_config
        eos = self.config.eos_token_id if generation is None else generation.eos_token_id
        if eos is None:
            return ()
        return (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def pad_id(self) -> int:
        """The token that pads short sequences: the padding token, else an end-of-sequence token."""
        pad = self.tokenizer.pad_token_id if self.has_tokenizer else self.config.pad_token_id
        if pad is not None:
            return int(pad)
        if not self.eos_ids:
            raise ValueError(
                f"{self.name} has neither a padding nor an end-of-sequence token, so sequences of "
                "different lengths cannot be batched. Set pad_token in its tokenizer, or use a "
                "batch of one."
            )
        return self.eos_ids[0]

    @cached_property
    def context_limit(self) -> int | None:
        """Maximum length of prompt and response together; None where the model names no limit."""
        return context_limit(self.config)

    @property
    def drafts_in_int8(self) -> bool:
        """Whether heads draft in 8-bit integers: three times as fast on a CPU. That changes the
        draft tokens a little, and the output never."""
        known = self.dtype in (torch.float32, torch.bfloat16)
        return self.device.type == "cpu" and known and available()

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `forward`. ValueError for B > 1 where layers are recurrent."""
        return self.decoder.new_cache(batch_size, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor | Tree,
        cache: KVCache | None = None,
        *,
        lengths_B: Tensor | None = None,
        taps: Sequence[int] = (),
        logits: bool = True,
    ) -> TargetOutput:
        """Run the model over token ids B x T, padded on the right, or over a tree.

        Tokens are causal and follow what the cache holds of each sequence. A node of a tree stands
        `depth` positions behind that, and sees it, its own ancestors and itself.
        cache: in which the new positions stay pending until `cache.commit`. None keeps nothing.
        lengths_B: valid tokens of each sequence; the ids behind them may be anything.
        taps: decoder layers (0-based) whose outputs are returned too.
        logits: whether to compute the logits.
        Raises ValueError for a tree with branches where layers are recurrent.
        """
        tree = tokens if isinstance(tokens, Tree) and tokens.nodes > 1 else None
        ids_BT = tokens.tokens_BN if isinstance(tokens, Tree) else tokens
        if lengths_B is not None:
            ids_BT = _blank_padding(ids_BT, lengths_B)
        depths_BT = _depths(ids_BT) if tree is None else tree.depths_BN
        if cache is None and tree is not None:
            cache = self.new_cache(len(ids_BT))
        if cache is None:
            lm_head_input_BTD, hidden = self.decoder.forward(ids_BT, depths_BT, None, None, taps)
        else:
            decoder = self._decoder_for(ids_BT, cache)
            cache.reserve(ids_BT.shape[1])
            visibility = Visibility(depths_BT, tree, cache, self.decoder.windows)
            positions_BT = depths_BT + cache.lengths_B[:, None]
            lm_head_input_BTD, hidden = decoder.forward(
                ids_BT, positions_BT, cache, visibility, taps
            )
        logits_BTV = self.unembed(lm_head_input_BTD) if logits else None
        return TargetOutput(logits_BTV, lm_head_input_BTD, hidden)

    def forward_train(
        self, ids_BT: Tensor, lengths_B: Tensor, taps: Sequence[int] = ()
    ) -> TargetOutput:
        """`forward` of whole sequences for training: no cache, no logits.

        It builds a graph where gradients are on and adapters are trained jointly (lora.py).
        """
        ids_BT = _blank_padding(ids_BT, lengths_B)
        lm_head_input_BTD, hidden = self.decoder.forward(ids_BT, _depths(ids_BT), None, None, taps)
        return TargetOutput(None, lm_head_input_BTD, hidden)

    def _decoder_for(self, ids_BT: Tensor, cache: KVCache) -> ModuleDecoder | FusedDecoder:
        if self.backend is not None and self.backend.accepts(ids_BT, cache):
            return self.backend
        return self.decoder

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Decode tokens to text. special: keep special tokens."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        assert isinstance(text, str)  # a list only for a batch
        return text

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings R x D."""
        hidden: Tensor = self.model.get_input_embeddings()(tokens)
        return hidden

    def unembed(self, hidden_RD: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Logits R x V of inputs of the LM head, scaled or capped as the family does it.

        Gradients flow to `hidden_RD`.
        token_ids: the tokens whose logits are wanted; None for all. Pass the same tensor each time:
            its rows of the LM head are then gathered once.
        """
        return self._lm_head(hidden_RD, token_ids)

    def draft_logits(self, token_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`unembed` for draft tokens, which may be rounded: in int8 where that is faster."""
        return self._lm_head.draft_logits(token_ids, rounded=self.drafts_in_int8)


def _blank_padding(ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Replace the ids behind each length, which need not be tokens that exist, by 0."""
    steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return ids_BT.masked_fill(steps_T >= lengths_B[:, None], 0)


def _depths(ids_BT: Tensor) -> Tensor:
    """Distance of each token from the first one, B x T."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
