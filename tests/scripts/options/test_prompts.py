"""The prompts that ship with the project: enough, diverse, and kept apart."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from headstart.inference.rollout import Prompt
from headstart.scripts.options.prompts import read_prompts, shipped_prompts

FILES = {"train": 400, "dev": 12, "heldout": 48}  # at least so many prompts
KINDS = {"chat", "code", "reasoning", "summary", "rewrite", "creative", "plan", "language"}


def prompts(name: str) -> list[Prompt]:
    return read_prompts([str(shipped_prompts(name))])[0]


def words(prompt: Prompt) -> str:
    return " ".join(prompt.turns[0].lower().split())


@pytest.mark.parametrize("name", FILES)
def test_enough_of_every_kind(name: str) -> None:
    found = prompts(name)
    assert len(found) >= FILES[name]
    assert {prompt.source for prompt in found} == KINDS
    assert max(Counter(map(words, found)).values()) == 1


@pytest.mark.parametrize("name", FILES)
def test_the_first_ones_are_as_diverse_as_all(name: str) -> None:
    """Commands with a limit take the first ones."""
    first = {prompt.source for prompt in prompts(name)[:12]}
    assert len(first) >= 6


@pytest.mark.parametrize(("one", "other"), combinations(FILES, 2))
def test_what_is_measured_on_was_neither_trained_nor_chosen_on(one: str, other: str) -> None:
    assert not set(map(words, prompts(one))) & set(map(words, prompts(other)))
    assert not {prompt.id for prompt in prompts(one)} & {prompt.id for prompt in prompts(other)}
