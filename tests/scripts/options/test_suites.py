"""Suites of prompts: files, data sets, and prompts filled up to a length."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_fixtures import Opened, Suites

from headstart.scripts.options.suites import Suite, make_cases, read_suite, read_suites


def test_a_column_is_text_or_turns(suites: Suites, tmp_path: Path) -> None:
    file, data = suites
    assert read_suite(f"{data}:question", 2).prompts[1].turns == ("what is 1 + 1?",)
    assert read_suite(f"{file}:turns").prompts[0].turns == ("tell ab", "more")
    assert read_suite(f"{data / 'test.jsonl'}:question").prompts[4].id == "test/5"
    assert read_suite("dev").prompts
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "data.jsonl").write_text('{"prompt": "hello"}\n')  # no split called test
    assert read_suite(str(tmp_path / "s")).prompts[0].turns == ("hello",)


def test_suites_that_cannot_be_read(suites: Suites, tmp_path: Path) -> None:
    file, data = suites
    with pytest.raises(ValueError, match=r"no column 'q'.*question, answer"):
        read_suite(f"{data}:q")
    with pytest.raises(ValueError, match="sums:COLUMN"):
        read_suite(str(data))
    with pytest.raises(ValueError, match="Two suites are called talk"):
        read_suites([str(file), str(file)], None)
    (odd := tmp_path / "odd.jsonl").write_text('{"n": 3}\n')
    with pytest.raises(ValueError, match=r"odd.jsonl:1: the column 'n'.*got 3"):
        read_suite(f"{odd}:n")
    with pytest.raises(ValueError, match="Cannot open the suite"):
        read_suite(f"{tmp_path / 'nowhere'}:prompt")


def test_context_fills_prompts_up(opened: Opened, suites: Suites) -> None:
    target, _ = opened
    suite = read_suite(str(suites[0]))
    (as_they_are, _), (filled, left) = (
        make_cases(suite, target, context=size, max_new_tokens=16) for size in (None, 200)
    )
    assert left == 0 and max(len(case.tokens) for case in as_they_are) < 100
    for before, after in zip(as_they_are, filled, strict=True):
        assert before.id == after.id and abs(len(after.tokens) - 200) < 8
        asked = target.text(before.tokens).removeprefix("user\n")
        assert target.text(after.tokens).endswith(asked)
    assert len({case.tokens[:60] for case in filled}) == len(filled)  # other text each
    assert make_cases(suite, target, context=10, max_new_tokens=16)[0] == as_they_are


def test_prompts_without_room(opened: Opened, suites: Suites) -> None:
    target, _ = opened
    suite = read_suite(str(suites[0]))
    everything, _ = make_cases(suite, target, context=None, max_new_tokens=1)
    second = sorted(len(case.tokens) for case in everything)[1]
    cases, left = make_cases(suite, target, context=None, max_new_tokens=512 - second)
    assert (len(cases), left) == (2, 3)
    with pytest.raises(ValueError, match="room for 512 new tokens"):
        make_cases(Suite("talk", suite.prompts), target, context=None, max_new_tokens=512)
