"""A target and its head as one model with transformers' own `generate`.

transformers prepares everything (settings, logits processors, stopping criteria, repeated rows) and
hands it to our loop through `generate(custom_generate=...)`, so options mean what they mean there.

Legend: B batch rows, T prompt positions, L positions of prompt and answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
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

from headstart.inference.engine.loop import StepStream, decode, plain
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.sequence import StopCriteria
from headstart.inference.engine.stats import Stats
from headstart.inference.tree_policy.adaptive import Budget
from headstart.inference.tree_policy.defaults import DEFAULT_TREE, WIDEST_TREE, fixed_tree, usual
from headstart.model.checkpoint.fused import load_fused
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

# Options of `generate` that ask for another way of decoding, or for inputs that are not ours.
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


@dataclass(frozen=True)
class _How:
    """Our own arguments of `generate`, those that transformers does not know."""

    tree: TreeShape | None
    budget: Budget | None
    lookup: bool | None
    speculate: bool
    seed: int | None
    timing: bool


class SpeculativeModel:
    """Decodes with a target and a draft head; every token is the target's own.

    last_stats: what the latest call did (tokens, passes, acceptance, time by phase).
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
        """Open a fused checkpoint: a target with its heads in `draft_heads/`.

        folder: where it is, or its name on the Hub (`owner/name`). Arguments as in `load_target`.
        """
        return cls(
            *load_fused(folder, dtype=dtype, device=device, revision=revision, quantize=quantize)
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tree: TreeShape | None = None,
        budget: Budget | None = None,
        lookup: bool | None = None,
        speculate: bool = True,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        stop_strings: str | list[str] | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Answer prompts, with the arguments and results of transformers' `generate`.

        input_ids: B x T prompts. attention_mask: 0 for padding. By default trees have 16 nodes on a
        GPU; on a CPU as many as pay on this machine, which is measured once (`Budget.auto`, a few
        seconds at the first call ever), and guesses come from the text itself too. tree: the shape
        of the guesses; with a budget the largest one. lookup: whether to guess from the text.
        speculate: False decodes plainly, with the same tokens as a result. seed: of the sampling;
        None takes one from torch's global generator. timing: measure time by phase.
        options: any other option of `generate`, e.g. max_new_tokens, do_sample, temperature, top_p,
        top_k, eos_token_id, stopping_criteria, return_dict_in_generate. B x L ids, padded on the
        right. Stopping criteria get no scores (None): a token that is accepted may not have any.
        ValueError for what cannot be combined with a tree.
        """
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(
                "A streamer takes one prompt at a time, because rows of a batch grow by different "
                "numbers of tokens. Pass a batch of one, or no streamer."
            )
        how = _How(tree, budget, lookup, speculate, seed, timing)
        request = self._request(input_ids, attention_mask, how, stop_strings, streamer, options)
        answers: list[list[int]] = [[] for _ in range(request.rows)]
        for step in request.steps:
            for answer, tokens in zip(answers, step, strict=True):
                answer += tokens
            if streamer is not None:
                streamer.put(torch.tensor(step[0]))
        if streamer is not None:
            streamer.end()
        return request.result(answers)

    def stream(
        self,
        input_ids: Tensor,
        *,
        tree: TreeShape | None = None,
        budget: Budget | None = None,
        lookup: bool | None = None,
        speculate: bool = True,
        seed: int | None = None,
        stop_strings: str | list[str] | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Iterator[list[int]]:
        """Answer one prompt (1 x T); yields, after each pass, the tokens it gave.

        Arguments as in `generate`. What is wrong with them is said now, not at the first token.
        """
        if len(input_ids) != 1:
            raise ValueError(
                f"stream answers one prompt at a time, got {len(input_ids)}. Use generate for more."
            )
        how = _How(tree, budget, lookup, speculate, seed, timing)
        request = self._request(input_ids, None, how, stop_strings, None, options)
        return (step[0] for step in request.steps)

    def _request(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        how: _How,
        stop_strings: str | list[str] | None,
        streamer: BaseStreamer | None,
        options: dict[str, Any],
    ) -> _Request:
        """Let transformers prepare the call. Nothing is decoded yet."""
        _refuse(options)
        _check_prompts(input_ids, attention_mask)
        options, stops = self._stop_criteria(stop_strings, options)
        self.last_stats = stats = Stats(timing=how.timing)

        # A parameter of another name than those of transformers' own loops would be taken out of
        # the options on the way, before they are prepared.
        def start(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> _Request:
            _refuse_config(generation_config)
            mask_BT = model_kwargs["attention_mask"]  # None where nothing is padded
            if len(input_ids) > 1 and generation_config._pad_token_tensor is None:
                raise _no_padding(self.target.name)
            sample = bool(generation_config.do_sample)
            sampler = Sampler(
                logits_processor, sample=sample, seed=_seed(how.seed) if sample else 0
            )
            stop = _stop([*stopping_criteria, *stops], input_ids.shape[1])
            steps = self._steps(how, input_ids, mask_BT, sampler=sampler, stop=stop, stats=stats)
            return _Request(input_ids, steps, generation_config)

        request: _Request = self.target.model.generate(
            input_ids,
            attention_mask=attention_mask,
            custom_generate=start,
            streamer=streamer,  # transformers shows it the prompt
            **options,
        )
        return request

    def _steps(
        self, how: _How, input_ids: Tensor, mask_BT: Tensor | None, **options: Any
    ) -> StepStream:
        if not how.speculate:
            return plain(self.target, input_ids, mask_BT, **options)
        tree, budget, lookup = how.tree, how.budget, how.lookup
        if tree is None and budget is None:
            tree = fixed_tree(self.target)
            if tree is None:
                budget = Budget.auto(self.target, self.head)
                lookup = True if lookup is None else lookup
        shape = usual(self.target, DEFAULT_TREE if budget is None else WIDEST_TREE)
        return decode(
            self.target,
            self.head,
            input_ids,
            mask_BT,
            shape=tree or shape,
            budget=budget,
            lookup=bool(lookup),
            **options,
        )

    def _stop_criteria(
        self, stop_strings: str | list[str] | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], list[StopStringCriteria]]:
        """Stop strings as criteria of our own: transformers does not pass a tokenizer on to a
        decoding function, and without one it refuses stop strings."""
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


def sampling_options(
    temperature: float, *, top_k: int | None = None, top_p: float | None = None
) -> dict[str, Any]:
    """The common settings as options of `generate`. Temperature 0 is greedy."""
    if temperature == 0:
        return {"do_sample": False}
    # top_k 0 is off: transformers' own default would be 50.
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": top_p or 1.0,
    }


def _no_padding(name: str) -> ValueError:
    return ValueError(
        f"{name} has neither a padding nor an end-of-text token, so answers of different length "
        "cannot be put in one tensor. Pass pad_token_id, or decode one prompt at a time."
    )


class _Request:
    """A prepared call: the loop, not yet begun, and how its answers are returned."""

    def __init__(
        self, input_ids_BT: Tensor, steps: Iterator[list[list[int]]], config: GenerationConfig
    ):
        self.steps, self.rows = steps, len(input_ids_BT)
        self._input_ids_BT, self._config = input_ids_BT, config

    def result(self, answers: list[list[int]]) -> Tensor | GenerateDecoderOnlyOutput:
        longest = max(map(len, answers))
        pad = self._config._pad_token_tensor
        fill = 0 if pad is None else int(pad)  # None: one row, nothing to fill
        filled = [answer + [fill] * (longest - len(answer)) for answer in answers]
        answers_BT = torch.tensor(filled, device=self._input_ids_BT.device)
        ids_BL = torch.cat([self._input_ids_BT, answers_BT], 1)
        if self._config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids_BL.long())  # type: ignore[arg-type]
        return ids_BL


def _stop(criteria: list[Any], prompt_columns: int) -> StopCriteria:
    """Length and end tokens are checked by ourselves, cheaply; the rest asks the criteria."""
    length = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    eos = [one.eos_token_id.tolist() for one in criteria if type(one) is EosTokenCriteria]
    others = [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
    assert length, "transformers always sets a length"
    return StopCriteria(
        min(length) - prompt_columns,
        frozenset(token for tokens in eos for token in tokens),
        tuple(others),
    )


def _seed(seed: int | None) -> int:
    """None: a new one, which torch.manual_seed makes repeatable."""
    return int(torch.randint(1 << 62, ())) if seed is None else seed


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


def _refuse(options: dict[str, Any]) -> None:
    for name in (*REFUSED_OPTIONS, *REFUSED_OUTPUTS):
        value = options.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is not supported: tokens come from a tree of guesses, several per pass. "
                "Leave it away, or call target.model.generate for plain transformers."
            )


def _refuse_config(config: GenerationConfig) -> None:
    """What a generation config can ask for, and this loop cannot do."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value.replace('_', ' ')} is not supported: a tree is verified against one "
            "continuation per row. Use greedy decoding (do_sample=False) or sampling "
            "(do_sample=True) with num_beams=1 and without an assistant."
        )
    if config.return_dict_in_generate:
        for name in REFUSED_OUTPUTS:
            if getattr(config, name):
                raise ValueError(f"{name} is not supported. Set it to False.")
