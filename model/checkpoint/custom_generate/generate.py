"""Speculative decoding with the draft head of this folder, in plain transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    out = model.generate(**ids, max_new_tokens=100, custom_generate=FOLDER, trust_remote_code=True)

The head guesses a chain of tokens and the model reads it in one forward pass. At every position the
model's own next token is found just as transformers finds it, greedily or drawn; that token is the
output, and as long as the guesses equal it, no further pass is needed. Headstart wrote this
file and drafting.py beside it; both need torch, transformers and safetensors alone.

Legend: 1 the only row, T tokens so far, P new positions, K guesses, V vocabulary.
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
USUAL_GUESSES = 3  # where nothing says how many steps ahead the head was trained for
# What transformers hands on that this file does itself.
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
NOT_TAKEN = (
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
    """transformers' `generate`, with its arguments and its results, speculating.

    num_assistant_tokens: guesses per pass; by default as many as the head was trained for.
    ValueError, before anything is read, for what cannot be decoded so.
    """
    trusted = arguments.pop("trust_remote_code", None)
    if arguments.get("custom_generate") is not None:  # another way is asked for
        options = arguments | {"tokenizer": tokenizer, "streamer": streamer}
        if num_assistant_tokens is not None:
            options["num_assistant_tokens"] = num_assistant_tokens
        return GenerationMixin.generate(model, *inputs, trust_remote_code=trusted, **options)
    for name in NOT_TAKEN:
        given = arguments.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"Speculative decoding of a fused folder does not take {name}: it has a cache and "
                "a head of its own, in one process. Leave it out."
            )
    _stop_at_strings(model, tokenizer, arguments)
    head, candidates = _head_of(model)
    if num_assistant_tokens is not None:
        if num_assistant_tokens < 1:
            raise ValueError(f"num_assistant_tokens is at least 1, not {num_assistant_tokens}.")
        candidates = num_assistant_tokens
    loop = partial(_decode, head=head, candidates=candidates, streamer=streamer)
    return GenerationMixin.generate(
        model, *inputs, custom_generate=loop, streamer=streamer, **arguments
    )


def _stop_at_strings(model: PreTrainedModel, tokenizer: Any, arguments: dict[str, Any]) -> None:
    """transformers gives a loop of others no tokenizer, so this criterion is made here."""
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
    candidates: int,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop, called by transformers where it would call its own."""
    _refuse(model, input_ids, generation_config, model_kwargs)
    answer = _Answer(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    reader, pairs = _Reader(model, head.taps), HeadState()
    seen = reader.read(input_ids, all_logits=False)
    done = answer.say(seen.logits_1PV[:, -1])
    next_1P = answer.ids_1T[:, 1:]
    while not done:
        head.advance(pairs, seen, next_1P.to(head.device))
        room = _room(model, generation_config, answer.ids_1T.shape[1])
        chain_1K = head.draft(pairs, min(candidates, room))
        drafted = chain_1K[0].tolist()
        root_11 = answer.ids_1T[:, -1:]
        seen = reader.read(torch.cat([root_11, chain_1K.to(root_11.device)], 1))
        for place in range(len(drafted) + 1):
            done = answer.say(seen.logits_1PV[:, place])
            if done or drafted[place : place + 1] != [int(answer.ids_1T[0, -1])]:
                break
        kept = place + 1
        reader.drop(len(drafted) + 1 - kept)
        seen, next_1P = seen.first(kept), answer.ids_1T[:, -kept:]
    return answer.result(reader.cache)


def _room(model: PreTrainedModel, config: GenerationConfig, length: int) -> int:
    """How many guesses can still become part of the text. Behind the model's last position there
    are none, so positions that do not exist are read by no guess."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    most = config.max_length if limit is None else min(config.max_length, limit)
    return max(0, most - length - 1)


def _refuse(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, given: dict[str, Any]
) -> None:
    """ValueError for what would not come out as transformers has it."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"A fused folder decodes greedily or samples, and this asks for {mode.value}. Open the "
            "model without trust_remote_code, and leave custom_generate out."
        )
    if len(input_ids) != 1:
        raise ValueError(
            f"Speculative decoding takes one prompt at a time, and this is a batch of "
            f"{len(input_ids)} (num_return_sequences counts too). Call generate for each."
        )
    mask = given.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("The attention mask hides tokens. Give the prompt without padding.")
    asked = (name for name, one in given.items() if one is not None and one is not False)
    unknown = sorted(set(asked) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"Speculative decoding reads text only and does not know {', '.join(unknown)}. Leave "
            "these out, or open the model without trust_remote_code."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("output_attentions and output_hidden_states are not kept in speculation.")
    rope: dict[str, Any] = getattr(_text_config(model), "rope_parameters", None) or {}
    for one in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        first = one.get("original_max_position_embeddings")
        if one.get("rope_type") == "longrope" and first and config.max_length > first:
            raise ValueError(
                f"Past {first} tokens this model turns all positions anew, which speculation does "
                f"not follow. Ask for at most {first} tokens, prompt included."
            )


@dataclass
class _Answer:
    """The text so far, and how it goes on: as in transformers' own loop."""

    ids_1T: Tensor
    processor: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def say(self, logits_1V: Tensor) -> bool:
        """One token more; whether it is the last one."""
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
            _cache_name(GenerateDecoderOnlyOutput.__init__): cache,
        }
        return GenerateDecoderOnlyOutput(**fields)


def _cache_name(function: Callable[..., Any]) -> str:
    """`cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


class _Reader:
    """The model, reading behind a cache from which guesses can be taken back.

    Made without a configuration, the cache keeps everything for layers with a window too: a window
    is then a matter of the model's mask, and what was dropped behind it is not missed.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]):
        self.model, self.layers = model, layers
        self.cache = DynamicCache()
        self.cache_kwarg = _cache_name(model.forward)
        self.chooses = model._supports_logits_to_keep()  # type: ignore[operator]

    def read(self, ids_1P: Tensor, all_logits: bool = True) -> TargetOutput:
        """One forward pass. all_logits: at every position, else at the last one alone."""
        options: dict[str, Any] = {self.cache_kwarg: self.cache, "use_cache": True}
        if self.chooses:
            options["logits_to_keep"] = 0 if all_logits else 1
        hidden: dict[int, Tensor] = {}

        def keep(place: int, _: nn.Module, __: object, output: Any) -> None:
            hidden[place] = output if isinstance(output, Tensor) else output[0]

        decoder = _decoder(self.model)
        blocks = _blocks(self.model, decoder)
        taps = {-1: decoder} | {layer: blocks[layer] for layer in self.layers}
        with ExitStack() as stack:
            for place, module in taps.items():
                stack.callback(module.register_forward_hook(partial(keep, place)).remove)
            ids_1P = ids_1P.to(self.model.device)
            output = self.model(input_ids=ids_1P, return_dict=True, **options)
        return TargetOutput(output.logits, hidden.pop(-1), hidden)

    def drop(self, count: int) -> None:
        if count:
            self.cache.crop(-count)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The model below its LM head."""
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
    """The head in the folder that the model was opened from, and how many steps ahead it was
    trained for. It is read once, and again where the model was moved or converted since."""
    kept = _loaded.get(model)
    if kept is not None and kept[0].suits(model):
        return kept
    with open(_file(model, CONFIG), encoding="utf-8") as file:
        ours = json.load(file)["headstart"]
    config = ours["head"]
    if config["kind"] not in KINDS or config.get("family") is not None:
        raise ValueError(
            f"The head of kind {config['kind']} in {HEADS} has layers that are not known "
            "here. Decode with Headstart itself."
        )
    with torch.device("meta"):  # random weights, never used, would take draws from the sampling
        head = KINDS[config["kind"]](config)
    _check_sizes(model, head)
    stored = load_file(_file(model, WEIGHTS))
    stored.pop("lm_head.weight", None)  # the model's own rows, for other engines
    named = {_name(name): tensor for name, tensor in stored.items()}
    head.load_state_dict(named, assign=True)
    _loaded[model] = head.borrow(model), ours["meta"].get("steps") or USUAL_GUESSES
    return _loaded[model]


def _check_sizes(model: PreTrainedModel, head: Head) -> None:
    """ValueError for another model than the head's, as far as sizes tell."""
    linear, layers = model.get_output_embeddings(), _text_config(model).num_hidden_layers
    ours = head.config["hidden_size"], head.config["vocab_size"]
    theirs = linear.in_features, linear.out_features
    if ours != theirs or any(layer >= layers for layer in head.taps):
        raise ValueError(
            f"The head in {HEADS} was made for a model of hidden size {ours[0]} and vocabulary "
            f"{ours[1]} and reads its layers {list(head.taps)}; this one has {theirs[0]}, "
            f"{theirs[1]} and {layers} layers. Open the model from the fused folder."
        )


def _file(model: PreTrainedModel, name: str) -> str:
    """A file of the head, in the model's folder or repository."""
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
        "it from the fused folder or repository itself."
    )


def _name(stored: str) -> str:
    """The head's own name of a tensor: kind mtp is stored under GLM's names."""
    prefix, _, rest = stored.partition("model.layers.")
    if prefix or not rest:
        return stored
    name = rest.partition(".")[2]
    if name.startswith("shared_head."):
        return name.removeprefix("shared_head.")
    return name if name.startswith(("enorm.", "hnorm.", "eh_proj.")) else f"layer.{name}"
