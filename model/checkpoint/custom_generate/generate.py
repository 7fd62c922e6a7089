"""Speculative decoding with the draft head of this folder, in plain transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    out = model.generate(**ids, max_new_tokens=100, custom_generate=FOLDER, trust_remote_code=True)

The head drafts a chain of tokens and the model verifies it in one forward pass. At every position
the model's own next token is chosen exactly as in transformers, greedily or sampled. That token is
the output; as long as the draft tokens equal it, no further pass is needed. Headstart wrote this
file and drafting.py beside it. They need torch, transformers and safetensors only.

Legend: 1 batch of one sequence, T tokens so far, P new positions, K draft tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMode
from transformers.utils import cached_file

from .drafting import KINDS, Head, HeadState, TargetOutput

HEADS, CONFIG, WEIGHTS = "draft_heads", "config.json", "model.safetensors"
DEFAULT_DRAFT_STEPS = 3  # if it is not known how many draft steps the head was trained for
# Arguments that transformers passes to a decoding loop and that this file handles itself.
KNOWN = (
    "attention_mask",
    "cache",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "position_ids",
    "use_cache",
)
UNSUPPORTED = (
    "assistant_model",
    "cache",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "synced_gpus",
)


def generate(
    *inputs: Any,
    model: PreTrainedModel,
    num_assistant_tokens: int | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    **arguments: Any,
) -> Any:
    """Generate as transformers' `generate` does, with speculative decoding.

    Takes the same arguments and returns the same results.

    num_assistant_tokens: draft tokens per forward pass (default: as many as the head was trained
        for).

    ValueError, before any forward pass, if the request is not supported.
    """
    trusted = arguments.pop("trust_remote_code", None)
    if arguments.get("custom_generate") is not None:  # another decoding loop is asked for
        options = arguments | {"tokenizer": tokenizer, "streamer": streamer}
        if num_assistant_tokens is not None:
            options["num_assistant_tokens"] = num_assistant_tokens
        return GenerationMixin.generate(model, *inputs, trust_remote_code=trusted, **options)
    for name in UNSUPPORTED:
        given = arguments.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"Speculative decoding of a fused checkpoint does not take {name}: it uses a cache "
                "and a draft head of its own, in one process. Leave it out."
            )
    _stop_at_strings(model, tokenizer, arguments)
    head, draft_steps = _head_of(model)
    if num_assistant_tokens is not None:
        if num_assistant_tokens < 1:
            raise ValueError(
                f"num_assistant_tokens must be at least 1, not {num_assistant_tokens}."
            )
        draft_steps = num_assistant_tokens
    loop = partial(_decode, head=head, draft_steps=draft_steps, streamer=streamer)
    return GenerationMixin.generate(
        model, *inputs, custom_generate=loop, streamer=streamer, **arguments
    )


def _stop_at_strings(model: PreTrainedModel, tokenizer: Any, arguments: dict[str, Any]) -> None:
    """Add the criterion for stop strings: custom loops get no tokenizer from transformers."""
    strings = arguments.pop("stop_strings", None)
    config = arguments.get("generation_config") or model.generation_config
    if strings is None and config is not None and config.stop_strings is not None:
        raise ValueError(
            "Give stop_strings as an argument of generate, not in a generation config."
        )
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer too: generate(..., tokenizer=...).")
    given = arguments.get("stopping_criteria") or []
    criteria = [*given, StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    head: Head,
    draft_steps: int,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode; transformers calls this in the place of its own loop."""
    _check_supported(model, input_ids, generation_config, model_kwargs)
    sequence = _Sequence(
        input_ids, logits_processor, stopping_criteria, generation_config, streamer
    )
    target, state = _Target(model, head.taps), HeadState()
    output = target.forward(input_ids, all_logits=False)
    done = sequence.append_token(output.logits_1PV[:, -1])
    next_1P = sequence.ids_1T[:, 1:]
    while not done:
        head.advance(state, output, next_1P.to(head.device))
        remaining = _remaining_tokens(model, generation_config, sequence.ids_1T.shape[1])
        chain_1K = head.draft(state, min(draft_steps, remaining))
        drafted = chain_1K[0].tolist()
        root_11 = sequence.ids_1T[:, -1:]
        output = target.forward(torch.cat([root_11, chain_1K.to(root_11.device)], 1))
        for position in range(len(drafted) + 1):
            done = sequence.append_token(output.logits_1PV[:, position])
            if done or drafted[position : position + 1] != [int(sequence.ids_1T[0, -1])]:
                break
        accepted = position + 1  # the root and the draft tokens that were right
        target.crop(len(drafted) + 1 - accepted)
        output, next_1P = output.first(accepted), sequence.ids_1T[:, -accepted:]
    return sequence.result(target.cache)


def _remaining_tokens(model: PreTrainedModel, config: GenerationConfig, length: int) -> int:
    """Number of draft tokens that can still become output, up to the length limit and the model's
    last position."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    most = config.max_length if limit is None else min(config.max_length, limit)
    return max(0, most - length - 1)


def _check_supported(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, given: dict[str, Any]
) -> None:
    """Raise ValueError if the output would differ from that of transformers."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"A fused checkpoint decodes greedily or samples; {mode.value} is not supported. Open "
            "the model without trust_remote_code, and leave custom_generate out."
        )
    if len(input_ids) != 1:
        raise ValueError(
            f"Speculative decoding takes one prompt at a time, and this is a batch of "
            f"{len(input_ids)} (times num_return_sequences). Call generate for each prompt."
        )
    mask = given.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("The attention mask hides tokens. Pass the prompt without padding.")
    asked = (name for name, one in given.items() if one is not None and one is not False)
    unknown = sorted(set(asked) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"Speculative decoding takes text only and does not support {', '.join(unknown)}. "
            "Leave these out, or open the model without trust_remote_code."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "Speculative decoding does not return output_attentions and output_hidden_states. "
            "Leave them out, or open the model without trust_remote_code."
        )
    rope: dict[str, Any] = getattr(_text_config(model), "rope_parameters", None) or {}
    for one in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        first = one.get("original_max_position_embeddings")
        if one.get("rope_type") == "longrope" and first and config.max_length > first:
            raise ValueError(
                f"Beyond {first} tokens this model rescales the rotary positions of the whole "
                f"sequence, which speculative decoding does not support. Generate at most {first} "
                "tokens, prompt included."
            )


@dataclass
class _Sequence:
    """The sequence so far, extended as in transformers' own loop.

    scores, logits: 1 x V for each new token, kept on request.
    """

    ids_1T: Tensor
    processor: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def append_token(self, logits_1V: Tensor) -> bool:
        """Choose and append the next token. Returns whether it ends the sequence."""
        raw_1V = logits_1V.to(copy=True, dtype=torch.float32, device=self.ids_1T.device)
        scores_1V = self.processor(self.ids_1T, raw_1V)  # type: ignore[arg-type]
        keeps = self.config.return_dict_in_generate
        if keeps and self.config.output_scores:
            self.scores.append(scores_1V)
        if keeps and self.config.output_logits:
            self.logits.append(raw_1V)
        if self.config.do_sample:
            token_11 = torch.multinomial(scores_1V.softmax(-1), num_samples=1)
        else:
            token_11 = scores_1V.argmax(-1, keepdim=True)
        self.ids_1T = torch.cat([self.ids_1T, token_11], 1)
        if self.streamer is not None:
            self.streamer.put(token_11[:, 0].cpu())
        kept: Any = tuple(self.scores) if keeps and self.config.output_scores else None
        return bool(self.criteria(self.ids_1T, kept).all())

    def result(self, cache: DynamicCache) -> Tensor | GenerateDecoderOnlyOutput:
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids_1T
        fields: dict[str, Any] = {
            "sequences": self.ids_1T,
            "scores": tuple(self.scores) if self.config.output_scores else None,
            "logits": tuple(self.logits) if self.config.output_logits else None,
            _cache_kwarg(GenerateDecoderOnlyOutput.__init__): cache,
        }
        return GenerateDecoderOnlyOutput(**fields)


def _cache_kwarg(function: Callable[..., Any]) -> str:
    """Name of the cache argument: `cache` since transformers 5.24, before `past_key_values`."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


class _Target:
    """The model with a cache from which rejected draft tokens can be cropped.

    The cache is made without a configuration, so that it keeps all slots also for layers with a
    sliding window, which the model's mask then applies. A cache that drops slots beyond the window
    could not be cropped.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]):
        self.model, self.layers = model, layers
        self.cache = DynamicCache()
        self.cache_kwarg = _cache_kwarg(model.forward)
        self.limits_logits = model._supports_logits_to_keep()  # type: ignore[operator]

    def forward(self, ids_1P: Tensor, all_logits: bool = True) -> TargetOutput:
        """Run the model. all_logits: compute logits at every position, not only at the last."""
        options: dict[str, Any] = {self.cache_kwarg: self.cache, "use_cache": True}
        if self.limits_logits:
            options["logits_to_keep"] = 0 if all_logits else 1
        hidden: dict[int, Tensor] = {}

        def keep(layer: int, _: nn.Module, __: object, output: Any) -> None:
            hidden[layer] = output if isinstance(output, Tensor) else output[0]

        decoder = _decoder(self.model)
        blocks = _blocks(self.model, decoder)
        taps = {-1: decoder} | {layer: blocks[layer] for layer in self.layers}
        with ExitStack() as stack:
            for layer, module in taps.items():
                stack.callback(module.register_forward_hook(partial(keep, layer)).remove)
            ids_1P = ids_1P.to(self.model.device)
            output = self.model(input_ids=ids_1P, return_dict=True, **options)
        return TargetOutput(output.logits, hidden.pop(-1), hidden)

    def crop(self, count: int) -> None:
        """Remove the last slots from the cache."""
        if count:
            self.cache.crop(-count)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the model whose output is the input of the LM head."""
    decoder: nn.Module = model.get_decoder()
    if decoder is not model:
        return decoder
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def _blocks(model: PreTrainedModel, decoder: nn.Module) -> nn.ModuleList:
    count = _text_config(model).num_hidden_layers
    lists = (one for one in decoder.modules() if isinstance(one, nn.ModuleList))
    return next(one for one in lists if len(one) == count)


_loaded: WeakKeyDictionary[PreTrainedModel, tuple[Head, int]] = WeakKeyDictionary()


def _head_of(model: PreTrainedModel) -> tuple[Head, int]:
    """Load the head in the folder that the model was opened from.

    Returns it with the number of draft steps it was trained for. It is loaded once, and again
    after the model was moved or converted.
    """
    kept = _loaded.get(model)
    if kept is not None and kept[0].is_current(model):
        return kept
    with open(_file(model, CONFIG), encoding="utf-8") as file:
        ours = json.load(file)["headstart"]
    config = ours["head"]
    if config["kind"] not in KINDS or config.get("family") is not None:
        raise ValueError(
            f"The head of kind {config['kind']} in {HEADS} has layers that this code does not "
            "support. Decode with Headstart itself."
        )
    with torch.device("meta"):  # initial weights would consume random numbers of the sampling
        head = KINDS[config["kind"]](config)
    _check_sizes(model, head)
    stored = load_file(_file(model, WEIGHTS))
    stored.pop("lm_head.weight", None)  # rows of the model's own, for other engines
    named = {_name(name): tensor for name, tensor in stored.items()}
    head.load_state_dict(named, assign=True)
    _loaded[model] = head.bind(model), ours["meta"].get("steps") or DEFAULT_DRAFT_STEPS
    return _loaded[model]


def _check_sizes(model: PreTrainedModel, head: Head) -> None:
    """Raise ValueError if the sizes show that the head belongs to another model."""
    linear, layers = model.get_output_embeddings(), _text_config(model).num_hidden_layers
    ours = head.config["hidden_size"], head.config["vocab_size"]
    theirs = linear.in_features, linear.out_features
    if ours != theirs or any(layer >= layers for layer in head.taps):
        raise ValueError(
            f"The head in {HEADS} was trained for a model of hidden size {ours[0]} and vocabulary "
            f"{ours[1]} and taps its layers {list(head.taps)}; this one has {theirs[0]}, "
            f"{theirs[1]} and {layers} layers. Open the model from the fused checkpoint."
        )


def _file(model: PreTrainedModel, name: str) -> str:
    """Find a file of the head in the model's folder or repository."""
    place, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    try:
        found = cached_file(place, f"{HEADS}/{name}", revision=commit) if place else None
    except OSError as error:
        raise ValueError(_no_head(place, name)) from error
    if found is None:
        raise ValueError(_no_head(place, name))
    return found


def _no_head(place: str, name: str) -> str:
    return (
        f"The model was opened from {place or 'no folder'}, where there is no {HEADS}/{name}. Open "
        "it from the folder or repository of the fused checkpoint."
    )


def _name(stored: str) -> str:
    """Name in the state dict of a stored tensor: kind mtp is stored under GLM's names."""
    prefix, _, rest = stored.partition("model.layers.")
    if prefix or not rest:
        return stored
    name = rest.partition(".")[2]
    if name.startswith("shared_head."):
        return name.removeprefix("shared_head.")
    return name if name.startswith(("enorm.", "hnorm.", "eh_proj.")) else f"layer.{name}"
