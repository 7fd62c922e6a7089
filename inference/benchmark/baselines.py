"""Contestants on the same prompts, ours and Hugging Face's: what each wrote and what it took.

A batch of prompts is answered by every contestant before the next batch comes, and who goes first
changes from batch to batch, so that a machine whose speed drifts treats all alike. Figures are
sums: total tokens by total passes, total tokens by total seconds. A contestant that fails keeps its
error and drops out; the others go on.

Legend: B batch rows, T positions, V vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.sequence import StopCriteria
from headstart.inference.engine.stats import Stats
from headstart.model.target.target import Target

from .runner import PLAIN, first_difference

WARM_UP = 8  # tokens
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
RESTART_PEAK = "5"  # what CLEAR takes for it
TOLD = os.access(CLEAR, os.W_OK)  # whether the system tells peaks


@dataclass(frozen=True)
class Case:
    """A prompt as the target reads it. id: its name in its suite."""

    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What is the same for all contestants. batch: prompts at a time; temperature 0 is greedy."""

    max_new_tokens: int
    batch: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Difference:
    """The first place where an answer leaves the plain one.

    margin: how far the two likeliest draws of the target lie apart there, in logits, when the plain
    answer is read once more in one pass. Near 0 it is a tie that rounding decides.
    """

    prompt: str
    place: int
    margin: float


@dataclass
class Score:
    """Sums over a contestant's batches.

    seconds: wall time, the prompt included. steps: passes of the target behind the prompts' own,
    counted once per batch. compared: answers that had to equal the plain ones. peak: bytes, the
    most that was in memory; working: how much of it came during an answer. None where this is not
    known. error: why the contestant dropped out.
    """

    stats: Stats = field(default_factory=lambda: Stats(timing=True))
    prompts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: int = 0
    compared: int = 0
    identical: int = 0
    differences: list[Difference] = field(default_factory=list)
    peak: int | None = None
    working: int | None = None
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.stats.tokens / self.seconds if self.seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of one pass with all that belongs to it, the prompts left out."""
        return (self.seconds - self.stats.seconds["prefill"]) / self.steps if self.steps else 0.0

    @staticmethod
    def total(scores: Sequence[Score]) -> Score:
        """Several runs of one contestant as one; it failed if it failed in one of them."""
        whole = Score()
        for one in scores:
            whole.stats.add(one.stats)
            whole.prompts += one.prompts
            whole.seconds += one.seconds
            whole.cpu_seconds += one.cpu_seconds
            whole.steps += one.steps
            whole.compared += one.compared
            whole.identical += one.identical
            whole.differences += one.differences
            whole.peak = _larger(whole.peak, one.peak)
            whole.working = _larger(whole.working, one.working)
            whole.error = whole.error or one.error
        return whole


class Runner(Protocol):
    """Somebody who answers batches of prompts.

    rows: the most prompts it takes at a time; None for any number. ours: whether the sampling noise
    is ours, so that even sampled answers must equal the plain ones.
    """

    device: torch.device
    rows: int | None
    ours: bool

    def answer(
        self, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, setting: Setting, score: Score
    ) -> list[list[int]]:
        """The answers, end-of-text included. Adds tokens, rounds and steps to the score."""
        ...


class Ours:
    """Our own loop: plain, or with a head and its tree."""

    rows: int | None = None
    ours = True

    def __init__(self, target: Target, contestant: SpeculativeConfig | None = None):
        self.target, self.contestant, self.device = target, contestant, target.device

    def answer(
        self, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, setting: Setting, score: Score
    ) -> list[list[int]]:
        sampling = SamplingParams(
            stop.max_new_tokens,
            setting.temperature,
            seed=setting.seed,
            stop_token_ids=stop.eos,
        )
        steps = decode(
            self.target,
            tokens_BT,
            mask_BT,
            sampling=sampling,
            speculative=self.contestant,
            stats=score.stats,
        )
        answers: list[list[int]] = [[] for _ in tokens_BT]
        for step, emitted in enumerate(steps):
            score.steps += step > 0
            for answer, tokens in zip(answers, emitted, strict=True):
                answer += tokens
        return answers


class Stock:
    """Hugging Face's `generate` on a copy of the model that nothing of ours has touched.

    options: of `generate`, such as prompt_lookup_num_tokens or use_mtp; with any of them one prompt
    at a time, as `generate` demands. A round is a pass of the model, the prompt's included.
    """

    ours = False

    def __init__(self, model: PreTrainedModel, eos: Sequence[int], pad: int, **options: Any):
        # Penalties and the like that a model's own settings ask for are not in our runs either.
        model.generation_config = GenerationConfig(eos_token_id=list(eos) or None, pad_token_id=pad)
        self.model, self.options, self.device = model, options, model.device
        self.rows: int | None = 1 if options else None

    def answer(
        self, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, setting: Setting, score: Score
    ) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if setting.temperature > 0:
            torch.manual_seed(setting.seed)
            sampling = {"do_sample": True, "temperature": setting.temperature, "top_k": 0}
        passes: list[None] = []
        hook = self.model.register_forward_pre_hook(lambda *_: passes.append(None))
        try:
            generate: Any = self.model.generate
            ids_BT = generate(
                tokens_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                max_new_tokens=stop.max_new_tokens,
                **sampling,
                **self.options,
            )
        finally:
            hook.remove()
        answers = [_ended(row, stop) for row in ids_BT[:, tokens_BT.shape[1] :].tolist()]
        score.stats.tokens += sum(map(len, answers))
        score.stats.rounds += len(passes) if len(answers) == 1 else sum(map(len, answers))
        score.steps += len(passes) - 1
        return answers


@dataclass(frozen=True)
class Timing:
    """One batch. took: by contestant, its tokens, seconds and rounds of the target."""

    prompts: tuple[str, ...]
    took: dict[str, tuple[int, float, int]]


@dataclass(frozen=True)
class Results:
    """Of one suite in one setting. answers: by contestant, token ids per prompt; those of a
    contestant that failed end early."""

    scores: dict[str, Score]
    timings: list[Timing]
    answers: dict[str, list[list[int]]]


def bench(
    target: Target,
    runners: Mapping[str, Runner],
    cases: Sequence[Case],
    setting: Setting,
    *,
    report: Callable[[int], None] = lambda done: None,
) -> Results:
    """Let every contestant answer every prompt.

    runners: by name; the one called `plain` is what the others are compared with. report: told how
    many batches are done. The first batch runs once unmeasured to warm up.
    """
    results = Results({name: Score() for name in runners}, [], {name: [] for name in runners})
    stop = StopCriteria(setting.max_new_tokens, frozenset(target.eos_ids))
    batches = [cases[at : at + setting.batch] for at in range(0, len(cases), setting.batch)]
    names = list(runners)
    for name in names:
        results.scores[name].error = _warmed_up(target, runners[name], batches, setting, stop)
    for number, batch in enumerate(batches):
        own = replace(setting, seed=setting.seed + number)
        took: dict[str, tuple[int, float, int]] = {}
        first = number % len(names)
        for name in names[first:] + names[:first]:
            score = results.scores[name]
            before = score.stats.tokens, score.seconds, score.stats.rounds
            answers = _answers(runners[name], batch, stop, own, score, target.pad_id)
            if score.error is None:
                results.answers[name] += answers
                tokens, seconds, rounds = before
                stats = score.stats
                took[name] = stats.tokens - tokens, score.seconds - seconds, stats.rounds - rounds
        results.timings.append(Timing(tuple(case.id for case in batch), took))
        _compare(target, runners, batch, own, results)
        report(number + 1)
    return results


def _warmed_up(
    target: Target,
    runner: Runner,
    batches: Sequence[Sequence[Case]],
    setting: Setting,
    stop: StopCriteria,
) -> str | None:
    """Answer the first batch unmeasured; the error if there is one. On CUDA the batch of the
    longest prompt and the last one too, and all to the end: each size of a cache has graphs of its
    own."""
    warm_up, pad = Score(), target.pad_id
    if target.device.type != "cuda" or isinstance(runner, Stock):
        stop = StopCriteria(min(WARM_UP, stop.max_new_tokens), stop.eos)
        _answers(runner, batches[0], stop, setting, warm_up, pad)
        return warm_up.error
    longest = max(batches, key=lambda batch: max(len(case.tokens) for case in batch))
    for batch in (batches[0], longest, batches[-1]):
        _answers(runner, batch, stop, setting, warm_up, pad)
    return warm_up.error


def _answers(
    runner: Runner,
    batch: Sequence[Case],
    stop: StopCriteria,
    setting: Setting,
    score: Score,
    pad: int,
) -> list[list[int]]:
    """One contestant's answers to a batch; none once it has failed."""
    if score.error is not None:
        return []
    tokens_BT, mask_BT = _padded(batch, pad)
    try:
        with _measured(runner.device, score):
            answers = runner.answer(tokens_BT, mask_BT, stop, setting, score)
    except Exception as error:  # whatever it is, it is this contestant's alone
        score.error = f"{type(error).__name__}: {str(error).strip()[:500]}"
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()
        return []
    score.prompts += len(batch)
    return answers


@contextmanager
def _measured(device: torch.device, score: Score) -> Iterator[None]:
    """Add time and memory of what happens inside."""
    _wait(device)
    start = _restart_peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    _wait(device)
    score.seconds += time.perf_counter() - wall
    score.cpu_seconds += time.process_time() - cpu
    most = _memory(device, peak=True)
    score.peak = _larger(score.peak, most)
    if most is not None and start is not None:
        score.working = _larger(score.working, most - start)


def _padded(batch: Sequence[Case], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, as `generate` wants them, and their mask."""
    longest = max(len(case.tokens) for case in batch)
    tokens_BT = torch.full((len(batch), longest), pad)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, case in enumerate(batch):
        tokens_BT[row, longest - len(case.tokens) :] = torch.tensor(case.tokens)
        mask_BT[row, longest - len(case.tokens) :] = 1
    return tokens_BT, mask_BT


def _compare(
    target: Target,
    runners: Mapping[str, Runner],
    batch: Sequence[Case],
    setting: Setting,
    results: Results,
) -> None:
    """Hold the last answers of all against the plain ones."""
    scores = results.scores
    if PLAIN not in scores or scores[PLAIN].error is not None:
        return
    for name, runner in runners.items():
        same_draws = runner.ours or setting.temperature == 0
        if name == PLAIN or scores[name].error is not None or not same_draws:
            continue
        expected, given = (results.answers[one][-len(batch) :] for one in (PLAIN, name))
        for row, (case, right, answer) in enumerate(zip(batch, expected, given, strict=True)):
            scores[name].compared += 1
            scores[name].identical += answer == right
            if answer != right:
                place = first_difference(answer, right)
                margin = _margin(target, [*case.tokens, *right[:place]], setting, row)
                scores[name].differences.append(Difference(case.id, place, margin))


def _margin(target: Target, ids: list[int], setting: Setting, row: int) -> float:
    """How far the likeliest two draws behind a text lie apart, sampling noise included."""
    sampler = Sampler.of(SamplingParams(temperature=setting.temperature, seed=setting.seed))
    seen = target.forward(torch.tensor([ids], device=target.device), logits=False)
    with torch.no_grad():
        scores_1V = sampler.scores(target.unembed(seen.lm_head_input_BTD[:, -1]), [], [row])
    if sampler.sample:
        scores_1V = scores_1V + sampler.noise([row], [len(ids)], scores_1V)
    best, second = scores_1V[0].topk(2).values.tolist()
    return float(best - second)


def _restart_peak(device: torch.device) -> int | None:
    """Forget the peak so far; the bytes in memory now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif TOLD:
        CLEAR.write_text(RESTART_PEAK)
    return _memory(device, peak=False)


def _memory(device: torch.device, *, peak: bool) -> int | None:
    """Bytes in memory, now or at the peak: of the process, or of torch on an accelerator. None
    where the system does not tell it so that a peak can be started anew."""
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return int(memory(device))
    if not TOLD:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _ended(tokens: list[int], stop: StopCriteria) -> list[int]:
    """An answer without what pads it behind its end."""
    ends = (place for place, token in enumerate(tokens) if token in stop.eos)
    return tokens[: next(ends, len(tokens)) + 1]
