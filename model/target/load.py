"""Open a target: from the Hub, a folder or a GGUF file, sharded over processes, or by its
configuration alone.

Every way ends in `_build`, which checks the model and wires the parts of a `Target`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headstart.model.backends.fused_decoder import FusedDecoder
from headstart.model.backends.int8 import quantize_linears
from headstart.model.backends.linear import pack_linears
from headstart.model.backends.select import select_backend

from .decoder import ModuleDecoder
from .gqa_attention import use_grouped_attention
from .linear_attention import RecurrentDecoder
from .lm_head import LMHead, LogitsRule
from .modules import decoder_layers, inner_model, output_head
from .pretrained import (
    open_pretrained,
    open_sharded,
    open_skeleton,
    open_tensor_parallel,
    open_weight_only,
)
from .probe import own_logits, probe
from .quantize import check_kind, check_quantizable, use_exact_attention
from .support import check_supported, check_window_is_applied, recurrent_mixers
from .target import Target
from .weight_only import check_weight_only
from .weights_hash import remember, weights_hash


def load_target(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    weight_only: str | None = None,
) -> Target:
    """Open a hub id, a model folder (a fused one too) or a .gguf file.

    dtype: "auto" is float32 on a CPU and bfloat16 on an accelerator.
    device: None is the accelerator if there is one.
    quantize: "int8" computes in 8-bit integers (CPU, float32); the quantised model's own output is
        then the reference.
    weight_only: "int8", "float8" or "nf4" stores the layers in less memory while heads are trained
        on it; decoding is slower then.
    Raises ValueError for a model that cannot be opened, with what to do instead.
    """
    check_kind(quantize)
    check_weight_only(weight_only)
    if weight_only is not None:
        if quantize is not None:
            raise ValueError("Give either quantize or weight_only: they exclude each other.")
        held = open_weight_only(str(name), dtype, device, revision, weight_only)
        return _build(*held, str(name), weight_only=weight_only)
    model, tokenizer = open_pretrained(str(name), dtype, device, revision)
    return _build(model, tokenizer, str(name), quantize=quantize)


def load_sharded_target(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device,
    revision: str | None = None,
    tensor_parallel: bool = False,
) -> Target:
    """Open a target whose layers are sharded over all processes of the run.

    All processes call this together, and `forward` too (with the same batch where the target is
    tensor-parallel). Such a target trains heads; it does not decode.
    """
    if tensor_parallel:
        model, tokenizer = open_tensor_parallel(str(name), dtype, device, revision)
        weights_hash(model)  # now, while all processes are here
    else:
        model, tokenizer, digest = open_sharded(str(name), dtype, device, revision)
        remember(model, digest)
    return _build(model, tokenizer, str(name))


def target_from_config(name: str | Path, *, revision: str | None = None) -> Target:
    """A target on the meta device, for its sizes: only the configuration is loaded."""
    skeleton = open_skeleton(str(name), revision)
    return _build(skeleton, "It was opened without weights.", str(name))


def wrap_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
) -> Target:
    """Freeze a model that is already built."""
    return _build(model, tokenizer or "None was given.", type(model).__name__, quantize=quantize)


def _build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str,
    name: str,
    *,
    quantize: str | None = None,
    weight_only: str | None = None,
) -> Target:
    """Check a model, compare it with its own forward pass, and choose how its layers are run.

    tokenizer: or the reason why there is none. ValueError for a model that does not qualify.
    """
    check_kind(quantize)
    check_supported(model, name)
    model = model.eval().requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    decoder = _module_decoder(model, output_head(model, name).weight.dtype, name)
    if decoder.recurrent and quantize is not None:
        raise ValueError(
            f"{name} has recurrent layers, which are not computed in integers. Leave out quantize "
            f"({quantize})."
        )

    def wired(backend: FusedDecoder | None = None) -> Target:
        lm_head = LMHead(output_head(model, name), LogitsRule.of(config))
        return Target(
            model,
            tokenizer,
            name,
            decoder,
            lm_head,
            backend=backend,
            quantized=quantize,
            weight_only=weight_only,
        )

    target = wired()
    if target.device.type == "meta":
        return target
    expected = own_logits(target)
    use_grouped_attention(decoder.module, config)
    probe(target, expected)
    if quantize is not None:
        check_quantizable(model, name)
        use_exact_attention(model, name)
        probe(target, own_logits(target))  # trees too are now verified with another attention
        quantize_linears(model)
    if target.is_sharded or weight_only is not None:
        return target
    backend = None
    if not decoder.recurrent and not decoder.windows.sparse:
        backend = select_backend(decoder.module, decoder.layers, config, decoder.windows)
    pack_linears(model)  # after the probes, which would pack what they widen
    return wired(backend)  # with an LM head that may have been replaced


def _module_decoder(model: PreTrainedModel, dtype: torch.dtype, name: str) -> ModuleDecoder:
    config = model.config.get_text_config(decoder=True)
    module = inner_model(model)
    layers = decoder_layers(module, config, name)
    check_window_is_applied(module, config, name)
    mixers = recurrent_mixers(layers, config, name)
    if mixers:
        return RecurrentDecoder(module, layers, config, dtype, mixers, name)
    return ModuleDecoder(module, layers, config, dtype)
