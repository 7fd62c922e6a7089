"""The frozen model whose output must be kept exactly: read tokens or a tree, see what it thinks.

Any causal language model of transformers with softmax attention, its own code untouched: it gets
explicit positions, a mask of ours and our cache. Where some layers are recurrent, it reads chains
instead of trees (states.py). What cannot be read that way is refused at load.

Legend: B batch rows, N tree nodes, T positions, S cache columns, D hidden size, V vocabulary,
R any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headstart.model.backends.cpu_ops import Native
from headstart.model.backends.cuda_ops import MOST_ROWS as MOST_ROWS_ON_A_GPU
from headstart.model.backends.cuda_ops import Accelerated
from headstart.model.backends.fused_decoder import Lean
from headstart.model.backends.int8 import available
from headstart.model.backends.linear import MOST_ROWS, pack_linears
from headstart.model.backends.select import shorter_way
from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.tree import Tree

from .gqa_attention import shared_keys
from .linear_attention import RecurrentTargetReader
from .lm_head import LMHead, LogitsRule
from .masks import FULL, LINEAR, AttentionWindows, pending_visibility
from .modules import cache_kwarg, context_limit, decoder_layers, inner_model, output_head
from .output import TargetOutput
from .probe import probe
from .quantize import quantize as quantize_target
from .sharding import is_sharded, is_tensor_parallel
from .support import recurrent_mixers, refuse, refuse_unused_window


class Target:
    """A frozen causal language model.

    model: untouched, in eval mode, no parameter asks for a gradient. config: of its text part.
    name: where it came from. hidden_size: width of the LM head's input. vocab_size: rows of the LM
    head, which can be more than the tokenizer knows. quantized: what it computes in, or None.
    weight_only: what its layers are held in, if not in their own type. is_sharded: whether its
    layers are sharded over several processes. is_tensor_parallel: whether those have to read the
    same rows.
    recurrent: whether layers have states, so that it reads chains, one text at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | str,
        name: str,
        quantize: str | None = None,
        weight_only: str | None = None,
    ):
        """tokenizer: or the reason why there is none. ValueError if the model cannot be read."""
        refuse(model, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.config = model.config.get_text_config(decoder=True)
        self._tokenizer = tokenizer
        head = output_head(model, name)
        self._decoder = inner_model(model)
        self._layers = decoder_layers(self._decoder, self.config, name)
        refuse_unused_window(self._decoder, self.config, name)
        self._chains = RecurrentTargetReader(
            recurrent_mixers(self._layers, self.config, name), name
        )
        self.recurrent = bool(self._chains.mixers)
        self._chains.refuse_integers(quantize)
        self._cache_name = cache_kwarg(self._decoder)
        self._windows = AttentionWindows.of(self.config)
        self._lm_head = LMHead(head, LogitsRule.of(self.config))
        self.hidden_size, self.vocab_size = head.in_features, head.out_features
        self.num_layers = len(self._layers)
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self._lean: Accelerated | Native | Lean | None = None
        self.quantized: str | None = None
        self.weight_only = weight_only
        self.is_sharded, self.is_tensor_parallel = is_sharded(model), is_tensor_parallel(model)
        if self.device.type == "meta":
            return
        probe(self)
        if quantize is not None:
            quantize_target(self, quantize)
            self.quantized = quantize
        if not self.is_sharded and weight_only is None:
            if not self.recurrent and not self._windows.sparse:
                self._lean = shorter_way(self._decoder, self._layers, self.config)
            pack_linears(model)  # after the probes, which would pack what they widen

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self._layers

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self._tokenizer, str):
            raise ValueError(
                f"{self.name} has no tokenizer, so it can read token ids but no text. "
                f"{self._tokenizer} Save the tokenizer of the model into its folder."
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return not isinstance(self._tokenizer, str)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; empty where the model names none."""
        generation = self.model.generation_config
        eos = self.config.eos_token_id if generation is None else generation.eos_token_id
        if eos is None:
            return ()
        return (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def pad_id(self) -> int:
        """A token to fill short rows with: the padding token, else an end-of-text token."""
        pad = self.tokenizer.pad_token_id if self.has_tokenizer else self.config.pad_token_id
        if pad is not None:
            return int(pad)
        if not self.eos_ids:
            raise ValueError(
                f"{self.name} has neither a padding nor an end-of-text token, so rows of different "
                "length cannot be batched. Set pad_token in its tokenizer, or use a batch of one."
            )
        return self.eos_ids[0]

    @cached_property
    def context_limit(self) -> int | None:
        """How many tokens it can read, prompt and answer together; None where it names no limit."""
        return context_limit(self.config)

    @property
    def drafts_in_int8(self) -> bool:
        """Whether heads draft in 8-bit integers here: three times as fast on a CPU. It changes
        what is guessed a little, and never what is said."""
        known = self.dtype in (torch.float32, torch.bfloat16)
        return self.device.type == "cpu" and known and available()

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `read`."""
        return self._chains.new_cache(batch_size, self.num_layers, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor | Tree,
        cache: KVCache | None = None,
        *,
        lengths_B: Tensor | None = None,
        layers: tuple[int, ...] = (),
        logits: bool = True,
    ) -> TargetOutput:
        """One forward pass over text (B x T ids, padded on the right) or a tree.

        Text is causal and stands behind what each row of the cache holds. A tree's node stands
        `depth` positions behind it and sees the row's committed tokens, its ancestors and itself.
        With a cache the rows read stay pending until `cache.commit`; without one nothing is kept.
        ValueError for branches where layers are recurrent.
        lengths_B: valid tokens per row of a text; behind them may be anything.
        layers: decoder layers (0-based) whose output is wanted too.
        """
        tree = tokens if isinstance(tokens, Tree) and tokens.nodes > 1 else None
        ids_BT = tokens.tokens_BN if isinstance(tokens, Tree) else tokens
        if tree is not None and cache is None:
            cache = self.new_cache(len(ids_BT))
        if lengths_B is not None:
            ids_BT = _blank(ids_BT, lengths_B)
        if self.recurrent and cache is not None:
            run = partial(self._read, cache=cache, layers=layers)
            lm_head_input_BTD, hidden = self._chains.read(ids_BT, tree, cache, self.dtype, run)
            return TargetOutput(
                self.unembed(lm_head_input_BTD) if logits else None, lm_head_input_BTD, hidden
            )
        steps_BT = _steps(ids_BT) if tree is None else tree.depths_BN
        lean = self._lean if cache is not None and self._suits(ids_BT, cache) else None
        mask: Tensor | dict[str, Tensor] | None = None  # None: the model's own causal mask
        if cache is not None:
            cache.reserve(ids_BT.shape[1])
            if isinstance(lean, Accelerated):
                mask = pending_visibility(steps_BT, tree)
            elif tree is not None or not _plain(cache, ids_BT, self._windows, lean is not None):
                mask = self._windows.mask(cache, steps_BT, tree, self.dtype)
            steps_BT = steps_BT + cache.lengths_B[:, None]
        if lean is not None and cache is not None:
            lm_head_input_BTD, hidden = lean.read(ids_BT, steps_BT, cache, mask, layers)
        else:
            lm_head_input_BTD, hidden = self._read(ids_BT, steps_BT, mask, cache, layers)
        return TargetOutput(
            self.unembed(lm_head_input_BTD) if logits else None, lm_head_input_BTD, hidden
        )

    def forward_train(
        self,
        ids_BT: Tensor,
        lengths_B: Tensor,
        layers: tuple[int, ...] = (),
    ) -> TargetOutput:
        """What training reads: `read` of texts, without a cache and logits, with a graph where
        gradients are on and something of the target learns (model/joint.py).
        """
        ids_BT = _blank(ids_BT, lengths_B)
        lm_head_input_BTD, hidden = self._read(ids_BT, _steps(ids_BT), None, None, layers)
        return TargetOutput(None, lm_head_input_BTD, hidden)

    def _suits(self, ids_BT: Tensor, cache: KVCache) -> bool:
        """Whether a read takes the shorter way. Behind a text all do, and all of a quantised model:
        rounding must not depend on how many rows are read together."""
        behind = cache.preallocated or cache.width > 0
        if isinstance(self._lean, Accelerated):
            return behind and ids_BT.shape[1] <= MOST_ROWS_ON_A_GPU
        known = self.quantized is not None or behind or ids_BT.numel() <= MOST_ROWS
        return known and not torch.is_autocast_enabled("cpu")

    def _read(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        cache: KVCache | None,
        layers: tuple[int, ...],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """With the model's own modules."""
        if mask is None:
            mask = self._windows.ranked(ids_BT, self.dtype)
        by_kind: Any = {FULL: mask, LINEAR: None} if self.recurrent and mask is not None else mask
        with self._tapped(layers) as hidden, shared_keys():
            lm_head_input_BTD: Tensor = self._decoder(
                input_ids=ids_BT,
                attention_mask=by_kind,
                position_ids=positions_BT,
                use_cache=cache is not None,
                **{self._cache_name: cache},
            ).last_hidden_state
        return lm_head_input_BTD, hidden

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Tokens as text; special: with the special ones."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        assert isinstance(text, str)  # a list only for a batch
        return text

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings R x D of tokens R."""
        hidden: Tensor = self.model.get_input_embeddings()(tokens)
        return hidden

    def unembed(self, hidden_RD: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Logits R x V of inputs of the LM head, scaled or capped as the family does it.

        token_ids: give only the logits of these tokens. Pass the same tensor each time: the rows of
        the LM head are then gathered once. Gradients flow to `hidden_RD`.
        """
        return self._lm_head(hidden_RD, token_ids)

    def draft_logits(self, token_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`unembed` for guesses, which may be rounded: in 8-bit integers where those are faster."""
        return self._lm_head.draft_logits(token_ids, rounded=self.drafts_in_int8)

    @contextmanager
    def _tapped(self, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of decoder layers while the model runs."""
        hidden: dict[int, Tensor] = {}

        def tap(layer: int) -> torch.utils.hooks.RemovableHandle:
            def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                hidden[layer] = output if isinstance(output, Tensor) else output[0]

            return self._layers[layer].register_forward_hook(keep)

        handles = [tap(layer) for layer in layers]
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()


def _blank(ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Behind the lengths may be anything, not only tokens that exist."""
    steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return ids_BT.masked_fill(steps_T >= lengths_B[:, None], 0)


def _steps(ids_BT: Tensor) -> Tensor:
    """Positions of a text behind what came before it."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)


def _plain(cache: KVCache, ids_BT: Tensor, windows: AttentionWindows, lean: bool) -> bool:
    """True where no mask of ours is needed: one token more, or all from the start, for which the
    model makes its own. With sparse attention ours is always needed."""
    if lean:
        return cache.equal_lengths and ids_BT.shape[1] == 1 and windows.kinds == (FULL,)
    first = ids_BT.shape[1] == 1 or cache.width == 0
    return cache.equal_lengths and first and not windows.sparse
