"""Answer files: what counts as answered, and what a later run may add."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chat_model import save

from headstart.inference.config import SamplingParams
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.scripts.commands.generate_data import write_responses
from headstart.scripts.options.prompts import read_prompts

SHORT = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(folder)


def prompt_file(path: Path, *texts: str) -> str:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def asked(out: Path) -> set[str]:
    lines = out.read_text().splitlines()
    return {json.loads(line)["messages"][0]["content"] for line in lines}


def test_prompts_without_ids_of_several_files_are_all_answered(target, tmp_path):
    out = tmp_path / "answers.jsonl"
    for name, texts in (("a", ("alpha", "beta")), ("b", ("gamma", "delta", "beta"))):
        prompts, _ = read_prompts([prompt_file(tmp_path / name, *texts)])
        write_responses(target, prompts, SHORT, out, batch_size=2)
    assert asked(out) == {"alpha", "beta", "gamma", "delta"}
    assert len(out.read_text().splitlines()) == 4


def test_a_prompt_that_comes_twice_is_asked_once_and_noted(tmp_path):
    prompts, left_out = read_prompts([prompt_file(tmp_path / "p", "same", "same", "other")])
    assert len(prompts) == 2 and "p.jsonl:2" in left_out[0]


def test_after_the_time_no_batch_is_begun(target, tmp_path):
    prompts, _ = read_prompts([prompt_file(tmp_path / "p", *"abcdefgh")])
    out = tmp_path / "answers.jsonl"
    assert write_responses(target, prompts, SHORT, out, batch_size=3, seconds=0) == 3
    assert write_responses(target, prompts, SHORT, out, batch_size=3) == 8


def test_the_same_weights_elsewhere_go_on_and_others_do_not(target, folder, tmp_path):
    prompts, _ = read_prompts([prompt_file(tmp_path / "p", "one", "two")])
    out = tmp_path / "answers.jsonl"
    write_responses(target, prompts[:1], SHORT, out, batch_size=1)
    moved = load_target(shutil.copytree(folder, tmp_path / "moved"))
    assert write_responses(moved, prompts, SHORT, out, batch_size=1) == 2
    other = load_target(save(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="other settings"):
        write_responses(other, prompts, SHORT, out, batch_size=1)


def test_two_files_of_one_stem_keep_their_own_settings(target, tmp_path):
    prompts, _ = read_prompts([prompt_file(tmp_path / "p", "one")])
    longer = SamplingParams(max_new_tokens=6)
    write_responses(target, prompts, SHORT, tmp_path / "data.train", batch_size=1)
    write_responses(target, prompts, longer, tmp_path / "data.val", batch_size=1)
    assert write_responses(target, prompts, SHORT, tmp_path / "data.train", batch_size=1) == 1


def test_a_broken_line_among_the_answers_is_named(target, tmp_path):
    prompts, _ = read_prompts([prompt_file(tmp_path / "p", "one", "two")])
    out = tmp_path / "answers.jsonl"
    write_responses(target, prompts[:1], SHORT, out, batch_size=1)
    out.write_text("{oops\n" + out.read_text())
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 is no response"):
        write_responses(target, prompts, SHORT, out, batch_size=1)


@pytest.mark.parametrize("message", ["hi", {"role": "user"}, {"role": 1, "content": "x"}])
def test_messages_of_another_form_are_named(tmp_path, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": [message]}) + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:1 has a message"):
        read_prompts([str(path)])
