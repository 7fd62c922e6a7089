"""A target and its draft head as one model, with the interface of transformers' `generate`.

transformers prepares the call (generation config, logits processors, stopping criteria, repeated
prompts) and hands it to our decode loop through `generate(custom_generate=...)`, so that its
options keep their meaning.

Legend: B sequences, T prompt positions, L positions of prompt and response.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.engine.measure_costs import measured_costs
from headstart.inference.engine.stats import Stats
from headstart.inference.tree_policy.defaults import fixed_tree
from headstart.model.checkpoint.fused import load_fused
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target

# Options of `generate` that ask for another decoding method, or for other inputs than token ids.
REFUSED_OPTIONS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "past_key_values",
    "inputs_embeds",
    "position_ids",
    "synced_gpus",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "token_healing",
)
REFUSED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class SpeculativeModel:
    """Decodes with a target and a draft head; every token is the target's own.

    last_stats: counts and times of the latest call.
    """

    def __init__(self, target: Target, head: DraftHead):
        self.target, self.head = target, head.eval()
        self.last_stats = Stats()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
    ) -> SpeculativeModel:
        """Load a fused checkpoint: a target with its heads in `draft_heads/`.

        folder: its path, or its name on the Hub (`owner/name`). Other arguments as in
        `load_target`.
        """
        return cls(
            *load_fused(folder, dtype=dtype, device=device, revision=revision, quantize=quantize)
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        speculative: SpeculativeConfig | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate responses, with the arguments and results of transformers' `generate`.

        input_ids: B x T prompts.
        attention_mask: 1 for tokens, 0 for padding; None: no padding.
        speculative: where drafts come from; None: `default_speculative_config`, which on a CPU
            measures this machine once (a few seconds). `SpeculativeConfig()` decodes
            autoregressively, with the same tokens as a result.
        seed: of the sampling noise; None: drawn from torch's global generator.
        streamer: gets the tokens as they come; for one prompt.
        stop_strings: texts that end a response.
        timing: measure the time by phase.
        options: any other option of `generate`, for example those of
            `SamplingParams.generate_options`. Stopping criteria get None for the scores: an
            accepted token may not have any.

        Returns B x L token ids, padded on the right. ValueError for options that a tree cannot do.
        """
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(
                "A streamer takes one prompt at a time, because the sequences of a batch grow by "
                "different numbers of tokens. Pass a batch of one, or no streamer."
            )
        request = self._request(
            input_ids, attention_mask, speculative, seed, timing, stop_strings, streamer, options
        )
        responses: list[list[int]] = [[] for _ in range(request.batch)]
        for step in request.steps:
            for response, tokens in zip(responses, step, strict=True):
                response += tokens
            if streamer is not None:
                streamer.put(torch.tensor(step[0]))
        if streamer is not None:
            streamer.end()
        return request.result(responses)

    def stream(
        self,
        input_ids: Tensor,
        *,
        speculative: SpeculativeConfig | None = None,
        seed: int | None = None,
        stop_strings: str | list[str] | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Iterator[list[int]]:
        """Generate a response to one prompt (1 x T); yields the tokens of each forward pass.

        Arguments as in `generate`. They are validated eagerly.
        """
        if len(input_ids) != 1:
            raise ValueError(
                f"stream takes one prompt at a time, got {len(input_ids)}. Use generate for more."
            )
        request = self._request(
            input_ids, None, speculative, seed, timing, stop_strings, None, options
        )
        return (step[0] for step in request.steps)

    def _request(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        speculative: SpeculativeConfig | None,
        seed: int | None,
        timing: bool,
        stop_strings: str | list[str] | None,
        streamer: BaseStreamer | None,
        options: dict[str, Any],
    ) -> _Request:
        """Let transformers prepare the call. Nothing is decoded yet."""
        _check_options(options)
        _check_prompts(input_ids, attention_mask)
        options, stops = self._stop_criteria(stop_strings, options)
        self.last_stats = stats = Stats(timing=timing)

        # A parameter of another name than those of transformers' own loops would be taken out of
        # the options before they are prepared.
        def start(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> _Request:
            _check_generation_config(generation_config)
            mask_BT = model_kwargs["attention_mask"]  # None where nothing is padded
            if len(input_ids) > 1 and generation_config._pad_token_tensor is None:
                raise _no_padding(self.target.name)
            sampling = _sampling_params(
                logits_processor,
                [*stopping_criteria, *stops],
                prompt_length=input_ids.shape[1],
                do_sample=bool(generation_config.do_sample),
                seed=seed,
            )
            steps = decode(
                self.target,
                input_ids,
                mask_BT,
                sampling=sampling,
                speculative=speculative or default_speculative_config(self.target, self.head),
                stats=stats,
            )
            return _Request(input_ids, steps, generation_config)

        request: _Request = self.target.model.generate(
            input_ids,
            attention_mask=attention_mask,
            custom_generate=start,
            streamer=streamer,  # transformers shows it the prompt
            **options,
        )
        return request

    def _stop_criteria(
        self, stop_strings: str | list[str] | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], list[StopStringCriteria]]:
        """Turn stop strings into criteria here: transformers does not pass a tokenizer on to a
        custom decoding function, and refuses stop strings without one."""
        options = dict(options)
        tokenizer = options.pop("tokenizer", None)
        given, own = options.get("generation_config"), self.target.model.generation_config
        if given is not None and given.stop_strings is not None:
            stop_strings = stop_strings or given.stop_strings
            options["generation_config"] = given = copy.deepcopy(given)
            given.stop_strings = None
        if own.stop_strings is not None:  # fills what the given one leaves open
            stop_strings = stop_strings or own.stop_strings
            options["stop_strings"] = None
        if not stop_strings:
            return options, []
        if tokenizer is None:
            tokenizer = self.target.tokenizer
        return options, [StopStringCriteria(tokenizer, stop_strings)]


def default_speculative_config(target: Target, head: DraftHead) -> SpeculativeConfig:
    """A fixed tree on a GPU. Elsewhere, and for recurrent targets, adaptive trees with n-gram
    drafts, for which a decode step is timed once per machine (a few seconds)."""
    tree = fixed_tree(target)
    if tree is not None:
        return SpeculativeConfig(head, tree)
    return SpeculativeConfig(head, costs=measured_costs(target, head), ngram=True)


def _no_padding(name: str) -> ValueError:
    return ValueError(
        f"{name} has neither a padding nor an end-of-text token, so responses of different length "
        "cannot be put in one tensor. Pass pad_token_id, or decode one prompt at a time."
    )


class _Request:
    """A prepared call: the steps, not yet begun, and how to return the responses.

    batch: number of sequences.
    """

    def __init__(
        self, input_ids_BT: Tensor, steps: Iterator[list[list[int]]], config: GenerationConfig
    ):
        self.steps, self.batch = steps, len(input_ids_BT)
        self._input_ids_BT, self._config = input_ids_BT, config

    def result(self, responses: list[list[int]]) -> Tensor | GenerateDecoderOnlyOutput:
        longest = max(map(len, responses))
        pad = self._config._pad_token_tensor
        fill = 0 if pad is None else int(pad)  # None: one sequence, nothing to fill
        filled = [response + [fill] * (longest - len(response)) for response in responses]
        responses_BT = torch.tensor(filled, device=self._input_ids_BT.device)
        ids_BL = torch.cat([self._input_ids_BT, responses_BT], 1)
        if self._config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids_BL.long())  # type: ignore[arg-type]
        return ids_BL


def _sampling_params(
    processors: LogitsProcessorList,
    criteria: Sequence[Any],
    *,
    prompt_length: int,
    do_sample: bool,
    seed: int | None,
) -> SamplingParams:
    """What transformers prepared. The engine checks length and end tokens itself, which is cheap;
    other criteria are called.

    prompt_length: padding included. seed None: drawn here, so that torch.manual_seed repeats it.
    """
    length = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    eos = [one.eos_token_id.tolist() for one in criteria if type(one) is EosTokenCriteria]
    others = [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    assert length, "transformers always sets a length"
    if do_sample and seed is None:
        seed = int(torch.randint(1 << 62, ()))
    return SamplingParams(
        max_new_tokens=min(length) - prompt_length,
        temperature=1.0 if do_sample else 0.0,  # that of the options is among the processors
        logits_processors=tuple(processors),
        seed=seed or 0,
        stop_token_ids=frozenset(token for tokens in eos for token in tokens),
        stopping_criteria=tuple(others),
    )


def _check_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(
            f"Prompts are a matrix of token ids, one row per prompt, got the shape "
            f"{tuple(input_ids.shape)}. For one prompt pass input_ids[None]."
        )
    empty = input_ids.numel() == 0
    if attention_mask is not None and not empty:
        empty = bool((attention_mask != 0).sum(1).min() == 0)
    if empty:
        raise ValueError(
            "A prompt is empty, so there is nothing to continue. Give at least one token, for "
            "example the tokenizer's beginning-of-text token."
        )


def _check_options(options: dict[str, Any]) -> None:
    for name in (*REFUSED_OPTIONS, *REFUSED_OUTPUTS):
        value = options.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is not supported: a forward pass verifies several draft tokens at once. "
                "Leave it away, or call target.model.generate of transformers."
            )


def _check_generation_config(config: GenerationConfig) -> None:
    """ValueError for what the decode loop does not support."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value.replace('_', ' ')} is not supported: a tree is verified against one "
            "continuation per sequence. Use greedy decoding (do_sample=False) or sampling "
            "(do_sample=True) with num_beams=1 and without an assistant."
        )
    if config.return_dict_in_generate:
        for name in REFUSED_OUTPUTS:
            if getattr(config, name):
                raise ValueError(f"{name} is not supported. Set it to False.")
